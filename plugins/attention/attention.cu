#include "attention/attention.h"

#include "attention/attention_kernels.cuh"

namespace qwenforge
{
namespace
{

using namespace attention;

bool isValid(AttentionShape const& shape) noexcept
{
    return shape.batch >= 0 && shape.sequence >= 0 && shape.capacity >= 0 && shape.positions >= 0
        && shape.numKeyValueHeads >= 1 && shape.numHeads >= 1 && shape.numHeads % shape.numKeyValueHeads == 0
        && shape.headSize >= 8 && shape.headSize <= kMaxHeadSize && shape.headSize % 8 == 0 && shape.slidingWindow >= 0;
}

bool areValid(AttentionTensors const& tensors) noexcept
{
    return isAddress(tensors.query) && isAddress(tensors.key) && isAddress(tensors.value) && isAddress(tensors.cos)
        && isAddress(tensors.sin) && isAddress(tensors.positionIds) && isAddress(tensors.cachePosition)
        && isAddress(tensors.keyCache) && isAddress(tensors.valueCache) && isAddress(tensors.output);
}

template <typename T>
cudaError_t launch(AttentionShape const& shape, AttentionTensors const& tensors, void* workspace, cudaStream_t stream)
{
    Call<T> call{};
    call.sequence = shape.sequence;
    call.capacity = shape.capacity;
    call.positions = shape.positions;
    call.heads = shape.numHeads;
    call.keyValueHeads = shape.numKeyValueHeads;
    call.headSize = shape.headSize;
    call.window = shape.slidingWindow;
    call.scale = shape.scale;
    call.query = static_cast<T const*>(tensors.query);
    call.key = static_cast<T const*>(tensors.key);
    call.value = static_cast<T const*>(tensors.value);
    call.cos = static_cast<T const*>(tensors.cos);
    call.sin = static_cast<T const*>(tensors.sin);
    call.positionIds = tensors.positionIds;
    call.cachePosition = tensors.cachePosition;
    call.keyCache = static_cast<T*>(tensors.keyCache);
    call.valueCache = static_cast<T*>(tensors.valueCache);
    call.rotated = static_cast<T*>(workspace);
    call.output = static_cast<T*>(tensors.output);

    auto const tokens = static_cast<unsigned>(shape.batch * shape.sequence);
    dim3 const rows(tokens * static_cast<unsigned>(shape.numHeads));
    dim3 const threads(kAttendThreads);
    QWENFORGE_LAUNCH(rotateAndAppend<T>, dim3(tokens), dim3(kAppendThreads), stream, call);
    if (shape.headSize <= 2 * kWarpSize)
    {
        QWENFORGE_LAUNCH((attend<T, 2>), rows, threads, stream, call);
    }
    else if (shape.headSize <= 4 * kWarpSize)
    {
        QWENFORGE_LAUNCH((attend<T, 4>), rows, threads, stream, call);
    }
    else
    {
        QWENFORGE_LAUNCH((attend<T, kMaxHeadSize / kWarpSize>), rows, threads, stream, call);
    }
    return cudaGetLastError();
}

} // namespace

size_t attentionWorkspaceBytes(AttentionShape const& shape)
{
    return isValid(shape) ? sizeof(uint16_t) * static_cast<size_t>(shape.batch * shape.sequence)
            * static_cast<size_t>(shape.numHeads) * static_cast<size_t>(shape.headSize)
                          : 0;
}

cudaError_t launchAttention(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors,
    void* workspace, size_t workspaceBytes, cudaStream_t stream)
{
    if (!isValid(shape) || shape.batch * shape.sequence * shape.numHeads > kMaxGrid)
    {
        return cudaErrorInvalidValue;
    }
    if (shape.batch == 0 || shape.sequence == 0)
    {
        return cudaSuccess;
    }
    if (!areValid(tensors) || !isAddress(workspace) || workspaceBytes < attentionWorkspaceBytes(shape))
    {
        return cudaErrorInvalidValue;
    }
    return type == ElementType::kFloat16 ? launch<__half>(shape, tensors, workspace, stream)
                                         : launch<__nv_bfloat16>(shape, tensors, workspace, stream);
}

} // namespace qwenforge
