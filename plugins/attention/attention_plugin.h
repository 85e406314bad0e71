// The TensorRT plugin QwenForgeAttention: see op.yaml for its tensors and fields. IPluginV3OneBuildV2, because the caches
// are updated in place: each present output is the memory of a past input.

#pragma once

#include "attention/attention_op.h"
#include "common/plugin_base.h"

namespace qwenforge
{

class AttentionPlugin final : public PluginBase<AttentionPlugin, nvinfer1::IPluginV3OneBuildV2>
{
public:
    static constexpr int32_t kKernelVersion = 2;

    static constexpr OpSpec const& spec() noexcept
    {
        return AttentionOp::spec();
    }

    using PluginBase::PluginBase;

    int32_t getAliasedInput(int32_t outputIndex) noexcept override
    {
        return contract().aliasedInput(outputIndex);
    }

    size_t workspaceBytes(Binding const& binding) const noexcept
    {
        return AttentionOp::workspaceBytes(contract(), binding);
    }
    bool checkSizes(Binding const& binding, Message& problem) const noexcept
    {
        return AttentionOp::checkSizes(contract(), binding, problem);
    }
    cudaError_t launch(Binding const& binding, Tensors const& tensors, void* workspace, size_t bytes,
        cudaStream_t stream) const noexcept
    {
        return AttentionOp::launch(contract(), binding, tensors, workspace, bytes, stream);
    }
};

} // namespace qwenforge
