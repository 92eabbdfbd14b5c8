#include "objects.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "digest.h"
#include "refusal.h"

namespace lola {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr std::size_t kIdLength = 64;
// As Flower's own: FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE.
constexpr std::size_t kChunkBytes = 5242880;

bool is_id(const std::string& text) {
  return text.size() == kIdLength &&
      text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

[[noreturn]] void refuse(const std::string& id) {
  throw Refusal("The server's object " + id + " is not what its name says.");
}

std::string quoted(const std::string& text) {
  return json(text).dump(-1, ' ', /*ensure_ascii=*/true);
}

} // namespace

Object read_object(const std::string& id, std::string content) {
  const std::size_t end = content.find('\0');
  const std::size_t first = content.find(' ');
  if (end == std::string::npos || first >= end || sha256_of(content) != id) {
    refuse(id);
  }
  const std::size_t second = content.find(' ', first + 1);
  if (second >= end ||
      content.substr(second + 1, end - second - 1) !=
          std::to_string(content.size() - end - 1)) {
    refuse(id);
  }
  Object object;
  object.type = content.substr(0, first);
  for (std::size_t place = first + 1; place < second; place += kIdLength + 1) {
    object.children.push_back(content.substr(place, std::min(kIdLength, second - place)));
    const std::size_t behind = place + kIdLength;
    if (!is_id(object.children.back()) || (behind < second && content[behind] != ',')) {
      refuse(id);
    }
  }
  content.erase(0, end + 1);
  object.body = std::move(content);
  return object;
}

Tree make_tree(
    const std::string& type, const std::string& body, std::vector<Tree> children) {
  Tree tree;
  for (Tree& child : children) {
    const bool is_there = std::any_of(
        tree.children.begin(), tree.children.end(), [&](const Tree& other) {
          return other.id == child.id;
        });
    if (!is_there) {
      tree.children.push_back(std::move(child));
    }
  }
  std::string head = type + " ";
  for (const Tree& child : tree.children) {
    head += (&child == &tree.children.front() ? "" : ",") + child.id;
  }
  tree.content = head + " " + std::to_string(body.size());
  tree.content += '\0';
  tree.content += body;
  tree.id = sha256_of(tree.content);
  return tree;
}

std::string python_json(const std::vector<std::pair<std::string, std::string>>& refs) {
  std::string text;
  for (const auto& [name, id] : refs) {
    text += (text.empty() ? "" : ", ") + quoted(name) + ": " + quoted(id);
  }
  return "{" + text + "}";
}

std::vector<std::pair<std::string, std::string>> read_refs(const std::string& text) {
  const auto found = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!found.is_object()) {
    throw Refusal("The server's record is no dictionary in JSON.");
  }
  std::vector<std::pair<std::string, std::string>> refs;
  for (const auto& [name, id] : found.items()) {
    if (!id.is_string() || !is_id(id.get<std::string>())) {
      throw Refusal("The server's record does not name objects.");
    }
    refs.emplace_back(name, id.get<std::string>());
  }
  return refs;
}

Tree array_tree(
    const std::string& dtype_name, int64_t count, const std::string& npy_bytes) {
  std::vector<Tree> chunks;
  std::vector<std::string> ids; // of the chunks, each once
  std::string places;
  for (std::size_t start = 0; start < npy_bytes.size(); start += kChunkBytes) {
    chunks.push_back(make_tree("ArrayChunk", npy_bytes.substr(start, kChunkBytes)));
    const auto found = std::find(ids.begin(), ids.end(), chunks.back().id);
    places += (start == 0 ? "" : ", ") + std::to_string(found - ids.begin());
    if (found == ids.end()) {
      ids.push_back(chunks.back().id);
    }
  }
  const std::string body = "{\"dtype\": " + quoted(dtype_name) + ", \"shape\": [" +
      std::to_string(count) + "], \"stype\": \"numpy.ndarray\", \"arraychunk_ids\": [" +
      places + "]}";
  return make_tree("Array", body, std::move(chunks));
}

} // namespace lola
