#include "attention/attention.h"

#include "attention/append.cuh"
#include "attention/launch.h"
#include "attention/plain.cuh"
#include "common/current_device.h"

namespace qwenforge
{
namespace
{

using namespace attention;

constexpr size_t kPartBytes = 256; // parts of the workspace begin at multiples of it
constexpr int32_t kOperandBytes = 2;

bool areValid(AttentionShape const& shape, AttentionTensors const& tensors) noexcept
{
    bool const quantized = shape.cacheType != CacheType::kFloat;
    return isAddress(tensors.query) && (shape.packedQkv != 0 || (isAddress(tensors.key) && isAddress(tensors.value)))
        && isAddress(tensors.cos) && isAddress(tensors.sin) && isAddress(tensors.positionIds)
        && isAddress(tensors.cachePosition) && isAddress(tensors.keyCache) && isAddress(tensors.valueCache)
        && isAddress(tensors.output) && (shape.qkNorm == 0 || (isAddress(tensors.queryNorm) && isAddress(tensors.keyNorm)))
        && (!quantized || (isAddress(tensors.keyScales) && isAddress(tensors.valueScales)))
        && (shape.pageSize == 0 || isAddress(tensors.pageTable));
}

Places placesOf(AttentionShape const& shape, int32_t const* pageTable) noexcept
{
    Places places{};
    places.capacity = shape.capacity;
    places.pages = shape.cacheRows;
    places.pageTokens = shape.pageSize == 0 ? shape.capacity : shape.pageSize;
    if (shape.pageSize != 0)
    {
        places.pageTable = pageTable;
        places.rowPages = shape.capacity / shape.pageSize;
        while (1 << places.shift < shape.pageSize)
        {
            ++places.shift;
        }
    }
    return places;
}

template <CacheType kType, typename T>
Call<kType, T> callOf(
    AttentionShape const& shape, ElementType type, AttentionTensors const& tensors, void* rotated) noexcept
{
    using Element = typename Call<kType, T>::Element;
    int64_t const keyValueWidth = static_cast<int64_t>(shape.numKeyValueHeads) * shape.headSize;
    int64_t const queryWidth = static_cast<int64_t>(shape.numHeads) * shape.headSize;
    bool const packed = shape.packedQkv != 0;
    Call<kType, T> call{};
    call.batch = shape.batch;
    call.sequence = shape.sequence;
    call.positions = shape.positions;
    call.heads = shape.numHeads;
    call.keyValueHeads = shape.numKeyValueHeads;
    call.group = shape.numHeads / shape.numKeyValueHeads;
    call.headSize = shape.headSize;
    call.window = shape.slidingWindow;
    call.scale = shape.scale;
    call.epsilon = shape.epsilon;
    call.query = static_cast<T const*>(tensors.query);
    call.key = packed ? call.query + queryWidth : static_cast<T const*>(tensors.key);
    call.value = packed ? call.query + queryWidth + keyValueWidth : static_cast<T const*>(tensors.value);
    call.queryStride = packed ? queryWidth + 2 * keyValueWidth : queryWidth;
    call.keyValueStride = packed ? call.queryStride : keyValueWidth;
    call.cos = static_cast<T const*>(tensors.cos);
    call.sin = static_cast<T const*>(tensors.sin);
    call.positionIds = tensors.positionIds;
    call.cachePosition = tensors.cachePosition;
    call.queryNorm = shape.qkNorm != 0 ? static_cast<T const*>(tensors.queryNorm) : nullptr;
    call.keyNorm = shape.qkNorm != 0 ? static_cast<T const*>(tensors.keyNorm) : nullptr;
    call.keyScales = kType == CacheType::kFloat ? nullptr : tensors.keyScales;
    call.valueScales = kType == CacheType::kFloat ? nullptr : tensors.valueScales;
    call.places = placesOf(shape, tensors.pageTable);
    call.keyCache = static_cast<Element*>(tensors.keyCache);
    call.valueCache = static_cast<Element*>(tensors.valueCache);
    call.rotated = static_cast<typename Call<kType, T>::Operand*>(rotated);
    call.output = tensors.output;
    call.outputType = type;
    return call;
}

// The first part of the workspace.
size_t rotatedBytes(AttentionShape const& shape) noexcept
{
    return static_cast<size_t>(shape.batch * shape.sequence * shape.numHeads) * static_cast<size_t>(shape.headSize)
        * kOperandBytes;
}

// Where the second part begins. Between the two there is always something that belongs to neither, so that a sanitizer
// notices who goes too far.
size_t partialsAt(AttentionShape const& shape) noexcept
{
    return (rotatedBytes(shape) / kPartBytes + 1) * kPartBytes;
}

template <CacheType kType, typename T>
void launchPlain(Call<kType, T> const& call, cudaStream_t stream)
{
    dim3 const queries(static_cast<unsigned>(call.batch * call.sequence * call.heads));
    dim3 const threads(kPlainThreads);
    if (call.headSize <= 2 * kWarpSize)
    {
        QWENFORGE_LAUNCH((attendPlain<kType, T, 2>), queries, threads, stream, call);
    }
    else if (call.headSize <= 4 * kWarpSize)
    {
        QWENFORGE_LAUNCH((attendPlain<kType, T, 4>), queries, threads, stream, call);
    }
    else
    {
        QWENFORGE_LAUNCH((attendPlain<kType, T, kMaxHeadSize / kWarpSize>), queries, threads, stream, call);
    }
}

template <CacheType kType, typename T>
cudaError_t launch(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors, void* workspace,
    AttentionPath path, cudaStream_t stream)
{
    QWENFORGE_ALLOW(workspace, rotatedBytes(shape));
    QWENFORGE_FORBID(static_cast<unsigned char*>(workspace) + rotatedBytes(shape), partialsAt(shape) - rotatedBytes(shape));
    int64_t const vectors = shape.batch * shape.sequence * (shape.numHeads + 2 * shape.numKeyValueHeads);
    Call<kType, T> const appended = callOf<kType, T>(shape, type, tensors, workspace);
    QWENFORGE_LAUNCH((rotateAndAppend<kType, T>), dim3(static_cast<unsigned>(ceilDiv(vectors, kAppendWarps))),
        dim3(kAppendThreads), stream, appended);
    using Operand = typename CacheFormat<kType, T>::Operand;
    Call<kType, Operand> const call = callOf<kType, Operand>(shape, type, tensors, workspace);
    unsigned char* const partials = static_cast<unsigned char*>(workspace) + partialsAt(shape);
    switch (path)
    {
    case AttentionPath::kSplit: return launchSplit(call, splitsOf(shape), partials, stream);
    case AttentionPath::kTiled: return launchTiled(call, stream);
    default: launchPlain(call, stream); return cudaGetLastError();
    }
}

template <typename T>
cudaError_t launchOf(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors, void* workspace,
    AttentionPath path, cudaStream_t stream)
{
    switch (shape.cacheType)
    {
    case CacheType::kFloat8: return launch<CacheType::kFloat8, T>(shape, type, tensors, workspace, path, stream);
    case CacheType::kInt8: return launch<CacheType::kInt8, T>(shape, type, tensors, workspace, path, stream);
    default: return launch<CacheType::kFloat, T>(shape, type, tensors, workspace, path, stream);
    }
}

bool hasPath(AttentionShape const& shape, AttentionPath path) noexcept
{
    bool const hasTiles = shape.headSize == 64 || shape.headSize == 128;
    switch (path)
    {
    case AttentionPath::kAuto:
    case AttentionPath::kPlain: return true;
    case AttentionPath::kSplit: return hasTiles && groupRows(shape) <= kMostSplitRows;
    case AttentionPath::kTiled: return hasTiles;
    }
    return false;
}

} // namespace

AttentionPath chosenPath(AttentionShape const& shape)
{
    if (!hasPath(shape, AttentionPath::kTiled))
    {
        return AttentionPath::kPlain;
    }
    // A few queries fill a tile of 16 at best; more of them, where tiles of 128 would leave most of the GPU idle.
    int64_t const tiles = ceilDiv(groupRows(shape), kTiledRows) * shape.numKeyValueHeads * shape.batch;
    bool const fewQueries = groupRows(shape) <= kSplitRows;
    bool const fewTiles = groupRows(shape) <= kMostSplitRows && 4 * tiles <= multiprocessors();
    return fewQueries || fewTiles ? AttentionPath::kSplit : AttentionPath::kTiled;
}

bool checkAttention(AttentionShape const& shape, int32_t sm, Message& problem)
{
    if (shape.batch < 0 || shape.sequence < 0 || shape.capacity < 0 || shape.cacheRows < 0 || shape.positions < 0)
    {
        return problem.set("a size is negative");
    }
    if (shape.numKeyValueHeads < 1 || shape.numHeads < 1 || shape.numHeads % shape.numKeyValueHeads != 0)
    {
        return problem.set("num_heads is %d, no multiple of num_key_value_heads, %d", shape.numHeads, shape.numKeyValueHeads);
    }
    if (shape.headSize < 8 || shape.headSize > kMaxHeadSize || shape.headSize % 8 != 0)
    {
        return problem.set("head_size is %d, no multiple of 8 up to %d", shape.headSize, kMaxHeadSize);
    }
    if (shape.slidingWindow < 0)
    {
        return problem.set("sliding_window is %d, below 0", shape.slidingWindow);
    }
    if (shape.pageSize != 0
        && (shape.pageSize < 16 || shape.pageSize > 4096 || (shape.pageSize & (shape.pageSize - 1)) != 0))
    {
        return problem.set("page_size is %d, no power of two within 16 and 4096", shape.pageSize);
    }
    if (shape.pageSize == 0 ? shape.cacheRows != shape.batch : shape.capacity % shape.pageSize != 0)
    {
        return shape.pageSize == 0
            ? problem.set("the caches have %lld rows for a batch of %lld", static_cast<long long>(shape.cacheRows),
                  static_cast<long long>(shape.batch))
            : problem.set("a row of %lld tokens is no number of pages", static_cast<long long>(shape.capacity));
    }
    if (shape.capacity > kMaxCapacity)
    {
        return problem.set("a row of the caches has %lld tokens, more than %lld", static_cast<long long>(shape.capacity),
            static_cast<long long>(kMaxCapacity));
    }
    if (shape.batch * shape.sequence * (shape.numHeads + 2 * shape.numKeyValueHeads) > kMaxGrid || shape.batch > 65535)
    {
        return problem.set("%lld rows of %lld tokens are too many for one launch", static_cast<long long>(shape.batch),
            static_cast<long long>(shape.sequence));
    }
    if (shape.cacheType != CacheType::kFloat && shape.cacheType != CacheType::kFloat8 && shape.cacheType != CacheType::kInt8)
    {
        return problem.set("cache_type is %d, not one of 0 to 2", static_cast<int>(shape.cacheType));
    }
    if (shape.cacheType == CacheType::kFloat8 && sm > 0 && sm < 89)
    {
        return problem.set("FP8 caches need a GPU with SM 89 or newer, this one has SM %d: use an INT8 cache", sm);
    }
    return true;
}

size_t attentionWorkspaceBytes(AttentionShape const& shape)
{
    Message problem;
    return checkAttention(shape, /*sm=*/0, problem) ? partialsAt(shape) + partialBytes(shape) : 0;
}

cudaError_t launchAttention(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors,
    void* workspace, size_t workspaceBytes, cudaStream_t stream, AttentionPath path)
{
    Message problem;
    if (!checkAttention(shape, /*sm=*/0, problem))
    {
        return cudaErrorInvalidValue;
    }
    if (shape.batch == 0 || shape.sequence == 0)
    {
        return cudaSuccess;
    }
    if (!checkAttention(shape, currentSm(), problem) || path < AttentionPath::kAuto || path > AttentionPath::kTiled
        || !hasPath(shape, path))
    {
        return cudaErrorNotSupported;
    }
    if (!areValid(shape, tensors) || !isAddress(workspace) || workspaceBytes < attentionWorkspaceBytes(shape))
    {
        return cudaErrorInvalidValue;
    }
    AttentionPath const chosen = path == AttentionPath::kAuto ? chosenPath(shape) : path;
    return type == ElementType::kFloat16 ? launchOf<__half>(shape, type, tensors, workspace, chosen, stream)
                                         : launchOf<__nv_bfloat16>(shape, type, tensors, workspace, chosen, stream);
}

} // namespace qwenforge
