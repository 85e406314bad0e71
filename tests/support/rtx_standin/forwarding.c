/*
 * Stands for the three libraries that the official TensorRT Python bindings are linked to and forwards to TensorRT for
 * RTX, which builds engines on a machine without a GPU.
 *
 * Its factories take the version of the headers they were called with and refuse any but their own, so every call passes
 * the version that the RTX library itself reports. The classes behind the factories have the same virtual functions as
 * TensorRT 11 as far as parsing and building go; INetworkDefinition's layer functions do not match (see __init__.py).
 *
 * Compiled with another library's name as TENSORRT it forwards to that one: to TensorRT's lean runtime, whose plugin
 * registry is the real one.
 */
#ifndef TENSORRT
#define TENSORRT "libtensorrt_rtx.so.1"
#endif

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void* function(char const* library, char const* name)
{
    void* const handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    void* const found = handle == NULL ? NULL : dlsym(handle, name);
    if (found == NULL)
    {
        fprintf(stderr, "rtx stand-in: %s\n", dlerror());
        abort();
    }
    return found;
}

static void* rtx(char const* name)
{
    return function(TENSORRT, name);
}

static void* parser(char const* name)
{
    rtx("getInferLibVersion"); /* the parser expects it to be loaded */
    return function("libtensorrt_onnxparser_rtx.so.1", name);
}

static int32_t rtxVersion(void)
{
    return ((int32_t(*)(void)) rtx("getInferLibVersion"))();
}

int32_t getNvOnnxParserVersion(void)
{
    return ((int32_t(*)(void)) parser("getNvOnnxParserVersion"))();
}

void* createInferBuilder_INTERNAL(void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, int32_t)) rtx("createInferBuilder_INTERNAL"))(logger, rtxVersion());
}

void* createInferRuntime_INTERNAL(void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, int32_t)) rtx("createInferRuntime_INTERNAL"))(logger, rtxVersion());
}

void* createInferRefitter_INTERNAL(void* engine, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) rtx("createInferRefitter_INTERNAL"))(engine, logger, rtxVersion());
}

void* createNvOnnxParser_INTERNAL(void* network, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) parser("createNvOnnxParser_INTERNAL"))(
        network, logger, getNvOnnxParserVersion());
}

void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int32_t version)
{
    (void) version;
    return ((void* (*) (void*, void*, int32_t)) parser("createNvOnnxParserRefitter_INTERNAL"))(
        refitter, logger, getNvOnnxParserVersion());
}

void* getPluginRegistry(void)
{
    return ((void* (*) (void) ) rtx("getPluginRegistry"))();
}

void* getBuilderPluginRegistry(int32_t capability)
{
    return ((void* (*) (int32_t)) rtx("getBuilderPluginRegistry"))(capability);
}

void* getLogger(void)
{
    return ((void* (*) (void) ) rtx("getLogger"))();
}

/* TensorRT's own plugins; TensorRT for RTX has none that are needed here. */
bool initLibNvInferPlugins(void* logger, char const* pluginNamespace)
{
    (void) logger;
    (void) pluginNamespace;
    return true;
}
