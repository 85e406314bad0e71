// Everything that a plugin described by an OpSpec has in common with the others: the four interfaces of IPluginV3.
//
// A plugin derives from PluginBase<itself, IPluginV3OneBuild or IPluginV3OneBuildV2> and brings
//     static constexpr OpSpec const& spec()                      its specification
//     static constexpr int32_t kKernelVersion                    raised whenever its kernels change their speed
//     size_t workspaceBytes(Binding const&) const noexcept       monotone in every size; 0 only for no output, or for
//                                                                sizes that the kernels refuse
//     bool checkSizes(Binding const&, Message&) const noexcept   what the specification cannot say
//     cudaError_t launch(Binding const&, Tensors const&, void* workspace, size_t bytes, cudaStream_t) const noexcept
// An object is immutable after creation, but for the buffers that TensorRT's getters return pointers to.

#pragma once

#include "common/contract.h"
#include "common/fields.h"
#include "common/logging.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>

namespace qwenforge
{

constexpr size_t kWorkspaceAlignment = 256;

// Said where an output has memory of its own.
constexpr char const* kHowToShare
    = "build the engine with PreviewFeature::kALIASED_PLUGIN_IO_10_03 and bind both to one address";

// The name of a plugin's creation state among the timings that TensorRT caches, and for its engine inspector.
class StateText
{
public:
    StateText(OpSpec const& spec, AttributeValue const* values, int32_t kernelVersion) noexcept;

    char const* text() const noexcept
    {
        return mText;
    }

private:
    char mText[512]{};
};

template <typename Plugin, typename BuildInterface>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public BuildInterface,
                   public nvinfer1::IPluginV3OneRuntime
{
public:
    PluginBase(char const* node, AttributeValue const* attributes) noexcept
        : mContract(Plugin::spec(), attributes)
        , mState(Plugin::spec(), attributes, Plugin::kKernelVersion)
    {
        std::snprintf(mNode, sizeof(mNode), "%s", node == nullptr ? "" : node);
    }

    // IPluginV3

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<BuildInterface*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override
    {
        return makeClone();
    }

    // IPluginV3OneCore

    char const* getPluginName() const noexcept override
    {
        return Plugin::spec().name;
    }

    char const* getPluginVersion() const noexcept override
    {
        return Plugin::spec().version;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return Plugin::spec().pluginNamespace;
    }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept override
    {
        return mContract.outputCount();
    }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs, nvinfer1::DataType const* inputTypes,
        int32_t nbInputs) const noexcept override
    {
        Message problem;
        return status(mContract.checkCounts(nbInputs, nbOutputs, problem)
                && mContract.outputTypes(inputTypes, outputTypes, problem),
            problem);
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
        nvinfer1::DimsExprs const* /*shapeInputs*/, int32_t /*nbShapeInputs*/, nvinfer1::DimsExprs* outputs,
        int32_t nbOutputs, nvinfer1::IExprBuilder& exprBuilder) noexcept override
    {
        Message problem;
        return status(mContract.checkCounts(nbInputs, nbOutputs, problem)
                && mContract.outputShapes(inputs, outputs, exprBuilder, problem),
            problem);
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
        int32_t nbOutputs) noexcept override
    {
        return nbInputs == mContract.inputCount() && nbOutputs == mContract.outputCount()
            && mContract.supportsFormat(pos, inOut);
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override
    {
        Message problem;
        return status(mContract.checkCounts(nbInputs, nbOutputs, problem)
                && mContract.checkConfiguration(in, out, problem) && checkMaximum(mContract.maximum(in), problem),
            problem);
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        nvinfer1::DynamicPluginTensorDesc const* /*outputs*/, int32_t nbOutputs) const noexcept override
    {
        Message problem;
        if (!mContract.checkCounts(nbInputs, nbOutputs, problem))
        {
            report(problem);
            return 0;
        }
        return alignedWorkspace(mContract.maximum(inputs));
    }

    char const* getTimingCacheID() noexcept override
    {
        return mState.text();
    }

    char const* getMetadataString() noexcept override
    {
        return mState.text();
    }

    // IPluginV3OneRuntime

    int32_t setTactic(int32_t tactic) noexcept override
    {
        Message problem;
        return status(tactic == 0 || problem.set("tactic %d was asked for, but there are none", tactic), problem);
    }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override
    {
        Message problem;
        Binding binding;
        return status(mContract.checkCounts(nbInputs, nbOutputs, problem)
                && mContract.bind(in, out, binding, problem) && self().checkSizes(binding, problem),
            problem);
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        Message problem;
        return status(tryEnqueue(inputDesc, outputDesc, inputs, outputs, workspace, stream, problem), problem,
            nvinfer1::ErrorCode::kFAILED_EXECUTION);
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override
    {
        Plugin* const attached = makeClone();
        if (attached != nullptr && context != nullptr)
        {
            attached->mRecorder = RecorderReference(context->getErrorRecorder());
        }
        return attached;
    }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        describeFields(Plugin::spec(), mContract.attributes(), mFields);
        mFieldCollection.nbFields = Plugin::spec().attributeCount;
        mFieldCollection.fields = mFields;
        return &mFieldCollection;
    }

protected:
    PluginBase(PluginBase const&) noexcept = default;
    ~PluginBase() noexcept override = default;

    Contract const& contract() const noexcept
    {
        return mContract;
    }

private:
    Plugin const& self() const noexcept
    {
        return static_cast<Plugin const&>(*this);
    }

    Plugin* makeClone() noexcept
    {
        Plugin* const copy = new (std::nothrow) Plugin(self());
        if (copy == nullptr)
        {
            Message problem;
            problem.set("no memory for a copy");
            report(problem, nvinfer1::ErrorCode::kFAILED_ALLOCATION);
        }
        return copy;
    }

    // A workspace of 0 bytes for the largest sizes would be too small for those below that the kernels do take.
    bool checkMaximum(Binding const& largest, Message& problem) const noexcept
    {
        return mContract.outputVolume(0, largest) == 0 || self().workspaceBytes(largest) > 0
            || problem.set("the largest sizes of the optimization profile are more than its kernels can take");
    }

    bool tryEnqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const* outputDesc,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream, Message& problem) noexcept
    {
        Binding binding;
        Tensors tensors;
        if (inputDesc == nullptr || outputDesc == nullptr || inputs == nullptr || outputs == nullptr)
        {
            return problem.set("no descriptions or no addresses of the tensors were given");
        }
        if (!mContract.bind(inputDesc, outputDesc, binding, problem) || !self().checkSizes(binding, problem)
            || !mContract.bindAddresses(inputs, outputs, binding, kHowToShare, tensors, problem))
        {
            return false;
        }
        if (mContract.outputVolume(0, binding) == 0)
        {
            return true;
        }
        size_t const bytes = alignedWorkspace(binding);
        if (bytes > 0 && workspace == nullptr)
        {
            return problem.set("no workspace was given, of which %zu bytes are needed", bytes);
        }
        cudaError_t const error = self().launch(binding, tensors, workspace, bytes, stream);
        return error == cudaSuccess
            || problem.set("the kernels could not be launched: %s (CUDA error %d)", cudaGetErrorString(error),
                static_cast<int>(error));
    }

    size_t alignedWorkspace(Binding const& binding) const noexcept
    {
        size_t const bytes = self().workspaceBytes(binding);
        return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    }

    int32_t status(bool good, Message const& problem,
        nvinfer1::ErrorCode code = nvinfer1::ErrorCode::kINVALID_ARGUMENT) const noexcept
    {
        if (good)
        {
            return 0;
        }
        report(problem, code);
        return static_cast<int32_t>(code);
    }

    void report(Message const& problem,
        nvinfer1::ErrorCode code = nvinfer1::ErrorCode::kINVALID_ARGUMENT) const noexcept
    {
        reportError({Plugin::spec().name, mNode}, problem, mRecorder.get(), code);
    }

    Contract mContract;
    StateText mState;
    RecorderReference mRecorder;
    char mNode[128]{};
    nvinfer1::PluginField mFields[kMaxAttributes];
    nvinfer1::PluginFieldCollection mFieldCollection{};
};

} // namespace qwenforge
