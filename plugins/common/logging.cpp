// TensorRT 11 moved ILogger and ILoggerFinder under IVersionedInterface, so that findLogger and log stand at other places
// in their tables of virtual functions than in TensorRT 10. One build of this library serves both: it asks the library
// that the finder comes from for its version and calls through the right place. Where it cannot tell, it calls nothing
// and writes to stderr.

#include "common/logging.h"

#include <dlfcn.h>

#include <atomic>

namespace qwenforge
{
namespace
{

constexpr int32_t kSeverityError = 1;
constexpr int32_t kUnknown = -1;
// TensorRT 10: the interface's only function comes first. TensorRT 11: after getAPILanguage, getInterfaceInfo and the two
// entries of the destructor.
constexpr int32_t kSlotTensorRT10 = 0;
constexpr int32_t kSlotTensorRT11 = 4;

using FindLogger = void* (*) (void* finder);
using Log = void (*)(void* logger, int32_t severity, char const* text);

// The one thing that this library remembers between calls, as TensorRT's protocol for plugin libraries wants it. Where its
// functions stand is found out anew for each message, so that the two can never belong to different finders.
std::atomic<void*> gFinder{nullptr};

void** virtualTable(void* object) noexcept
{
    return *static_cast<void***>(object);
}

template <typename Function>
Function virtualFunction(void* object, int32_t slot) noexcept
{
    return reinterpret_cast<Function>(virtualTable(object)[slot]);
}

// getInferLibVersion counts 10000 * major + 100 * minor + patch: 100300 is TensorRT 10.3.0, 10701 TensorRT for RTX 1.7.1.
int32_t slotOfVersion(int32_t version) noexcept
{
    constexpr int32_t kTensorRT10 = 100000;
    constexpr int32_t kTensorRT11 = 110000;
    constexpr int32_t kTensorRTForRTX17 = 10700; // the oldest one that was seen with the newer layout
    constexpr int32_t kTensorRTForRTX2 = 20000;
    if (version >= kTensorRT11 || (version >= kTensorRTForRTX17 && version < kTensorRTForRTX2))
    {
        return kSlotTensorRT11;
    }
    return version >= kTensorRT10 ? kSlotTensorRT10 : kUnknown;
}

int32_t slotOfFinder(void* finder) noexcept
{
    Dl_info owner{};
    if (dladdr(virtualTable(finder), &owner) == 0 || owner.dli_fname == nullptr)
    {
        return kUnknown;
    }
    // A program that TensorRT is linked into statically is no library that can be opened: look at the program itself.
    void* library = dlopen(owner.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr)
    {
        library = dlopen(nullptr, RTLD_LAZY);
    }
    if (library == nullptr)
    {
        return kUnknown;
    }
    auto const getVersion = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    int32_t const slot = getVersion == nullptr ? kUnknown : slotOfVersion(getVersion());
    dlclose(library);
    return slot;
}

void log(char const* text) noexcept
{
    void* const finder = gFinder.load();
    int32_t const slot = finder == nullptr ? kUnknown : slotOfFinder(finder);
    void* const logger = slot == kUnknown ? nullptr : virtualFunction<FindLogger>(finder, slot)(finder);
    if (logger == nullptr)
    {
        std::fprintf(stderr, "%s\n", text);
        return;
    }
    virtualFunction<Log>(logger, slot)(logger, kSeverityError, text);
}

} // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gFinder.store(finder);
}

void reportError(Speaker const& speaker, Message const& problem, nvinfer1::IErrorRecorder* recorder,
    nvinfer1::ErrorCode code) noexcept
{
    Message line;
    if (speaker.node == nullptr || speaker.node[0] == '\0')
    {
        line.set("%s: %s", speaker.plugin, problem.text());
    }
    else
    {
        line.set("%s '%s': %s", speaker.plugin, speaker.node, problem.text());
    }
    log(line.text());
    if (recorder != nullptr)
    {
        recorder->reportError(code, line.text());
    }
}

} // namespace qwenforge
