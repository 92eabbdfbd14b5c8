#include "memory.h"

#include <sys/resource.h>

#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace lola {
namespace {

std::optional<double> bytes_in(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    double kilobytes = 0;
    if (word == key && file >> kilobytes) {
      return 1024 * kilobytes;
    }
  }
  return std::nullopt;
}

} // namespace

double peak_memory_bytes() {
  // Of this program alone: what getrusage tells begins with what its parent had.
  if (const auto found = bytes_in("/proc/self/status", "VmHWM:")) {
    return *found;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return 1024 * static_cast<double>(usage.ru_maxrss);
}

double available_memory_bytes() {
  return bytes_in("/proc/meminfo", "MemAvailable:")
      .value_or(std::numeric_limits<double>::infinity());
}

} // namespace lola
