// lola-runner DIRECTORY: computes gradients with the programs that `lola-flwr export`
// wrote. It answers frames on its standard input and output:
//
//   run, header {"block": 5}, arrays: the manifest's inputs, in order
//     -> outputs, header {"compute_s": ..., "peak_memory_bytes": ...}, arrays: the loss
//        and the gradients
//   what was wrong -> error, or out-of-memory, header {"message": "..."}
//
// Before the first of them it says "ready", or what is wrong and ends. With --check it checks
// the directory, says so in words, and ends.

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <iostream>
#include <memory>
#include <new>

#include "frames.h"
#include "manifest.h"
#include "memory.h"
#include "refusal.h"
#include "steps.h"

namespace {

using lola::Header;
using lola::Manifest;
using lola::ProgramSpec;
using nlohmann::json;

constexpr char kNoMemory[] = "memory cannot be allocated";

const ProgramSpec& program_for(const Manifest& manifest, const Header& asked) {
  if (asked.kind != "run") {
    throw lola::Refusal("A runner does not know the message '" + asked.kind + "'.");
  }
  const json block = asked.values.is_object() ? asked.values.value("block", json()) : json();
  const auto found = std::find_if(
      manifest.programs.begin(), manifest.programs.end(), [&](const ProgramSpec& each) {
        return block.is_number_integer() && block == each.block;
      });
  if (found == manifest.programs.end()) {
    throw lola::Refusal("No program trains block " + block.dump() + "; export it, too.");
  }
  return *found;
}

void check_arrays(const Manifest& manifest, const Header& asked) {
  bool is_same = asked.arrays.size() == manifest.inputs.size();
  for (std::size_t i = 0; is_same && i < asked.arrays.size(); ++i) {
    is_same = asked.arrays[i].name == manifest.inputs[i].name &&
        asked.arrays[i].dtype == manifest.inputs[i].dtype &&
        asked.arrays[i].shape == manifest.inputs[i].shape;
  }
  if (!is_same) {
    throw lola::Refusal("These arrays are not the inputs that the manifest lists.");
  }
}

// Answer one frame whose header has been read.
void answer(const Manifest& manifest, lola::Steps& steps, const Header& asked, int out) {
  const auto start = std::chrono::steady_clock::now();
  std::size_t unread = 0;
  for (const lola::ArraySpec& spec : asked.arrays) {
    unread += spec.num_bytes();
  }
  try {
    const ProgramSpec& program = program_for(manifest, asked);
    check_arrays(manifest, asked);
    for (auto& input : steps.inputs()) {
      lola::read_bytes(STDIN_FILENO, input.data(), input.size());
      unread -= input.size();
    }
    const auto outputs = steps.run(program);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    lola::write_frame(
        out,
        "outputs",
        {{"compute_s", taken.count()}, {"peak_memory_bytes", lola::peak_memory_bytes()}},
        outputs);
  } catch (const lola::Refusal& error) {
    lola::skip_bytes(STDIN_FILENO, unread);
    lola::write_frame(out, "error", {{"message", error.what()}});
  } catch (const lola::OutOfMemory& error) {
    lola::write_frame(out, "out-of-memory", {{"message", error.what()}});
  } catch (const std::bad_alloc&) {
    lola::skip_bytes(STDIN_FILENO, unread);
    lola::write_frame(out, "out-of-memory", {{"message", kNoMemory}});
  }
}

int serve(const std::string& directory, int out) {
  Manifest manifest;
  std::unique_ptr<lola::Steps> steps;
  try {
    manifest = lola::read_manifest(directory);
    steps = std::make_unique<lola::Steps>(manifest);
  } catch (const lola::Refusal& error) {
    lola::write_frame(out, "error", {{"message", error.what()}});
    return 1;
  } catch (const std::bad_alloc&) {
    lola::write_frame(out, "out-of-memory", {{"message", kNoMemory}});
    return 1;
  }
  lola::write_frame(
      out,
      "ready",
      {{"base_fingerprint", manifest.base_fingerprint}, {"runtime", manifest.runtime}});
  Header asked;
  while (lola::read_header(STDIN_FILENO, asked)) {
    answer(manifest, *steps, asked, out);
  }
  return 0;
}

int check(const std::string& directory) {
  const Manifest manifest = lola::read_manifest(directory);
  std::cout << directory << ": " << manifest.programs.size()
            << " programs, as they were exported with " << manifest.runtime << "\n";
  return 0;
}

} // namespace

int main(int count, char** words) {
  const std::vector<std::string> given(words + 1, words + count);
  const bool checks = given.size() == 2 && given[1] == "--check";
  if (given.empty() || given[0].empty() || given[0][0] == '-' ||
      (given.size() > 1 && !checks)) {
    std::cerr << "usage: lola-runner DIRECTORY [--check]\n";
    return 2;
  }
  try {
    if (checks) {
      return check(given[0]);
    }
    // Who went away is seen where the answer is written.
    std::signal(SIGPIPE, SIG_IGN);
    // Whatever a library prints must not come between frames.
    const int out = dup(STDOUT_FILENO);
    if (out < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
      throw lola::LinkError("Standard output cannot be written to.");
    }
    return serve(given[0], out);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
