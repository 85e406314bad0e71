// Attention over a key/value cache on the device; plugins/attention/op.yaml says what it computes. No TensorRT in here.

#pragma once

#include "common/element_type.h"
#include "common/message.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace qwenforge
{

// What the elements of the caches are.
enum class CacheType : int32_t
{
    kFloat = 0,  // as the tokens, 16 bits
    kFloat8 = 1, // E4M3; SM 89 and up
    kInt8 = 2,
};

// B is batch, S sequence, M capacity, P positions, Hq numHeads, Hk numKeyValueHeads, D headSize.
struct AttentionShape
{
    int64_t batch;
    int64_t sequence;
    int64_t capacity;  // M, tokens that a row can have: of a paged cache, pages of a row times pageSize
    int64_t cacheRows; // B, or the number of pages
    int64_t positions;
    int32_t numHeads;         // a multiple of Hk
    int32_t numKeyValueHeads; // at least 1
    int32_t headSize;         // a multiple of 8, 8..256
    int32_t slidingWindow;    // 0: none
    int32_t pageSize;         // a power of two, 16..4096; 0: linear caches
    CacheType cacheType;
    int32_t packedQkv; // 0 or 1: whether `query` holds key and value too
    int32_t qkNorm;    // 0 or 1
    float scale;
    float epsilon; // of the norm
};

// Device addresses, multiples of 16 bytes. T is the type given to launchAttention, K the caches' element.
struct AttentionTensors
{
    void const* query; // T [B, S, Hq D]; packed [B, S, (Hq + 2 Hk) D]
    void const* key;   // T [B, S, Hk D]; null when packed
    void const* value; // T [B, S, Hk D]; null when packed
    void const* cos;   // T [P, D / 2]
    void const* sin;   // T [P, D / 2]
    int32_t const* positionIds;   // [B, S]
    int32_t const* cachePosition; // [B]
    void const* queryNorm;        // T [D]; null without qkNorm
    void const* keyNorm;          // T [D]; the same
    float const* keyScales;       // [Hk, D]; null where the caches are of type T
    float const* valueScales;     // [Hk]; the same
    int32_t const* pageTable;     // [B, M / pageSize]; null where the caches are linear
    void* keyCache;               // K [B, Hk, M, D], or [pages, Hk, pageSize, D]; updated in place
    void* valueCache;             // the same
    void* output;                 // T [B, S, Hq D]
};

// How the attention itself is computed.
enum class AttentionPath : int32_t
{
    kAuto = 0,  // by the shape: never a path that this shape does not have
    kPlain = 1, // a block a query, without matrix instructions; any head size
    kSplit = 2, // 16 queries of a group at a time, keys divided among blocks; D 64 or 128
    kTiled = 3, // 128 queries of a group at a time; D 64 or 128
};

// What kAuto stands for.
AttentionPath chosenPath(AttentionShape const& shape);

// Whether the shape can be computed on `sm` (0: on any); `problem` says by name what is wrong, and what to do instead.
bool checkAttention(AttentionShape const& shape, int32_t sm, Message& problem);

// Workspace in bytes, 0 for a shape that cannot be computed; grows with B and S. It does not depend on the device.
size_t attentionWorkspaceBytes(AttentionShape const& shape);

// Launches the kernels on `stream`, and neither allocates nor waits. The grids follow from the shape and the device
// alone, lengths are read on the device: the call can be captured in a CUDA graph. The same input gives the same bits on
// the same path; linear and paged caches of the same capacity give the same bits.
//
// Where the values on the device are wrong, nothing outside the tensors is touched and the result shows it: a token whose
// place cachePosition[b] + j lies outside the cache or in a page that does not exist is not appended and its output is
// NaN; so are output and key of a token whose position lies outside the tables, and the output of a token that would see
// a page that does not exist. INT8 has no NaN: a key or value that is NaN is stored as 0.
//
// Returns cudaErrorInvalidValue for a shape or an address that is not as above or a workspace that is too small,
// cudaErrorNotSupported for caches or a path that this GPU or this shape lacks, cudaSuccess without a launch when B or S
// is 0, and otherwise what the launches return.
cudaError_t launchAttention(AttentionShape const& shape, ElementType type, AttentionTensors const& tensors,
    void* workspace, size_t workspaceBytes, cudaStream_t stream, AttentionPath path = AttentionPath::kAuto);

} // namespace qwenforge
