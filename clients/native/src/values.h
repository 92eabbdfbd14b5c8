// The values that a device is sent, put where a program takes them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "manifest.h"
#include "objects.h"

namespace lola {

// Fetch the one array of values that an ArrayRecord names, chunk by chunk, into the
// inputs of a program. Throw Refusal if it is of another model.
void fetch_values(
    const Object& record,
    const std::function<Object(const std::string& id)>& fetch,
    const Manifest& manifest,
    std::vector<std::vector<unsigned char>>& inputs);

} // namespace lola
