// The host's part: checks a call, chooses its path, divides the workspace, and launches, chunk by chunk of 2048 tokens,
//
//     routing    routeFew, or routeTokens, countPairs and placePairs                       routing.cuh
//     products   [quantizeTokens,] projectUp, projectDown                                  experts.cuh
//                or gatherTokens, a grouped GEMM, activate, a grouped GEMM                 grouped.cuh, cutlass/
//     sum        combine                                                                   routing.cuh
//
// What the host does follows from the shape, the path and the device alone: how the tokens are routed is known on the
// device only, so that grids are as large as any routing can need, and blocks without a tile leave at once. A kernel reads
// what kernels before it wrote in the same call, on the same stream, and nothing of an earlier call.

#include "moe/moe.h"

#include "moe/cutlass/grouped_gemm.h"
#include "moe/experts.h"
#include "moe/grouped.cuh"
#include "moe/routing.cuh"
#include "moe/tactics/tactics.h"

namespace qwenforge
{
namespace
{

using namespace moe;

constexpr int64_t kChunkTokens = 2048;
constexpr size_t kAlignment = 256; // of the parts of the workspace

int32_t storedExperts(MoeShape const& shape) noexcept
{
    return shape.numLocalExperts + shape.numSharedExperts;
}

int32_t tileTokensOf(MoePath path, WeightType weights) noexcept
{
    return path == MoePath::kEight ? 8 : path == MoePath::kSixteen ? 16 : wideTokens(weights);
}

// The most tiles that the experts can need, however the tokens are routed: an expert of n pairs has at most
// n / tileTokens + 1 of them (rounded down) and none where n is 0, and no more experts have a pair than there are pairs.
int64_t mostTiles(int64_t pairs, int64_t experts, int32_t tileTokens) noexcept
{
    return pairs / tileTokens + (pairs < experts ? pairs : experts);
}

// The workspace of one chunk. Where `base` is null only the size counts.
struct Workspace
{
    Routing routing{};
    void* tokens{nullptr}; // E4M3
    void* hidden{nullptr};
    void* partial{nullptr}; // and before, the gathered tokens of kGrouped
    // Of kGrouped alone.
    void* gateUp{nullptr};
    void* gemm{nullptr};
    size_t gemmBytes{0};
    size_t bytes{0};

    Workspace(MoeShape const& shape, MoePath path, void* base) noexcept
    {
        int64_t const count = shape.tokens < kChunkTokens ? shape.tokens : kChunkTokens;
        int32_t const slots = shape.topK + shape.numSharedExperts;
        int32_t const stored = storedExperts(shape);
        int64_t const pairs = count * slots;
        bool const quantized = shape.weightType == WeightType::kFloat8;
        routing.tokens = static_cast<int32_t>(count);
        routing.experts = shape.numExperts;
        routing.firstLocal = shape.firstLocalExpert;
        routing.localExperts = shape.numLocalExperts;
        routing.sharedExperts = shape.numSharedExperts;
        routing.topK = shape.topK;
        routing.slots = slots;
        routing.normalize = shape.normalizeTopK != 0;
        routing.stored = take<int32_t>(base, pairs);
        routing.weights = take<float>(base, pairs);
        routing.counts = take<int32_t>(base, stored);
        routing.pairAt = take<int32_t>(base, pairs);
        routing.positionOf = take<int32_t>(base, pairs);
        routing.tiles = take<Tile>(base, mostTiles(pairs, stored, 8));
        routing.tileCount = take<int32_t>(base, 1);
        tokens = take<uint8_t>(base, quantized ? count * shape.hiddenSize : 0);
        hidden = take<uint8_t>(base, pairs * shape.intermediateSize * (quantized ? 1 : 2));
        partial = take<uint16_t>(base, pairs * shape.hiddenSize);
        if (path == MoePath::kGrouped)
        {
            gateUp = take<uint16_t>(base, pairs * 2 * shape.intermediateSize);
            gemmBytes = groupedGemmWorkspaceBytes(stored, multiprocessors());
            gemm = take<uint8_t>(base, static_cast<int64_t>(gemmBytes));
        }
    }

private:
    // Between two parts there is always something that belongs to neither, so that a sanitizer notices who goes too far.
    template <typename T>
    T* take(void* base, int64_t count) noexcept
    {
        size_t const offset = bytes;
        size_t const used = static_cast<size_t>(count) * sizeof(T);
        bytes += (used / kAlignment + 1) * kAlignment;
        if (base == nullptr)
        {
            return nullptr;
        }
        unsigned char* const part = static_cast<unsigned char*>(base) + offset;
        QWENFORGE_ALLOW(part, used);
        QWENFORGE_FORBID(part + used, bytes - offset - used);
        return reinterpret_cast<T*>(part);
    }
};

bool checkSize(char const* name, int32_t value, bool packed, Message& problem)
{
    int32_t const multiple = packed ? 64 : 8;
    return (value >= multiple && value <= 65536 && value % multiple == 0)
        || problem.set("%s is %d, which has to be a multiple of %d up to 65536", name, value, multiple);
}

bool checkGroups(MoeShape const& shape, Message& problem)
{
    switch (shape.weightType)
    {
    case WeightType::kFloat: return true;
    case WeightType::kInt4:
        return shape.groupSize == 64 || shape.groupSize == 128
            || problem.set("group_size is %d: INT4 weights have scales for 64 or 128 columns", shape.groupSize);
    case WeightType::kInt8:
    case WeightType::kFloat8:
        return shape.groupSize == kRowGroupSize
            || problem.set("group_size is %d: INT8 and FP8 weights have one scale a row, which is a group_size of %d",
                shape.groupSize, kRowGroupSize);
    }
    return problem.set("weight_type is %d, not one of 0 to 3", static_cast<int>(shape.weightType));
}

bool areValid(MoeShape const& shape, MoeTensors const& tensors) noexcept
{
    bool const packed = shape.weightType != WeightType::kFloat;
    return isAddress(tensors.hiddenStates) && isAddress(tensors.routerLogits) && isAddress(tensors.gateUpWeights)
        && isAddress(tensors.downWeights) && isAddress(tensors.output)
        && (shape.numSharedExperts == 0 || isAddress(tensors.sharedGateLogits))
        && (!packed || (isAddress(tensors.gateUpScales) && isAddress(tensors.downScales)))
        && (shape.weightType != WeightType::kFloat8 || isAddress(tensors.activationScales));
}

unsigned blocks(int64_t count, int64_t each) noexcept
{
    return static_cast<unsigned>(ceilDiv(count, each));
}

template <typename T>
T const* from(void const* address, int64_t element) noexcept
{
    return address == nullptr ? nullptr : static_cast<T const*>(address) + element;
}

// With `counts`, those of the experts are wanted too.
template <typename T>
void launchRouting(Routing const& routing, T const* logits, T const* gates, bool counts, cudaStream_t stream)
{
    dim3 const threads(kSortThreads);
    if (!counts && static_cast<int64_t>(routing.tokens) * routing.slots <= kFewPairs)
    {
        QWENFORGE_LAUNCH(routeFew<T>, dim3(1), threads, stream, routing, logits, gates);
        return;
    }
    dim3 const experts(static_cast<unsigned>(routing.localExperts + routing.sharedExperts));
    QWENFORGE_LAUNCH(routeTokens<T>, dim3(blocks(routing.tokens, kRouteWarps)), dim3(kRouteWarps * kWarpSize), stream,
        routing, logits, gates);
    QWENFORGE_LAUNCH(countPairs, experts, threads, stream, routing);
    QWENFORGE_LAUNCH(placePairs, experts, threads, stream, routing);
}

void launchProducts(WeightType weights, ExpertCall const& call, ElementType type, cudaStream_t stream)
{
    switch (weights)
    {
    case WeightType::kFloat: launchExperts<WeightType::kFloat>(call, type, stream); break;
    case WeightType::kInt8: launchExperts<WeightType::kInt8>(call, type, stream); break;
    case WeightType::kInt4: launchExperts<WeightType::kInt4>(call, type, stream); break;
    case WeightType::kFloat8: launchExperts<WeightType::kFloat8>(call, type, stream); break;
    }
}

// The two products on the tokens of each expert, gathered one behind the other.
template <typename T>
cudaError_t launchGrouped(MoeShape const& shape, MoeTensors const& tensors, T const* states, Routing const& routing,
    Workspace const& space, ElementType type, cudaStream_t stream)
{
    auto const pairs = static_cast<unsigned>(routing.tokens * routing.slots);
    dim3 const threads(kRowThreads);
    T* const gateUp = static_cast<T*>(space.gateUp);
    QWENFORGE_LAUNCH(gatherTokens<T>, dim3(pairs, blocks(shape.hiddenSize, kRowChannels)), threads, stream, routing,
        states, shape.hiddenSize, static_cast<T*>(space.partial));
    int32_t const experts = storedExperts(shape);
    GroupedTile const tile
        = static_cast<int64_t>(pairs) >= 128 * static_cast<int64_t>(experts) ? GroupedTile::k128x128 : GroupedTile::k64x128;
    GroupedGemm const up{space.partial, tensors.gateUpWeights, gateUp, routing.counts, experts,
        2 * shape.intermediateSize, shape.hiddenSize, space.gemm, space.gemmBytes, multiprocessors()};
    cudaError_t error = launchGroupedGemm(up, type, tile, stream);
    if (error != cudaSuccess)
    {
        return error;
    }
    QWENFORGE_LAUNCH(activate<T>, dim3(pairs, blocks(shape.intermediateSize, kRowChannels)), threads, stream, routing,
        static_cast<T const*>(gateUp), shape.intermediateSize, static_cast<T*>(space.hidden));
    GroupedGemm const down{space.hidden, tensors.downWeights, space.partial, routing.counts, experts, shape.hiddenSize,
        shape.intermediateSize, space.gemm, space.gemmBytes, multiprocessors()};
    return launchGroupedGemm(down, type, tile, stream);
}

// The two products on tiles of tokens, of whatever the weights are.
template <typename T>
void launchTiled(MoeShape const& shape, MoeTensors const& tensors, T const* states, Routing const& routing,
    Workspace const& space, ElementType type, cudaStream_t stream)
{
    int64_t const pairs = static_cast<int64_t>(routing.tokens) * routing.slots;
    auto const* const scales = static_cast<float const*>(tensors.activationScales);
    int32_t const groupShift = shape.groupSize == 128 ? 1 : 0;
    ExpertCall call{};
    call.routing = routing;
    call.tiles = static_cast<unsigned>(mostTiles(pairs, storedExperts(shape), routing.tileTokens));
    call.up = {states, static_cast<unsigned char const*>(tensors.gateUpWeights), tensors.gateUpScales, scales,
        space.hidden, 2 * shape.intermediateSize, shape.hiddenSize, groupShift};
    call.down = {space.hidden, static_cast<unsigned char const*>(tensors.downWeights), tensors.downScales, scales,
        space.partial, shape.hiddenSize, shape.intermediateSize, groupShift};
    if (shape.weightType == WeightType::kFloat8)
    {
        int64_t const count = static_cast<int64_t>(routing.tokens) * shape.hiddenSize;
        auto* const quantized = static_cast<__nv_fp8_e4m3*>(space.tokens);
        QWENFORGE_LAUNCH(quantizeTokens<T>, dim3(blocks(count, 8 * kQuantizeThreads)), dim3(kQuantizeThreads), stream,
            states, count, scales, quantized);
        call.up.inputs = quantized;
    }
    launchProducts(shape.weightType, call, type, stream);
}

// The tokens from `first` on, as many as the workspace is for.
template <typename T>
cudaError_t launchChunk(MoeShape const& shape, MoeTensors const& tensors, int64_t first, Workspace const& space,
    ElementType type, MoePath path, cudaStream_t stream)
{
    Routing routing = space.routing;
    routing.tileTokens = tileTokensOf(path, shape.weightType);
    launchRouting(routing, from<T>(tensors.routerLogits, first * shape.numExperts),
        from<T>(tensors.sharedGateLogits, first), path == MoePath::kGrouped, stream);
    T const* const states = from<T>(tensors.hiddenStates, first * shape.hiddenSize);
    if (path == MoePath::kGrouped)
    {
        cudaError_t const error = launchGrouped<T>(shape, tensors, states, routing, space, type, stream);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    else
    {
        launchTiled<T>(shape, tensors, states, routing, space, type, stream);
    }
    T* const output = static_cast<T*>(tensors.output) + first * shape.hiddenSize;
    QWENFORGE_LAUNCH(combine<T>,
        dim3(static_cast<unsigned>(routing.tokens), blocks(shape.hiddenSize, kCombineThreads)), dim3(kCombineThreads),
        stream, routing, static_cast<T const*>(space.partial), shape.hiddenSize, output);
    return cudaGetLastError();
}

} // namespace

MoePath chosenPath(MoeShape const& shape, int32_t sm)
{
    Tactic const& tactic = tacticFor(sm, shape.weightType);
    if (shape.tokens <= tactic.eightUpTo)
    {
        return MoePath::kEight;
    }
    int64_t const tokens = shape.tokens < kChunkTokens ? shape.tokens : kChunkTokens;
    bool const canGroup = shape.weightType == WeightType::kFloat && sm == 90 && hasGroupedGemm();
    if (canGroup && tactic.groupedFrom > 0 && tokens >= tactic.groupedFrom)
    {
        return MoePath::kGrouped;
    }
    int64_t const pairs = tokens * (shape.topK + shape.numSharedExperts);
    int64_t const experts = shape.numExperts + shape.numSharedExperts;
    return pairs <= tactic.sixteenUpTo * experts ? MoePath::kSixteen : MoePath::kWide;
}

bool checkMoe(MoeShape const& shape, int32_t sm, Message& problem)
{
    bool const packed = shape.weightType != WeightType::kFloat;
    if (!checkGroups(shape, problem) || !checkSize("hidden_size", shape.hiddenSize, packed, problem)
        || !checkSize("intermediate_size", shape.intermediateSize, packed, problem))
    {
        return false;
    }
    if (shape.numExperts < 1 || shape.numExperts > kMaxExperts)
    {
        return problem.set("num_experts is %d, not within 1 and %d", shape.numExperts, kMaxExperts);
    }
    if (shape.firstLocalExpert < 0 || shape.numLocalExperts < 1
        || shape.firstLocalExpert > shape.numExperts - shape.numLocalExperts)
    {
        return problem.set("the %d local experts from %d on are not among the %d experts", shape.numLocalExperts,
            shape.firstLocalExpert, shape.numExperts);
    }
    if (shape.numSharedExperts < 0 || shape.numSharedExperts > kMaxSharedExperts)
    {
        return problem.set("num_shared_experts is %d, not within 0 and %d", shape.numSharedExperts, kMaxSharedExperts);
    }
    if (shape.topK < 1 || shape.topK > kMaxTopK || shape.topK > shape.numExperts)
    {
        return problem.set("top_k is %d, not within 1 and %d or above num_experts, %d", shape.topK, kMaxTopK,
            shape.numExperts);
    }
    if (shape.tokens < 0)
    {
        return problem.set("the number of tokens is negative");
    }
    if (shape.weightType == WeightType::kFloat8 && sm > 0 && sm < 89)
    {
        return problem.set("FP8 experts need a GPU with SM 89 or newer, this one has SM %d: use INT8 or INT4 weights",
            sm);
    }
    return true;
}

size_t moeWorkspaceBytes(MoeShape const& shape, MoePath path)
{
    Message problem;
    MoePath const chosen = path == MoePath::kTable ? chosenPath(shape, currentSm()) : path;
    return checkMoe(shape, /*sm=*/0, problem) ? Workspace(shape, chosen, nullptr).bytes : 0;
}

cudaError_t launchMoe(MoeShape const& shape, ElementType type, MoeTensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream, MoePath path)
{
    Message problem;
    if (!checkMoe(shape, /*sm=*/0, problem))
    {
        return cudaErrorInvalidValue;
    }
    if (shape.tokens == 0)
    {
        return cudaSuccess;
    }
    int32_t const sm = currentSm();
    bool const isGrouped = path == MoePath::kGrouped;
    if (!checkMoe(shape, sm, problem) || path < MoePath::kTable || path > MoePath::kGrouped
        || (isGrouped && (shape.weightType != WeightType::kFloat || sm != 90 || !hasGroupedGemm())))
    {
        return cudaErrorNotSupported;
    }
    // An engine built where the GPU was not known may bring too little for kGrouped.
    size_t const least = moeWorkspaceBytes(shape, isGrouped ? path : MoePath::kWide);
    if (!areValid(shape, tensors) || !isAddress(workspace) || workspaceBytes < least)
    {
        return cudaErrorInvalidValue;
    }
    for (int64_t first = 0; first < shape.tokens; first += kChunkTokens)
    {
        MoeShape chunk = shape;
        chunk.tokens = shape.tokens - first < kChunkTokens ? shape.tokens - first : kChunkTokens;
        MoePath chosen = path == MoePath::kTable ? chosenPath(chunk, sm) : path;
        if (chosen == MoePath::kGrouped && Workspace(chunk, chosen, nullptr).bytes > workspaceBytes)
        {
            chosen = MoePath::kWide;
        }
        Workspace const space(chunk, chosen, workspace);
        cudaError_t const error = type == ElementType::kFloat16
            ? launchChunk<__half>(chunk, tensors, first, space, type, chosen, stream)
            : launchChunk<__nv_bfloat16>(chunk, tensors, first, space, type, chosen, stream);
        if (error != cudaSuccess)
        {
            return error;
        }
    }
    return cudaSuccess;
}

} // namespace qwenforge
