// The plugins' sources linked into the program of the checks, and stand-ins for TensorRT's logger as TensorRT 10 and as
// TensorRT 11 lay it out.

#pragma once

#include "check.h"
#include "plugin_access.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

inline int32_t gVersion = 0;
inline std::string gLogged;

inline void* findLogger(void* finder);
inline void logText(void*, int32_t severity, char const* text)
{
    gLogged = std::to_string(severity) + " " + text;
}
inline void unexpected()
{
    gLogged = "the wrong function was called";
}

// Tables of virtual functions as TensorRT 10 and 11 lay them out: getAPILanguage, getInterfaceInfo and two destructors
// come first in TensorRT 11.
inline void* const kFinder10[] = {reinterpret_cast<void*>(findLogger), reinterpret_cast<void*>(unexpected)};
inline void* const kLogger10[] = {reinterpret_cast<void*>(logText), reinterpret_cast<void*>(unexpected)};
inline void* const kFinder11[] = {reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected),
    reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(findLogger)};
inline void* const kLogger11[] = {reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected),
    reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(logText)};

struct Object
{
    void* const* table;
    Object* logger;
};
inline Object gLogger{nullptr, nullptr};
inline Object gFinder{nullptr, &gLogger};

inline void* findLogger(void* finder)
{
    return static_cast<Object*>(finder)->logger;
}

inline Source fromLinkedSources()
{
    return {[](char const* name) -> IPluginCreatorV3One* {
                int32_t count = 0;
                IPluginCreatorInterface* const* const creators = getCreators(count);
                for (int32_t i = 0; i < count; ++i)
                {
                    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
                    if (std::strcmp(creator->getPluginName(), name) == 0)
                    {
                        return creator;
                    }
                }
                return nullptr;
            },
        /*computes=*/true, /*logged=*/&gLogged};
}

// Leaves the last one in place, so that what follows sees the messages of refusals.
inline void checkLogger(Subject const& subject)
{
    IPluginCreatorV3One* const creator = fromLinkedSources().find(subject.spec->name);
    struct Case
    {
        int32_t version;
        void* const* finder;
        void* const* logger;
        char const* name;
    };
    Case const cases[] = {{100300, kFinder10, kLogger10, "TensorRT 10.3"}, {101600, kFinder10, kLogger10, "TensorRT 10.16"},
        {110400, kFinder11, kLogger11, "TensorRT 11.4"}, {10701, kFinder11, kLogger11, "TensorRT for RTX 1.7"}};
    setLoggerFinder(nullptr);
    creator->createPlugin("node 7", nullptr, TensorRTPhase::kBUILD);
    check(gLogged.empty(), "without a logger an error goes to stderr");
    for (int32_t const version : {8601, 20000})
    {
        gVersion = version;
        gFinder.table = kFinder10;
        gLogger.table = kLogger10;
        setLoggerFinder(reinterpret_cast<ILoggerFinder*>(&gFinder));
        creator->createPlugin("node 7", nullptr, TensorRTPhase::kBUILD);
        check(gLogged.empty(), "nothing is called in a TensorRT of unknown layout, %d", version);
    }
    for (Case const& each : cases)
    {
        gVersion = each.version;
        gFinder.table = each.finder;
        gLogger.table = each.logger;
        gLogged.clear();
        setLoggerFinder(reinterpret_cast<ILoggerFinder*>(&gFinder));
        creator->createPlugin("node 7", nullptr, TensorRTPhase::kBUILD);
        std::string const expected = std::string("1 ") + subject.spec->name + " 'node 7': no fields were given";
        check(gLogged == expected, "an error reaches the logger of %s: %s", each.name, gLogged.c_str());
    }
}

// The plugins ask the library that a finder comes from for its version: here that is this program.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion()
{
    return gVersion;
}
