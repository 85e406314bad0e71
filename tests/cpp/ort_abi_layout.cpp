// Pins what a custom op and ONNX Runtime have to agree on: each function's place in the table, the structures and the
// enumerations. It passes when it compiles, against our declaration of the interface and against the official header:
//     g++ -std=c++17 -fsyntax-only -I plugins tests/cpp/ort_abi_layout.cpp
//     g++ -std=c++17 -fsyntax-only -I plugins -DQWENFORGE_OFFICIAL_ONNXRUNTIME_HEADERS -I FOLDER tests/cpp/ort_abi_layout.cpp
// where FOLDER holds onnxruntime_c_api.h: Debian's libonnxruntime-dev has it, and so do ONNX Runtime's releases.

#include "onnxruntime/ort.h"

#include <cstddef>
#include <type_traits>

#define ENTRY(function, place) \
    static_assert(offsetof(OrtApi, function) == (place) * sizeof(void*), #function " is not entry " #place)

ENTRY(CreateStatus, 0);
ENTRY(GetErrorMessage, 2);
ENTRY(CreateCustomOpDomain, 26);
ENTRY(CustomOpDomain_Add, 27);
ENTRY(AddCustomOpDomain, 28);
ENTRY(GetTensorMutableData, 51);
ENTRY(CastTypeInfoToTensorInfo, 55);
ENTRY(CreateTensorTypeAndShapeInfo, 57);
ENTRY(SetTensorElementType, 58);
ENTRY(SetDimensions, 59);
ENTRY(GetTensorElementType, 60);
ENTRY(GetDimensionsCount, 61);
ENTRY(GetDimensions, 62);
ENTRY(GetSymbolicDimensions, 63);
ENTRY(GetTensorTypeAndShape, 65);
ENTRY(AllocatorAlloc, 75);
ENTRY(AllocatorFree, 76);
ENTRY(AllocatorGetInfo, 77);
ENTRY(KernelInfoGetAttribute_float, 85);
ENTRY(KernelInfoGetAttribute_int64, 86);
ENTRY(KernelContext_GetInputCount, 88);
ENTRY(KernelContext_GetOutputCount, 89);
ENTRY(KernelContext_GetInput, 90);
ENTRY(KernelContext_GetOutput, 91);
ENTRY(ReleaseStatus, 93);
ENTRY(ReleaseTypeInfo, 98);
ENTRY(ReleaseTensorTypeAndShapeInfo, 99);
ENTRY(ReleaseCustomOpDomain, 101);
ENTRY(ReleaseAllocator, 132);
ENTRY(KernelContext_GetGPUComputeStream, 193);
ENTRY(KernelInfo_GetInputCount, 230);
ENTRY(KernelInfo_GetInputName, 232);
ENTRY(KernelInfo_GetInputTypeInfo, 234);
ENTRY(KernelInfo_GetNodeName, 244);
ENTRY(KernelInfoGetConstantInput_tensor, 249);
ENTRY(ShapeInferContext_GetInputCount, 267);
ENTRY(ShapeInferContext_GetInputTypeShape, 268);
ENTRY(ShapeInferContext_GetAttribute, 269);
ENTRY(ShapeInferContext_SetOutputTypeShape, 270);
ENTRY(SetSymbolicDimensions, 271);
ENTRY(ReadOpAttr, 272);
ENTRY(KernelContext_ParallelFor, 274);
ENTRY(KernelContext_GetScratchBuffer, 277);
ENTRY(KernelInfoGetAllocator, 278);

#define MEMBER(name, place) \
    static_assert(offsetof(OrtCustomOp, name) == (place) * sizeof(void*), #name " is not member " #place)

MEMBER(version, 0);
MEMBER(CreateKernel, 1);
MEMBER(GetName, 2);
MEMBER(GetExecutionProviderType, 3);
MEMBER(GetInputType, 4);
MEMBER(GetInputTypeCount, 5);
MEMBER(GetOutputType, 6);
MEMBER(GetOutputTypeCount, 7);
MEMBER(KernelCompute, 8);
MEMBER(KernelDestroy, 9);
MEMBER(GetInputCharacteristic, 10);
MEMBER(GetOutputCharacteristic, 11);
MEMBER(GetInputMemoryType, 12);
MEMBER(GetVariadicInputMinArity, 13);
MEMBER(GetVariadicInputHomogeneity, 14);
MEMBER(GetVariadicOutputMinArity, 15);
MEMBER(GetVariadicOutputHomogeneity, 16);
MEMBER(CreateKernelV2, 17);
MEMBER(KernelComputeV2, 18);
MEMBER(InferOutputShapeFn, 19);
MEMBER(GetStartVersion, 20);
MEMBER(GetEndVersion, 21);
MEMBER(GetMayInplace, 22);
MEMBER(ReleaseMayInplace, 23);
MEMBER(GetAliasMap, 24);
MEMBER(ReleaseAliasMap, 25);

static_assert(offsetof(OrtApiBase, GetApi) == 0 && offsetof(OrtApiBase, GetVersionString) == sizeof(void*));
static_assert(offsetof(OrtAllocator, version) == 0 && offsetof(OrtAllocator, Alloc) == sizeof(void*)
    && offsetof(OrtAllocator, Free) == 2 * sizeof(void*) && offsetof(OrtAllocator, Info) == 3 * sizeof(void*));

template <typename Enumeration>
constexpr bool is(Enumeration value, int expected)
{
    return sizeof(Enumeration) == 4 && static_cast<int>(value) == expected;
}

static_assert(is(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, 0) && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 1)
    && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 2) && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 3)
    && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 6) && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 7)
    && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 9) && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 10)
    && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 16) && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, 17)
    && is(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, 22));
static_assert(is(ORT_OK, 0) && is(ORT_FAIL, 1) && is(ORT_INVALID_ARGUMENT, 2) && is(ORT_RUNTIME_EXCEPTION, 6));
static_assert(is(ORT_OP_ATTR_UNDEFINED, 0) && is(ORT_OP_ATTR_INT, 1) && is(ORT_OP_ATTR_FLOAT, 3));
static_assert(is(OrtMemTypeCPUInput, -2) && is(OrtMemTypeCPUOutput, -1) && is(OrtMemTypeDefault, 0));
static_assert(is(INPUT_OUTPUT_REQUIRED, 0) && is(INPUT_OUTPUT_OPTIONAL, 1) && is(INPUT_OUTPUT_VARIADIC, 2));
