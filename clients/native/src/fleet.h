// Flower's Fleet API: protobuf messages over HTTP, signed with the node's key.
#pragma once

#include <google/protobuf/message_lite.h>

#include <atomic>
#include <string>
#include <thread>

#include "http.h"
#include "node_key.h"

namespace lola {

struct Link {
  std::string address; // HOST:PORT of the SuperLink
  bool is_secure = true;
  std::string root_certificates; // a file; "" for the system's own
};

// The SuperLink does not know this node, or its key: it has to join anew.
class NotKnown : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The run that a message belongs to goes on no longer.
class RunIsOver : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The SuperLink refuses a request.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The node was asked to stop.
class Stopped : public std::runtime_error {
 public:
  Stopped() : std::runtime_error("The device was asked to stop.") {}
};

// Most bytes of an answer that holds no array.
constexpr std::size_t kLargestAnswer = std::size_t{16} << 20;

class Fleet {
 public:
  Fleet(const Link& link, const NodeKey& key);

  // Ask once. Throw what of the above is the case.
  void ask(
      const std::string& name,
      const google::protobuf::MessageLite& request,
      google::protobuf::MessageLite& response,
      std::size_t most_bytes = kLargestAnswer,
      long timeout_s = 0);

  // Ask again and again while the SuperLink cannot be reached.
  void ask_until_answered(
      const std::string& name,
      const google::protobuf::MessageLite& request,
      google::protobuf::MessageLite& response,
      std::size_t most_bytes = kLargestAnswer);

  void finish_though_stopping() {
    http_.finish_though_stopping();
  }

 private:
  Http http_;
  const NodeKey& key_;
};

// A node that has joined. It says that it is there, and leaves when it goes.
class Node {
 public:
  // Join, once the SuperLink can be reached; register before if `registers`.
  Node(const Link& link, const NodeKey& key, bool registers);
  ~Node();
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  uint64_t id() const {
    return id_;
  }

  // Throw NotKnown if the SuperLink has forgotten this node.
  void check() const;

 private:
  void beat();

  const Link& link_;
  const NodeKey& key_;
  const bool registers_;
  uint64_t id_ = 0;
  std::atomic<bool> leaves_{false};
  std::atomic<bool> is_forgotten_{false};
  std::thread heart_;
};

// Seconds before the next try, after so many that failed: 1, 2, 4, ... 20.
double backoff_s(int failures);

// Return what a server said as it may stand in a line: without control characters.
std::string printable(std::string text);

void log_line(const std::string& text);

} // namespace lola
