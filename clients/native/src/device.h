// A device: what it answers to the server's messages.
#pragma once

#include <flwr/proto/recorddict.pb.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "assignment.h"
#include "examples.h"
#include "manifest.h"
#include "objects.h"
#include "steps.h"

namespace lola {

// Fetches an object of a message by its id.
using Fetch = std::function<Object(const std::string& id)>;

// A message as it was received, but for its arrays, which are fetched where they go.
struct Received {
  std::string type;
  std::vector<flwr::proto::ConfigRecord> configs;
  std::vector<std::pair<std::string, Object>> array_records; // by name
};

// Fetch a message's records.
Received receive(const std::string& type, const std::string& id, const Fetch& fetch);

// What a reply is to hold, once the message is received.
using Answer = std::function<Tree()>;

using Profile = std::vector<std::pair<std::string, flwr::proto::ConfigRecordValue>>;

// Read what the device offers, from the file that `lola-flwr profile` writes, and add
// what its programs do with its examples; throw Refusal if it is none.
Profile read_profile(
    const std::string& path, const Manifest& manifest, const Examples& examples);

class Device {
 public:
  Device(const Manifest& manifest, const Examples& examples, Profile profile);

  // Take a message in, its values included, and return what answers it. Throw Refusal
  // if this device does not do what is asked.
  Answer take_in(const Received& message, const Fetch& fetch);

  // Most bytes that an object of a message has.
  std::size_t most_object_bytes() const;

 private:
  Tree train(const Assignment& assignment, const std::string& key);

  const Manifest& manifest_;
  const Examples& examples_;
  const Profile profile_;
  Steps steps_;
};

} // namespace lola
