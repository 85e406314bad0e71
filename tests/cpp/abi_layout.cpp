// Pins what a plugin library and TensorRT have to agree on: sizes and offsets of structures, values of enumerations, and
// each virtual function's place in its table. Compiled against our declaration of the interface and, where they are
// found, against TensorRT's official headers: both have to pass. Run it: it exits with 0 or names what differs.

#include "common/tensorrt.h"

#include <cstddef>
#include <cstdio>
#include <cstring>

using namespace nvinfer1;

// Structures that cross the boundary.
static_assert(sizeof(Dims) == 72 && offsetof(Dims, nbDims) == 0 && offsetof(Dims, d) == 8 && Dims::MAX_DIMS == 8);
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, nbDims) == 0 && offsetof(DimsExprs, d) == 8);
static_assert(sizeof(InterfaceInfo) == 16 && offsetof(InterfaceInfo, major) == 8 && offsetof(InterfaceInfo, minor) == 12);
static_assert(sizeof(PluginField) == 24 && offsetof(PluginField, name) == 0 && offsetof(PluginField, data) == 8
    && offsetof(PluginField, type) == 16 && offsetof(PluginField, length) == 20);
static_assert(sizeof(PluginFieldCollection) == 16 && offsetof(PluginFieldCollection, nbFields) == 0
    && offsetof(PluginFieldCollection, fields) == 8);
static_assert(sizeof(PluginTensorDesc) == 88 && offsetof(PluginTensorDesc, dims) == 0
    && offsetof(PluginTensorDesc, type) == 72 && offsetof(PluginTensorDesc, format) == 76
    && offsetof(PluginTensorDesc, scale) == 80);
static_assert(sizeof(DynamicPluginTensorDesc) == 304 && offsetof(DynamicPluginTensorDesc, desc) == 0
    && offsetof(DynamicPluginTensorDesc, min) == 88 && offsetof(DynamicPluginTensorDesc, max) == 160
    && offsetof(DynamicPluginTensorDesc, opt) == 232);
static_assert(sizeof(IDimensionExpr) == 16 && sizeof(IExprBuilder) == 16);
static_assert(sizeof(IPluginV3) == 8 && sizeof(IPluginV3OneCore) == 8 && sizeof(IPluginV3OneBuildV2) == 8
    && sizeof(IPluginV3OneRuntime) == 8 && sizeof(IPluginCreatorV3One) == 8);

template <typename Enumeration>
constexpr bool is(Enumeration value, int expected)
{
    return sizeof(Enumeration) == 4 && static_cast<int>(value) == expected;
}

static_assert(is(DataType::kFLOAT, 0) && is(DataType::kHALF, 1) && is(DataType::kINT8, 2) && is(DataType::kINT32, 3)
    && is(DataType::kBOOL, 4) && is(DataType::kUINT8, 5) && is(DataType::kFP8, 6) && is(DataType::kBF16, 7)
    && is(DataType::kINT64, 8) && is(DataType::kINT4, 9));
static_assert(is(TensorFormat::kLINEAR, 0) && is(TensorFormat::kCHW2, 1) && is(TensorFormat::kHWC8, 2)
    && is(TensorFormat::kCHW4, 3) && is(TensorFormat::kCHW16, 4) && is(TensorFormat::kCHW32, 5)
    && is(TensorFormat::kDHWC8, 6) && is(TensorFormat::kCDHW32, 7) && is(TensorFormat::kHWC, 8)
    && is(TensorFormat::kDLA_LINEAR, 9) && is(TensorFormat::kDLA_HWC4, 10) && is(TensorFormat::kHWC16, 11)
    && is(TensorFormat::kDHWC, 12));
static_assert(is(APILanguage::kCPP, 0) && is(APILanguage::kPYTHON, 1));
static_assert(is(ErrorCode::kSUCCESS, 0) && is(ErrorCode::kUNSPECIFIED_ERROR, 1) && is(ErrorCode::kINTERNAL_ERROR, 2)
    && is(ErrorCode::kINVALID_ARGUMENT, 3) && is(ErrorCode::kINVALID_CONFIG, 4) && is(ErrorCode::kFAILED_ALLOCATION, 5)
    && is(ErrorCode::kFAILED_INITIALIZATION, 6) && is(ErrorCode::kFAILED_EXECUTION, 7)
    && is(ErrorCode::kFAILED_COMPUTATION, 8) && is(ErrorCode::kINVALID_STATE, 9)
    && is(ErrorCode::kUNSUPPORTED_STATE, 10));
static_assert(is(DimensionOperation::kSUM, 0) && is(DimensionOperation::kPROD, 1) && is(DimensionOperation::kMAX, 2)
    && is(DimensionOperation::kMIN, 3) && is(DimensionOperation::kSUB, 4) && is(DimensionOperation::kEQUAL, 5)
    && is(DimensionOperation::kLESS, 6) && is(DimensionOperation::kFLOOR_DIV, 7)
    && is(DimensionOperation::kCEIL_DIV, 8));
static_assert(is(PluginFieldType::kFLOAT16, 0) && is(PluginFieldType::kFLOAT32, 1) && is(PluginFieldType::kFLOAT64, 2)
    && is(PluginFieldType::kINT8, 3) && is(PluginFieldType::kINT16, 4) && is(PluginFieldType::kINT32, 5)
    && is(PluginFieldType::kCHAR, 6) && is(PluginFieldType::kDIMS, 7) && is(PluginFieldType::kUNKNOWN, 8)
    && is(PluginFieldType::kBF16, 9) && is(PluginFieldType::kINT64, 10) && is(PluginFieldType::kFP8, 11));
static_assert(is(TensorRTPhase::kBUILD, 0) && is(TensorRTPhase::kRUNTIME, 1));
static_assert(is(PluginCapabilityType::kCORE, 0) && is(PluginCapabilityType::kBUILD, 1)
    && is(PluginCapabilityType::kRUNTIME, 2));

namespace
{

int gDifferences = 0;

// In the Itanium C++ ABI a pointer to a virtual member function holds 1 plus the function's offset in the table; on
// 64-bit ARM the 1 is in the second word and the first holds the offset alone.
template <typename Function>
long slotOf(Function function)
{
    static_assert(sizeof(Function) == 2 * sizeof(std::ptrdiff_t), "not a pointer to a member function");
    std::ptrdiff_t words[2];
    std::memcpy(words, &function, sizeof(words));
#if defined(__aarch64__)
    return words[0] / static_cast<long>(sizeof(void*));
#else
    return (words[0] - 1) / static_cast<long>(sizeof(void*));
#endif
}

template <typename Function>
void expectSlot(char const* name, Function function, long expected)
{
    long const slot = slotOf(function);
    if (slot != expected)
    {
        std::printf("%s is entry %ld, not %ld\n", name, slot, expected);
        ++gDifferences;
    }
}

void expectInterface(char const* name, InterfaceInfo info, char const* kind, int major)
{
    if (std::strcmp(info.kind, kind) != 0 || info.major != major || info.minor != 0)
    {
        std::printf("%s is %s %d.%d, not %s %d.0\n", name, info.kind, info.major, info.minor, kind, major);
        ++gDifferences;
    }
}

// Called without an object: these functions only return constants.
template <typename Interface>
InterfaceInfo infoOf()
{
    alignas(16) unsigned char storage[64]{};
    auto const* object = reinterpret_cast<Interface const*>(storage);
    return object->Interface::getInterfaceInfo();
}

// Entries 2 and 3 of every table are the destructor.
void checkTables()
{
#define SLOT(function, entry) expectSlot(#function, &function, entry)
    SLOT(IVersionedInterface::getAPILanguage, 0);
    SLOT(IVersionedInterface::getInterfaceInfo, 1);
    SLOT(IPluginV3::getCapabilityInterface, 4);
    SLOT(IPluginV3::clone, 5);
    SLOT(IPluginV3OneCore::getPluginName, 4);
    SLOT(IPluginV3OneCore::getPluginVersion, 5);
    SLOT(IPluginV3OneCore::getPluginNamespace, 6);
    SLOT(IPluginV3OneBuild::configurePlugin, 4);
    SLOT(IPluginV3OneBuild::getOutputDataTypes, 5);
    SLOT(IPluginV3OneBuild::getOutputShapes, 6);
    SLOT(IPluginV3OneBuild::supportsFormatCombination, 7);
    SLOT(IPluginV3OneBuild::getNbOutputs, 8);
    SLOT(IPluginV3OneBuild::getWorkspaceSize, 9);
    SLOT(IPluginV3OneBuild::getValidTactics, 10);
    SLOT(IPluginV3OneBuild::getNbTactics, 11);
    SLOT(IPluginV3OneBuild::getTimingCacheID, 12);
    SLOT(IPluginV3OneBuild::getFormatCombinationLimit, 13);
    SLOT(IPluginV3OneBuild::getMetadataString, 14);
    SLOT(IPluginV3OneBuildV2::getAliasedInput, 15);
    SLOT(IPluginV3OneRuntime::setTactic, 4);
    SLOT(IPluginV3OneRuntime::onShapeChange, 5);
    SLOT(IPluginV3OneRuntime::enqueue, 6);
    SLOT(IPluginV3OneRuntime::attachToContext, 7);
    SLOT(IPluginV3OneRuntime::getFieldsToSerialize, 8);
    SLOT(IPluginCreatorV3One::createPlugin, 4);
    SLOT(IPluginCreatorV3One::getFieldNames, 5);
    SLOT(IPluginCreatorV3One::getPluginName, 6);
    SLOT(IPluginCreatorV3One::getPluginVersion, 7);
    SLOT(IPluginCreatorV3One::getPluginNamespace, 8);
    SLOT(IErrorRecorder::getNbErrors, 4);
    SLOT(IErrorRecorder::getErrorCode, 5);
    SLOT(IErrorRecorder::getErrorDesc, 6);
    SLOT(IErrorRecorder::hasOverflowed, 7);
    SLOT(IErrorRecorder::clear, 8);
    SLOT(IErrorRecorder::reportError, 9);
    SLOT(IErrorRecorder::incRefCount, 10);
    SLOT(IErrorRecorder::decRefCount, 11);
    // No IVersionedInterface underneath.
    SLOT(IPluginResourceContext::getGpuAllocator, 0);
    SLOT(IPluginResourceContext::getErrorRecorder, 1);
    // Entries 0 and 1 are the destructor.
    SLOT(apiv::VDimensionExpr::isConstant, 2);
    SLOT(apiv::VDimensionExpr::getConstantValue, 3);
    SLOT(apiv::VDimensionExpr::isSizeTensor, 4);
    SLOT(apiv::VExprBuilder::constant, 2);
    SLOT(apiv::VExprBuilder::operation, 3);
    SLOT(apiv::VExprBuilder::declareSizeTensor, 4);
#ifdef QWENFORGE_OFFICIAL_TENSORRT_HEADERS
    // Read by common/logging.cpp, which knows both layouts.
    constexpr long kLoggerSlot = NV_TENSORRT_MAJOR >= 11 ? 4 : 0;
    SLOT(ILogger::log, kLoggerSlot);
    SLOT(ILoggerFinder::findLogger, kLoggerSlot);
#endif
#undef SLOT
}

void checkInterfaces()
{
    expectInterface("IPluginV3", infoOf<IPluginV3>(), "PLUGIN", 1);
    expectInterface("IPluginV3OneCore", infoOf<IPluginV3OneCore>(), "PLUGIN_V3ONE_CORE", 1);
    expectInterface("IPluginV3OneBuild", infoOf<IPluginV3OneBuild>(), "PLUGIN_V3ONE_BUILD", 1);
    expectInterface("IPluginV3OneBuildV2", infoOf<IPluginV3OneBuildV2>(), "PLUGIN_V3ONE_BUILD", 2);
    expectInterface("IPluginV3OneRuntime", infoOf<IPluginV3OneRuntime>(), "PLUGIN_V3ONE_RUNTIME", 1);
    expectInterface("IPluginCreatorV3One", infoOf<IPluginCreatorV3One>(), "PLUGIN CREATOR_V3ONE", 1);
    expectInterface("IErrorRecorder", infoOf<IErrorRecorder>(), "IErrorRecorder", 1);
}

} // namespace

int main()
{
    checkTables();
    checkInterfaces();
    if (gDifferences == 0)
    {
        std::printf("the interface has the expected layout\n");
    }
    return gDifferences == 0 ? 0 : 1;
}
