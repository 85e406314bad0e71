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
    std::map<std::string, int64_t> attributes;
    std::vector<OrtTensorTypeAndShapeInfo> inputs; // of type UNDEFINED where there is none
};
struct OrtKernelContext
{
    std::vector<OrtValue> inputs;
    OrtValue output;
    void* stream;
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
            *out = found->second;
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
        = [](OrtKernelContext* context, size_t, int64_t const* shape, size_t rank, OrtValue** out) noexcept {
              context->output.info.shape.assign(shape, shape + rank);
              *out = &context->output;
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
    return api;
}

} // namespace fake
