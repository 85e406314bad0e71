#include "moe/moe_op.h"

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
    shape.firstLocalExpert = attributes.firstLocalExpert;
    shape.numLocalExperts = attributes.numLocalExperts;
    shape.numSharedExperts = attributes.numSharedExperts;
    shape.topK = attributes.topK;
    shape.normalizeTopK = attributes.normalizeTopk;
    shape.weightType = static_cast<WeightType>(attributes.weightType);
    shape.groupSize = attributes.groupSize;
    return shape;
}

} // namespace

size_t MoeOp::workspaceBytes(Contract const& contract, Binding const& binding) noexcept
{
    return moeWorkspaceBytes(shapeOf(contract, binding));
}

bool MoeOp::checkSizes(Contract const& contract, Binding const& binding, Message& problem) noexcept
{
    return checkMoe(shapeOf(contract, binding), currentSm(), problem);
}

cudaError_t MoeOp::launch(Contract const& contract, Binding const& binding, Tensors const& tensors, void* workspace,
    size_t workspaceBytes, cudaStream_t stream) noexcept
{
    MoeTensors moe{};
    moe.hiddenStates = tensors.inputs[Input::kHiddenStates];
    moe.routerLogits = tensors.inputs[Input::kRouterLogits];
    moe.gateUpWeights = tensors.inputs[Input::kGateUpWeights];
    moe.downWeights = tensors.inputs[Input::kDownWeights];
    moe.sharedGateLogits = tensors.inputs[Input::kSharedGateLogits];
    moe.gateUpScales = tensors.inputs[Input::kGateUpScales];
    moe.downScales = tensors.inputs[Input::kDownScales];
    moe.activationScales = tensors.inputs[Input::kActivationScales];
    moe.output = tensors.outputs[Output::kOutput];
    return launchMoe(
        shapeOf(contract, binding), elementType(binding.types[0]), moe, workspace, workspaceBytes, stream);
}

} // namespace qwenforge
