// Runs the programs of an export, one at a time.
#pragma once

#include <executorch/extension/module/module.h>

#include <memory>
#include <vector>

#include "frames.h"
#include "manifest.h"

namespace lola {

class Steps {
 public:
  explicit Steps(const Manifest& manifest);

  // Memory for each input, in the order of the manifest; filled before `run`.
  std::vector<std::vector<unsigned char>>& inputs() {
    return inputs_;
  }

  // Run a block's program on the inputs. What is returned holds until the next run.
  std::vector<Outgoing> run(const ProgramSpec& program);

 private:
  const Manifest& manifest_;
  std::vector<std::vector<unsigned char>> inputs_;
  int64_t block_ = -1;
  std::unique_ptr<executorch::extension::Module> module_;
  std::vector<executorch::runtime::EValue> outputs_;
};

} // namespace lola
