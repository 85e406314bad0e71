// What an op of this library sees of ONNX Runtime: a node when its kernel is made, and a call when it is run. Both throw
// Refusal, whose text reaches the user behind the op's and the node's name.

#pragma once

#include "cpu/team.h"
#include "onnxruntime/ort.h"

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace qwenforge::cpu
{

class Refusal : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

struct Shape
{
    std::vector<int64_t> extents;

    size_t rank() const noexcept
    {
        return extents.size();
    }

    int64_t operator[](size_t axis) const
    {
        return extents.at(axis);
    }

    int64_t elements() const noexcept;

    // "[2, 7, 64]"
    std::string text() const;
};

// A tensor of a call or a constant of a node, empty where an optional input is left out.
template <typename T>
struct View
{
    T const* data{nullptr};
    Shape shape;

    explicit operator bool() const noexcept
    {
        return data != nullptr;
    }
};

// A node, while its kernel is made.
class Node
{
public:
    Node(OrtApi const& api, OrtKernelInfo const* info) noexcept
        : mApi(api)
        , mInfo(info)
    {
    }

    int64_t integer(char const* attribute) const;
    float number(char const* attribute) const;

    // For attributes that a node may leave out.
    int64_t integer(char const* attribute, int64_t absent) const noexcept;
    float number(char const* attribute, float absent) const noexcept;

    // Whether the input is connected.
    bool has(size_t input) const;

    // The initializer that is bound to the input; empty where it is left out. Valid for as long as the session.
    template <typename T>
    View<T> constant(size_t input, char const* name) const
    {
        View<T> view;
        view.data = static_cast<T const*>(constantData(input, name, view.shape));
        return view;
    }

    std::string name() const;

private:
    void const* constantData(size_t input, char const* name, Shape& shape) const;

    OrtApi const& mApi;
    OrtKernelInfo const* mInfo;
};

// One call of a kernel.
class Call
{
public:
    Call(OrtApi const& api, OrtKernelContext* context) noexcept
        : mApi(api)
        , mContext(context)
    {
    }

    // Empty where an optional input is left out.
    template <typename T>
    View<T> input(size_t index) const
    {
        View<T> view;
        view.data = static_cast<T const*>(inputData(index, view.shape));
        return view;
    }

    // Null where nobody wants the output.
    template <typename T>
    T* output(size_t index, Shape const& shape) const
    {
        return static_cast<T*>(outputData(index, shape));
    }

    // Runs the stages one after the other, the items of each divided among the threads of the session.
    void run(Stages& stages) const;

private:
    void const* inputData(size_t index, Shape& shape) const;
    void* outputData(size_t index, Shape const& shape) const;

    OrtApi const& mApi;
    OrtKernelContext* mContext;
};

// Immutable after creation: a session may run it from several threads.
class Kernel
{
public:
    Kernel() = default;
    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;
    virtual ~Kernel() = default;
    virtual void compute(Call const& call) const = 0;
};

struct Port
{
    ONNXTensorElementDataType type;
    bool optional{false};
};

inline constexpr Port kFloat{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
inline constexpr Port kOptionalFloat{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true};
inline constexpr Port kHalf{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16};
inline constexpr Port kCodes{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8};
inline constexpr Port kOptionalCodes{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, true};
inline constexpr Port kInt32{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32};
inline constexpr Port kOptionalInt32{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, true};
inline constexpr Port kInt64{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};
inline constexpr Port kOptionalInt64{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, true};

struct OpDefinition
{
    char const* name;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::unique_ptr<Kernel> (*create)(Node const& node);
};

// Of ops that this library registers in the domain "qwenforge.cpu", each defined beside its kernel.
OpDefinition quantizedLinear();
OpDefinition quantizedGatedMlp();
OpDefinition quantizedMixtureOfExperts();
OpDefinition cachedAttention();
OpDefinition cachedAttentionOfHalves(); // under the same name: ONNX Runtime tells them apart by the types

} // namespace qwenforge::cpu
