// The manifest of an export: what goes into its programs and what comes out.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace lola {

struct ArraySpec {
  std::string name;
  std::vector<int64_t> shape;
  std::string dtype; // as numpy writes it: "<f4"

  std::size_t num_bytes() const;
};

struct FileSpec {
  std::string name;
  uint64_t num_bytes;
  std::string sha256;
};

struct ProgramSpec {
  int64_t block;
  FileSpec file;
  std::vector<ArraySpec> outputs; // the loss, and the gradients
  uint64_t arena_bytes; // what it sets aside for all that it computes
};

struct Manifest {
  std::string directory;
  std::string base_fingerprint;
  std::string runtime;
  std::string model;
  std::vector<std::string> head;
  int64_t batch_size = 0;
  bool takes_fewer_examples = false;
  bool takes_fewer_tokens = false;
  std::vector<ArraySpec> inputs; // the values, and the batch
  std::vector<uint64_t> offsets_bytes; // of the values, in what a device is sent
  std::vector<std::optional<double>> fills; // of the batch, behind short sequences
  FileSpec frozen;
  std::vector<ProgramSpec> programs;

  std::string path_of(const FileSpec& file) const;

  std::size_t num_values() const {
    return offsets_bytes.size();
  }

  // Places of the values among the inputs, by their names.
  std::vector<std::size_t> in_order_of_names() const;

  // Return the program of a block; throw Refusal if there is none.
  const ProgramSpec& program(int64_t block) const;
};

// Bytes of one element of a type; throw Refusal for a type that programs do not have.
std::size_t item_bytes(const std::string& dtype);

// Read the manifest of a directory, and check that its files are those that were
// exported; throw Refusal otherwise. Nothing is loaded from them.
Manifest read_manifest(const std::string& directory);

} // namespace lola
