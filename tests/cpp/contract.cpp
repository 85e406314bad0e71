// Walks everything that TensorRT asks of the two plugins in each of their variants, right calls and wrong ones.
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

// Sizes: tokens.
std::vector<Subject> moeSubjects()
{
    OpSpec const* const spec = &moe_spec::kSpec;
    return {
        {spec, {64, 32, 8, 0, 8, 2, 2, 1, 0, 65536, 1}, {5}, {0}},
        {spec, {64, 32, 8, 0, 8, 0, 2, 1, 0, 65536, 1}, {5}, {0}},  // without shared experts
        {spec, {64, 64, 8, 2, 4, 1, 2, 1, 1, 65536, 1}, {5}, {0}},  // INT8
        {spec, {128, 64, 8, 0, 8, 0, 2, 1, 2, 64, 1}, {5}, {0}},    // INT4
        {spec, {64, 64, 8, 0, 8, 2, 2, 1, 3, 65536, 1}, {5}, {0}}}; // FP8
}

// Sizes: batch, sequence, cache_rows, capacity, positions, row_pages.
void checkAttention(std::vector<double> const& numbers, bool isPaged, Source const& source)
{
    int64_t const pages = isPaged ? 5 : 2;
    Subject const subject{
        &attention_spec::kSpec, numbers, {2, 3, pages, 16, 32, 2}, {0, 3, isPaged ? 5 : 0, 16, 32, 2}};
    checkPlugin(subject, {64, 4096, 64, isPaged ? 16 : 4096, 4096, 256}, source);
    IPluginCreatorV3One* const creator = source.find(subject.spec->name);
    PluginPointer const plugin = creator == nullptr ? nullptr : create(*creator, Fields(*subject.spec, numbers));
    if (plugin == nullptr)
    {
        return;
    }
    auto const refused = [&](std::vector<int64_t> const& sizes, char const* sentence) {
        checkRefusedSizes(subject, *plugin, sizes, sentence, source);
    };
    refused({2, 3, pages, 16, 0, 2}, "the tables cos and sin are empty");
    if (isPaged)
    {
        refused({2, 3, 5, 32, 32, 2}, "a page of the caches has 32 tokens, but page_size is 16");
        refused({2, 33, 5, 16, 32, 2}, "33 new tokens do not fit into a row of the caches, which has 32");
    }
    else
    {
        refused({2, 3, 3, 16, 32, 2}, "the caches have 3 rows for a batch of 2");
        refused({2, 17, 2, 16, 32, 2}, "17 new tokens do not fit into a row of the caches, which has 16");
    }
}

void checkPlugins(Source const& source)
{
    for (Subject const& subject : moeSubjects())
    {
        checkPlugin(subject, {1000000}, source);
    }
    checkAttention({4, 2, 64, 0.125, 0, 0, 0, 0, 0, 1e-6}, false, source);
    checkAttention({4, 2, 64, 0.125, 0, 0, 0, 1, 1, 1e-6}, false, source); // packed and normalized
    checkAttention({6, 2, 128, 0.125, 0, 2, 0, 0, 1, 1e-6}, false, source); // INT8
    checkAttention({4, 2, 64, 0.125, 0, 0, 16, 0, 0, 1e-6}, true, source); // paged
    checkAttention({4, 1, 64, 0.125, 9, 1, 16, 1, 1, 1e-6}, true, source); // paged FP8, packed and normalized
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
#ifdef LINKED
    if (argc == 2 && std::strcmp(argv[1], "linked") == 0)
    {
        Source const source = fromLinkedSources();
        checkLogger(moeSubjects().front());
        checkPlugins(source);
        return failures() == 0 ? 0 : 1;
    }
#endif
    if (argc == 4 && std::strcmp(argv[1], "registry") == 0)
    {
        checkPlugins(fromRegistry(argv[2], argv[3]));
        return failures() == 0 ? 0 : 1;
    }
    std::fprintf(stderr, "usage: %s linked | registry LIBRARY PLUGINS\n", argv[0]);
    return 2;
}
