#include "examples.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "npy.h"
#include "refusal.h"

namespace lola {
namespace {

constexpr char kLabels[] = "labels";
// The label that the losses of transformers leave out of their mean.
constexpr double kIgnored = -100;

template <typename Type>
void fill_as(unsigned char* place, std::size_t count, double value) {
  const auto typed = static_cast<Type>(value);
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(place + i * sizeof(Type), &typed, sizeof(Type));
  }
}

void fill(unsigned char* place, std::size_t count, const std::string& dtype, double value) {
  if (dtype == "<f4") {
    fill_as<float>(place, count, value);
  } else if (dtype == "<f8") {
    fill_as<double>(place, count, value);
  } else if (dtype == "<i4") {
    fill_as<int32_t>(place, count, value);
  } else if (dtype == "<i8") {
    fill_as<int64_t>(place, count, value);
  } else {
    fill_as<bool>(place, count, value);
  }
}

std::string described(const std::string& dtype, const std::vector<int64_t>& shape) {
  return dtype + python_shape(shape);
}

// Labels of whole numbers alone can say that they do not count.
bool is_ignored(const unsigned char* place, const std::string& dtype) {
  int64_t value = 0;
  if (dtype == "<i8") {
    std::memcpy(&value, place, sizeof value);
  } else if (dtype == "<i4") {
    int32_t half = 0;
    std::memcpy(&half, place, sizeof half);
    value = half;
  }
  return value == static_cast<int64_t>(kIgnored);
}

} // namespace

struct Examples::File {
  std::shared_ptr<const unsigned char> rows;
  std::size_t row_bytes = 0;
  std::size_t num_rows = 0;
};

namespace {

using Mapped = std::pair<std::shared_ptr<const unsigned char>, std::size_t>;

Mapped mapped(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (descriptor < 0 || fstat(descriptor, &status) != 0 || status.st_size <= 0) {
    if (descriptor >= 0) {
      close(descriptor);
    }
    throw Refusal(
        path + " cannot be read; write one array for each argument of the model, with "
        "numpy.save.");
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  void* const place = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (place == MAP_FAILED) {
    throw Refusal(path + " cannot be mapped (" + std::strerror(errno) + ").");
  }
  return {
      {static_cast<const unsigned char*>(place),
       [size](const unsigned char* mine) { munmap(const_cast<unsigned char*>(mine), size); }},
      size};
}

// Throw Refusal if rows of that array do not fit an input, filled up where they may be.
void check_fits(
    const std::string& path, const ArraySpec& found, std::size_t input, const Manifest& manifest) {
  const ArraySpec& spec = manifest.inputs[manifest.num_values() + input];
  bool fits = found.dtype == spec.dtype && found.shape.size() == spec.shape.size() &&
      !found.shape.empty() && found.shape[0] > 0;
  for (std::size_t axis = 1; fits && axis < spec.shape.size(); ++axis) {
    const bool may_be_shorter = axis == 1 && manifest.fills[input].has_value();
    fits = found.shape[axis] == spec.shape[axis] ||
        (may_be_shorter && found.shape[axis] < spec.shape[axis] && found.shape[axis] > 0);
  }
  if (!fits) {
    throw Refusal(
        path + " is " + described(found.dtype, found.shape) + ", and the programs take " +
        described(spec.dtype, spec.shape) + " or less; write such rows, or export for these.");
  }
  if (found.shape.size() > 1 && found.shape[1] != spec.shape[1] &&
      !manifest.takes_fewer_tokens) {
    throw Refusal(
        path + " has sequences of " + std::to_string(found.shape[1]) +
        " tokens, which are shorter than the programs', and padding changes what this "
        "model computes; give sequences of " +
        std::to_string(spec.shape[1]) + " tokens.");
  }
}

// Throw Refusal if so many examples are no batch.
void check_fills_up(std::size_t count, const Manifest& manifest) {
  const auto room = static_cast<std::size_t>(manifest.batch_size);
  if (count < room && !manifest.takes_fewer_examples) {
    throw Refusal(
        "A batch has " + std::to_string(count) + " examples, and the program takes " +
        std::to_string(room) +
        ": this model's loss does not leave out what has no label; give whole batches.");
  }
}

} // namespace

uint64_t mix(uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

Examples::Examples(
    const std::string& directory,
    const Manifest& manifest,
    uint64_t seed,
    MeanOver mean_over)
    : manifest_(manifest), seed_(seed), mean_over_(mean_over) {
  for (std::size_t i = 0; i < manifest.fills.size(); ++i) {
    const ArraySpec& spec = manifest.inputs[manifest.num_values() + i];
    if (std::filesystem::path(spec.name).filename() != spec.name) {
      throw Refusal("'" + spec.name + "' is no name of a file.");
    }
    const std::string path =
        (std::filesystem::path(directory) / (spec.name + ".npy")).string();
    const auto [bytes, size] = mapped(path);
    const auto header = read_npy_header(
        reinterpret_cast<const char*>(bytes.get()), std::min(size, kLargestNpyHeader));
    if (!header || header->array.num_bytes() != size - header->num_bytes) {
      throw Refusal(path + " is no whole array; write it with numpy.save.");
    }
    check_fits(path, header->array, i, manifest);
    const auto rows = static_cast<std::size_t>(header->array.shape[0]);
    files_.push_back(
        {{bytes, bytes.get() + header->num_bytes}, header->array.num_bytes() / rows, rows});
    if (rows != files_.front().num_rows) {
      throw Refusal(
          path + " has " + std::to_string(rows) + " examples, and another file " +
          std::to_string(files_.front().num_rows) + "; each row of each is an example.");
    }
  }
  if (files_.empty()) {
    throw Refusal("The programs take no batch; export anew.");
  }
  num_examples_ = files_.front().num_rows;
  // No batch is ever larger.
  check_fills_up(num_examples_, manifest);
}

Examples::~Examples() = default;

std::vector<std::size_t> Examples::chosen(uint64_t server_round, std::size_t count) const {
  const uint64_t key = mix(mix(seed_) ^ server_round);
  std::vector<std::pair<uint64_t, std::size_t>> numbers(num_examples_);
  for (std::size_t i = 0; i < num_examples_; ++i) {
    numbers[i] = {mix(key + i), i};
  }
  const auto end = numbers.begin() + static_cast<std::ptrdiff_t>(count);
  std::partial_sort(numbers.begin(), end, numbers.end());
  std::vector<std::size_t> rows;
  std::transform(numbers.begin(), end, std::back_inserter(rows), [](const auto& each) {
    return each.second;
  });
  return rows;
}

int64_t Examples::draw(
    int64_t server_round,
    int64_t batch_size,
    std::vector<std::vector<unsigned char>>& inputs) const {
  const auto room = static_cast<std::size_t>(manifest_.batch_size);
  const std::size_t count = std::min(static_cast<std::size_t>(batch_size), num_examples_);
  if (batch_size < 1 || count > room) {
    throw Refusal(
        "The server asks for batches of " + std::to_string(batch_size) +
        " examples, and the programs take " + std::to_string(room) +
        "; export with --batch-size " + std::to_string(batch_size) + ".");
  }
  check_fills_up(count, manifest_);
  const std::vector<std::size_t> rows = chosen(static_cast<uint64_t>(server_round), count);
  int64_t learned_tokens = 0;
  for (std::size_t i = 0; i < files_.size(); ++i) {
    const File& file = files_[i];
    const ArraySpec& spec = manifest_.inputs[manifest_.num_values() + i];
    std::vector<unsigned char>& input = inputs[manifest_.num_values() + i];
    const std::size_t item = item_bytes(spec.dtype);
    const std::size_t row_bytes = input.size() / room;
    for (std::size_t place = 0; place < room; ++place) {
      unsigned char* const row = input.data() + place * row_bytes;
      std::memcpy(
          row, file.rows.get() + rows[std::min(place, count - 1)] * file.row_bytes, file.row_bytes);
      fill(
          row + file.row_bytes,
          (row_bytes - file.row_bytes) / item,
          spec.dtype,
          manifest_.fills[i].value_or(0));
      if (spec.name == kLabels && place >= count) {
        fill(row, row_bytes / item, spec.dtype, kIgnored);
      }
      // The first token of a sequence is nobody's next one.
      const std::size_t first = mean_over_ == MeanOver::kNextTokens ? item : 0;
      for (std::size_t at = first; spec.name == kLabels && at < row_bytes; at += item) {
        learned_tokens += is_ignored(row + at, spec.dtype) ? 0 : 1;
      }
    }
  }
  const int64_t weight =
      mean_over_ == MeanOver::kExamples ? static_cast<int64_t>(count) : learned_tokens;
  if (weight == 0) {
    throw Refusal(
        "The loss of a mini-batch is a mean over nothing: no token of it has a label; "
        "give it examples that have.");
  }
  return weight;
}

} // namespace lola
