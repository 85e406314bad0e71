#include "onnxruntime/op_schema.h"

#include "onnxruntime/ort_values.h"
#include "onnxruntime/shape_inference.h"

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

// The first input whose type the attribute chooses that also chooses an output's, the number of inputs without one.
int32_t choosingInput(OpSpec const& spec) noexcept
{
    int32_t const attribute = typeChoosingAttribute(spec);
    int32_t input = 0;
    while (input < spec.inputCount && (attribute < 0 || spec.inputs[input].typeAttribute != attribute))
    {
        ++input;
    }
    return input;
}

} // namespace

CustomOp::CustomOp(OrtApi const& api, OpTable const& table, nvinfer1::DataType type, int32_t choice,
    char const* provider) noexcept
    : OrtCustomOp{}
    , mApi(&api)
    , mTable(&table)
    , mType(type)
    , mChoice(choice)
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
        return inferOutputShapes(*of(op).mApi, of(op).mTable->spec, context);
    };
    GetStartVersion = [](OrtCustomOp const* op) noexcept { return std::atoi(of(op).mTable->spec.version); };
    GetAliasMap = table.aliasMap;
    ReleaseAliasMap = [](int* inputs, int* outputs) noexcept {
        delete[] inputs;
        delete[] outputs;
    };
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
    TypeSpec const& type = tensor.types[tensor.typeAttribute < 0 ? 0 : mChoice];
    return elementTypeOf(type.variable < 0 ? type.type : mType);
}

ONNXTensorElementDataType CustomOp::inputType(size_t index) const noexcept
{
    OpSpec const& spec = mTable->spec;
    auto const input = static_cast<int32_t>(index);
    bool const decides = input == decidingInput(spec) || input == choosingInput(spec);
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

} // namespace qwenforge
