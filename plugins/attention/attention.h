// Attention over a linear cache on the device; plugins/attention/op.yaml says what it computes. No TensorRT in here.

#pragma once

#include "common/element_type.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace qwenforge
{

// B is batch, S sequence, M capacity, P positions, Hq numHeads, Hk numKeyValueHeads, D headSize.
struct AttentionShape
{
    int64_t batch;
    int64_t sequence;
    int64_t capacity;
    int64_t positions;
    int32_t numHeads;         // a multiple of Hk
    int32_t numKeyValueHeads; // at least 1
    int32_t headSize;         // a multiple of 8, 8..256
    int32_t slidingWindow;    // 0: none
    float scale;
};

// Device addresses, multiples of 16 bytes. The elements are of the type given to launchAttention.
struct AttentionTensors
{
    void const* query;            // [B, S, Hq D]
    void const* key;              // [B, S, Hk D]
    void const* value;            // [B, S, Hk D]
    void const* cos;              // [P, D / 2]
    void const* sin;              // [P, D / 2]
    int32_t const* positionIds;   // [B, S]
    int32_t const* cachePosition; // [B]
    void* keyCache;               // [B, Hk, M, D], updated in place
    void* valueCache;             // [B, Hk, M, D], updated in place
    void* output;                 // [B, S, Hq D]
};

// Workspace in bytes: the rotated query. At most 2^31 - 1 query heads of tokens, B S Hq, can be launched.
size_t attentionWorkspaceBytes(AttentionShape const& shape);

// Launches the kernels on `stream`, and neither allocates nor waits. The grids follow from the shape alone, so that the
// call can be captured in a CUDA graph. The same input gives the same bits.
//
// Where the values on the device are wrong, nothing outside the tensors is touched and the result shows it: a token whose
// place cachePosition[b] + j lies outside the cache is not appended and its output is NaN, and so are output and key of
// a token whose position lies outside the tables.
//
// Returns cudaErrorInvalidValue for a shape or an address that is not as above or a workspace that is too small,
// cudaSuccess without a launch when B or S is 0, and otherwise what the launches return.
cudaError_t launchAttention(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors,
    void* workspace, size_t workspaceBytes, cudaStream_t stream);

} // namespace qwenforge
