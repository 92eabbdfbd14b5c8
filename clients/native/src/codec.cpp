#include "codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "npy.h"
#include "refusal.h"

namespace lola {
namespace {

constexpr char kFp32[] = "fp32";
constexpr char kBf16[] = "bf16";

// To nearest, ties to even; all that is no number is one.
uint16_t bfloat16(float value) {
  if (std::isnan(value)) {
    return 0x7FC0;
  }
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0x7FFFu + (bits >> 16 & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

} // namespace

void check_codec(const std::string& name) {
  if (name != kFp32 && name != kBf16) {
    throw Refusal(
        "codec='" + name.substr(0, 32) + "' is not among those of this device, fp32 and "
        "bf16; have the run use one of these.");
  }
}

Encoded encode(const std::string& codec, std::vector<Outgoing> gradients) {
  check_codec(codec);
  std::sort(gradients.begin(), gradients.end(), [](const Outgoing& one, const Outgoing& other) {
    return one.spec.name < other.spec.name;
  });
  std::size_t bytes = 0;
  for (const Outgoing& gradient : gradients) {
    bytes += gradient.spec.num_bytes();
  }
  const std::size_t count = bytes / sizeof(float);
  const bool is_short = codec == kBf16;
  Encoded encoded{
      is_short ? "uint16" : "float32",
      static_cast<int64_t>(count),
      npy_header(is_short ? "<u2" : "<f4", {static_cast<int64_t>(count)})};
  encoded.npy_bytes.reserve(encoded.npy_bytes.size() + bytes);
  for (const Outgoing& gradient : gradients) {
    const auto* data = static_cast<const char*>(gradient.data);
    if (!is_short) {
      encoded.npy_bytes.append(data, gradient.spec.num_bytes());
      continue;
    }
    for (std::size_t at = 0; at < gradient.spec.num_bytes(); at += sizeof(float)) {
      float value = 0;
      std::memcpy(&value, data + at, sizeof value);
      const uint16_t rounded = bfloat16(value);
      encoded.npy_bytes.append(reinterpret_cast<const char*>(&rounded), sizeof rounded);
    }
  }
  return encoded;
}

} // namespace lola
