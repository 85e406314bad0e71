// What the files of the kernels share about their launches.

#pragma once

#include "attention/cache.cuh"

namespace qwenforge
{
namespace attention
{

constexpr int64_t kMaxCapacity = int64_t{1} << 30; // keys of a row are counted in 32 bits

// A *group row* is one query of one of the heads that share a key and value head: row j * G + g is query j of the g-th of
// the G heads.
inline int64_t groupRows(AttentionShape const& shape) noexcept
{
    return shape.sequence * (shape.numHeads / shape.numKeyValueHeads);
}

// Of shared memory: the most that a block may have on every GPU, SM 86, 89 and 120 having the least, and what CUDA itself
// takes for each block.
constexpr size_t kMostBlockBytes = 99 * 1024;
constexpr size_t kReservedBytes = 1024;

constexpr int32_t kSplitRows = 16;      // group rows of a tile of kSplit
constexpr int32_t kMostSplitRows = 128; // that kSplit takes
constexpr int32_t kTiledRows = 128;     // of a tile of kTiled

// Into how many parts kSplit divides the keys: by the shape and the current device, whatever the lengths are.
int32_t splitsOf(AttentionShape const& shape) noexcept;

// The most bytes that the parts' results can take on any device.
size_t partialBytes(AttentionShape const& shape) noexcept;

template <CacheType kType, typename T>
cudaError_t launchSplit(Call<kType, T> const& call, int32_t splits, void* partials, cudaStream_t stream);

template <CacheType kType, typename T>
cudaError_t launchTiled(Call<kType, T> const& call, cudaStream_t stream);

} // namespace attention
} // namespace qwenforge
