// The manifest of an export: what goes into its programs and what comes out.
#pragma once

#include <cstdint>
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
};

struct Manifest {
  std::string directory;
  std::string base_fingerprint;
  std::string runtime;
  std::vector<ArraySpec> inputs; // the values, and the batch
  FileSpec frozen;
  std::vector<ProgramSpec> programs;

  std::string path_of(const FileSpec& file) const;
};

// Bytes of one element of a type; throw Refusal for a type that programs do not have.
std::size_t item_bytes(const std::string& dtype);

// Read the manifest of a directory, and check that its files are those that were
// exported; throw Refusal otherwise. Nothing is loaded from them.
Manifest read_manifest(const std::string& directory);

} // namespace lola
