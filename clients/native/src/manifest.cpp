#include "manifest.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>

#include "digest.h"
#include "refusal.h"

namespace lola {
namespace {

using nlohmann::json;

constexpr int64_t kVersion = 1;
constexpr char kFormat[] = "lola-flwr-export";

ArraySpec array_of(const json& value) {
  ArraySpec spec{
      value.at("name").get<std::string>(),
      value.at("shape").get<std::vector<int64_t>>(),
      value.at("dtype").get<std::string>()};
  spec.num_bytes(); // refuses what no array has
  return spec;
}

FileSpec file_of(const json& value) {
  FileSpec spec{
      value.at("name").get<std::string>(),
      value.at("num_bytes").get<uint64_t>(),
      value.at("sha256").get<std::string>()};
  const std::filesystem::path path(spec.name);
  if (spec.name.empty() || path.filename() != path || spec.name == "." ||
      spec.name == "..") {
    throw Refusal("'" + spec.name + "' is no name of a file beside the manifest.");
  }
  return spec;
}

ProgramSpec program_of(const json& value) {
  ProgramSpec program{
      value.at("block").get<int64_t>(),
      file_of(value.at("file")),
      {},
      value.at("arena_bytes").get<uint64_t>()};
  program.outputs.push_back({"loss", {}, "<f4"});
  for (const json& gradient : value.at("gradients")) {
    program.outputs.push_back(array_of(gradient));
  }
  return program;
}

void check_file(const Manifest& manifest, const FileSpec& file) {
  const std::string path = manifest.path_of(file);
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) {
    throw Refusal(
        path + " cannot be read (" + error.message() +
        "); copy the whole directory.");
  }
  if (size != file.num_bytes || sha256_of_file(path) != file.sha256) {
    throw Refusal(
        path +
        " is not the file that was exported: its size or SHA-256 differs from the "
        "manifest's; copy it anew, or export anew.");
  }
}

// Values lie one behind the other in what a device is sent, without a gap.
void check_offsets(const Manifest& manifest) {
  uint64_t end = 0;
  for (const std::size_t i : manifest.in_order_of_names()) {
    if (manifest.offsets_bytes[i] != end || manifest.inputs[i].dtype != "<f4") {
      throw Refusal("its values are not where its names put them; export anew.");
    }
    end += manifest.inputs[i].num_bytes();
  }
}

Manifest parsed(const std::string& directory, const json& found) {
  Manifest manifest;
  manifest.directory = directory;
  manifest.base_fingerprint = found.at("base_fingerprint").get<std::string>();
  manifest.runtime = found.at("runtime").get<std::string>();
  manifest.model = found.at("model").get<std::string>();
  manifest.head = found.at("head").get<std::vector<std::string>>();
  manifest.batch_size = found.at("batch_size").get<int64_t>();
  manifest.takes_fewer_examples = found.at("takes_fewer_examples").get<bool>();
  manifest.takes_fewer_tokens = found.at("takes_fewer_tokens").get<bool>();
  for (const json& value : found.at("values")) {
    manifest.inputs.push_back(array_of(value));
    manifest.offsets_bytes.push_back(value.at("offset_bytes").get<uint64_t>());
  }
  for (const json& value : found.at("batch")) {
    manifest.inputs.push_back(array_of(value));
    const json& fill = value.at("fill");
    manifest.fills.push_back(
        fill.is_null() ? std::nullopt : std::optional(fill.get<double>()));
  }
  check_offsets(manifest);
  manifest.frozen = file_of(found.at("frozen"));
  for (const json& value : found.at("programs")) {
    manifest.programs.push_back(program_of(value));
  }
  return manifest;
}

} // namespace

std::size_t item_bytes(const std::string& dtype) {
  if (dtype == "<f4" || dtype == "<i4") {
    return 4;
  }
  if (dtype == "<f8" || dtype == "<i8") {
    return 8;
  }
  if (dtype == "|b1") {
    return 1;
  }
  throw Refusal("Arrays of type '" + dtype + "' do not go into programs.");
}

std::size_t ArraySpec::num_bytes() const {
  std::size_t bytes = item_bytes(dtype);
  for (const int64_t size : shape) {
    const auto count = static_cast<std::size_t>(size);
    if (size < 0 ||
        (count > 0 && bytes > std::numeric_limits<std::size_t>::max() / count)) {
      throw Refusal("The shape of '" + name + "' is none.");
    }
    bytes *= count;
  }
  return bytes;
}

std::string Manifest::path_of(const FileSpec& file) const {
  return (std::filesystem::path(directory) / file.name).string();
}

std::vector<std::size_t> Manifest::in_order_of_names() const {
  std::vector<std::size_t> places(offsets_bytes.size());
  std::iota(places.begin(), places.end(), std::size_t{0});
  std::sort(places.begin(), places.end(), [&](std::size_t one, std::size_t other) {
    return inputs[one].name < inputs[other].name;
  });
  return places;
}

const ProgramSpec& Manifest::program(int64_t block) const {
  const auto found =
      std::find_if(programs.begin(), programs.end(), [&](const ProgramSpec& each) {
        return block == each.block;
      });
  if (found == programs.end()) {
    throw Refusal(
        "No program trains block " + std::to_string(block) + " of '" + model +
        "'; export it, too: lola-flwr export --blocks " + std::to_string(block) + ".");
  }
  return *found;
}

Manifest read_manifest(const std::string& directory) {
  const std::string path =
      (std::filesystem::path(directory) / "manifest.json").string();
  std::ifstream file(path);
  if (!file) {
    throw Refusal(
        path +
        " cannot be read; name a directory that lola-flwr export has written.");
  }
  const json found = json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (found.is_discarded()) {
    throw Refusal(path + " is no JSON; export anew.");
  }
  if (!found.is_object() || found.value("format", json()) != kFormat) {
    throw Refusal(path + " is no manifest of lola-flwr export.");
  }
  const json version = found.value("version", json());
  if (version != kVersion) {
    throw Refusal(
        path + " is of version " + version.dump() + ", and this program reads version " +
        std::to_string(kVersion) +
        "; use the release that exported it, or export anew.");
  }
  Manifest manifest;
  try {
    manifest = parsed(directory, found);
  } catch (const json::exception& error) {
    throw Refusal(path + " is damaged (" + error.what() + "); export anew.");
  } catch (const Refusal& error) {
    throw Refusal(path + " is damaged: " + error.what());
  }
  check_file(manifest, manifest.frozen);
  for (const ProgramSpec& program : manifest.programs) {
    check_file(manifest, program.file);
  }
  return manifest;
}

} // namespace lola
