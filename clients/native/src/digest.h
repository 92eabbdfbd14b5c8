#pragma once

#include <string>

namespace lola {

// Return the SHA-256 of a file, in hexadecimal; throw Refusal if it cannot be read.
std::string sha256_of(const std::string& path);

} // namespace lola
