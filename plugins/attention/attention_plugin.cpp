#include "attention/attention_plugin.h"

#include "attention/attention.h"

namespace qwenforge
{
namespace
{

using namespace attention_spec;

AttentionShape shapeOf(Contract const& contract, Binding const& binding) noexcept
{
    Attributes const attributes = typed(contract.attributes());
    AttentionShape shape{};
    shape.batch = binding.sizes[Size::kBatch];
    shape.sequence = binding.sizes[Size::kSequence];
    shape.capacity = binding.sizes[Size::kCapacity];
    shape.positions = binding.sizes[Size::kPositions];
    shape.numHeads = attributes.numHeads;
    shape.numKeyValueHeads = attributes.numKeyValueHeads;
    shape.headSize = attributes.headSize;
    shape.slidingWindow = attributes.slidingWindow;
    shape.scale = attributes.scale;
    return shape;
}

} // namespace

size_t AttentionPlugin::workspaceBytes(Binding const& binding) const noexcept
{
    return attentionWorkspaceBytes(shapeOf(contract(), binding));
}

bool AttentionPlugin::checkSizes(Binding const& binding, Message& problem) const noexcept
{
    int64_t const sequence = binding.sizes[Size::kSequence];
    int64_t const capacity = binding.sizes[Size::kCapacity];
    if (sequence > capacity)
    {
        return problem.set("%" PRId64 " new tokens do not fit into a cache of %" PRId64, sequence, capacity);
    }
    if (sequence > 0 && binding.sizes[Size::kPositions] == 0)
    {
        return problem.set("the tables cos and sin are empty");
    }
    return true;
}

cudaError_t AttentionPlugin::launch(Binding const& binding, Tensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream) const noexcept
{
    AttentionTensors attention{};
    attention.query = tensors.inputs[Input::kQuery];
    attention.key = tensors.inputs[Input::kKey];
    attention.value = tensors.inputs[Input::kValue];
    attention.cos = tensors.inputs[Input::kCos];
    attention.sin = tensors.inputs[Input::kSin];
    attention.positionIds = static_cast<int32_t const*>(tensors.inputs[Input::kPositionIds]);
    attention.cachePosition = static_cast<int32_t const*>(tensors.inputs[Input::kCachePosition]);
    attention.keyCache = tensors.outputs[Output::kPresentKey];
    attention.valueCache = tensors.outputs[Output::kPresentValue];
    attention.output = tensors.outputs[Output::kOutput];
    return launchAttention(
        shapeOf(contract(), binding), elementType(binding.types[0]), attention, workspace, workspaceBytes, stream);
}

} // namespace qwenforge
