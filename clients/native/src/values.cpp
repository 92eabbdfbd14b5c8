#include "values.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "npy.h"
#include "refusal.h"

namespace lola {
namespace {

using nlohmann::json;

constexpr char kValues[] = "values";
constexpr std::size_t kMostChunks = 1 << 20;

// Takes the bytes of a .npy file as they come, and puts its values into the inputs.
class Scattered {
 public:
  Scattered(const Manifest& manifest, std::vector<std::vector<unsigned char>>& inputs)
      : manifest_(manifest), inputs_(inputs), order_(manifest.in_order_of_names()) {
    for (const std::size_t i : order_) {
      total_bytes_ += inputs[i].size();
    }
  }

  void add(const std::string& bytes) {
    std::size_t taken = 0;
    if (!is_header_read_) {
      const std::size_t before = header_.size();
      header_ += bytes.substr(0, kLargestNpyHeader);
      const auto header = read_npy_header(header_.data(), header_.size());
      if (!header) {
        return;
      }
      const std::vector<int64_t> expected{static_cast<int64_t>(total_bytes_ / sizeof(float))};
      if (header->array.dtype != "<f4" || header->array.shape != expected) {
        throw Refusal(
            "An array of " + header->array.dtype + python_shape(header->array.shape) +
            " received; the values of '" + manifest_.model + "' are <f4" +
            python_shape(expected) + ". Use the same model on server and device.");
      }
      is_header_read_ = true;
      taken = header->num_bytes - before;
    }
    while (taken < bytes.size()) {
      if (next_ == order_.size()) {
        throw Refusal("More bytes were received than the array of values has.");
      }
      std::vector<unsigned char>& input = inputs_[order_[next_]];
      const std::size_t count = std::min(bytes.size() - taken, input.size() - place_);
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(taken), count,
                  input.begin() + static_cast<std::ptrdiff_t>(place_));
      taken += count;
      place_ += count;
      if (place_ == input.size()) {
        ++next_;
        place_ = 0;
      }
    }
  }

  void finish() const {
    if (!is_header_read_ || next_ != order_.size()) {
      throw Refusal("The array of values ended too early.");
    }
  }

 private:
  const Manifest& manifest_;
  std::vector<std::vector<unsigned char>>& inputs_;
  const std::vector<std::size_t> order_;
  std::size_t total_bytes_ = 0;
  std::string header_;
  bool is_header_read_ = false;
  std::size_t next_ = 0; // value that is filled, in order
  std::size_t place_ = 0; // bytes of it that are there
};

std::vector<std::string> chunks_of(const Object& array) {
  const json found = json::parse(array.body, nullptr, /*allow_exceptions=*/false);
  const json places =
      found.is_object() ? found.value("arraychunk_ids", json()) : json();
  if (array.type != "Array" || !places.is_array() || places.size() > kMostChunks ||
      found.value("stype", json()) != "numpy.ndarray") {
    throw Refusal("The values are in no array of numpy's.");
  }
  std::vector<std::string> chunks;
  for (const json& place : places) {
    if (!place.is_number_unsigned() || place.get<uint64_t>() >= array.children.size()) {
      throw Refusal("An array names a chunk that it does not have.");
    }
    chunks.push_back(array.children[place.get<std::size_t>()]);
  }
  return chunks;
}

} // namespace

void fetch_values(
    const Object& record,
    const std::function<Object(const std::string& id)>& fetch,
    const Manifest& manifest,
    std::vector<std::vector<unsigned char>>& inputs) {
  const auto refs = read_refs(record.body);
  if (refs.size() != 1 || refs.front().first != kValues) {
    throw Refusal(
        "The server sends arrays by name, and this device takes them in one array; have "
        "the server be made with its model, not with a project's arrays.");
  }
  Scattered values(manifest, inputs);
  for (const std::string& id : chunks_of(fetch(refs.front().second))) {
    const Object chunk = fetch(id);
    if (chunk.type != "ArrayChunk") {
      throw Refusal("An array consists of something else than chunks.");
    }
    values.add(chunk.body);
  }
  values.finish();
}

} // namespace lola
