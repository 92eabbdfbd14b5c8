// The device's examples: a .npy file for each argument of the model, mapped.
//
// A round's batch is drawn as lola_flwr/export/data.py says.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "manifest.h"

namespace lola {

// What the loss of a batch is a mean over, by which its gradient weighs.
enum class MeanOver { kExamples, kTokens, kNextTokens };

class Examples {
 public:
  // Map the files of a directory. Throw Refusal if they do not fit the programs.
  Examples(
      const std::string& directory,
      const Manifest& manifest,
      uint64_t seed,
      MeanOver mean_over);
  ~Examples();

  // Put a round's batch into the inputs behind the values, filled up to the programs'
  // shape; return what it weighs.
  int64_t draw(
      int64_t server_round,
      int64_t batch_size,
      std::vector<std::vector<unsigned char>>& inputs) const;

  // How many there are.
  int64_t num_examples() const {
    return static_cast<int64_t>(num_examples_);
  }

 private:
  struct File;

  std::vector<std::size_t> chosen(uint64_t server_round, std::size_t count) const;

  const Manifest& manifest_;
  const uint64_t seed_;
  const MeanOver mean_over_;
  std::vector<File> files_; // one for each input of a batch
  std::size_t num_examples_ = 0;
};

// SplitMix64's step and finalizer.
uint64_t mix(uint64_t value);

} // namespace lola
