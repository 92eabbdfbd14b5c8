#include "fleet.h"

#include <flwr/proto/fleet.pb.h>
#include <flwr/proto/heartbeat.pb.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <iostream>
#include <mutex>

#include "refusal.h"
#include "stopping.h"

namespace lola {
namespace {

namespace proto = flwr::proto;

// As Flower's own nodes: HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_CALL_TIMEOUT.
constexpr double kHeartbeat_s = 30;
constexpr long kHeartbeatAnswer_s = 5;
// So often, that one that is lost does no harm.
constexpr double kBetweenHeartbeats_s = 20;
constexpr double kLongestBackoff_s = 20;
constexpr std::size_t kMostOfAnError = 300;

std::string utc_now() {
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  const auto rest = std::chrono::duration_cast<std::chrono::microseconds>(
                        now.time_since_epoch())
                        .count() %
      1000000;
  std::tm parts{};
  gmtime_r(&seconds, &parts);
  char date[32];
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &parts);
  char text[64];
  std::snprintf(text, sizeof text, "%s.%06lld+00:00", date, static_cast<long long>(rest));
  return text;
}

std::string said_in(const Response& response) {
  const std::string text = printable(response.body.substr(0, kMostOfAnError));
  return "status " + std::to_string(response.status) + (text.empty() ? "" : ", " + text);
}

} // namespace

std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, ' ');
  return text;
}

void log_line(const std::string& text) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::cerr << printable(text) << std::endl;
}

double backoff_s(int failures) {
  return std::min(std::ldexp(1.0, std::min(failures - 1, 10)), kLongestBackoff_s);
}

Fleet::Fleet(const Link& link, const NodeKey& key)
    : http_(link.address, link.is_secure, link.root_certificates), key_(key) {}

void Fleet::ask(
    const std::string& name,
    const google::protobuf::MessageLite& request,
    google::protobuf::MessageLite& response,
    std::size_t most_bytes,
    long timeout_s) {
  const std::string now = utc_now();
  const Response found = http_.post(
      "/v1/fleet/" + name,
      request.SerializeAsString(),
      {"content-type: application/protobuf",
       "accept: application/protobuf",
       "expect:",
       "flwr-package-name: flwr",
       "flwr-package-version: " LOLA_FLOWER_VERSION,
       "flwr-component-name: SuperNode",
       "flwr-public-key: " + base64(key_.public_pem()),
       "flwr-timestamp: " + now,
       "flwr-signature: " + base64(key_.sign(now))},
      most_bytes,
      timeout_s);
  if (!found.warning.empty()) {
    log_line("The SuperLink says:" + found.warning);
  }
  if (found.status == 401) {
    throw NotKnown(name + ": " + said_in(found));
  }
  if (found.status == 403) {
    throw RunIsOver(name + ": " + said_in(found));
  }
  if (found.status == 502 || found.status == 503 || found.status == 504) {
    throw Unreachable(name + ": " + said_in(found));
  }
  if (found.status != 200) {
    throw Refused(name + ": " + said_in(found));
  }
  if (!response.ParseFromString(found.body)) {
    throw Refused(name + ": the answer is none of Flower " LOLA_FLOWER_VERSION ".");
  }
}

void Fleet::ask_until_answered(
    const std::string& name,
    const google::protobuf::MessageLite& request,
    google::protobuf::MessageLite& response,
    std::size_t most_bytes) {
  for (int failures = 1;; ++failures) {
    try {
      ask(name, request, response, most_bytes);
      return;
    } catch (const Unreachable& error) {
      if (is_stopping()) {
        throw Stopped();
      }
      log_line(std::string(error.what()) + "; trying again");
    }
    if (!wait_s(backoff_s(failures))) {
      throw Stopped();
    }
  }
}

Node::Node(const Link& link, const NodeKey& key, bool registers)
    : link_(link), key_(key), registers_(registers) {
  Fleet fleet(link, key);
  if (registers) {
    proto::RegisterNodeFleetRequest request;
    proto::RegisterNodeFleetResponse response;
    request.set_public_key(key.public_pem());
    fleet.ask_until_answered("register-node", request, response);
  }
  proto::ActivateNodeRequest request;
  proto::ActivateNodeResponse response;
  request.set_public_key(key.public_pem());
  request.set_heartbeat_interval(kHeartbeat_s);
  fleet.ask_until_answered("activate-node", request, response);
  id_ = response.node_id();
  heart_ = std::thread([this] { beat(); });
}

Node::~Node() {
  leaves_ = true;
  heart_.join();
  if (is_forgotten_) {
    return;
  }
  // Not again and again: a node that is silent is taken to have left.
  try {
    Fleet fleet(link_, key_);
    fleet.finish_though_stopping();
    proto::DeactivateNodeRequest request;
    proto::DeactivateNodeResponse response;
    request.set_node_id(id_);
    fleet.ask("deactivate-node", request, response, kLargestAnswer, kHeartbeatAnswer_s);
    if (registers_) {
      proto::UnregisterNodeFleetRequest last;
      proto::UnregisterNodeFleetResponse answer;
      last.set_node_id(id_);
      fleet.ask("unregister-node", last, answer, kLargestAnswer, kHeartbeatAnswer_s);
    }
  } catch (const std::exception& error) {
    log_line(std::string("Left without a word: ") + error.what());
  }
}

void Node::check() const {
  if (is_forgotten_) {
    throw NotKnown("The SuperLink has forgotten this node.");
  }
}

void Node::beat() {
  try {
    Fleet fleet(link_, key_);
    proto::SendNodeHeartbeatRequest request;
    request.mutable_node()->set_node_id(id_);
    request.set_heartbeat_interval(kHeartbeat_s);
    double pause_s = 0;
    int failures = 0;
    while (true) {
      // In small steps: it may have to leave though nobody sent a signal.
      for (double waited_s = 0; waited_s < pause_s; waited_s += 0.1) {
        if (leaves_ || !wait_s(0.1)) {
          return;
        }
      }
      if (leaves_ || is_stopping()) {
        return;
      }
      try {
        proto::SendNodeHeartbeatResponse response;
        fleet.ask(
            "send-node-heartbeat", request, response, kLargestAnswer, kHeartbeatAnswer_s);
        if (!response.success()) {
          throw NotKnown("no heartbeat");
        }
        failures = 0;
        pause_s = kBetweenHeartbeats_s;
      } catch (const Unreachable&) {
        pause_s = backoff_s(++failures);
      }
    }
  } catch (const std::exception& error) {
    log_line(std::string("The SuperLink takes no heartbeat: ") + error.what());
    is_forgotten_ = true;
  }
}

} // namespace lola
