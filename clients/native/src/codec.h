// What a gradient travels in.
#pragma once

#include <string>
#include <vector>

#include "frames.h"

namespace lola {

struct Encoded {
  std::string dtype_name; // as numpy calls it: "float32"
  int64_t count;
  std::string npy_bytes; // as numpy.save writes it
};

// Throw Refusal if this device does not have that codec.
void check_codec(const std::string& name);

// Encode gradients as one array, in the order of their names.
Encoded encode(const std::string& codec, std::vector<Outgoing> gradients);

} // namespace lola
