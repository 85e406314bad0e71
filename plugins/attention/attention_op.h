// QwenForgeAttention as both front ends see it: TensorRT's plugin and ONNX Runtime's custom op.

#pragma once

#include "attention_spec.h"
#include "common/contract.h"

#include <cuda_runtime_api.h>

namespace qwenforge
{

struct AttentionOp
{
    static constexpr OpSpec const& spec() noexcept
    {
        return attention_spec::kSpec;
    }

    static size_t workspaceBytes(Contract const& contract, Binding const& binding) noexcept;
    static bool checkSizes(Contract const& contract, Binding const& binding, Message& problem) noexcept;
    static cudaError_t launch(Contract const& contract, Binding const& binding, Tensors const& tensors, void* workspace,
        size_t workspaceBytes, cudaStream_t stream) noexcept;
};

} // namespace qwenforge
