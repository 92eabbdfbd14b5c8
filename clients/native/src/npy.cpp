#include "npy.h"

#include <algorithm>
#include <cstring>
#include <regex>

#include "refusal.h"

namespace lola {
namespace {

constexpr char kMagic[] = "\x93NUMPY\x01\x00";
constexpr std::size_t kMagicBytes = 8;
constexpr std::size_t kPrefixBytes = 10; // and the header's length
constexpr std::size_t kAligned = 64;
constexpr std::size_t kRoomForDigits = 21; // so that an array can grow in its file
// Far more than an array has, and no number that overflows.
constexpr std::size_t kMostDigits = 15;

[[noreturn]] void refuse() {
  throw Refusal("This is no array in .npy format 1.0, as numpy.save writes it, of rows.");
}

} // namespace

std::optional<NpyHeader> read_npy_header(const char* data, std::size_t count) {
  if (std::memcmp(data, kMagic, std::min(count, kMagicBytes)) != 0) {
    refuse();
  }
  if (count < kPrefixBytes) {
    return std::nullopt;
  }
  const std::size_t length = kPrefixBytes + static_cast<unsigned char>(data[8]) +
      (static_cast<std::size_t>(static_cast<unsigned char>(data[9])) << 8);
  if (length > kLargestNpyHeader) {
    refuse();
  }
  if (count < length) {
    return std::nullopt;
  }
  static const std::regex kHeader(
      "\\{'descr': '([<|][a-z][0-9]{1,2})', 'fortran_order': (True|False), "
      "'shape': \\(((?:[0-9]+, ?)*[0-9]*)\\), \\} *\n");
  const std::string text(data + kPrefixBytes, length - kPrefixBytes);
  std::smatch found;
  if (!std::regex_match(text, found, kHeader)) {
    refuse();
  }
  NpyHeader header{length, {"", {}, found[1]}};
  const std::string sizes = found[3];
  static const std::regex kNumber("[0-9]+");
  for (std::sregex_iterator each(sizes.begin(), sizes.end(), kNumber), end; each != end;
       ++each) {
    if (each->str().size() > kMostDigits) {
      refuse();
    }
    header.array.shape.push_back(std::stoll(each->str()));
  }
  if (found[2] == "True" && header.array.shape.size() > 1) {
    refuse();
  }
  header.array.num_bytes(); // refuses types and shapes that no program has
  return header;
}

std::string python_shape(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) {
    text += std::to_string(size) + ", ";
  }
  if (shape.size() > 1) {
    text.resize(text.size() - 2);
  } else if (!text.empty()) {
    text.resize(text.size() - 1);
  }
  return "(" + text + ")";
}

std::string npy_header(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': " +
      python_shape(shape) + ", }";
  if (!shape.empty()) {
    text.append(kRoomForDigits - std::to_string(shape.front()).size(), ' ');
  }
  const std::size_t length = kPrefixBytes + text.size() + 1;
  text.append(kAligned - length % kAligned, ' ');
  text += '\n';
  std::string header(kMagic, kMagicBytes);
  header += static_cast<char>(text.size() & 255);
  header += static_cast<char>(text.size() >> 8 & 255);
  return header + text;
}

} // namespace lola
