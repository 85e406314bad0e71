// The mixture of experts on the device; plugins/moe/op.yaml says what it computes. No TensorRT in here.

#pragma once

#include "common/element_type.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace qwenforge
{

// C is hiddenSize, I intermediateSize, E numExperts, Es numSharedExperts.
struct MoeShape
{
    int64_t tokens;           // T, any number of them, 0 included
    int32_t hiddenSize;       // a multiple of 8
    int32_t intermediateSize; // a multiple of 8
    int32_t numExperts;       // 1..256
    int32_t numSharedExperts; // 0..64
    int32_t topK;             // 1..8, at most E
    bool normalizeTopK;
};

// Device addresses, multiples of 16 bytes. The elements are of the type given to launchMoe.
struct MoeTensors
{
    void const* hiddenStates;     // [T, C]
    void const* routerLogits;     // [T, E]
    void const* gateUpWeights;    // [E + Es, 2 I, C], packed: plugins/moe/README.md
    void const* downWeights;      // [E + Es, C, I]
    void const* sharedGateLogits; // [T, 1]; null when Es is 0
    void* output;                 // [T, C]
};

// How the two products of the experts are computed.
enum class MoePath : int32_t
{
    kPlain = 0,  // fp32 multiply-adds
    kMatrix = 1, // matrix instructions; not yet run on a GPU, so that nothing chooses it by itself
};

// Workspace in bytes: grows with T up to a chunk of 512 tokens, which larger batches go through one after the other.
size_t moeWorkspaceBytes(MoeShape const& shape);

// Launches the kernels on `stream`, and neither allocates nor waits. The grids follow from the shape alone, so that the
// call can be captured in a CUDA graph. The same input gives the same bits.
//
// Returns cudaErrorInvalidValue for a shape or an address that is not as above or a workspace that is too small,
// cudaSuccess without a launch when T is 0, and otherwise what the launches return.
cudaError_t launchMoe(MoeShape const& shape, ElementType type, MoeTensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream, MoePath path = MoePath::kPlain);

} // namespace qwenforge
