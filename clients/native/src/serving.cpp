#include "serving.h"

#include <flwr/proto/fleet.pb.h>
#include <flwr/proto/message.pb.h>

#include <algorithm>
#include <chrono>

#include "refusal.h"
#include "stopping.h"

namespace lola {
namespace {

namespace proto = flwr::proto;
using Clock = std::chrono::steady_clock;

// Soon after a message comes the next; else as seldom as Flower's own nodes ask.
constexpr double kFirstPause_s = 0.25;
constexpr double kLongestPause_s = 3;
// An object may be on its way to the SuperLink: PULL_MAX_TRIES_PER_OBJECT.
constexpr int kMostTries = 500;
constexpr double kLongestWaitForObject_s = 10;
// ErrorCode.CLIENT_APP_RAISED_EXCEPTION
constexpr int kRaised = 2;

double unix_now_s() {
  return std::chrono::duration<double>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

Object pulled(
    Fleet& fleet,
    const Node& node,
    uint64_t run_id,
    const std::string& id,
    std::size_t most_bytes) {
  proto::PullObjectRequest request;
  request.mutable_node()->set_node_id(node.id());
  request.set_run_id(run_id);
  request.set_object_id(id);
  double pause_s = 1;
  for (int tries = 0; tries < kMostTries; ++tries) {
    proto::PullObjectResponse response;
    fleet.ask_until_answered("pull-object", request, response, most_bytes);
    if (!response.object_found()) {
      break;
    }
    if (response.object_available()) {
      return read_object(id, std::move(*response.mutable_object_content()));
    }
    if (!wait_s(pause_s)) {
      throw Stopped();
    }
    pause_s = std::min(2 * pause_s, kLongestWaitForObject_s);
  }
  throw Refused("The SuperLink does not have object " + id + ".");
}

// Write a tree as Flower's ObjectTree.
void describe(const Tree& tree, proto::ObjectTree& described) {
  described.set_object_id(tree.id);
  for (const Tree& child : tree.children) {
    describe(child, *described.add_children());
  }
}

void push_objects(Fleet& fleet, proto::PushObjectRequest& request, const Tree& tree,
                  const proto::PushMessagesResponse& wanted) {
  for (const Tree& child : tree.children) {
    push_objects(fleet, request, child, wanted);
  }
  const auto& ids = wanted.objects_to_push();
  if (std::find(ids.begin(), ids.end(), tree.id) == ids.end()) {
    return;
  }
  request.set_object_id(tree.id);
  request.set_object_content(tree.content);
  proto::PushObjectResponse response;
  fleet.ask_until_answered("push-object", request, response);
  if (!response.stored()) {
    throw Refused("The SuperLink did not take object " + tree.id + ".");
  }
}

proto::Metadata reply_metadata(const proto::Metadata& asked) {
  proto::Metadata metadata;
  const double now_s = unix_now_s();
  metadata.set_run_id(asked.run_id());
  metadata.set_src_node_id(asked.dst_node_id());
  metadata.set_dst_node_id(asked.src_node_id());
  metadata.set_reply_to_message_id(asked.message_id());
  metadata.set_group_id(asked.group_id());
  metadata.set_created_at(now_s);
  metadata.set_ttl(asked.created_at() + asked.ttl() - now_s);
  metadata.set_message_type(asked.message_type());
  if (asked.has_dst_task_id()) {
    metadata.set_src_task_id(asked.dst_task_id());
  }
  if (asked.has_src_task_id()) {
    metadata.set_dst_task_id(asked.src_task_id());
  }
  return metadata;
}

void push(
    Fleet& fleet,
    const Node& node,
    const proto::Metadata& asked,
    std::vector<Tree> content,
    const std::string& error,
    double runtime_s) {
  proto::Message message;
  *message.mutable_metadata() = reply_metadata(asked);
  if (content.empty()) {
    message.mutable_error()->set_code(kRaised);
    message.mutable_error()->set_reason(error);
  }
  const bool has_content = !content.empty();
  const Tree tree = make_tree("Message", message.SerializeAsString(), std::move(content));
  message.mutable_metadata()->set_message_id(tree.id);
  if (has_content) {
    message.mutable_content(); // it is pushed object by object
  }
  proto::PushMessagesRequest request;
  proto::PushMessagesResponse response;
  request.mutable_node()->set_node_id(node.id());
  *request.add_messages_list() = message;
  describe(tree, *request.add_message_object_trees());
  request.add_clientapp_runtime_list(runtime_s);
  fleet.ask_until_answered("push-messages", request, response);
  proto::PushObjectRequest object;
  object.mutable_node()->set_node_id(node.id());
  object.set_run_id(asked.run_id());
  object.set_session_id(response.session_id());
  push_objects(fleet, object, tree, response);
}

void confirm(Fleet& fleet, const Node& node, const proto::Metadata& asked) {
  proto::ConfirmMessageReceivedRequest request;
  proto::ConfirmMessageReceivedResponse response;
  request.mutable_node()->set_node_id(node.id());
  request.set_run_id(asked.run_id());
  request.set_message_object_id(asked.message_id());
  fleet.ask_until_answered("confirm-message-received", request, response);
}

void answer(Fleet& fleet, const Node& node, Device& device, const proto::Metadata& asked) {
  const std::size_t most_bytes = device.most_object_bytes();
  const Fetch fetch = [&](const std::string& id) {
    return pulled(fleet, node, asked.run_id(), id, most_bytes);
  };
  std::vector<Tree> content;
  std::string error;
  Answer work;
  const auto refuse = [&](const Refusal& refusal) {
    error = printable(refusal.what());
    log_line("Refused: " + error);
  };
  try {
    work = device.take_in(receive(asked.message_type(), asked.message_id(), fetch), fetch);
  } catch (const Refusal& refusal) {
    refuse(refusal);
  }
  confirm(fleet, node, asked);
  const auto start = Clock::now();
  try {
    if (work) {
      content.push_back(work());
    }
  } catch (const Refusal& refusal) {
    refuse(refusal);
  }
  const std::chrono::duration<double> taken = Clock::now() - start;
  push(fleet, node, asked, std::move(content), error, taken.count());
}

} // namespace

void serve(Fleet& fleet, const Node& node, Device& device) {
  proto::PullMessagesRequest request;
  request.mutable_node()->set_node_id(node.id());
  double pause_s = kFirstPause_s;
  do {
    node.check();
    proto::PullMessagesResponse response;
    fleet.ask_until_answered("pull-messages", request, response);
    if (response.messages_list().empty()) {
      pause_s = std::min(2 * pause_s, kLongestPause_s);
      continue;
    }
    pause_s = kFirstPause_s;
    for (const proto::Message& message : response.messages_list()) {
      try {
        answer(fleet, node, device, message.metadata());
      } catch (const RunIsOver&) {
        log_line("The run of a message is over.");
      } catch (const Refused& error) {
        log_line(std::string("A message is left unanswered: ") + error.what());
      }
    }
  } while (wait_s(pause_s));
}

} // namespace lola
