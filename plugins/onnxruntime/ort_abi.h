// What a custom op needs of ONNX Runtime's C interface, version 18, declared by us for machines without its header (the
// PyPI packages carry none). Included by onnxruntime/ort.h only where <onnxruntime_c_api.h> is not found.
//
// The table of functions only grows: an entry keeps its place in every later version. The entries that we call are at
// theirs, between stretches of those that we do not. tests/cpp/ort_abi_layout.cpp pins the places, the structures and
// the enumerations, and compiles against the official header too.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C"
{

enum ONNXTensorElementDataType
{
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN = 17,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4 = 22,
};

enum OrtErrorCode
{
    ORT_OK = 0,
    ORT_FAIL = 1,
    ORT_INVALID_ARGUMENT = 2,
    ORT_RUNTIME_EXCEPTION = 6,
};

enum OrtMemType
{
    OrtMemTypeCPUInput = -2,
    OrtMemTypeCPUOutput = -1,
    OrtMemTypeDefault = 0,
};

enum OrtOpAttrType
{
    ORT_OP_ATTR_UNDEFINED = 0,
    ORT_OP_ATTR_INT = 1,
    ORT_OP_ATTR_FLOAT = 3,
};

enum OrtCustomOpInputOutputCharacteristic
{
    INPUT_OUTPUT_REQUIRED = 0,
    INPUT_OUTPUT_OPTIONAL = 1,
    INPUT_OUTPUT_VARIADIC = 2,
};

struct OrtStatus; // null is success
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtCustomOp;

struct OrtAllocator
{
    uint32_t version;
    void* (*Alloc)(OrtAllocator* self, size_t size);
    void (*Free)(OrtAllocator* self, void* address);
    OrtMemoryInfo const* (*Info)(OrtAllocator const* self);
};

struct OrtApi
{
    OrtStatus* (*CreateStatus)(OrtErrorCode code, char const* text); // 0
    void* skipped1;
    char const* (*GetErrorMessage)(OrtStatus const* status); // 2
    void* skipped3[23];
    OrtStatus* (*CreateCustomOpDomain)(char const* domain, OrtCustomOpDomain** out); // 26
    OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, OrtCustomOp const* op);
    OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
    void* skipped29[22];
    OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out); // 51
    void* skipped52[3];
    OrtStatus* (*CastTypeInfoToTensorInfo)(OrtTypeInfo const* info, OrtTensorTypeAndShapeInfo const** out); // 55
    void* skipped56;
    OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** out); // 57
    OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType type);
    OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo* info, int64_t const* values, size_t count); // 59
    OrtStatus* (*GetTensorElementType)(OrtTensorTypeAndShapeInfo const* info, ONNXTensorElementDataType* out); // 60
    OrtStatus* (*GetDimensionsCount)(OrtTensorTypeAndShapeInfo const* info, size_t* out);
    OrtStatus* (*GetDimensions)(OrtTensorTypeAndShapeInfo const* info, int64_t* values, size_t count);
    OrtStatus* (*GetSymbolicDimensions)(OrtTensorTypeAndShapeInfo const* info, char const* names[], size_t count); // 63
    void* skipped64;
    OrtStatus* (*GetTensorTypeAndShape)(OrtValue const* value, OrtTensorTypeAndShapeInfo** out); // 65
    void* skipped66[9];
    OrtStatus* (*AllocatorAlloc)(OrtAllocator* allocator, size_t size, void** out); // 75
    OrtStatus* (*AllocatorFree)(OrtAllocator* allocator, void* address);
    OrtStatus* (*AllocatorGetInfo)(OrtAllocator const* allocator, OrtMemoryInfo const** out);
    void* skipped78[7];
    OrtStatus* (*KernelInfoGetAttribute_float)(OrtKernelInfo const* info, char const* name, float* out); // 85
    OrtStatus* (*KernelInfoGetAttribute_int64)(OrtKernelInfo const* info, char const* name, int64_t* out);
    void* skipped87;
    OrtStatus* (*KernelContext_GetInputCount)(OrtKernelContext const* context, size_t* out); // 88
    OrtStatus* (*KernelContext_GetOutputCount)(OrtKernelContext const* context, size_t* out);
    OrtStatus* (*KernelContext_GetInput)(OrtKernelContext const* context, size_t index, OrtValue const** out); // 90
    OrtStatus* (*KernelContext_GetOutput)(
        OrtKernelContext* context, size_t index, int64_t const* dimensions, size_t rank, OrtValue** out);
    void* skipped92;
    void (*ReleaseStatus)(OrtStatus* status); // 93
    void* skipped94[4];
    void (*ReleaseTypeInfo)(OrtTypeInfo* info); // 98
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
    void* skipped100;
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* domain); // 101
    void* skipped102[30];
    void (*ReleaseAllocator)(OrtAllocator* allocator); // 132
    void* skipped133[60];
    OrtStatus* (*KernelContext_GetGPUComputeStream)(OrtKernelContext const* context, void** out); // 193
    void* skipped194[36];
    OrtStatus* (*KernelInfo_GetInputCount)(OrtKernelInfo const* info, size_t* out); // 230
    void* skipped231;
    OrtStatus* (*KernelInfo_GetInputName)(OrtKernelInfo const* info, size_t index, char* out, size_t* size); // 232
    void* skipped233;
    OrtStatus* (*KernelInfo_GetInputTypeInfo)(OrtKernelInfo const* info, size_t index, OrtTypeInfo** out); // 234
    void* skipped235[9];
    OrtStatus* (*KernelInfo_GetNodeName)(OrtKernelInfo const* info, char* out, size_t* size); // 244
    void* skipped245[4];
    OrtStatus* (*KernelInfoGetConstantInput_tensor)( // 249
        OrtKernelInfo const* info, size_t index, int* isConstant, OrtValue const** out);
    void* skipped250[17];
    OrtStatus* (*ShapeInferContext_GetInputCount)(OrtShapeInferContext const* context, size_t* out); // 267
    OrtStatus* (*ShapeInferContext_GetInputTypeShape)(
        OrtShapeInferContext const* context, size_t index, OrtTensorTypeAndShapeInfo** out);
    OrtStatus* (*ShapeInferContext_GetAttribute)(
        OrtShapeInferContext const* context, char const* name, OrtOpAttr const** out);
    OrtStatus* (*ShapeInferContext_SetOutputTypeShape)( // 270
        OrtShapeInferContext const* context, size_t index, OrtTensorTypeAndShapeInfo const* info);
    OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, char const* names[], size_t count);
    OrtStatus* (*ReadOpAttr)(OrtOpAttr const* attribute, OrtOpAttrType type, void* data, size_t bytes, size_t* needed);
    void* skipped273;
    OrtStatus* (*KernelContext_ParallelFor)( // 274
        OrtKernelContext const* context, void (*task)(void*, size_t), size_t total, size_t batches, void* data);
    void* skipped275[2];
    OrtStatus* (*KernelContext_GetScratchBuffer)( // 277
        OrtKernelContext const* context, OrtMemoryInfo const* memory, size_t bytes, void** out);
    OrtStatus* (*KernelInfoGetAllocator)(OrtKernelInfo const* info, OrtMemType type, OrtAllocator** out);
};

struct OrtApiBase
{
    OrtApi const* (*GetApi)(uint32_t version); // null for a version that the runtime does not have
    char const* (*GetVersionString)();
};

struct OrtCustomOp
{
    uint32_t version;
    void* (*CreateKernel)(OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* info);
    char const* (*GetName)(OrtCustomOp const* op);
    char const* (*GetExecutionProviderType)(OrtCustomOp const* op);
    ONNXTensorElementDataType (*GetInputType)(OrtCustomOp const* op, size_t index);
    size_t (*GetInputTypeCount)(OrtCustomOp const* op);
    ONNXTensorElementDataType (*GetOutputType)(OrtCustomOp const* op, size_t index);
    size_t (*GetOutputTypeCount)(OrtCustomOp const* op);
    void (*KernelCompute)(void* kernel, OrtKernelContext* context);
    void (*KernelDestroy)(void* kernel);
    OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(OrtCustomOp const* op, size_t index);
    OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(OrtCustomOp const* op, size_t index);
    OrtMemType (*GetInputMemoryType)(OrtCustomOp const* op, size_t index);
    int (*GetVariadicInputMinArity)(OrtCustomOp const* op);
    int (*GetVariadicInputHomogeneity)(OrtCustomOp const* op);
    int (*GetVariadicOutputMinArity)(OrtCustomOp const* op);
    int (*GetVariadicOutputHomogeneity)(OrtCustomOp const* op);
    OrtStatus* (*CreateKernelV2)(OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* info, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
    OrtStatus* (*InferOutputShapeFn)(OrtCustomOp const* op, OrtShapeInferContext* context);
    int (*GetStartVersion)(OrtCustomOp const* op);
    int (*GetEndVersion)(OrtCustomOp const* op);
    size_t (*GetMayInplace)(int** inputs, int** outputs);
    void (*ReleaseMayInplace)(int* inputs, int* outputs);
    size_t (*GetAliasMap)(int** inputs, int** outputs);
    void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

} // extern "C"
