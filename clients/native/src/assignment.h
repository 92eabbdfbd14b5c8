// What the server asks of this device in a round.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "manifest.h"

namespace flwr::proto {
class ConfigRecord;
}

namespace lola {

struct Assignment {
  int64_t server_round;
  int64_t block_index;
  int64_t batch_size;
  std::string codec;
  std::string base_fingerprint;
  bool sends_head;
  std::optional<std::string> versions; // what the message leaves out
};

// Read an assignment. Throw Refusal if it is none, or asks for what programs do not do.
Assignment read_assignment(const flwr::proto::ConfigRecord& record);

// Throw Refusal if an assignment is of another model than the programs', or of a block
// that none trains.
void check_model(const Assignment& assignment, const Manifest& manifest);

// A part of the model that is sent, or left out, as a whole.
struct Piece {
  std::string digest;
  std::vector<std::size_t> positions; // among all values
  bool is_sent; // as it is, not as changes
};

// Read what a message leaves out: lola_flwr/wire/versions.py. Throw Refusal if it is
// not of so many values.
std::vector<Piece> read_pieces(const std::string& text, std::size_t num_values);

// Throw Refusal if the values are not those of the pieces' digests.
void check_pieces(
    const std::vector<Piece>& pieces,
    const Manifest& manifest,
    const std::vector<std::vector<unsigned char>>& inputs);

} // namespace lola
