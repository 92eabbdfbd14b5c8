// Frames as lola_flwr/deployment/worker_link.py has them: a prefix ("LOLA", version,
// bytes of the header), a header in JSON, and the raw bytes of the arrays it lists.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "manifest.h"

namespace lola {

// The other end does not speak this protocol, or has gone in the middle of a frame.
class LinkError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Header {
  std::string kind;
  nlohmann::json values;
  std::vector<ArraySpec> arrays; // their bytes come next
};

struct Outgoing {
  ArraySpec spec;
  const void* data;
};

// Read the next frame's header; false at the end of what is sent.
bool read_header(int descriptor, Header& header);

// Read bytes that have to come.
void read_bytes(int descriptor, void* data, std::size_t count);

// Read bytes that nobody wants, so that the next frame is found.
void skip_bytes(int descriptor, std::size_t count);

void write_frame(
    int descriptor,
    const std::string& kind,
    const nlohmann::json& values,
    const std::vector<Outgoing>& arrays = {});

} // namespace lola
