// How keys and values come to a warp: stages by asynchronous copies, in a ring. The kernels of split.cuh and tiled.cuh differ
// in who owns which keys and who shares a ring.
//
// Why the bounds hold: a stage is filled from keys below `end`, which is at most the capacity of a row, in pages that exist;
// what is missing is filled with zeros. Queries are read and outputs written of group rows below S G alone. What every
// thread copies and reads of a stage follows from compile-time sizes that divide evenly, which is asserted.

#pragma once

#include "attention/products.cuh"

namespace qwenforge
{
namespace attention
{

// Who shares a ring of stages: the threads of a warp, or of a block of kThreads.
template <int32_t kThreads>
__device__ __forceinline__ void synchronize()
{
    if constexpr (kThreads == kWarpSize)
    {
        __syncwarp();
    }
    else
    {
        __syncthreads();
    }
}

// The keys of one key and value head of one row of the batch that somebody goes through: `count` stages of them, of the keys
// first, first + stride, ...; none is read from `end` on.
struct Keys
{
    int64_t batchRow;
    int32_t head;
    int32_t first;
    int32_t stride;
    int32_t end;

    __device__ __forceinline__ int32_t count() const
    {
        return first < end ? (end - first + stride - 1) / stride : 0;
    }
};

// Asks for the keys or values of a stage; `thread` is one of kThreads that share the work.
template <typename L, int32_t kThreads>
__device__ __forceinline__ void fillStage(Call<L::kType, typename L::T> const& call, Keys const& keys, int32_t firstKey,
    bool isValue, int32_t thread, unsigned char* stage)
{
    auto const* const cache = reinterpret_cast<unsigned char const*>(isValue ? call.valueCache : call.keyCache);
    constexpr int32_t kCopies = L::kKeys * L::kChunks / kThreads;
    static_assert(L::kKeys * L::kChunks % kThreads == 0, "every thread makes the same number of copies");
    int32_t const own = recomputed(thread);
#pragma unroll
    for (int32_t i = 0; i < kCopies; ++i)
    {
        int32_t const row = (own + i * kThreads) / L::kChunks;
        int32_t const chunk = (own + i * kThreads) % L::kChunks;
        int64_t const key = firstKey + row;
        int64_t const page = key < keys.end ? call.places.page(keys.batchRow, key) : -1;
        int64_t const vector = page < 0 ? 0 : call.places.vector(page, keys.head, call.keyValueHeads, key);
        copyAsync16(stage + offsetOf<L>(row, chunk, isValue), cache + (vector * L::kChunks + chunk) * kChunkBytes,
            page >= 0);
    }
}

// Goes through `keys`, by way of a ring of kStages stages that keys and values take turns in. kThreads threads share the
// ring and all of them have to call this. A stage is asked for kStages - 1 turns ahead, into the one that everybody has
// finished reading before the synchronization of this turn.
template <typename L, int32_t kStages, int32_t kThreads>
__device__ __forceinline__ void attendKeys(Call<L::kType, typename L::T> const& call, Keys const& keys,
    Sight<L> const& sight, unsigned char const* queries, unsigned char* ring, Sums<L>& sums)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x) % kThreads;
    int32_t const turns = 2 * keys.count();
    float const factor = call.scale * kLog2E;
    auto const fill = [&](int32_t turn) {
        if (turn < turns)
        {
            fillStage<L, kThreads>(call, keys, keys.first + turn / 2 * keys.stride, turn % 2 == 1, thread,
                ring + turn % kStages * L::kStageBytes);
        }
        commitCopies();
    };
    auto const next = [&](int32_t turn) {
        waitForCopies<kStages - 2>();
        synchronize<kThreads>();
        fill(turn + kStages - 1);
        return ring + turn % kStages * L::kStageBytes;
    };
#pragma unroll
    for (int32_t turn = 0; turn < kStages - 1; ++turn)
    {
        fill(turn);
    }
    for (int32_t turn = 0; turn < turns; turn += 2)
    {
        int32_t const firstKey = keys.first + turn / 2 * keys.stride;
        bool const isSeen = sight.isSeenBySome(firstKey, L::kKeys); // the same for the whole warp
        Scores<L> scores{};
        unsigned char const* const keyStage = next(turn);
        if (isSeen)
        {
            multiplyKeys<L>(queries, keyStage, scores);
            weigh<L>(scores, sums, sight, firstKey, factor);
        }
        unsigned char const* const valueStage = next(turn + 1);
        if (isSeen)
        {
            addValues<L>(scores, valueStage, sums, sight, firstKey);
        }
    }
    waitForCopies<0>();
    sums.finish();
}

// Brings the queries of kRows group rows from firstRow on into shared memory, zeros for those that are not there.
template <typename L, int32_t kRows, int32_t kThreads>
__device__ __forceinline__ void loadQueries(Call<L::kType, typename L::T> const& call, int64_t batchRow, int32_t head,
    int64_t firstRow, int64_t rows, unsigned char* queries)
{
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kRows * L::kQueryChunks; i += kThreads)
    {
        int64_t const row = firstRow + i / L::kQueryChunks;
        int32_t const chunk = i % L::kQueryChunks;
        int64_t const token = batchRow * call.sequence + (row < rows ? row / call.group : 0);
        int64_t const vector = token * call.heads + head * call.group + (row < rows ? row % call.group : 0);
        copyAsync16(queries + queryOffset<L>(i / L::kQueryChunks, chunk),
            reinterpret_cast<unsigned char const*>(call.rotated) + (vector * L::kQueryChunks + chunk) * kChunkBytes,
            row < rows);
    }
    commitCopies();
    waitForCopies<0>();
    __syncthreads();
}

// The first element of the output of a group row.
template <CacheType kType, typename T>
__device__ __forceinline__ int64_t outputOf(Call<kType, T> const& call, int64_t batchRow, int32_t head, int64_t row)
{
    int64_t const token = batchRow * call.sequence + row / call.group;
    return (token * call.heads + head * call.group + row % call.group) * call.headSize;
}

template <CacheType kType, typename T>
__device__ __forceinline__ float valueScale(Call<kType, T> const& call, int32_t head)
{
    return call.valueScales == nullptr ? 1.0f : call.valueScales[head];
}

} // namespace attention
} // namespace qwenforge
