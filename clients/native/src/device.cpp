#include "device.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "codec.h"
#include "fleet.h"
#include "memory.h"
#include "npy.h"
#include "refusal.h"
#include "values.h"

namespace lola {
namespace {

namespace proto = flwr::proto;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kMostRecords = 16;
constexpr int kProfileVersion = 1;
constexpr char kOutOfMemory[] = "out-of-memory";

// A record of ours: keys and values, in order.
class Record {
 public:
  proto::ConfigRecordValue& operator[](const std::string& key) {
    auto* item = record_.add_items();
    item->set_key(key);
    return *item->mutable_value();
  }

  Tree tree() const {
    return make_tree("ConfigRecord", record_.SerializeAsString());
  }

 private:
  proto::ConfigRecord record_;
};

Tree content(std::vector<std::pair<std::string, Tree>> records) {
  std::vector<std::pair<std::string, std::string>> refs;
  std::vector<Tree> children;
  for (auto& [name, tree] : records) {
    refs.emplace_back(name, tree.id);
    children.push_back(std::move(tree));
  }
  return make_tree("RecordDict", python_json(refs), std::move(children));
}

Tree num_examples(int64_t count) {
  proto::MetricRecord record;
  auto* item = record.add_items();
  item->set_key("num-examples");
  item->mutable_value()->set_sint64(count);
  return make_tree("MetricRecord", record.SerializeAsString());
}

Tree without_update(const Record& report) {
  return content({{"metrics", num_examples(0)}, {"lola-report", report.tree()}});
}

// What a device says that does not hold what a message left out.
Tree nothing(const Assignment& assignment) {
  Record report;
  report["server-round"].set_sint64(assignment.server_round);
  report["block-index"].set_sint64(assignment.block_index);
  report["update-kind"].set_string("nothing");
  report["compute-clock"].set_string("");
  return without_update(report);
}

Tree no_memory(const std::string& detail) {
  Record report;
  report["failure"].set_string(kOutOfMemory);
  report["detail"].set_string(detail);
  return without_update(report);
}

void refuse_lack_of_memory(const Manifest& manifest, const ProgramSpec& program) {
  double needed = static_cast<double>(program.arena_bytes);
  for (const ArraySpec& output : program.outputs) {
    needed += static_cast<double>(output.num_bytes());
  }
  // What an earlier step took, this process still has.
  const double free = available_memory_bytes() + peak_memory_bytes();
  if (free < needed) {
    throw OutOfMemory(
        "block " + std::to_string(program.block) + " of '" + manifest.model + "' needs " +
        std::to_string(needed) + " B, there are " + std::to_string(free) + " B");
  }
}

} // namespace

Received receive(const std::string& type, const std::string& id, const Fetch& fetch) {
  Received received;
  received.type = type;
  const Object message = fetch(id);
  if (message.type != "Message" || message.children.size() != 1) {
    throw Refusal("A message without content was received.");
  }
  const Object records = fetch(message.children.front());
  const auto refs = read_refs(records.body);
  if (records.type != "RecordDict" || refs.size() > kMostRecords) {
    throw Refusal("A message of other records than a strategy's was received.");
  }
  for (const auto& [name, record_id] : refs) {
    Object record = fetch(record_id);
    if (record.type == "ArrayRecord") {
      received.array_records.emplace_back(name, std::move(record));
    } else if (record.type == "ConfigRecord") {
      received.configs.emplace_back();
      if (!received.configs.back().ParseFromString(record.body)) {
        throw Refusal("A message's record is damaged.");
      }
    }
  }
  return received;
}

Profile read_profile(
    const std::string& path, const Manifest& manifest, const Examples& examples) {
  std::ifstream file(path);
  const json found =
      file ? json::parse(file, nullptr, /*allow_exceptions=*/false) : json();
  if (!found.is_object() || found.value("lola-flwr-profile", json()) != kProfileVersion) {
    throw Refusal(
        path + " is no profile of version " + std::to_string(kProfileVersion) +
        "; `lola-flwr profile --out device.json` writes one.");
  }
  Profile profile;
  const auto add = [&](const char* key) -> proto::ConfigRecordValue& {
    profile.emplace_back(key, proto::ConfigRecordValue());
    return profile.back().second;
  };
  const auto add_number = [&](const char* key, bool is_needed, std::optional<double> other) {
    const json value = found.value(key, json());
    if (value.is_number_integer()) {
      add(key).set_sint64(value.get<int64_t>());
    } else if (value.is_number_float()) {
      add(key).set_double_(value.get<double>());
    } else if (!value.is_null() || is_needed) {
      throw Refusal(path + ": " + key + " must be a number.");
    } else if (other) {
      add(key).set_double_(*other);
    }
  };
  const json name = found.value("name", json());
  if (!name.is_string()) {
    throw Refusal(path + ": name must be a string.");
  }
  add("name").set_string(name.get<std::string>());
  add_number("flops-per-s", true, std::nullopt);
  add_number("memory-bytes", true, std::nullopt);
  add_number("snr-db", !found.contains("uplink-bps"), 0.0);
  add_number("uplink-bps", false, std::nullopt);
  add("num-examples").set_sint64(examples.num_examples());
  // All that programs do in a round: the server is to ask for nothing else.
  add("trains-one-block").set_bool_(true);
  add("batch-size").set_sint64(manifest.batch_size);
  return profile;
}

Device::Device(const Manifest& manifest, const Examples& examples, Profile profile)
    : manifest_(manifest),
      examples_(examples),
      profile_(std::move(profile)),
      steps_(manifest) {}

std::size_t Device::most_object_bytes() const {
  std::size_t bytes = kLargestAnswer;
  for (std::size_t i = 0; i < manifest_.num_values(); ++i) {
    bytes += manifest_.inputs[i].num_bytes();
  }
  return bytes;
}

Answer Device::take_in(const Received& message, const Fetch& fetch) {
  if (message.type == "query.lola_profile") {
    return [this] {
      Record profile;
      for (const auto& [key, value] : profile_) {
        profile[key] = value;
      }
      return content({{"lola-profile", profile.tree()}});
    };
  }
  if (message.type != "train") {
    throw Refusal(
        "A device with exported programs trains blocks, and does not answer '" +
        message.type.substr(0, 64) + "'; use devices with PyTorch for that.");
  }
  if (message.configs.size() != 1 || message.array_records.size() != 1) {
    throw Refusal("This is no message of LoLa-DEFT's strategy: it has other records.");
  }
  const Assignment assignment = read_assignment(message.configs.front());
  check_model(assignment, manifest_);
  check_codec(assignment.codec);
  std::vector<Piece> pieces;
  if (assignment.versions) {
    pieces = read_pieces(*assignment.versions, manifest_.num_values());
    if (!std::all_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.is_sent; })) {
      return [assignment] { return nothing(assignment); };
    }
  }
  const auto& [key, record] = message.array_records.front();
  fetch_values(record, fetch, manifest_, steps_.inputs());
  if (!pieces.empty()) {
    check_pieces(pieces, manifest_, steps_.inputs());
  }
  return [this, assignment, key = key] {
    try {
      return train(assignment, key);
    } catch (const OutOfMemory& error) {
      return no_memory(error.what());
    } catch (const std::bad_alloc&) {
      return no_memory("memory cannot be allocated");
    }
  };
}

Tree Device::train(const Assignment& assignment, const std::string& key) {
  const auto start = Clock::now();
  const ProgramSpec& program = manifest_.program(assignment.block_index);
  refuse_lack_of_memory(manifest_, program);
  const int64_t weight =
      examples_.draw(assignment.server_round, assignment.batch_size, steps_.inputs());
  const std::vector<Outgoing> outputs = steps_.run(program);
  float loss = 0;
  std::memcpy(&loss, outputs.front().data, sizeof loss);
  std::vector<Outgoing> gradients;
  for (std::size_t i = 1; i < outputs.size(); ++i) {
    const auto& head = manifest_.head;
    const bool is_of_head =
        std::find(head.begin(), head.end(), outputs[i].spec.name) != head.end();
    if (assignment.sends_head || !is_of_head) {
      gradients.push_back(outputs[i]);
    }
  }
  const Encoded encoded = encode(assignment.codec, std::move(gradients));
  Tree array = array_tree(encoded.dtype_name, encoded.count, encoded.npy_bytes);
  const std::string refs = python_json({{"gradients", array.id}});
  std::vector<Tree> arrays;
  arrays.push_back(std::move(array));
  const std::chrono::duration<double> taken = Clock::now() - start;
  Record report;
  report["server-round"].set_sint64(assignment.server_round);
  report["block-index"].set_sint64(assignment.block_index);
  report["update-kind"].set_string("gradient");
  report["loss"].set_double_(static_cast<double>(loss));
  report["compute-s"].set_double_(taken.count());
  report["compute-clock"].set_string("measured");
  report["peak-memory-bytes"].set_double_(peak_memory_bytes());
  log_line(
      "round " + std::to_string(assignment.server_round) + ": block " +
      std::to_string(assignment.block_index) + ", loss " + std::to_string(loss) + ", " +
      std::to_string(taken.count()) + " s");
  return content(
      {{"metrics", num_examples(weight)},
       {"lola-report", report.tree()},
       {key, make_tree("ArrayRecord", refs, std::move(arrays))}});
}

} // namespace lola
