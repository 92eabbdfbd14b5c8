// NumPy's .npy format, version 1.0, of arrays in C's order; read without trust.
#pragma once

#include <optional>
#include <string>

#include "manifest.h"

namespace lola {

// Most bytes that a header has, in what this program reads.
constexpr std::size_t kLargestNpyHeader = 1024;

struct NpyHeader {
  std::size_t num_bytes; // of the header, in front of the values
  ArraySpec array; // without a name
};

// Read a header from the first bytes; nothing if there are too few yet. Throw Refusal
// if it is none, or of what this program does not read.
std::optional<NpyHeader> read_npy_header(const char* data, std::size_t count);

// Write a shape as Python writes a tuple.
std::string python_shape(const std::vector<int64_t>& shape);

// Return the header that numpy.save writes.
std::string npy_header(const std::string& dtype, const std::vector<int64_t>& shape);

} // namespace lola
