// The TensorRT plugin QwenForgeMoE: see op.yaml for its tensors and fields.

#pragma once

#include "common/plugin_base.h"
#include "moe/moe_op.h"

namespace qwenforge
{

class MoePlugin final : public PluginBase<MoePlugin, nvinfer1::IPluginV3OneBuild>
{
public:
    static constexpr int32_t kKernelVersion = 2;

    static constexpr OpSpec const& spec() noexcept
    {
        return MoeOp::spec();
    }

    using PluginBase::PluginBase;

    size_t workspaceBytes(Binding const& binding) const noexcept
    {
        return MoeOp::workspaceBytes(contract(), binding);
    }
    bool checkSizes(Binding const& binding, Message& problem) const noexcept
    {
        return MoeOp::checkSizes(contract(), binding, problem);
    }
    cudaError_t launch(Binding const& binding, Tensors const& tensors, void* workspace, size_t bytes,
        cudaStream_t stream) const noexcept
    {
        return MoeOp::launch(contract(), binding, tensors, workspace, bytes, stream);
    }
};

} // namespace qwenforge
