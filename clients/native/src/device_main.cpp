// lola-device DIRECTORY: joins a federation, and trains blocks with the programs that
// `lola-flwr export` wrote. It speaks with Flower's SuperLink by itself; docs/protocol.md
// says how.

#include <curl/curl.h>
#include <malloc.h>

#include <iostream>
#include <map>
#include <memory>
#include <optional>

#include "device.h"
#include "examples.h"
#include "fleet.h"
#include "refusal.h"
#include "serving.h"
#include "stopping.h"

namespace {

// What is larger goes back to the system when it is freed. Left alone, glibc keeps more
// and more: it learns from the chunks of arrays that come and go.
[[maybe_unused]] constexpr int kMappedBytes = 1 << 20;

constexpr char kUsage[] =
    "usage: lola-device DIRECTORY --superlink HOST:PORT --profile FILE --data DIRECTORY\n"
    "  --root-certificates FILE   of the SuperLink (default: the system's)\n"
    "  --insecure                 without TLS\n"
    "  --auth-supernode-private-key FILE   the node's key, in PEM (default: a new one)\n"
    "  --seed NUMBER              by which batches are drawn (default: 0)\n"
    "  --mean-over examples|tokens|next-tokens   what the loss is a mean over\n";

struct Options {
  std::string directory;
  std::string profile;
  std::string data;
  lola::Link link;
  std::optional<std::string> key;
  uint64_t seed = 0;
  std::optional<lola::MeanOver> mean_over;
};

// The command line is wrong; the usage is printed.
class Misused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

uint64_t seed_in(const std::string& text) {
  // As far as the other clients go: 63 bits.
  const bool is_number = !text.empty() && text.size() <= 18 &&
      text.find_first_not_of("0123456789") == std::string::npos;
  if (!is_number) {
    throw Misused("--seed " + text + " must be a whole number below 10^18.");
  }
  return std::stoull(text);
}

lola::MeanOver mean_over_in(const std::string& text) {
  static const std::map<std::string, lola::MeanOver> kKnown = {
      {"examples", lola::MeanOver::kExamples},
      {"tokens", lola::MeanOver::kTokens},
      {"next-tokens", lola::MeanOver::kNextTokens}};
  const auto found = kKnown.find(text);
  if (found == kKnown.end()) {
    throw Misused("--mean-over " + text + " must be examples, tokens or next-tokens.");
  }
  return found->second;
}

Options options_in(const std::vector<std::string>& given) {
  Options options;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const std::string& word = given[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == given.size()) {
        throw Misused(word + " needs a value.");
      }
      return given[++i];
    };
    if (word == "--superlink") {
      options.link.address = value();
    } else if (word == "--profile") {
      options.profile = value();
    } else if (word == "--data") {
      options.data = value();
    } else if (word == "--root-certificates") {
      options.link.root_certificates = value();
    } else if (word == "--insecure") {
      options.link.is_secure = false;
    } else if (word == "--auth-supernode-private-key") {
      options.key = value();
    } else if (word == "--seed") {
      options.seed = seed_in(value());
    } else if (word == "--mean-over") {
      options.mean_over = mean_over_in(value());
    } else if (options.directory.empty() && word.rfind('-', 0) != 0) {
      options.directory = word;
    } else {
      throw Misused("'" + word + "' is not known.");
    }
  }
  for (const auto& [name, text] : std::map<std::string, std::string>{
           {"DIRECTORY", options.directory},
           {"--superlink", options.link.address},
           {"--profile", options.profile},
           {"--data", options.data}}) {
    if (text.empty()) {
      throw Misused(name + " is missing.");
    }
  }
  if (!options.link.is_secure && (options.key || !options.link.root_certificates.empty())) {
    throw Misused("Certificates and a node's key need TLS; leave --insecure out.");
  }
  return options;
}

// Return what the loss is a mean over: of one label an example there is no doubt.
lola::MeanOver mean_over_of(const Options& options, const lola::Manifest& manifest) {
  for (std::size_t i = manifest.num_values(); i < manifest.inputs.size(); ++i) {
    const lola::ArraySpec& spec = manifest.inputs[i];
    if (spec.name == "labels" && spec.shape.size() > 1 && !options.mean_over) {
      throw lola::Refusal(
          "Each token has a label; say what the loss is a mean over: --mean-over "
          "next-tokens for a language model, tokens where each token has its own.");
    }
  }
  return options.mean_over.value_or(lola::MeanOver::kExamples);
}

// Join, work, and join anew where the SuperLink has forgotten this node.
void stay(const Options& options, lola::Device& device) {
  int failures = 0;
  while (!lola::is_stopping()) {
    try {
      // With a key of its own a node is registered by the SuperLink's owner.
      const lola::NodeKey key =
          options.key ? lola::NodeKey::read(*options.key) : lola::NodeKey::made();
      const lola::Node node(options.link, key, !options.key);
      lola::log_line("Node " + std::to_string(node.id()) + " is there.");
      failures = 0;
      lola::Fleet fleet(options.link, key);
      lola::serve(fleet, node, device);
    } catch (const lola::Stopped&) {
      return;
    } catch (const lola::NotKnown& error) {
      lola::log_line(std::string(error.what()) + "; joining anew");
    } catch (const lola::RunIsOver& error) {
      lola::log_line(std::string(error.what()) + "; joining anew");
    } catch (const lola::Refused& error) {
      lola::log_line(std::string(error.what()) + "; joining anew");
    }
    lola::wait_s(lola::backoff_s(++failures));
  }
}

int run(const Options& options) {
#ifdef M_MMAP_THRESHOLD
  mallopt(M_MMAP_THRESHOLD, kMappedBytes);
#endif
  const lola::Manifest manifest = lola::read_manifest(options.directory);
  const lola::Examples examples(
      options.data, manifest, options.seed, mean_over_of(options, manifest));
  lola::Device device(
      manifest, examples, lola::read_profile(options.profile, manifest, examples));
  lola::stop_at_signals();
  if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK) {
    throw std::runtime_error("libcurl cannot be used.");
  }
  stay(options, device);
  lola::log_line("The device has left.");
  curl_global_cleanup();
  return 0;
}

} // namespace

int main(int count, char** words) {
  try {
    return run(options_in({words + 1, words + count}));
  } catch (const Misused& error) {
    std::cerr << "error: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
