#include "attention/attention_op.h"

#include "attention/attention.h"
#include "common/current_device.h"

#include <cinttypes>

namespace qwenforge
{
namespace
{

using namespace attention_spec;

AttentionShape shapeOf(Contract const& contract, Binding const& binding) noexcept
{
    Attributes const attributes = typed(contract.attributes());
    bool const isPaged = attributes.pageSize != 0;
    AttentionShape shape{};
    shape.batch = binding.sizes[Size::kBatch];
    shape.sequence = binding.sizes[Size::kSequence];
    shape.capacity
        = isPaged ? binding.sizes[Size::kRowPages] * attributes.pageSize : binding.sizes[Size::kCapacity];
    shape.cacheRows = binding.sizes[Size::kCacheRows];
    shape.positions = binding.sizes[Size::kPositions];
    shape.numHeads = attributes.numHeads;
    shape.numKeyValueHeads = attributes.numKeyValueHeads;
    shape.headSize = attributes.headSize;
    shape.slidingWindow = attributes.slidingWindow;
    shape.pageSize = attributes.pageSize;
    shape.cacheType = static_cast<CacheType>(attributes.cacheType);
    shape.packedQkv = attributes.packedQkv;
    shape.qkNorm = attributes.qkNorm;
    shape.scale = attributes.scale;
    shape.epsilon = attributes.epsilon;
    return shape;
}

} // namespace

size_t AttentionOp::workspaceBytes(Contract const& contract, Binding const& binding) noexcept
{
    AttentionShape shape = shapeOf(contract, binding);
    if (shape.pageSize == 0)
    {
        // TensorRT bounds each tensor on its own: a profile may allow more rows of caches than of queries. The workspace
        // is that of the queries; checkSizes sees to it that a call has as many of both.
        shape.cacheRows = shape.batch;
    }
    return attentionWorkspaceBytes(shape);
}

bool AttentionOp::checkSizes(Contract const& contract, Binding const& binding, Message& problem) noexcept
{
    AttentionShape const shape = shapeOf(contract, binding);
    int64_t const slots = binding.sizes[Size::kCapacity];
    if (shape.pageSize != 0 && slots != shape.pageSize)
    {
        return problem.set("a page of the caches has %" PRId64 " tokens, but page_size is %d", slots, shape.pageSize);
    }
    if (!checkAttention(shape, currentSm(), problem))
    {
        return false;
    }
    if (shape.sequence > shape.capacity)
    {
        return problem.set("%" PRId64 " new tokens do not fit into a row of the caches, which has %" PRId64,
            shape.sequence, shape.capacity);
    }
    if (shape.sequence > 0 && shape.positions == 0)
    {
        return problem.set("the tables cos and sin are empty");
    }
    return true;
}

cudaError_t AttentionOp::launch(Contract const& contract, Binding const& binding, Tensors const& tensors,
    void* workspace, size_t workspaceBytes, cudaStream_t stream) noexcept
{
    AttentionTensors attention{};
    attention.query = tensors.inputs[Input::kQuery];
    attention.key = tensors.inputs[Input::kKey];
    attention.value = tensors.inputs[Input::kValue];
    attention.cos = tensors.inputs[Input::kCos];
    attention.sin = tensors.inputs[Input::kSin];
    attention.positionIds = static_cast<int32_t const*>(tensors.inputs[Input::kPositionIds]);
    attention.cachePosition = static_cast<int32_t const*>(tensors.inputs[Input::kCachePosition]);
    attention.queryNorm = tensors.inputs[Input::kQueryNorm];
    attention.keyNorm = tensors.inputs[Input::kKeyNorm];
    attention.keyScales = static_cast<float const*>(tensors.inputs[Input::kKeyScales]);
    attention.valueScales = static_cast<float const*>(tensors.inputs[Input::kValueScales]);
    attention.pageTable = static_cast<int32_t const*>(tensors.inputs[Input::kPageTable]);
    attention.keyCache = tensors.outputs[Output::kPresentKey];
    attention.valueCache = tensors.outputs[Output::kPresentValue];
    attention.output = tensors.outputs[Output::kOutput];
    return launchAttention(shapeOf(contract, binding), elementType(binding.types[0]), attention, workspace,
        workspaceBytes, stream);
}

} // namespace qwenforge
