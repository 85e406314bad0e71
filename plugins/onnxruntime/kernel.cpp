#include "onnxruntime/kernel.h"

#include "onnxruntime/ort_values.h"
#include "onnxruntime/workspace.h"

#include <new>

namespace qwenforge
{
namespace
{

using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

// Said where an output has memory of its own.
constexpr char const* kHowToShare = "bind one OrtValue to both (IO binding's bind_ortvalue_input and "
                                    "bind_ortvalue_output), on the device of the session";

// Whether the node names a tensor at this place: an optional input is left out by an empty name, or at the end.
OrtStatus* isGiven(OrtApi const& api, OrtKernelInfo const* info, size_t count, size_t index, bool& given) noexcept
{
    size_t bytes = 0; // of the name and the 0 behind it
    given = false;
    OrtStatus* const status
        = index < count ? api.KernelInfo_GetInputName(info, index, nullptr, &bytes) : nullptr;
    given = bytes > 1;
    return status;
}

// What the graph knows of an input; extents are -1 where it does not.
OrtStatus* describeInput(OrtApi const& api, OrtKernelInfo const* info, size_t index, int32_t rank,
    PluginTensorDesc& description) noexcept
{
    OrtTypeInfo* type = nullptr;
    OrtTensorTypeAndShapeInfo const* shape = nullptr;
    if (OrtStatus* const status = api.KernelInfo_GetInputTypeInfo(info, index, &type))
    {
        return status;
    }
    Owned<OrtTypeInfo> const owned(type, api.ReleaseTypeInfo);
    if (OrtStatus* const status = api.CastTypeInfoToTensorInfo(type, &shape))
    {
        return status;
    }
    if (shape == nullptr)
    {
        return api.CreateStatus(ORT_INVALID_ARGUMENT, "an input is no tensor");
    }
    OrtStatus* const status = describe(api, shape, description);
    if (status == nullptr && description.dims.nbDims == 0)
    {
        description.dims.nbDims = rank;
        for (int32_t axis = 0; axis < rank; ++axis)
        {
            description.dims.d[axis] = -1;
        }
    }
    return status;
}

} // namespace

Kernel::Kernel(OrtApi const& api, OpTable const& op, AttributeValue const* attributes) noexcept
    : mApi(api)
    , mOp(op)
    , mContract(op.spec, attributes)
{
}

Kernel::~Kernel()
{
    if (mAllocator != nullptr)
    {
        mApi.ReleaseAllocator(mAllocator);
    }
}

OrtStatus* Kernel::create(OrtApi const& api, OpTable const& op, OrtKernelInfo const* info, Kernel*& kernel) noexcept
{
    AttributeValue attributes[kMaxAttributes]{};
    Message problem;
    if (!readAttributes(api, op.spec, info, attributes, problem))
    {
        return refuseNode(api, op.spec, info, problem);
    }
    std::unique_ptr<Kernel> created(new (std::nothrow) Kernel(api, op, attributes));
    if (created == nullptr)
    {
        return api.CreateStatus(ORT_FAIL, "no memory for a kernel");
    }
    if (OrtStatus* const status = created->checkNode(info))
    {
        return status;
    }
    if (OrtStatus* const status = api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &created->mAllocator))
    {
        return status;
    }
    if (OrtStatus* const status = api.AllocatorGetInfo(created->mAllocator, &created->mMemory))
    {
        return status;
    }
    kernel = created.release();
    return nullptr;
}

bool Kernel::checkPresence(int32_t input, bool given, Message& problem) const noexcept
{
    bool const needed = mContract.position(input) >= 0;
    return given == needed
        || problem.set(needed ? "input %s is missing, which the attributes ask for"
                              : "input %s is given, for which the attributes have no use",
            mOp.spec.inputs[input].name);
}

OrtStatus* Kernel::checkNode(OrtKernelInfo const* info) const noexcept
{
    DynamicPluginTensorDesc inputs[kMaxTensors]{};
    Message problem;
    size_t count = 0;
    if (OrtStatus* const status = mApi.KernelInfo_GetInputCount(info, &count))
    {
        return status;
    }
    for (int32_t i = 0; i < mOp.spec.inputCount; ++i)
    {
        auto const index = static_cast<size_t>(i);
        bool given = false;
        if (OrtStatus* const status = isGiven(mApi, info, count, index, given))
        {
            return status;
        }
        if (!checkPresence(i, given, problem))
        {
            return refuseNode(mApi, mOp.spec, info, problem);
        }
        if (!given)
        {
            continue;
        }
        PluginTensorDesc& description = inputs[mContract.position(i)].desc;
        if (OrtStatus* const status = describeInput(mApi, info, index, mOp.spec.inputs[i].rank, description))
        {
            return status;
        }
    }
    return mContract.checkConfiguration(inputs, nullptr, problem) ? checkWritten(info)
                                                                  : refuseNode(mApi, mOp.spec, info, problem);
}

// An input whose memory an output shares is written: a constant of the model would be another one at the next call.
OrtStatus* Kernel::checkWritten(OrtKernelInfo const* info) const noexcept
{
    for (int32_t i = 0; i < mOp.spec.outputCount; ++i)
    {
        int32_t const input = mOp.spec.outputs[i].aliases;
        int isConstant = 0;
        OrtValue const* value = nullptr; // the session's
        OrtStatus* const status = input < 0
            ? nullptr
            : mApi.KernelInfoGetConstantInput_tensor(info, static_cast<size_t>(input), &isConstant, &value);
        if (status != nullptr)
        {
            return status;
        }
        if (isConstant != 0)
        {
            Message problem;
            problem.set("%s is a constant of the model, but it is updated in place: make it an input of the graph",
                mOp.spec.inputs[input].name);
            return refuseNode(mApi, mOp.spec, info, problem);
        }
    }
    return nullptr;
}

OrtStatus* Kernel::compute(OrtKernelContext* context) const noexcept
{
    Binding binding{};
    Tensors tensors{};
    if (OrtStatus* const status = bind(context, binding, tensors))
    {
        return status;
    }
    return mContract.outputVolume(0, binding) == 0 ? nullptr : launch(context, binding, tensors);
}

OrtStatus* Kernel::bind(OrtKernelContext* context, Binding& binding, Tensors& tensors) const noexcept
{
    PluginTensorDesc descriptions[kMaxTensors]{};
    void const* inputs[kMaxTensors]{};
    void* outputs[kMaxTensors]{};
    Message problem;
    size_t count = 0;
    if (OrtStatus* const status = mApi.KernelContext_GetInputCount(context, &count))
    {
        return status;
    }
    for (int32_t i = 0; i < mOp.spec.inputCount; ++i)
    {
        auto const index = static_cast<size_t>(i);
        OrtValue const* value = nullptr;
        if (OrtStatus* const status
            = index < count ? mApi.KernelContext_GetInput(context, index, &value) : nullptr)
        {
            return status;
        }
        if (!checkPresence(i, value != nullptr, problem))
        {
            return refusal(mApi, problem);
        }
        if (value == nullptr)
        {
            continue;
        }
        int32_t const position = mContract.position(i);
        void* address = nullptr;
        if (OrtStatus* const status = describe(mApi, value, descriptions[position]))
        {
            return status;
        }
        if (OrtStatus* const status = addressOf(mApi, value, address))
        {
            return status;
        }
        inputs[position] = address;
    }
    if (!mContract.bind(descriptions, nullptr, binding, problem) || !mOp.checkSizes(mContract, binding, problem))
    {
        return refusal(mApi, problem);
    }
    for (int32_t i = 0; i < mOp.spec.outputCount; ++i)
    {
        nvinfer1::Dims const shape = mContract.outputShape(i, binding);
        OrtValue* value = nullptr;
        if (OrtStatus* const status = mApi.KernelContext_GetOutput(
                context, static_cast<size_t>(i), shape.d, static_cast<size_t>(shape.nbDims), &value))
        {
            return status;
        }
        if (OrtStatus* const status = addressOf(mApi, value, outputs[i]))
        {
            return status;
        }
    }
    return mContract.bindAddresses(inputs, outputs, binding, kHowToShare, tensors, problem) ? nullptr
                                                                                           : refusal(mApi, problem);
}

OrtStatus* Kernel::launch(OrtKernelContext* context, Binding const& binding, Tensors const& tensors) const noexcept
{
    void* stream = nullptr;
    if (OrtStatus* const status = mApi.KernelContext_GetGPUComputeStream(context, &stream))
    {
        return status;
    }
    size_t const bytes = mOp.workspaceBytes(mContract, binding);
    Workspace workspace(mApi, mAllocator);
    if (OrtStatus* const status = workspace.take(context, mMemory, bytes, stream))
    {
        return status;
    }
    cudaError_t const error
        = mOp.launch(mContract, binding, tensors, workspace.address(), bytes, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess)
    {
        return nullptr;
    }
    Message problem;
    problem.set("the kernels could not be launched: %s (CUDA error %d)", cudaGetErrorString(error),
        static_cast<int>(error));
    return mApi.CreateStatus(ORT_FAIL, problem.text());
}

} // namespace qwenforge
