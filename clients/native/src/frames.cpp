#include "frames.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "refusal.h"

namespace lola {
namespace {

using nlohmann::json;

constexpr std::array<unsigned char, 4> kMagic = {'L', 'O', 'L', 'A'};
constexpr unsigned kVersion = 3;
constexpr std::size_t kPrefixBytes = 10;
constexpr std::size_t kLargestHeaderBytes = std::size_t{16} << 20;

// Return whether all bytes came; false where nothing came at all.
bool read_all(int descriptor, void* data, std::size_t count) {
  auto* place = static_cast<unsigned char*>(data);
  std::size_t done = 0;
  while (done < count) {
    const ssize_t got = ::read(descriptor, place + done, count - done);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got < 0) {
      throw LinkError(std::string("The other end is gone (") + std::strerror(errno) + ").");
    }
    if (got == 0 && done == 0) {
      return false;
    }
    if (got == 0) {
      throw LinkError("The other end is gone in the middle of a frame.");
    }
    done += static_cast<std::size_t>(got);
  }
  return true;
}

void write_all(int descriptor, const void* data, std::size_t count) {
  const auto* place = static_cast<const unsigned char*>(data);
  while (count > 0) {
    const ssize_t put = ::write(descriptor, place, count);
    if (put < 0 && errno == EINTR) {
      continue;
    }
    if (put < 0) {
      throw LinkError(std::string("The other end is gone (") + std::strerror(errno) + ").");
    }
    place += put;
    count -= static_cast<std::size_t>(put);
  }
}

unsigned big_endian(const unsigned char* place, int count) {
  unsigned value = 0;
  for (int i = 0; i < count; ++i) {
    value = value << 8 | place[i];
  }
  return value;
}

} // namespace

bool read_header(int descriptor, Header& header) {
  std::array<unsigned char, kPrefixBytes> prefix{};
  if (!read_all(descriptor, prefix.data(), prefix.size())) {
    return false;
  }
  const unsigned version = big_endian(prefix.data() + 4, 2);
  const std::size_t length = big_endian(prefix.data() + 6, 4);
  if (!std::equal(kMagic.begin(), kMagic.end(), prefix.begin()) ||
      length > kLargestHeaderBytes) {
    throw LinkError("The other end does not speak the worker's protocol.");
  }
  if (version != kVersion) {
    throw LinkError(
        "The other end speaks version " + std::to_string(version) +
        " of the worker's protocol, this one " + std::to_string(kVersion) + ".");
  }
  std::string text(length, '\0');
  read_bytes(descriptor, text.data(), length);
  try {
    const json found = json::parse(text);
    header.kind = found.at("kind").get<std::string>();
    header.values = found.at("header");
    header.arrays.clear();
    for (const json& listed : found.at("arrays")) {
      header.arrays.push_back(
          {listed.at(0).get<std::string>(),
           listed.at(2).get<std::vector<int64_t>>(),
           listed.at(1).get<std::string>()});
      header.arrays.back().num_bytes();
    }
  } catch (const json::exception& error) {
    throw LinkError(std::string("Malformed header (") + error.what() + ").");
  } catch (const Refusal& error) {
    throw LinkError(std::string("Malformed header (") + error.what() + ").");
  }
  return true;
}

void read_bytes(int descriptor, void* data, std::size_t count) {
  if (count > 0 && !read_all(descriptor, data, count)) {
    throw LinkError("The other end is gone in the middle of a frame.");
  }
}

void skip_bytes(int descriptor, std::size_t count) {
  std::array<unsigned char, 1 << 16> unwanted;
  while (count > 0) {
    const std::size_t part = std::min(count, unwanted.size());
    read_bytes(descriptor, unwanted.data(), part);
    count -= part;
  }
}

void write_frame(
    int descriptor,
    const std::string& kind,
    const json& values,
    const std::vector<Outgoing>& arrays) {
  json listed = json::array();
  for (const Outgoing& array : arrays) {
    listed.push_back({array.spec.name, array.spec.dtype, array.spec.shape});
  }
  const std::string text =
      json({{"kind", kind}, {"header", values}, {"arrays", listed}}).dump();
  std::array<unsigned char, kPrefixBytes> prefix{};
  std::copy(kMagic.begin(), kMagic.end(), prefix.begin());
  prefix[4] = kVersion >> 8;
  prefix[5] = kVersion & 255;
  for (int i = 0; i < 4; ++i) {
    prefix[static_cast<std::size_t>(6 + i)] =
        static_cast<unsigned char>(text.size() >> (8 * (3 - i)) & 255);
  }
  write_all(descriptor, prefix.data(), prefix.size());
  write_all(descriptor, text.data(), text.size());
  for (const Outgoing& array : arrays) {
    write_all(descriptor, array.data, array.spec.num_bytes());
  }
}

} // namespace lola
