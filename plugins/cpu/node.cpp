#include "cpu/node.h"

namespace qwenforge::cpu
{
namespace
{

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

// Errors of ONNX Runtime that no user of ours can bring about.
void require(OrtApi const& api, OrtStatus* status)
{
    if (status != nullptr)
    {
        std::string const text = api.GetErrorMessage(status);
        api.ReleaseStatus(status);
        throw Refusal(text);
    }
}

Shape shapeOf(OrtApi const& api, OrtValue const* value)
{
    OrtTensorTypeAndShapeInfo* found = nullptr;
    require(api, api.GetTensorTypeAndShape(value, &found));
    Owned<OrtTensorTypeAndShapeInfo> const info(found, api.ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    require(api, api.GetDimensionsCount(info.get(), &rank));
    Shape shape{std::vector<int64_t>(rank)};
    require(api, api.GetDimensions(info.get(), shape.extents.data(), rank));
    return shape;
}

void* dataOf(OrtApi const& api, OrtValue const* value)
{
    void* data = nullptr;
    require(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    return data;
}

} // namespace

int64_t Shape::elements() const noexcept
{
    int64_t product = 1;
    for (int64_t const extent : extents)
    {
        product *= extent;
    }
    return product;
}

std::string Shape::text() const
{
    std::string text = "[";
    for (size_t i = 0; i < extents.size(); ++i)
    {
        text += (i == 0 ? "" : ", ") + std::to_string(extents[i]);
    }
    return text + "]";
}

int64_t Node::integer(char const* attribute) const
{
    int64_t value = 0;
    if (OrtStatus* const status = mApi.KernelInfoGetAttribute_int64(mInfo, attribute, &value))
    {
        mApi.ReleaseStatus(status);
        throw Refusal(std::string("the attribute ") + attribute + ", an integer, is missing");
    }
    return value;
}

float Node::number(char const* attribute) const
{
    float value = 0;
    if (OrtStatus* const status = mApi.KernelInfoGetAttribute_float(mInfo, attribute, &value))
    {
        mApi.ReleaseStatus(status);
        throw Refusal(std::string("the attribute ") + attribute + ", a float, is missing");
    }
    return value;
}

int64_t Node::integer(char const* attribute, int64_t absent) const noexcept
{
    int64_t value = 0;
    if (OrtStatus* const status = mApi.KernelInfoGetAttribute_int64(mInfo, attribute, &value))
    {
        mApi.ReleaseStatus(status);
        return absent;
    }
    return value;
}

float Node::number(char const* attribute, float absent) const noexcept
{
    float value = 0;
    if (OrtStatus* const status = mApi.KernelInfoGetAttribute_float(mInfo, attribute, &value))
    {
        mApi.ReleaseStatus(status);
        return absent;
    }
    return value;
}

bool Node::has(size_t input) const
{
    size_t count = 0;
    require(mApi, mApi.KernelInfo_GetInputCount(mInfo, &count));
    if (input >= count)
    {
        return false;
    }
    size_t size = 0;
    require(mApi, mApi.KernelInfo_GetInputName(mInfo, input, nullptr, &size));
    return size > 1; // with its zero
}

void const* Node::constantData(size_t input, char const* name, Shape& shape) const
{
    if (!has(input))
    {
        return nullptr;
    }
    int isConstant = 0;
    OrtValue const* value = nullptr;
    require(mApi, mApi.KernelInfoGetConstantInput_tensor(mInfo, input, &isConstant, &value));
    if (isConstant == 0 || value == nullptr)
    {
        throw Refusal(std::string(name) + " has to be an initializer of the model");
    }
    shape = shapeOf(mApi, value);
    return dataOf(mApi, value);
}

std::string Node::name() const
{
    size_t size = 0;
    require(mApi, mApi.KernelInfo_GetNodeName(mInfo, nullptr, &size));
    std::string name(size, '\0');
    require(mApi, mApi.KernelInfo_GetNodeName(mInfo, name.data(), &size));
    name.resize(size > 0 ? size - 1 : 0);
    return name;
}

void const* Call::inputData(size_t index, Shape& shape) const
{
    size_t count = 0;
    require(mApi, mApi.KernelContext_GetInputCount(mContext, &count));
    if (index >= count)
    {
        return nullptr;
    }
    OrtValue const* value = nullptr;
    require(mApi, mApi.KernelContext_GetInput(mContext, index, &value));
    if (value == nullptr)
    {
        return nullptr;
    }
    shape = shapeOf(mApi, value);
    return dataOf(mApi, value);
}

void* Call::outputData(size_t index, Shape const& shape) const
{
    size_t count = 0;
    require(mApi, mApi.KernelContext_GetOutputCount(mContext, &count));
    if (index >= count)
    {
        return nullptr;
    }
    OrtValue* value = nullptr;
    require(mApi, mApi.KernelContext_GetOutput(mContext, index, shape.extents.data(), shape.rank(), &value));
    return value == nullptr ? nullptr : dataOf(mApi, value);
}

void Call::run(Stages& stages) const
{
    // Items do not throw: what can be refused was before the first stage.
    auto const task = [](void* data, size_t worker) { static_cast<Stages*>(data)->work(worker); };
    if (stages.workers() == 1)
    {
        task(&stages, 0);
        return;
    }
    require(mApi, mApi.KernelContext_ParallelFor(mContext, task, stages.workers(), stages.workers(), &stages));
}

} // namespace qwenforge::cpu
