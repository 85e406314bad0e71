#include "moe/moe_plugin.h"

#include "moe/moe.h"

namespace qwenforge
{
namespace
{

using namespace moe_spec;

MoeShape shapeOf(Contract const& contract, Binding const& binding) noexcept
{
    Attributes const attributes = typed(contract.attributes());
    MoeShape shape{};
    shape.tokens = binding.sizes[Size::kTokens];
    shape.hiddenSize = attributes.hiddenSize;
    shape.intermediateSize = attributes.intermediateSize;
    shape.numExperts = attributes.numExperts;
    shape.numSharedExperts = attributes.numSharedExperts;
    shape.topK = attributes.topK;
    shape.normalizeTopK = attributes.normalizeTopk != 0;
    return shape;
}

} // namespace

size_t MoePlugin::workspaceBytes(Binding const& binding) const noexcept
{
    return moeWorkspaceBytes(shapeOf(contract(), binding));
}

bool MoePlugin::checkSizes(Binding const& /*binding*/, Message& /*problem*/) const noexcept
{
    return true;
}

cudaError_t MoePlugin::launch(Binding const& binding, Tensors const& tensors, void* workspace, size_t workspaceBytes,
    cudaStream_t stream) const noexcept
{
    MoeTensors moe{};
    moe.hiddenStates = tensors.inputs[Input::kHiddenStates];
    moe.routerLogits = tensors.inputs[Input::kRouterLogits];
    moe.gateUpWeights = tensors.inputs[Input::kGateUpWeights];
    moe.downWeights = tensors.inputs[Input::kDownWeights];
    moe.sharedGateLogits = tensors.inputs[Input::kSharedGateLogits];
    moe.output = tensors.outputs[Output::kOutput];
    return launchMoe(
        shapeOf(contract(), binding), elementType(binding.types[0]), moe, workspace, workspaceBytes, stream);
}

} // namespace qwenforge
