// Walks everything that TensorRT asks of the two plugins, right calls and wrong ones.
//
//   contract linked                      the plugins' sources linked in, kernels run by the emulator
//   contract registry LIBRARY PLUGINS    the built library, loaded by the plugin registry in TensorRT's LIBRARY

#include "build_checks.h"
#include "creation_checks.h"
#include "plugin_registry.h"
#include "runtime_checks.h"
#ifdef LINKED
#include "linked_plugins.h"
#endif

#include <dlfcn.h>

namespace
{

constexpr char const* kNamespace = "qwenforge";

void checkPlugin(Subject const& subject, std::vector<int64_t> const& larger, Source const& source)
{
    IPluginCreatorV3One* const creator = source.find(subject.spec->name);
    if (!check(creator != nullptr, "%s: its creator is found", subject.spec->name))
    {
        return;
    }
    checkCreation(subject, *creator);
    checkWrongFields(subject, *creator, source);
    PluginPointer const plugin = create(*creator, Fields(*subject.spec, subject.numbers));
    if (plugin == nullptr)
    {
        return;
    }
    checkTypesAndShapes(subject, *plugin);
    checkFormats(subject, *plugin);
    checkConfiguration(subject, *plugin, larger);
    checkAliasing(subject, *plugin);
    checkRuntime(subject, *plugin, source);
    checkContext(subject, *plugin);
}

Source fromRegistry(char const* tensorrt, char const* plugins)
{
    void* const library = dlopen(tensorrt, RTLD_NOW | RTLD_GLOBAL);
    if (!check(library != nullptr, "TensorRT's library is opened"))
    {
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(1);
    }
    auto const get = reinterpret_cast<registry_abi::IPluginRegistry* (*) ()>(dlsym(library, "getPluginRegistry"));
    registry_abi::IPluginRegistry* const registry = get();
    check(registry->loadLibrary("/nowhere/libplugins.so") == nullptr, "a library that is not there is not loaded");
    check(registry->loadLibrary(plugins) != nullptr, "the plugin library is loaded");
    return {[registry](char const* name) {
                check(registry->getCreator(name, "2", kNamespace) == nullptr, "%s: version 2 is not found", name);
                check(registry->getCreator(name, "1", "") == nullptr, "%s: another namespace is not found", name);
                return static_cast<IPluginCreatorV3One*>(registry->getCreator(name, "1", kNamespace));
            },
        /*computes=*/false, /*logged=*/nullptr};
}

} // namespace

int main(int argc, char** argv)
{
    // tokens, and batch, sequence, capacity, positions, in the order of the generated indices.
    Subject const moe{&qwenforge::moe_spec::kSpec, {64, 32, 8, 0, 8, 2, 2, 1, 0, 65536, 1}, {5}};
    Subject const withoutShared{&qwenforge::moe_spec::kSpec, {64, 32, 8, 0, 8, 0, 2, 1, 0, 65536, 1}, {5}};
    Subject const int8{&qwenforge::moe_spec::kSpec, {64, 64, 8, 2, 4, 1, 2, 1, 1, 65536, 1}, {5}};
    Subject const int4{&qwenforge::moe_spec::kSpec, {128, 64, 8, 0, 8, 0, 2, 1, 2, 64, 1}, {5}};
    Subject const float8{&qwenforge::moe_spec::kSpec, {64, 64, 8, 0, 8, 2, 2, 1, 3, 65536, 1}, {5}};
    Subject const attention{&qwenforge::attention_spec::kSpec, {4, 2, 64, 0.125, 0, 0}, {2, 3, 16, 32}};
#ifdef LINKED
    if (argc == 2 && std::strcmp(argv[1], "linked") == 0)
    {
        Source const source = fromLinkedSources();
        checkLogger(moe);
        for (Subject const* subject : {&moe, &withoutShared, &int8, &int4, &float8})
        {
            checkPlugin(*subject, {1000000}, source);
        }
        checkPlugin(attention, {64, 4096, 4096, 4096}, source);
        return failures() == 0 ? 0 : 1;
    }
#endif
    if (argc == 4 && std::strcmp(argv[1], "registry") == 0)
    {
        Source const source = fromRegistry(argv[2], argv[3]);
        for (Subject const* subject : {&moe, &withoutShared, &int8, &int4, &float8})
        {
            checkPlugin(*subject, {1000000}, source);
        }
        checkPlugin(attention, {64, 4096, 4096, 4096}, source);
        return failures() == 0 ? 0 : 1;
    }
    std::fprintf(stderr, "usage: %s linked | registry LIBRARY PLUGINS\n", argv[0]);
    return 2;
}
