// The TensorRT plugin QwenForgeMoE: see op.yaml for its tensors and fields.

#pragma once

#include "common/plugin_base.h"
#include "moe_spec.h"

namespace qwenforge
{

class MoePlugin final : public PluginBase<MoePlugin, nvinfer1::IPluginV3OneBuild>
{
public:
    static constexpr int32_t kKernelVersion = 1;

    static constexpr OpSpec const& spec() noexcept
    {
        return moe_spec::kSpec;
    }

    using PluginBase::PluginBase;

    size_t workspaceBytes(Binding const& binding) const noexcept;
    bool checkSizes(Binding const& binding, Message& problem) const noexcept;
    cudaError_t launch(Binding const& binding, Tensors const& tensors, void* workspace, size_t workspaceBytes,
        cudaStream_t stream) const noexcept;
};

} // namespace qwenforge
