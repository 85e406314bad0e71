// What the contract's checks are made of: valid fields and tensors of each plugin, and small stand-ins for the objects
// that TensorRT hands to a plugin.

#pragma once

#include "attention_spec.h"
#include "common/tensorrt.h"
#include "moe_spec.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

// Fields with data of their own; change them one by one.
struct Fields
{
    std::vector<nvinfer1::PluginField> fields;
    std::deque<qwenforge::AttributeValue> values;

    Fields(qwenforge::OpSpec const& spec, std::vector<double> const& numbers)
    {
        for (int32_t i = 0; i < spec.attributeCount; ++i)
        {
            bool const isInt = spec.attributes[i].type == qwenforge::AttributeType::kInt;
            qwenforge::AttributeValue value{};
            double const number = numbers[static_cast<size_t>(i)];
            isInt ? value.integer = static_cast<int32_t>(number) : value.real = static_cast<float>(number);
            values.push_back(value);
            fields.emplace_back(spec.attributes[i].name, &values.back(),
                isInt ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32, 1);
        }
    }

    nvinfer1::PluginFieldCollection collection() const
    {
        nvinfer1::PluginFieldCollection result{};
        result.nbFields = static_cast<int32_t>(fields.size());
        result.fields = fields.data();
        return result;
    }
};

inline nvinfer1::Dims dims(std::vector<int64_t> const& sizes)
{
    nvinfer1::Dims result{};
    result.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        result.d[i] = sizes[i];
    }
    return result;
}

// One plugin under test: its fields, and the tensors of a call by the sizes that the tensors bring.
struct Subject
{
    qwenforge::OpSpec const* spec;
    std::vector<double> numbers;
    std::vector<int64_t> sizes;   // by index of the specification, as in a small call
    std::vector<int64_t> nothing; // the same of a call without a token

    std::vector<nvinfer1::PluginTensorDesc> tensors(
        std::vector<int64_t> const& given, nvinfer1::DataType type = nvinfer1::DataType::kHALF) const
    {
        Fields const fields(*spec, numbers);
        std::vector<qwenforge::AttributeValue> values(fields.values.begin(), fields.values.end());
        std::vector<nvinfer1::PluginTensorDesc> result;
        auto const add = [&](qwenforge::TensorSpec const& tensor) {
            nvinfer1::PluginTensorDesc desc{};
            desc.dims.nbDims = tensor.rank;
            for (int32_t axis = 0; axis < tensor.rank; ++axis)
            {
                qwenforge::DimensionSpec const& dimension = tensor.shape[axis];
                desc.dims.d[axis] = dimension.size >= 0 ? given[static_cast<size_t>(dimension.size)]
                                                        : dimension.expression(values.data());
            }
            qwenforge::TypeSpec const& chosen = tensor.type(values.data());
            desc.type = chosen.variable >= 0 ? type : chosen.type;
            desc.format = nvinfer1::TensorFormat::kLINEAR;
            result.push_back(desc);
        };
        for (int32_t i = 0; i < inputs(); ++i)
        {
            add(input(i));
        }
        for (int32_t i = 0; i < spec->outputCount; ++i)
        {
            add(spec->outputs[i]);
        }
        return result;
    }

    std::vector<nvinfer1::PluginTensorDesc> tensors() const
    {
        return tensors(sizes);
    }

    // Of the inputs that the fields do not make absent.
    std::vector<int32_t> present() const
    {
        Fields const fields(*spec, numbers);
        std::vector<qwenforge::AttributeValue> const values(fields.values.begin(), fields.values.end());
        std::vector<int32_t> indices;
        for (int32_t i = 0; i < spec->inputCount; ++i)
        {
            qwenforge::BooleanExpression const condition = spec->inputs[i].presentIf;
            if (condition == nullptr || condition(values.data()))
            {
                indices.push_back(i);
            }
        }
        return indices;
    }
    int32_t inputs() const
    {
        return static_cast<int32_t>(present().size());
    }
    qwenforge::TensorSpec const& input(int32_t position) const
    {
        return spec->inputs[present()[static_cast<size_t>(position)]];
    }
    int32_t outputs() const
    {
        return spec->outputCount;
    }

    // The position of the input whose memory an output shares, -1 for none.
    int32_t aliasedInput(int32_t output) const
    {
        std::vector<int32_t> const indices = present();
        auto const found = std::find(indices.begin(), indices.end(), spec->outputs[output].aliases);
        return found == indices.end() ? -1 : static_cast<int32_t>(found - indices.begin());
    }

    // How many of the inputs bring a size.
    int64_t inputsWith(int32_t size) const
    {
        std::vector<int32_t> const indices = present();
        return std::count_if(indices.begin(), indices.end(), [&](int32_t index) {
            qwenforge::TensorSpec const& tensor = spec->inputs[index];
            return std::any_of(tensor.shape, tensor.shape + tensor.rank,
                [&](qwenforge::DimensionSpec const& dimension) { return dimension.size == size; });
        });
    }
};

inline std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(std::vector<nvinfer1::PluginTensorDesc> const& tensors)
{
    std::vector<nvinfer1::DynamicPluginTensorDesc> result;
    for (nvinfer1::PluginTensorDesc const& tensor : tensors)
    {
        result.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    }
    return result;
}

inline int64_t bytesOf(nvinfer1::PluginTensorDesc const& tensor)
{
    bool const wide = tensor.type == nvinfer1::DataType::kINT32 || tensor.type == nvinfer1::DataType::kFLOAT;
    int64_t count = wide ? 4 : tensor.type == nvinfer1::DataType::kINT8 ? 1 : 2;
    for (int32_t axis = 0; axis < tensor.dims.nbDims; ++axis)
    {
        count *= tensor.dims.d[axis];
    }
    return count;
}

// Memory for the tensors of a call, zeros and, where there are scales in fp32, ones; an output that aliases an input has its address.
struct Memory
{
    std::vector<std::unique_ptr<char, void (*)(void*)>> blocks;
    std::vector<void const*> inputs;
    std::vector<void*> outputs;

    Memory(Subject const& subject, std::vector<nvinfer1::PluginTensorDesc> const& tensors)
    {
        for (int32_t i = 0; i < subject.inputs() + subject.outputs(); ++i)
        {
            auto const bytes = static_cast<size_t>(bytesOf(tensors[static_cast<size_t>(i)]));
            void* address = nullptr;
            if (posix_memalign(&address, 256, bytes == 0 ? 1 : bytes) != 0)
            {
                std::abort();
            }
            std::memset(address, 0, bytes);
            if (tensors[static_cast<size_t>(i)].type == nvinfer1::DataType::kFLOAT)
            {
                std::fill_n(static_cast<float*>(address), bytes / sizeof(float), 1.0F);
            }
            blocks.emplace_back(static_cast<char*>(address), std::free);
            if (i < subject.inputs())
            {
                inputs.push_back(address);
                continue;
            }
            int32_t const alias = subject.aliasedInput(i - subject.inputs());
            outputs.push_back(alias < 0 ? address : const_cast<void*>(inputs[static_cast<size_t>(alias)]));
        }
    }
};

// TensorRT's expressions: constants and named symbols, which is all that these plugins need.
class Expression final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr
{
public:
    explicit Expression(int64_t value, std::string name = "")
        : mValue(value)
        , mName(std::move(name))
    {
        mImpl = this;
    }
    std::string text() const
    {
        return mName.empty() ? std::to_string(mValue) : mName;
    }

private:
    bool isConstant() const override
    {
        return mName.empty();
    }
    int64_t getConstantValue() const override
    {
        return mValue;
    }
    bool isSizeTensor() const override
    {
        return false;
    }
    int64_t mValue;
    std::string mName;
};

class Expressions final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder
{
public:
    Expressions()
    {
        mImpl = this;
    }
    nvinfer1::IDimensionExpr const* symbol(std::string const& name)
    {
        mMade.push_back(std::make_unique<Expression>(0, name));
        return mMade.back().get();
    }
    nvinfer1::IDimensionExpr const* constant(int64_t value) override
    {
        mMade.push_back(std::make_unique<Expression>(value));
        return mMade.back().get();
    }

private:
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
        nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }
    nvinfer1::IDimensionExpr const* declareSizeTensor(
        int32_t, nvinfer1::IDimensionExpr const&, nvinfer1::IDimensionExpr const&) override
    {
        return nullptr;
    }
    std::vector<std::unique_ptr<Expression>> mMade;
};

// Keeps what is reported, and counts references.
class Recorder final : public nvinfer1::IErrorRecorder
{
public:
    std::string last;
    int32_t references = 0;

    int32_t getNbErrors() const noexcept override
    {
        return last.empty() ? 0 : 1;
    }
    nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override
    {
        return nvinfer1::ErrorCode::kUNSPECIFIED_ERROR;
    }
    ErrorDesc getErrorDesc(int32_t) const noexcept override
    {
        return last.c_str();
    }
    bool hasOverflowed() const noexcept override
    {
        return false;
    }
    void clear() noexcept override
    {
        last.clear();
    }
    bool reportError(nvinfer1::ErrorCode, ErrorDesc text) noexcept override
    {
        last = text;
        return true;
    }
    RefCount incRefCount() noexcept override
    {
        return ++references;
    }
    RefCount decRefCount() noexcept override
    {
        return --references;
    }
};

class Context final : public nvinfer1::IPluginResourceContext
{
public:
    explicit Context(Recorder& recorder)
        : mRecorder(&recorder)
    {
    }
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override
    {
        return nullptr;
    }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return mRecorder;
    }

private:
    Recorder* mRecorder;
};
