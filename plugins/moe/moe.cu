#include "moe/moe.h"

#include "moe/moe_kernels.cuh"
#include "moe/moe_mma_kernels.cuh"

namespace qwenforge
{
namespace
{

using namespace moe;

constexpr int64_t kChunkTokens = 512;
constexpr size_t kAlignment = 256; // of the parts of the workspace

// The workspace of one chunk. Where `base` is null only the size counts.
struct Workspace
{
    Routing routing{};
    void* hidden{nullptr};
    float* partial{nullptr};
    size_t bytes{0};

    Workspace(MoeShape const& shape, void* base) noexcept
    {
        int64_t const tokens = shape.tokens < kChunkTokens ? shape.tokens : kChunkTokens;
        int32_t const slots = shape.topK + shape.numSharedExperts;
        int64_t const pairs = tokens * slots;
        routing.tokens = static_cast<int32_t>(tokens);
        routing.experts = shape.numExperts;
        routing.sharedExperts = shape.numSharedExperts;
        routing.topK = shape.topK;
        routing.slots = slots;
        routing.normalize = shape.normalizeTopK;
        routing.ids = take<int32_t>(base, pairs);
        routing.weights = take<float>(base, pairs);
        routing.counts = take<int32_t>(base, shape.numExperts + shape.numSharedExperts);
        routing.pairAt = take<int32_t>(base, pairs);
        routing.positionOf = take<int32_t>(base, pairs);
        hidden = take<uint16_t>(base, pairs * shape.intermediateSize);
        partial = take<float>(base, pairs * shape.hiddenSize);
    }

private:
    template <typename T>
    T* take(void* base, int64_t count) noexcept
    {
        size_t const offset = bytes;
        bytes += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
        return base == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<unsigned char*>(base) + offset);
    }
};

bool isValid(MoeShape const& shape) noexcept
{
    return shape.tokens >= 0 && shape.hiddenSize >= 8 && shape.hiddenSize % 8 == 0 && shape.intermediateSize >= 8
        && shape.intermediateSize % 8 == 0 && shape.numExperts >= 1 && shape.numExperts <= kMaxExperts
        && shape.numSharedExperts >= 0 && shape.numSharedExperts <= kMaxSharedExperts && shape.topK >= 1
        && shape.topK <= kMaxTopK && shape.topK <= shape.numExperts;
}

bool areValid(MoeShape const& shape, MoeTensors const& tensors) noexcept
{
    return isAddress(tensors.hiddenStates) && isAddress(tensors.routerLogits) && isAddress(tensors.gateUpWeights)
        && isAddress(tensors.downWeights) && isAddress(tensors.output)
        && (shape.numSharedExperts == 0 || isAddress(tensors.sharedGateLogits));
}

unsigned blocks(int64_t count, int64_t each) noexcept
{
    return static_cast<unsigned>(ceilDiv(count, each));
}

// Where the tensors of one chunk begin.
template <typename T>
struct Chunk
{
    T const* states;
    T const* logits;
    T const* gates;
    T const* gateUp;
    T const* down;
    T* hidden;
    T* output;

    Chunk(MoeShape const& shape, MoeTensors const& tensors, int64_t first, Workspace const& space)
        : states(static_cast<T const*>(tensors.hiddenStates) + first * shape.hiddenSize)
        , logits(static_cast<T const*>(tensors.routerLogits) + first * shape.numExperts)
        , gates(shape.numSharedExperts == 0 ? nullptr : static_cast<T const*>(tensors.sharedGateLogits) + first)
        , gateUp(static_cast<T const*>(tensors.gateUpWeights))
        , down(static_cast<T const*>(tensors.downWeights))
        , hidden(static_cast<T*>(space.hidden))
        , output(static_cast<T*>(tensors.output) + first * shape.hiddenSize)
    {
    }
};

// The most tiles of `size` positions that the experts can need, however the tokens are routed.
unsigned mostTiles(Routing const& routing, int32_t size) noexcept
{
    int64_t const pairs = static_cast<int64_t>(routing.tokens) * routing.slots;
    int64_t const experts = routing.experts + routing.sharedExperts;
    return static_cast<unsigned>(pairs / size + (pairs < experts ? pairs : experts));
}

template <typename T>
void projectPlain(MoeShape const& shape, Chunk<T> const& chunk, Workspace const& space, cudaStream_t stream)
{
    unsigned const tiles = mostTiles(space.routing, kTilePairs);
    dim3 const threads(kTileThreads);
    QWENFORGE_LAUNCH(projectUp<T>, dim3(tiles, blocks(shape.intermediateSize, kTileRows / 2)), threads, stream,
        space.routing, chunk.states, chunk.gateUp, shape.hiddenSize, shape.intermediateSize, chunk.hidden);
    QWENFORGE_LAUNCH(projectDown<T>, dim3(tiles, blocks(shape.hiddenSize, kTileRows)), threads, stream, space.routing,
        static_cast<T const*>(chunk.hidden), chunk.down, shape.hiddenSize, shape.intermediateSize, space.partial);
}

template <typename T, int32_t kTokens>
void projectMatrix(MoeShape const& shape, Chunk<T> const& chunk, Workspace const& space, cudaStream_t stream)
{
    unsigned const tiles = mostTiles(space.routing, kTokens);
    dim3 const threads(kMmaThreads);
    QWENFORGE_LAUNCH((projectUpMma<T, kTokens>), dim3(tiles, blocks(shape.intermediateSize, kMmaRows / 2)), threads,
        stream, space.routing, chunk.states, chunk.gateUp, shape.hiddenSize, shape.intermediateSize, chunk.hidden);
    QWENFORGE_LAUNCH((projectDownMma<T, kTokens>), dim3(tiles, blocks(shape.hiddenSize, kMmaRows)), threads, stream,
        space.routing, static_cast<T const*>(chunk.hidden), chunk.down, shape.hiddenSize, shape.intermediateSize,
        space.partial);
}

template <typename T>
cudaError_t launchChunk(MoeShape const& shape, MoeTensors const& tensors, int64_t first, Workspace const& space,
    MoePath path, cudaStream_t stream)
{
    Routing const& routing = space.routing;
    auto const experts = static_cast<unsigned>(routing.experts + routing.sharedExperts);
    Chunk<T> const chunk(shape, tensors, first, space);
    QWENFORGE_LAUNCH(routeTokens<T>, dim3(blocks(routing.tokens, kRouteWarps)), dim3(kRouteWarps * kWarpSize), stream,
        routing, chunk.logits, chunk.gates);
    QWENFORGE_LAUNCH(countPairs, dim3(experts), dim3(kSortThreads), stream, routing);
    QWENFORGE_LAUNCH(placePairs, dim3(experts), dim3(kSortThreads), stream, routing);
    bool const few = static_cast<int64_t>(routing.tokens) * routing.slots <= static_cast<int64_t>(experts) * kFewTokens;
    switch (path)
    {
    case MoePath::kPlain: projectPlain<T>(shape, chunk, space, stream); break;
    case MoePath::kMatrix:
        few ? projectMatrix<T, kFewTokens>(shape, chunk, space, stream)
            : projectMatrix<T, kManyTokens>(shape, chunk, space, stream);
        break;
    default: return cudaErrorInvalidValue;
    }
    QWENFORGE_LAUNCH(combine<T>,
        dim3(static_cast<unsigned>(routing.tokens), blocks(shape.hiddenSize, kCombineThreads)), dim3(kCombineThreads),
        stream, routing, static_cast<float const*>(space.partial), shape.hiddenSize, chunk.output);
    return cudaGetLastError();
}

} // namespace

size_t moeWorkspaceBytes(MoeShape const& shape)
{
    return isValid(shape) ? Workspace(shape, nullptr).bytes : 0;
}

cudaError_t launchMoe(MoeShape const& shape, ElementType type, MoeTensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream, MoePath path)
{
    if (!isValid(shape))
    {
        return cudaErrorInvalidValue;
    }
    if (shape.tokens == 0)
    {
        return cudaSuccess;
    }
    if (!areValid(shape, tensors) || !isAddress(workspace) || workspaceBytes < moeWorkspaceBytes(shape))
    {
        return cudaErrorInvalidValue;
    }
    for (int64_t first = 0; first < shape.tokens; first += kChunkTokens)
    {
        MoeShape chunk = shape;
        chunk.tokens = shape.tokens - first; // cut to the chunk by Workspace
        Workspace const space(chunk, workspace);
        cudaError_t const error = type == ElementType::kFloat16
            ? launchChunk<__half>(chunk, tensors, first, space, path, stream)
            : launchChunk<__nv_bfloat16>(chunk, tensors, first, space, path, stream);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    return cudaSuccess;
}

} // namespace qwenforge
