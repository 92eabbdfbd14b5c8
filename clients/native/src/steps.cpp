#include "steps.h"

#include <executorch/extension/tensor/tensor.h>

#include "refusal.h"

namespace lola {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

ScalarType scalar_type(const std::string& dtype) {
  if (dtype == "<f4") {
    return ScalarType::Float;
  }
  if (dtype == "<f8") {
    return ScalarType::Double;
  }
  if (dtype == "<i4") {
    return ScalarType::Int;
  }
  if (dtype == "<i8") {
    return ScalarType::Long;
  }
  return ScalarType::Bool;
}

void require(Error error, const std::string& what) {
  if (error == Error::Ok) {
    return;
  }
  const std::string reason = what + ": ExecuTorch's error " +
      std::to_string(static_cast<unsigned>(error)) + " (" +
      executorch::runtime::to_string(error) + ")";
  if (error == Error::MemoryAllocationFailed) {
    throw OutOfMemory(reason);
  }
  throw Refusal(reason + "; export anew with the release that runs it.");
}

} // namespace

Steps::Steps(const Manifest& manifest) : manifest_(manifest) {
  for (const ArraySpec& spec : manifest.inputs) {
    inputs_.emplace_back(spec.num_bytes());
  }
}

std::vector<Outgoing> Steps::run(const ProgramSpec& program) {
  const std::string path = manifest_.path_of(program.file);
  outputs_.clear();
  if (block_ != program.block) {
    module_.reset(); // first: two programs would be in memory
    // Mapped, not read: of the frozen weights that a step looks up little is touched.
    module_ = std::make_unique<Module>(
        path, manifest_.path_of(manifest_.frozen), Module::LoadMode::Mmap);
    block_ = -1;
    require(module_->load_forward(), path);
    block_ = program.block;
  }
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const ArraySpec& spec = manifest_.inputs[i];
    tensors.push_back(executorch::extension::from_blob(
        inputs_[i].data(),
        {spec.shape.begin(), spec.shape.end()},
        scalar_type(spec.dtype)));
    values.emplace_back(*tensors.back());
  }
  auto found = module_->forward(values);
  require(found.error(), path);
  outputs_ = std::move(*found);
  if (outputs_.size() != program.outputs.size()) {
    throw Refusal(path + " returns other arrays than its manifest says; export anew.");
  }
  std::vector<Outgoing> outgoing;
  for (std::size_t i = 0; i < outputs_.size(); ++i) {
    const ArraySpec& spec = program.outputs[i];
    if (!outputs_[i].isTensor() ||
        outputs_[i].toTensor().nbytes() != spec.num_bytes() ||
        outputs_[i].toTensor().scalar_type() != scalar_type(spec.dtype)) {
      throw Refusal(path + " returns another '" + spec.name + "' than its manifest says; export anew.");
    }
    outgoing.push_back({spec, outputs_[i].toTensor().const_data_ptr()});
  }
  return outgoing;
}

} // namespace lola
