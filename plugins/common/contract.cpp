#include "common/contract.h"

#include <cinttypes>
#include <cstdint>
#include <cstring>

namespace qwenforge
{
namespace
{

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

// The widest access of the kernels. TensorRT aligns to 256 bytes; a caller's own address may not be.
constexpr uintptr_t kAlignment = 16;

char const* typeName(DataType type) noexcept
{
    constexpr char const* kNames[]{
        "float32", "float16", "int8", "int32", "bool", "uint8", "float8", "bfloat16", "int64", "int4"};
    auto const index = static_cast<size_t>(type);
    return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "another type";
}

bool allows(TypeVariableSpec const& variable, DataType type) noexcept
{
    for (int32_t i = 0; i < variable.typeCount; ++i)
    {
        if (variable.types[i] == type)
        {
            return true;
        }
    }
    return false;
}

} // namespace

Contract::Contract(OpSpec const& spec, AttributeValue const* attributes) noexcept
    : mSpec(&spec)
{
    std::memcpy(mAttributes, attributes, sizeof(AttributeValue) * static_cast<size_t>(spec.attributeCount));
    for (int32_t i = 0; i < spec.inputCount; ++i)
    {
        BooleanExpression const condition = spec.inputs[i].presentIf;
        bool const present = condition == nullptr || condition(attributes);
        mPositionOf[i] = present ? mInputCount : -1;
        if (present)
        {
            mIndexAt[mInputCount++] = i;
        }
    }
}

int32_t Contract::aliasedInput(int32_t output) const noexcept
{
    if (output < 0 || output >= mSpec->outputCount || mSpec->outputs[output].aliases < 0)
    {
        return -1;
    }
    return mPositionOf[mSpec->outputs[output].aliases];
}

bool Contract::checkCounts(int32_t inputs, int32_t outputs, Message& problem) const noexcept
{
    if (inputs != mInputCount)
    {
        return problem.set("%d inputs were given, not %d", inputs, mInputCount);
    }
    if (outputs != mSpec->outputCount)
    {
        return problem.set("%d outputs were asked for, not %d", outputs, mSpec->outputCount);
    }
    return true;
}

bool Contract::outputTypes(DataType const* inputs, DataType* outputs, Message& problem) const noexcept
{
    TypeState state;
    for (int32_t i = 0; i < mInputCount; ++i)
    {
        if (!acceptType(tensorAt(i), inputs[i], state, problem))
        {
            return false;
        }
    }
    for (int32_t i = 0; i < mSpec->outputCount; ++i)
    {
        TypeSpec const& type = mSpec->outputs[i].type(mAttributes);
        outputs[i] = type.variable < 0 ? type.type : state.types[type.variable];
    }
    return true;
}

bool Contract::outputShapes(nvinfer1::DimsExprs const* inputs, nvinfer1::DimsExprs* outputs,
    nvinfer1::IExprBuilder& builder, Message& problem) const noexcept
{
    SizeState state;
    nvinfer1::IDimensionExpr const* expressions[kMaxSizes]{};
    for (int32_t i = 0; i < mInputCount; ++i)
    {
        TensorSpec const& tensor = tensorAt(i);
        nvinfer1::Dims known{};
        known.nbDims = inputs[i].nbDims;
        for (int32_t axis = 0; axis < known.nbDims; ++axis)
        {
            nvinfer1::IDimensionExpr const* const extent = inputs[i].d[axis];
            known.d[axis] = extent->isConstant() ? extent->getConstantValue() : -1;
        }
        if (!acceptShape(tensor, known, /*unknownAllowed=*/true, state, problem))
        {
            return false;
        }
        for (int32_t axis = 0; axis < tensor.rank; ++axis)
        {
            int32_t const size = tensor.shape[axis].size;
            // A constant says more than an expression that only comes to the same number when it runs.
            if (size >= 0 && (expressions[size] == nullptr || known.d[axis] >= 0))
            {
                expressions[size] = inputs[i].d[axis];
            }
        }
    }
    for (int32_t i = 0; i < mSpec->outputCount; ++i)
    {
        TensorSpec const& tensor = mSpec->outputs[i];
        outputs[i].nbDims = tensor.rank;
        for (int32_t axis = 0; axis < tensor.rank; ++axis)
        {
            DimensionSpec const& dimension = tensor.shape[axis];
            outputs[i].d[axis]
                = dimension.size >= 0 ? expressions[dimension.size] : builder.constant(dimension.expression(mAttributes));
            if (outputs[i].d[axis] == nullptr)
            {
                return problem.set("no expression for %s of %s", dimension.text, tensor.name);
            }
        }
    }
    return true;
}

bool Contract::supportsFormat(int32_t position, DynamicPluginTensorDesc const* tensors) const noexcept
{
    if (position < 0 || position >= mInputCount + mSpec->outputCount)
    {
        return false;
    }
    PluginTensorDesc const& asked = tensors[position].desc;
    TypeSpec const& type = tensorAt(position).type(mAttributes);
    if (asked.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    if (type.variable < 0)
    {
        return asked.type == type.type;
    }
    for (int32_t i = 0; i < position; ++i)
    {
        if (tensorAt(i).type(mAttributes).variable == type.variable)
        {
            return asked.type == tensors[i].desc.type;
        }
    }
    return allows(mSpec->typeVariables[type.variable], asked.type);
}

bool Contract::checkConfiguration(
    DynamicPluginTensorDesc const* inputs, DynamicPluginTensorDesc const* outputs, Message& problem) const noexcept
{
    TypeState types;
    SizeState sizes;
    int32_t const count = mInputCount + (outputs == nullptr ? 0 : mSpec->outputCount);
    for (int32_t i = 0; i < count; ++i)
    {
        PluginTensorDesc const& given = i < mInputCount ? inputs[i].desc : outputs[i - mInputCount].desc;
        if (!accept(tensorAt(i), given, /*unknownAllowed=*/true, types, sizes, problem))
        {
            return false;
        }
    }
    return true;
}

Binding Contract::maximum(DynamicPluginTensorDesc const* inputs) const noexcept
{
    Binding binding{};
    for (int32_t i = 0; i < mInputCount; ++i)
    {
        TensorSpec const& tensor = tensorAt(i);
        for (int32_t axis = 0; axis < tensor.rank && axis < inputs[i].max.nbDims; ++axis)
        {
            int32_t const size = tensor.shape[axis].size;
            if (size >= 0 && inputs[i].max.d[axis] > binding.sizes[size])
            {
                binding.sizes[size] = inputs[i].max.d[axis];
            }
        }
    }
    return binding;
}

bool Contract::bind(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs, Binding& binding,
    Message& problem) const noexcept
{
    TypeState types;
    SizeState sizes;
    int32_t const count = mInputCount + (outputs == nullptr ? 0 : mSpec->outputCount);
    for (int32_t i = 0; i < count; ++i)
    {
        PluginTensorDesc const& given = i < mInputCount ? inputs[i] : outputs[i - mInputCount];
        if (!accept(tensorAt(i), given, /*unknownAllowed=*/false, types, sizes, problem))
        {
            return false;
        }
    }
    std::memcpy(binding.sizes, sizes.sizes, sizeof(binding.sizes));
    std::memcpy(binding.types, types.types, sizeof(binding.types));
    return true;
}

nvinfer1::Dims Contract::outputShape(int32_t output, Binding const& binding) const noexcept
{
    TensorSpec const& tensor = mSpec->outputs[output];
    nvinfer1::Dims shape{};
    shape.nbDims = tensor.rank;
    for (int32_t axis = 0; axis < tensor.rank; ++axis)
    {
        shape.d[axis] = extent(tensor.shape[axis], binding);
    }
    return shape;
}

int64_t Contract::outputVolume(int32_t output, Binding const& binding) const noexcept
{
    return volume(mSpec->outputs[output], binding);
}

bool Contract::bindAddresses(void const* const* inputs, void* const* outputs, Binding const& binding,
    char const* howToShare, Tensors& tensors, Message& problem) const noexcept
{
    tensors = Tensors{};
    for (int32_t i = 0; i < mInputCount; ++i)
    {
        if (!acceptAddress(tensorAt(i), inputs[i], binding, problem))
        {
            return false;
        }
        tensors.inputs[mIndexAt[i]] = inputs[i];
    }
    for (int32_t i = 0; i < mSpec->outputCount; ++i)
    {
        TensorSpec const& output = mSpec->outputs[i];
        if (!acceptAddress(output, outputs[i], binding, problem))
        {
            return false;
        }
        tensors.outputs[i] = outputs[i];
        bool const mustShare = output.aliases >= 0 && volume(output, binding) > 0;
        if (mustShare && tensors.outputs[i] != tensors.inputs[output.aliases])
        {
            return problem.set("%s is not at the address of %s, whose memory it has to share: %s", output.name,
                mSpec->inputs[output.aliases].name, howToShare);
        }
    }
    return true;
}

TensorSpec const& Contract::tensorAt(int32_t position) const noexcept
{
    return position < mInputCount ? mSpec->inputs[mIndexAt[position]] : mSpec->outputs[position - mInputCount];
}

int64_t Contract::extent(DimensionSpec const& dimension, Binding const& binding) const noexcept
{
    return dimension.size >= 0 ? binding.sizes[dimension.size] : dimension.expression(mAttributes);
}

int64_t Contract::volume(TensorSpec const& tensor, Binding const& binding) const noexcept
{
    int64_t product = 1;
    for (int32_t axis = 0; axis < tensor.rank; ++axis)
    {
        product *= extent(tensor.shape[axis], binding);
    }
    return product;
}

bool Contract::acceptType(TensorSpec const& tensor, DataType type, TypeState& state, Message& problem) const noexcept
{
    TypeSpec const& expected = tensor.type(mAttributes);
    if (expected.variable < 0)
    {
        return type == expected.type
            || problem.set("%s is of type %s, not %s", tensor.name, typeName(type), typeName(expected.type));
    }
    char const*& from = state.from[expected.variable];
    DataType& bound = state.types[expected.variable];
    if (from == nullptr)
    {
        TypeVariableSpec const& variable = mSpec->typeVariables[expected.variable];
        from = tensor.name;
        bound = type;
        return allows(variable, type)
            || problem.set("%s is of type %s, which is not supported: export the model in %s or %s", tensor.name,
                typeName(type), typeName(variable.types[0]), typeName(variable.types[variable.typeCount - 1]));
    }
    return type == bound
        || problem.set("%s is of type %s, but %s of type %s", tensor.name, typeName(type), from, typeName(bound));
}

bool Contract::acceptShape(TensorSpec const& tensor, nvinfer1::Dims const& shape, bool unknownAllowed, SizeState& state,
    Message& problem) const noexcept
{
    if (shape.nbDims != tensor.rank)
    {
        return problem.set("%s has %d dimensions, not %d", tensor.name, shape.nbDims, tensor.rank);
    }
    for (int32_t axis = 0; axis < tensor.rank; ++axis)
    {
        DimensionSpec const& dimension = tensor.shape[axis];
        int64_t const given = shape.d[axis];
        if (given < 0)
        {
            if (unknownAllowed)
            {
                continue;
            }
            return problem.set("dimension %d of %s is not known", axis, tensor.name);
        }
        if (dimension.size < 0)
        {
            int64_t const expected = dimension.expression(mAttributes);
            if (given != expected)
            {
                return problem.set("dimension %d of %s is %" PRId64 ", but %s is %" PRId64, axis, tensor.name, given,
                    dimension.text, expected);
            }
            continue;
        }
        char const*& from = state.from[dimension.size];
        int64_t& bound = state.sizes[dimension.size];
        if (from == nullptr)
        {
            from = tensor.name;
            bound = given;
        }
        else if (given != bound)
        {
            return problem.set("dimension %d of %s is %" PRId64 ", but %s of %s is %" PRId64, axis, tensor.name, given,
                dimension.text, from, bound);
        }
    }
    return true;
}

bool Contract::accept(TensorSpec const& tensor, PluginTensorDesc const& given, bool unknownAllowed, TypeState& types,
    SizeState& sizes, Message& problem) const noexcept
{
    if (given.format != TensorFormat::kLINEAR)
    {
        return problem.set("%s is not in the linear format", tensor.name);
    }
    return acceptType(tensor, given.type, types, problem)
        && acceptShape(tensor, given.dims, unknownAllowed, sizes, problem);
}

bool Contract::acceptAddress(
    TensorSpec const& tensor, void const* address, Binding const& binding, Message& problem) const noexcept
{
    if (volume(tensor, binding) == 0)
    {
        return true;
    }
    if (address == nullptr)
    {
        return problem.set("%s has no address", tensor.name);
    }
    if (reinterpret_cast<uintptr_t>(address) % kAlignment != 0)
    {
        return problem.set("%s is at %p, which is no multiple of %d bytes", tensor.name, address,
            static_cast<int>(kAlignment));
    }
    return true;
}

} // namespace qwenforge
