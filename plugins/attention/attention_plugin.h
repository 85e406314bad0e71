// The TensorRT plugin QwenForgeAttention: see op.yaml for its tensors and fields. IPluginV3OneBuildV2, because the caches
// are updated in place: each present output is the memory of a past input.

#pragma once

#include "attention_spec.h"
#include "common/plugin_base.h"

namespace qwenforge
{

class AttentionPlugin final : public PluginBase<AttentionPlugin, nvinfer1::IPluginV3OneBuildV2>
{
public:
    static constexpr int32_t kKernelVersion = 1;

    static constexpr OpSpec const& spec() noexcept
    {
        return attention_spec::kSpec;
    }

    using PluginBase::PluginBase;

    int32_t getAliasedInput(int32_t outputIndex) noexcept override
    {
        return contract().aliasedInput(outputIndex);
    }

    size_t workspaceBytes(Binding const& binding) const noexcept;
    bool checkSizes(Binding const& binding, Message& problem) const noexcept;
    cudaError_t launch(Binding const& binding, Tensors const& tensors, void* workspace, size_t workspaceBytes,
        cudaStream_t stream) const noexcept;
};

} // namespace qwenforge
