#include "assignment.h"

#include <flwr/proto/recorddict.pb.h>

#include <algorithm>
#include <limits>
#include <regex>
#include <sstream>

#include "digest.h"
#include "npy.h"
#include "refusal.h"

namespace lola {
namespace {

using Record = flwr::proto::ConfigRecord;
using Value = flwr::proto::ConfigRecordValue;

// Before keys of ours, where a project's own stand beside them.
constexpr char kOurs[] = "lola-";
constexpr std::size_t kDigestLength = 32;
// A regular expression is not let loose on more.
constexpr std::size_t kLongestHead = 128;

const Value* find(const Record& record, const std::string& key) {
  const Value* found = nullptr;
  for (const auto& item : record.items()) {
    if (item.key() == kOurs + key) {
      return &item.value();
    }
    if (item.key() == key) {
      found = &item.value();
    }
  }
  return found;
}

[[noreturn]] void refuse(const std::string& key, const std::string& type) {
  throw Refusal(
      key + " must be of type " + type + ": this is no message of LoLa-DEFT's strategy.");
}

int64_t whole_number(const Record& record, const std::string& key) {
  const Value* value = find(record, key);
  if (value == nullptr || value->value_case() != Value::kSint64 || value->sint64() < 0 ||
      value->sint64() > std::numeric_limits<int32_t>::max()) {
    refuse(key, "int");
  }
  return value->sint64();
}

std::string text(const Record& record, const std::string& key) {
  const Value* value = find(record, key);
  if (value == nullptr || value->value_case() != Value::kString) {
    refuse(key, "str");
  }
  return value->string();
}

void refuse_other_work(const Record& record) {
  static const std::pair<const char*, const char*> kOther[] = {
      {"direction-seed", "train without back-propagation (zeroth-order)"},
      {"operations", "train under a schedule of operations"},
      {"further-blocks", "train several blocks together"},
      {"update-names", "return weights"},
      {"projection-rank", "project its gradient"},
      {"components", "send some components of an adapter (rank)"},
  };
  for (const auto& [key, what] : kOther) {
    if (find(record, key) != nullptr) {
      throw Refusal(
          std::string("The server asks this device to ") + what +
          ", and it trains one block by back-propagation and sends its gradient; have "
          "devices with PyTorch do that.");
    }
  }
}

} // namespace

Assignment read_assignment(const Record& record) {
  Assignment assignment{
      whole_number(record, "server-round"),
      whole_number(record, "block-index"),
      whole_number(record, "batch-size"),
      text(record, "codec"),
      text(record, "base-fingerprint"),
      true,
      std::nullopt};
  refuse_other_work(record);
  if (const Value* value = find(record, "sends-head")) {
    if (value->value_case() != Value::kBool) {
      refuse("sends-head", "bool");
    }
    assignment.sends_head = value->bool_();
  }
  if (find(record, "manifest") != nullptr) {
    assignment.versions = text(record, "manifest");
  }
  return assignment;
}

void check_model(const Assignment& assignment, const Manifest& manifest) {
  if (assignment.base_fingerprint != manifest.base_fingerprint) {
    throw Refusal(
        "The frozen base weights of this device differ from the server's; export the "
        "model that the run trains, with its revision and seed.");
  }
  manifest.program(assignment.block_index);
}

std::vector<Piece> read_pieces(const std::string& given, std::size_t num_values) {
  static const std::regex kHead("(\\+?)([0-9a-f]{32})(~[a-z0-9]{1,9}~[0-9a-f]{32})?");
  std::vector<Piece> pieces;
  std::vector<bool> is_there(num_values, false);
  std::size_t total = 0;
  std::istringstream words(given);
  for (std::string word; words >> word;) {
    const std::size_t colon = std::min(word.find(':'), word.size());
    const std::string head = word.substr(0, colon);
    std::smatch found;
    if (head.size() > kLongestHead || !std::regex_match(head, found, kHead)) {
      throw Refusal("The manifest of the message's values describes no pieces.");
    }
    Piece piece{found[2], {}, found[1].length() > 0 && found[3].length() == 0};
    // "0-15,32-35"
    std::istringstream runs(word.substr(std::min(colon + 1, word.size())));
    for (char separator = ','; separator == ',';) {
      std::size_t first = 0, last = 0;
      if (!(runs >> first >> separator >> last) || separator != '-' || last >= num_values) {
        throw Refusal("The manifest of the message's values has impossible positions.");
      }
      for (std::size_t i = first; i <= last; ++i) {
        if (is_there[i]) {
          throw Refusal("The manifest of the message's values has a position twice.");
        }
        is_there[i] = true;
        ++total;
        piece.positions.push_back(i);
      }
      separator = ' ';
      runs >> separator;
    }
    pieces.push_back(std::move(piece));
  }
  if (total != num_values) {
    throw Refusal(
        "The manifest of the message's values is of " + std::to_string(total) +
        " arrays; this model has " + std::to_string(num_values) +
        ". Use the same model on server and device.");
  }
  return pieces;
}

void check_pieces(
    const std::vector<Piece>& pieces,
    const Manifest& manifest,
    const std::vector<std::vector<unsigned char>>& inputs) {
  for (const Piece& piece : pieces) {
    Sha256 digest;
    for (const std::size_t i : piece.positions) {
      const ArraySpec& spec = manifest.inputs[i];
      const std::string kind = spec.dtype + python_shape(spec.shape);
      digest.add(kind.data(), kind.size());
      digest.add(inputs[i].data(), inputs[i].size());
    }
    if (digest.hexadecimal().substr(0, kDigestLength) != piece.digest) {
      throw Refusal(
          "The arrays received do not have the digest " + piece.digest +
          " that the manifest states; something on the way has changed them.");
    }
  }
}

} // namespace lola
