#include "onnxruntime/op_schema.h"

#include "onnxruntime/ort_values.h"

#include <cstdlib>
#include <cstring>

namespace qwenforge
{
namespace
{

// The first input whose type is the type variable's whatever the attributes are.
int32_t decidingInput(OpSpec const& spec) noexcept
{
    int32_t input = 0;
    while (input < spec.inputCount && (spec.inputs[input].typeAttribute >= 0 || spec.inputs[input].types->variable < 0))
    {
        ++input;
    }
    return input;
}

// An input that the specification gives the shape of `output`, -1 for none.
int32_t inputOfShape(OpSpec const& spec, TensorSpec const& output) noexcept
{
    for (int32_t i = 0; i < spec.inputCount; ++i)
    {
        TensorSpec const& input = spec.inputs[i];
        bool same = input.rank == output.rank && input.presentIf == nullptr;
        for (int32_t axis = 0; same && axis < input.rank; ++axis)
        {
            same = std::strcmp(input.shape[axis].text, output.shape[axis].text) == 0;
        }
        if (same)
        {
            return i;
        }
    }
    return -1;
}

} // namespace

CustomOp::CustomOp(OrtApi const& api, OpTable const& table, nvinfer1::DataType type, char const* provider) noexcept
    : OrtCustomOp{}
    , mApi(&api)
    , mTable(&table)
    , mType(type)
    , mProvider(provider)
{
    version = kOrtVersion;
    GetName = [](OrtCustomOp const* op) noexcept { return of(op).mTable->spec.name; };
    GetExecutionProviderType = [](OrtCustomOp const* op) noexcept { return of(op).mProvider; };
    GetInputTypeCount
        = [](OrtCustomOp const* op) noexcept { return static_cast<size_t>(of(op).mTable->spec.inputCount); };
    GetInputType = [](OrtCustomOp const* op, size_t index) noexcept { return of(op).inputType(index); };
    GetOutputTypeCount
        = [](OrtCustomOp const* op) noexcept { return static_cast<size_t>(of(op).mTable->spec.outputCount); };
    GetOutputType = [](OrtCustomOp const* op, size_t index) noexcept {
        return of(op).typeOf(of(op).mTable->spec.outputs[index]);
    };
    GetInputCharacteristic = [](OrtCustomOp const* op, size_t index) noexcept {
        bool const always = of(op).mTable->spec.inputs[index].presentIf == nullptr;
        return always ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetOutputCharacteristic = [](OrtCustomOp const*, size_t) noexcept { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](OrtCustomOp const*, size_t) noexcept { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](OrtCustomOp const*) noexcept { return 0; };
    GetVariadicInputHomogeneity = [](OrtCustomOp const*) noexcept { return 0; };
    GetVariadicOutputMinArity = [](OrtCustomOp const*) noexcept { return 0; };
    GetVariadicOutputHomogeneity = [](OrtCustomOp const*) noexcept { return 0; };
    CreateKernelV2 = [](OrtCustomOp const* op, OrtApi const* own, OrtKernelInfo const* info,
                         void** kernel) noexcept -> OrtStatus* {
        Kernel* created = nullptr;
        OrtStatus* const status = of(op).createKernel(*own, info, created);
        *kernel = created;
        return status;
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) noexcept -> OrtStatus* {
        return static_cast<Kernel const*>(kernel)->compute(context);
    };
    KernelDestroy = [](void* kernel) noexcept { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](OrtCustomOp const* op, OrtShapeInferContext* context) noexcept -> OrtStatus* {
        return of(op).inferShapes(context);
    };
    GetStartVersion = [](OrtCustomOp const* op) noexcept { return std::atoi(of(op).mTable->spec.version); };
}

OrtStatus* CustomOp::addTo(OrtCustomOpDomain* domain) const noexcept
{
    return mApi->CustomOpDomain_Add(domain, this);
}

CustomOp const& CustomOp::of(OrtCustomOp const* op) noexcept
{
    return *static_cast<CustomOp const*>(op);
}

ONNXTensorElementDataType CustomOp::typeOf(TensorSpec const& tensor) const noexcept
{
    return elementTypeOf(tensor.types->variable < 0 ? tensor.types->type : mType);
}

ONNXTensorElementDataType CustomOp::inputType(size_t index) const noexcept
{
    OpSpec const& spec = mTable->spec;
    bool const decides = static_cast<int32_t>(index) == decidingInput(spec);
    return decides ? typeOf(spec.inputs[index]) : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

OrtStatus* CustomOp::createKernel(OrtApi const& api, OrtKernelInfo const* info, Kernel*& kernel) const noexcept
{
    if (std::strcmp(mProvider, kProviders[0]) == 0)
    {
        return Kernel::create(api, *mTable, info, kernel);
    }
    Message problem;
    problem.set("its kernels need %s, which this session does not have", kProviders[0]);
    return refuseNode(api, mTable->spec, info, problem);
}

OrtStatus* CustomOp::inferShapes(OrtShapeInferContext* context) const noexcept
{
    OpSpec const& spec = mTable->spec;
    for (int32_t i = 0; i < spec.outputCount; ++i)
    {
        int32_t const input = inputOfShape(spec, spec.outputs[i]);
        if (input < 0)
        {
            continue;
        }
        OrtTensorTypeAndShapeInfo* shape = nullptr; // the context's
        if (OrtStatus* const status
            = mApi->ShapeInferContext_GetInputTypeShape(context, static_cast<size_t>(input), &shape))
        {
            return status;
        }
        size_t rank = 0;
        if (OrtStatus* const status = mApi->GetDimensionsCount(shape, &rank))
        {
            return status;
        }
        // Without dimensions the shape is not known; with others than the specification's the kernel says so.
        OrtStatus* const status = rank == static_cast<size_t>(spec.outputs[i].rank)
            ? mApi->ShapeInferContext_SetOutputTypeShape(context, static_cast<size_t>(i), shape)
            : nullptr;
        if (status != nullptr)
        {
            return status;
        }
    }
    return nullptr;
}

} // namespace qwenforge
