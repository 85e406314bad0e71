// A stand-in for ONNX Runtime: the entries of its table that a kernel calls, over a node and its tensors. It counts what
// is handed out and given back, and can fail any one call. Defines the types that are opaque in ONNX Runtime's header.

#pragma once

#include "onnxruntime/ort.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

struct OrtStatus
{
    std::string text;
};
struct OrtTensorTypeAndShapeInfo
{
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;
    std::vector<std::string> names{}; // of the extents, empty where they have none
};
struct OrtTypeInfo
{
    OrtTensorTypeAndShapeInfo tensor;
};
struct OrtValue
{
    OrtTensorTypeAndShapeInfo info;
    void* data;
};
struct OrtMemoryInfo
{
};
struct OrtKernelInfo
{
    std::map<std::string, double> attributes;
    std::vector<OrtTensorTypeAndShapeInfo> inputs; // of type UNDEFINED where there is none
    int constant = -1;                             // the one of them that is a constant
};
struct OrtKernelContext
{
    std::vector<OrtValue> inputs;
    std::vector<OrtValue> outputs;
    void* stream;
};
struct OrtOpAttr
{
    double value;
};
struct OrtShapeInferContext
{
    std::map<std::string, OrtOpAttr> attributes;
    std::vector<OrtTensorTypeAndShapeInfo> inputs; // of type UNDEFINED where there is none
    mutable std::map<size_t, OrtTensorTypeAndShapeInfo> outputs{}; // that were set
};

namespace fake
{

// What is handed out and not yet given back, and which call is to fail: 0 the next one, -1 none.
struct State
{
    int statuses = 0;
    int infos = 0;
    int allocators = 0;
    int buffers = 0;
    int fromStream = 0; // buffers that were asked for on a stream, ever
    int calls = 0;
    int failing = -1;
};

inline State state;
inline OrtMemoryInfo const memory;
inline OrtAllocator allocator{};

inline OrtStatus* status(char const* text)
{
    ++state.statuses;
    return new OrtStatus{text};
}

// Null, or the error that this call is to be.
inline OrtStatus* called()
{
    return state.calls++ == state.failing ? status("injected") : nullptr;
}

inline OrtStatus* give(size_t bytes, void** out)
{
    OrtStatus* const failed = called();
    if (failed == nullptr)
    {
        ++state.buffers;
        *out = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    }
    return failed;
}

inline OrtApi table()
{
    OrtApi api{};
    api.CreateStatus = [](OrtErrorCode, char const* text) noexcept { return status(text); };
    api.ReleaseStatus = [](OrtStatus* given) noexcept {
        --state.statuses;
        delete given;
    };
    api.KernelInfoGetAttribute_int64 = [](OrtKernelInfo const* info, char const* name, int64_t* out) noexcept {
        auto const found = info->attributes.find(name);
        OrtStatus* const failed = found == info->attributes.end() ? status("no such attribute") : called();
        if (failed == nullptr)
        {
            *out = static_cast<int64_t>(found->second);
        }
        return failed;
    };
    api.KernelInfoGetAttribute_float = [](OrtKernelInfo const* info, char const* name, float* out) noexcept {
        auto const found = info->attributes.find(name);
        OrtStatus* const failed = found == info->attributes.end() ? status("no such attribute") : called();
        if (failed == nullptr)
        {
            *out = static_cast<float>(found->second);
        }
        return failed;
    };
    api.KernelInfo_GetNodeName = [](OrtKernelInfo const*, char* out, size_t* size) noexcept {
        std::memcpy(out, "node", *size = 5);
        return called();
    };
    api.KernelInfo_GetInputCount = [](OrtKernelInfo const* info, size_t* out) noexcept {
        *out = info->inputs.size();
        return called();
    };
    api.KernelInfo_GetInputName = [](OrtKernelInfo const* info, size_t index, char*, size_t* size) noexcept {
        *size = info->inputs[index].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED ? 1 : 6;
        return called();
    };
    api.KernelInfo_GetInputTypeInfo = [](OrtKernelInfo const* info, size_t index, OrtTypeInfo** out) noexcept {
        OrtStatus* const failed = called();
        if (failed == nullptr)
        {
            ++state.infos;
            *out = new OrtTypeInfo{info->inputs[index]};
        }
        return failed;
    };
    api.CastTypeInfoToTensorInfo = [](OrtTypeInfo const* info, OrtTensorTypeAndShapeInfo const** out) noexcept {
        *out = &info->tensor;
        return called();
    };
    api.ReleaseTypeInfo = [](OrtTypeInfo* info) noexcept {
        --state.infos;
        delete info;
    };
    api.GetTensorElementType
        = [](OrtTensorTypeAndShapeInfo const* info, ONNXTensorElementDataType* out) noexcept {
              *out = info->type;
              return called();
          };
    api.GetDimensionsCount = [](OrtTensorTypeAndShapeInfo const* info, size_t* out) noexcept {
        *out = info->shape.size();
        return called();
    };
    api.GetDimensions = [](OrtTensorTypeAndShapeInfo const* info, int64_t* values, size_t count) noexcept {
        std::copy_n(info->shape.begin(), count, values);
        return called();
    };
    api.KernelInfoGetConstantInput_tensor
        = [](OrtKernelInfo const* info, size_t index, int* isConstant, OrtValue const** out) noexcept {
              *isConstant = static_cast<int>(index) == info->constant ? 1 : 0;
              *out = nullptr;
              return called();
          };
    api.KernelInfoGetAllocator = [](OrtKernelInfo const*, OrtMemType, OrtAllocator** out) noexcept {
        OrtStatus* const failed = called();
        if (failed == nullptr)
        {
            ++state.allocators;
            *out = &allocator;
        }
        return failed;
    };
    api.ReleaseAllocator = [](OrtAllocator*) noexcept { --state.allocators; };
    api.AllocatorGetInfo = [](OrtAllocator const*, OrtMemoryInfo const** out) noexcept {
        *out = &memory;
        return called();
    };
    api.AllocatorAlloc = [](OrtAllocator*, size_t bytes, void** out) noexcept { return give(bytes, out); };
    api.AllocatorFree = [](OrtAllocator*, void* address) noexcept {
        --state.buffers;
        std::free(address);
        return called(); // an error here reaches nobody, but must not leak
    };
    api.KernelContext_GetScratchBuffer
        = [](OrtKernelContext const*, OrtMemoryInfo const* info, size_t bytes, void** out) noexcept {
              ++state.fromStream;
              return info == &memory ? give(bytes, out) : status("another memory");
          };
    api.KernelContext_GetInputCount = [](OrtKernelContext const* context, size_t* out) noexcept {
        *out = context->inputs.size();
        return called();
    };
    api.KernelContext_GetInput = [](OrtKernelContext const* context, size_t index, OrtValue const** out) noexcept {
        OrtValue const& value = context->inputs[index];
        *out = value.info.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED ? nullptr : &value;
        return called();
    };
    api.KernelContext_GetOutput
        = [](OrtKernelContext* context, size_t index, int64_t const* shape, size_t rank, OrtValue** out) noexcept {
              context->outputs[index].info.shape.assign(shape, shape + rank);
              *out = &context->outputs[index];
              return called();
          };
    api.GetTensorTypeAndShape = [](OrtValue const* value, OrtTensorTypeAndShapeInfo** out) noexcept {
        OrtStatus* const failed = called();
        if (failed == nullptr)
        {
            ++state.infos;
            *out = new OrtTensorTypeAndShapeInfo(value->info);
        }
        return failed;
    };
    api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) noexcept {
        --state.infos;
        delete info;
    };
    api.GetTensorMutableData = [](OrtValue* value, void** out) noexcept {
        *out = value->data;
        return called();
    };
    api.KernelContext_GetGPUComputeStream = [](OrtKernelContext const* context, void** out) noexcept {
        *out = context->stream;
        return called();
    };
    api.CreateTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo** out) noexcept {
        OrtStatus* const failed = called();
        if (failed == nullptr)
        {
            ++state.infos;
            *out = new OrtTensorTypeAndShapeInfo{};
        }
        return failed;
    };
    api.SetTensorElementType = [](OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType type) noexcept {
        info->type = type;
        return called();
    };
    api.SetDimensions = [](OrtTensorTypeAndShapeInfo* info, int64_t const* values, size_t count) noexcept {
        info->shape.assign(values, values + count);
        return called();
    };
    api.GetSymbolicDimensions
        = [](OrtTensorTypeAndShapeInfo const* info, char const* names[], size_t count) noexcept {
              for (size_t i = 0; i < count; ++i)
              {
                  names[i] = i < info->names.size() ? info->names[i].c_str() : "";
              }
              return called();
          };
    api.SetSymbolicDimensions = [](OrtTensorTypeAndShapeInfo* info, char const* names[], size_t count) noexcept {
        info->names.assign(names, names + count);
        return called();
    };
    api.ShapeInferContext_GetInputCount = [](OrtShapeInferContext const* context, size_t* out) noexcept {
        *out = context->inputs.size();
        return called();
    };
    api.ShapeInferContext_GetInputTypeShape
        = [](OrtShapeInferContext const* context, size_t index, OrtTensorTypeAndShapeInfo** out) noexcept {
              OrtTensorTypeAndShapeInfo const& info = context->inputs[index];
              bool const isGiven = info.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
              *out = isGiven ? const_cast<OrtTensorTypeAndShapeInfo*>(&info) : nullptr;
              return called();
          };
    api.ShapeInferContext_GetAttribute
        = [](OrtShapeInferContext const* context, char const* name, OrtOpAttr const** out) noexcept {
              auto const found = context->attributes.find(name);
              *out = found == context->attributes.end() ? nullptr : &found->second;
              return *out == nullptr ? status("no such attribute") : called();
          };
    api.ReadOpAttr = [](OrtOpAttr const* attribute, OrtOpAttrType type, void* data, size_t bytes, size_t* needed) noexcept {
        auto const integer = static_cast<int64_t>(attribute->value);
        auto const real = static_cast<float>(attribute->value);
        *needed = type == ORT_OP_ATTR_INT ? sizeof(integer) : sizeof(real);
        OrtStatus* const failed = bytes < *needed ? status("too few bytes") : called();
        if (failed == nullptr)
        {
            std::memcpy(data, type == ORT_OP_ATTR_INT ? static_cast<void const*>(&integer) : &real, *needed);
        }
        return failed;
    };
    api.ShapeInferContext_SetOutputTypeShape
        = [](OrtShapeInferContext const* context, size_t index, OrtTensorTypeAndShapeInfo const* info) noexcept {
              context->outputs[index] = *info;
              return called();
          };
    return api;
}

} // namespace fake
