// Walks everything that TensorRT asks of the two plugins, right calls and wrong ones.
//
//   contract linked                      the plugins' sources linked in, kernels run by the emulator
//   contract registry LIBRARY PLUGINS    the built library, loaded by the plugin registry in TensorRT's LIBRARY

#include "check.h"
#include "plugin_calls.h"
#include "plugin_registry.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <functional>

using namespace nvinfer1;
using namespace qwenforge;

namespace
{

using PluginPointer = std::unique_ptr<IPluginV3>;

constexpr char const* kNamespace = "qwenforge";

// Where creators come from, and whether kernels can run there.
struct Source
{
    std::function<IPluginCreatorV3One*(char const* name)> find;
    bool computes;
};

template <typename Interface>
Interface* capability(IPluginV3& plugin, PluginCapabilityType type)
{
    return static_cast<Interface*>(plugin.getCapabilityInterface(type));
}

IPluginV3OneBuild* buildOf(IPluginV3& plugin)
{
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtimeOf(IPluginV3& plugin)
{
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

PluginPointer create(IPluginCreatorV3One& creator, Fields const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD)
{
    PluginFieldCollection const collection = fields.collection();
    return PluginPointer(creator.createPlugin("node", &collection, phase));
}

std::string serialized(IPluginV3& plugin)
{
    PluginFieldCollection const* const fields = runtimeOf(plugin)->getFieldsToSerialize();
    std::string text;
    for (int32_t i = 0; i < fields->nbFields; ++i)
    {
        text += std::string(fields->fields[i].name) + "=";
        text += std::string(static_cast<char const*>(fields->fields[i].data), 4) + ";";
    }
    return text;
}

void checkCreation(Subject const& subject, IPluginCreatorV3One& creator)
{
    char const* const name = subject.spec->name;
    PluginFieldCollection const* const known = creator.getFieldNames();
    bool same = known->nbFields == subject.spec->attributeCount;
    for (int32_t i = 0; same && i < known->nbFields; ++i)
    {
        same = std::strcmp(known->fields[i].name, subject.spec->attributes[i].name) == 0 && known->fields[i].length == 1;
    }
    check(same, "%s: its creator names its fields in order", name);
    for (TensorRTPhase const phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME})
    {
        PluginPointer const plugin = create(creator, Fields(*subject.spec, subject.numbers), phase);
        if (!check(plugin != nullptr, "%s: created in phase %d", name, static_cast<int>(phase)))
        {
            return;
        }
        auto* const core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
        check(std::strcmp(core->getPluginName(), name) == 0 && std::strcmp(core->getPluginVersion(), "1") == 0
                && std::strcmp(core->getPluginNamespace(), kNamespace) == 0,
            "%s: name, version and namespace", name);
        PluginPointer const copy(plugin->clone());
        check(copy != nullptr && copy.get() != plugin.get() && serialized(*copy) == serialized(*plugin),
            "%s: a clone is another object with the same fields", name);
        PluginFieldCollection const* const fields = runtimeOf(*plugin)->getFieldsToSerialize();
        PluginPointer const again(creator.createPlugin("again", fields, TensorRTPhase::kRUNTIME));
        check(again != nullptr && serialized(*again) == serialized(*plugin), "%s: recreated from its own fields", name);
        check(std::strstr(buildOf(*plugin)->getTimingCacheID(), name) != nullptr
                && std::strstr(buildOf(*plugin)->getMetadataString(), subject.spec->attributes[0].name) != nullptr,
            "%s: timing cache and metadata tell its fields", name);
    }
}

void checkWrongFields(Subject const& subject, IPluginCreatorV3One& creator)
{
    OpSpec const& spec = *subject.spec;
    Fields const good(spec, subject.numbers);
    auto const refused = [&](Fields const& fields, char const* what, char const* field) {
        check(create(creator, fields) == nullptr, "%s: refused: %s %s", spec.name, field, what);
    };
    for (int32_t i = 0; i < spec.attributeCount; ++i)
    {
        auto const index = static_cast<size_t>(i);
        AttributeSpec const& attribute = spec.attributes[i];
        Fields fields = good;
        fields.fields.erase(fields.fields.begin() + i);
        refused(fields, "is missing", attribute.name);
        fields = good;
        fields.fields.push_back(fields.fields[index]);
        refused(fields, "is given twice", attribute.name);
        fields = good;
        fields.fields[index].type = PluginFieldType::kINT64;
        refused(fields, "is of another type", attribute.name);
        fields = good;
        fields.fields[index].length = 2;
        refused(fields, "holds two values", attribute.name);
        fields = good;
        fields.fields[index].length = 0;
        refused(fields, "holds no value", attribute.name);
        fields = good;
        fields.fields[index].data = nullptr;
        refused(fields, "has no data", attribute.name);
        for (double const number : {attribute.minimum - 1, attribute.maximum + 1})
        {
            if (std::fabs(number) > 1e9)
            {
                continue;
            }
            std::vector<double> numbers = subject.numbers;
            numbers[index] = number;
            refused(Fields(spec, numbers), "is out of range", attribute.name);
        }
        if (attribute.multipleOf > 1)
        {
            std::vector<double> numbers = subject.numbers;
            numbers[index] += 1;
            refused(Fields(spec, numbers), "is no multiple", attribute.name);
        }
        if (attribute.type == AttributeType::kFloat)
        {
            std::vector<double> numbers = subject.numbers;
            numbers[index] = std::nan("");
            refused(Fields(spec, numbers), "is NaN", attribute.name);
        }
    }
    Fields fields = good;
    fields.fields.emplace_back("surprise", &fields.values.back(), PluginFieldType::kINT32, 1);
    refused(fields, "is unknown", "surprise");
    fields.fields.back().name = nullptr;
    refused(fields, "has no name", "a field");
    check(creator.createPlugin("node", nullptr, TensorRTPhase::kBUILD) == nullptr, "%s: refused: no fields", spec.name);
    PluginFieldCollection empty{};
    empty.nbFields = 3;
    check(creator.createPlugin(nullptr, &empty, TensorRTPhase::kBUILD) == nullptr,
        "%s: refused: three fields at no address", spec.name);
}

void checkTypesAndShapes(Subject const& subject, IPluginV3& plugin)
{
    char const* const name = subject.spec->name;
    IPluginV3OneBuild& build = *buildOf(plugin);
    int32_t const inputs = subject.inputs();
    int32_t const outputs = subject.outputs();
    check(build.getNbOutputs() == outputs, "%s: number of outputs", name);
    for (DataType const type : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT, DataType::kINT8})
    {
        std::vector<PluginTensorDesc> const tensors = subject.tensors(subject.sizes, type);
        std::vector<DataType> given;
        for (int32_t i = 0; i < inputs; ++i)
        {
            given.push_back(tensors[static_cast<size_t>(i)].type);
        }
        std::vector<DataType> found(static_cast<size_t>(outputs), DataType::kINT64);
        int32_t const status = build.getOutputDataTypes(found.data(), outputs, given.data(), inputs);
        bool const right = type == DataType::kHALF || type == DataType::kBF16;
        bool good = (status == 0) == right;
        for (DataType const output : found)
        {
            good = good && (!right || output == type);
        }
        check(good, "%s: output types for input type %d", name, static_cast<int>(type));
    }
    std::vector<DataType> types(static_cast<size_t>(inputs), DataType::kHALF);
    check(build.getOutputDataTypes(types.data(), outputs, types.data(), inputs + 1) != 0
            && build.getOutputDataTypes(types.data(), outputs + 1, types.data(), inputs) != 0,
        "%s: wrong numbers of tensors are refused", name);

    Expressions expressions;
    std::vector<DimsExprs> shapes;
    std::vector<PluginTensorDesc> const tensors = subject.tensors();
    for (int32_t i = 0; i < inputs; ++i)
    {
        TensorSpec const& tensor = subject.spec->inputs[i];
        DimsExprs shape{};
        shape.nbDims = tensor.rank;
        for (int32_t axis = 0; axis < tensor.rank; ++axis)
        {
            DimensionSpec const& dimension = tensor.shape[axis];
            shape.d[axis] = dimension.size >= 0 ? expressions.symbol(subject.spec->sizes[dimension.size])
                                                : expressions.constant(tensors[static_cast<size_t>(i)].dims.d[axis]);
        }
        shapes.push_back(shape);
    }
    std::vector<DimsExprs> found(static_cast<size_t>(outputs));
    bool good = build.getOutputShapes(shapes.data(), inputs, nullptr, 0, found.data(), outputs, expressions) == 0;
    for (int32_t i = 0; good && i < outputs; ++i)
    {
        TensorSpec const& tensor = subject.spec->outputs[i];
        DimsExprs const& shape = found[static_cast<size_t>(i)];
        good = shape.nbDims == tensor.rank;
        for (int32_t axis = 0; good && axis < tensor.rank; ++axis)
        {
            std::string const text = static_cast<Expression const*>(shape.d[axis])->text();
            DimensionSpec const& dimension = tensor.shape[axis];
            int64_t const number = tensors[static_cast<size_t>(inputs + i)].dims.d[axis];
            good = text == (dimension.size >= 0 ? subject.spec->sizes[dimension.size] : std::to_string(number));
        }
    }
    check(good, "%s: output shapes are expressions of the inputs'", name);
    shapes[0].nbDims -= 1;
    check(build.getOutputShapes(shapes.data(), inputs, nullptr, 0, found.data(), outputs, expressions) != 0,
        "%s: an input of another rank is refused", name);
}

// Every position, with every type and format at it: exactly the types of the specification, linear, all T alike.
void checkFormats(Subject const& subject, IPluginV3& plugin)
{
    IPluginV3OneBuild& build = *buildOf(plugin);
    int32_t wrong = 0;
    int32_t asked = 0;
    for (DataType const chosen : {DataType::kHALF, DataType::kBF16})
    {
        for (int32_t position = 0; position < subject.inputs() + subject.outputs(); ++position)
        {
            for (int32_t type = 0; type <= 9; ++type)
            {
                for (int32_t format = 0; format <= 12; ++format)
                {
                    auto tensors = dynamic(subject.tensors(subject.sizes, chosen));
                    PluginTensorDesc& desc = tensors[static_cast<size_t>(position)].desc;
                    bool const isFirst = position == 0;
                    bool const right = desc.type == DataType::kINT32 ? type == static_cast<int>(DataType::kINT32)
                        : isFirst ? type == static_cast<int>(DataType::kHALF) || type == static_cast<int>(DataType::kBF16)
                                  : type == static_cast<int>(chosen);
                    desc.type = static_cast<DataType>(type);
                    desc.format = static_cast<TensorFormat>(format);
                    // What stands behind the position is not filled in yet.
                    for (size_t later = static_cast<size_t>(position) + 1; later < tensors.size(); ++later)
                    {
                        std::memset(static_cast<void*>(&tensors[later]), 0x7f, sizeof(tensors[later]));
                    }
                    bool const accepted
                        = build.supportsFormatCombination(position, tensors.data(), subject.inputs(), subject.outputs());
                    wrong += accepted == (right && format == 0) ? 0 : 1;
                    ++asked;
                }
            }
        }
    }
    check(wrong == 0, "%s: formats: %d of %d combinations answered wrongly", subject.spec->name, wrong, asked);
    auto const tensors = dynamic(subject.tensors());
    check(!build.supportsFormatCombination(-1, tensors.data(), subject.inputs(), subject.outputs())
            && !build.supportsFormatCombination(
                subject.inputs() + subject.outputs(), tensors.data(), subject.inputs(), subject.outputs())
            && !build.supportsFormatCombination(0, tensors.data(), subject.inputs() - 1, subject.outputs()),
        "%s: positions and counts out of range are not supported", subject.spec->name);
}

void checkConfiguration(Subject const& subject, IPluginV3& plugin, std::vector<int64_t> const& larger)
{
    char const* const name = subject.spec->name;
    IPluginV3OneBuild& build = *buildOf(plugin);
    auto const configure = [&](std::vector<DynamicPluginTensorDesc> const& tensors) {
        return build.configurePlugin(
            tensors.data(), subject.inputs(), tensors.data() + subject.inputs(), subject.outputs());
    };
    auto tensors = dynamic(subject.tensors());
    check(configure(tensors) == 0, "%s: configured", name);
    tensors[0].desc.dims.d[0] = -1;
    check(configure(tensors) == 0, "%s: configured with an extent that is not known yet", name);
    tensors = dynamic(subject.tensors());
    tensors[0].desc.type = DataType::kFLOAT;
    check(configure(tensors) != 0, "%s: fp32 is refused", name);
    tensors = dynamic(subject.tensors());
    tensors[1].desc.dims.d[1] += 8;
    check(configure(tensors) != 0, "%s: a static extent that is not the fields' is refused", name);

    auto const workspace = [&](std::vector<int64_t> const& sizes) {
        auto const descs = dynamic(subject.tensors(sizes));
        return build.getWorkspaceSize(
            descs.data(), subject.inputs(), descs.data() + subject.inputs(), subject.outputs());
    };
    bool grows = true;
    std::vector<int64_t> sizes = subject.sizes;
    sizes[0] = 1;
    size_t before = workspace(sizes);
    for (int64_t count = 2; count <= 4096; count *= 2)
    {
        sizes[0] = count;
        grows = grows && workspace(sizes) >= before && workspace(sizes) % 256 == 0;
        before = workspace(sizes);
    }
    check(grows && before > 0, "%s: the workspace grows with the first size, by 256 bytes", name);
    check(workspace(larger) > 0 && workspace(larger) < size_t{4} << 30, "%s: the largest workspace is %zu bytes", name,
        workspace(larger));
}

void checkAliasing(Subject const& subject, IPluginV3& plugin)
{
    bool const isV2 = std::any_of(subject.spec->outputs, subject.spec->outputs + subject.outputs(),
        [](TensorSpec const& output) { return output.aliases >= 0; });
    auto* const build = buildOf(plugin);
    InterfaceInfo const info = build->getInterfaceInfo();
    check(std::strcmp(info.kind, "PLUGIN_V3ONE_BUILD") == 0 && info.major == (isV2 ? 2 : 1),
        "%s: the build interface is of version %d", subject.spec->name, isV2 ? 2 : 1);
    if (!isV2)
    {
        return;
    }
    auto* const second = static_cast<IPluginV3OneBuildV2*>(build);
    bool good = second->getAliasedInput(-1) == -1 && second->getAliasedInput(subject.outputs()) == -1;
    for (int32_t i = 0; i < subject.outputs(); ++i)
    {
        good = good && second->getAliasedInput(i) == subject.spec->outputs[i].aliases;
    }
    check(good, "%s: caches are aliased, the output is not", subject.spec->name);
}

struct Call
{
    std::vector<PluginTensorDesc> tensors;
    Memory memory;
    std::vector<char> workspace;

    Call(Subject const& subject, std::vector<int64_t> const& sizes, IPluginV3OneBuild& build)
        : tensors(subject.tensors(sizes))
        , memory(subject, tensors)
    {
        auto const descs = dynamic(tensors);
        workspace.resize(256
            + build.getWorkspaceSize(
                descs.data(), subject.inputs(), descs.data() + subject.inputs(), subject.outputs()));
    }

    void* alignedWorkspace()
    {
        auto const address = reinterpret_cast<uintptr_t>(workspace.data());
        return reinterpret_cast<void*>((address + 255) / 256 * 256);
    }
};

void checkRuntime(Subject const& subject, IPluginV3& plugin, Source const& source)
{
    char const* const name = subject.spec->name;
    IPluginV3OneRuntime& runtime = *runtimeOf(plugin);
    auto const inputs = static_cast<size_t>(subject.inputs());
    auto const enqueue = [&](Call& call, void* workspace) {
        return runtime.enqueue(call.tensors.data(), call.tensors.data() + inputs, call.memory.inputs.data(),
            call.memory.outputs.data(), workspace, nullptr);
    };
    auto const shapes = [&](Call const& call) {
        return runtime.onShapeChange(
            call.tensors.data(), subject.inputs(), call.tensors.data() + inputs, subject.outputs());
    };
    auto const fresh = [&] { return Call(subject, subject.sizes, *buildOf(plugin)); };

    check(runtime.setTactic(0) == 0 && runtime.setTactic(1) != 0, "%s: tactic 0 is the only one", name);
    Call good = fresh();
    check(shapes(good) == 0, "%s: shapes are accepted", name);
    if (source.computes)
    {
        std::memset(good.memory.outputs[0], 0xff, static_cast<size_t>(bytesOf(good.tensors[inputs])));
        bool finite = enqueue(good, good.alignedWorkspace()) == 0;
        auto const* const halves = static_cast<uint16_t const*>(good.memory.outputs[0]);
        for (int64_t i = 0; finite && i < bytesOf(good.tensors[inputs]) / 2; ++i)
        {
            finite = (halves[i] & 0x7c00) != 0x7c00;
        }
        check(finite, "%s: enqueue computes every element", name);
    }
    else
    {
        check(enqueue(good, good.alignedWorkspace()) != 0, "%s: enqueue without a GPU is an error", name);
    }
    std::vector<int64_t> none = subject.sizes;
    none[0] = 0;
    Call empty(subject, none, *buildOf(plugin));
    check(shapes(empty) == 0 && enqueue(empty, nullptr) == 0, "%s: no token is no work and no error", name);

    check(enqueue(good, nullptr) != 0, "%s: enqueue without a workspace is an error", name);
    for (size_t i = 0; i < inputs; ++i)
    {
        Call wrong = fresh();
        wrong.memory.inputs[i] = nullptr;
        check(enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: a null %s is an error", name,
            subject.spec->inputs[i].name);
        wrong = fresh();
        wrong.memory.inputs[i] = static_cast<char const*>(wrong.memory.inputs[i]) + 2;
        check(enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: an unaligned %s is an error", name,
            subject.spec->inputs[i].name);
        wrong = fresh();
        wrong.tensors[i].type = DataType::kFLOAT;
        check(shapes(wrong) != 0 && enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: %s in fp32 is an error", name,
            subject.spec->inputs[i].name);
        wrong = fresh();
        wrong.tensors[i].format = TensorFormat::kCHW32;
        check(shapes(wrong) != 0, "%s: %s in another format is an error", name, subject.spec->inputs[i].name);
        for (int32_t axis = 0; axis < subject.spec->inputs[i].rank; ++axis)
        {
            wrong = fresh();
            wrong.tensors[i].dims.d[axis] += 1;
            int32_t const size = subject.spec->inputs[i].shape[axis].size;
            // The positions of the tables are the one size that no other tensor has, but for the second table.
            bool const shared = size < 0 || std::strcmp(subject.spec->sizes[size], "positions") != 0 || i > 5;
            check(!shared || (shapes(wrong) != 0 && enqueue(wrong, wrong.alignedWorkspace()) != 0),
                "%s: dimension %d of %s that does not fit is an error", name, axis, subject.spec->inputs[i].name);
        }
    }
    for (int32_t i = 0; i < subject.outputs(); ++i)
    {
        Call wrong = fresh();
        wrong.memory.outputs[static_cast<size_t>(i)] = nullptr;
        check(enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: a null %s is an error", name,
            subject.spec->outputs[i].name);
        if (subject.spec->outputs[i].aliases < 0)
        {
            continue;
        }
        Call apart = fresh();
        apart.memory.outputs[static_cast<size_t>(i)] = apart.memory.blocks[inputs + static_cast<size_t>(i)].get();
        check(enqueue(apart, apart.alignedWorkspace()) != 0, "%s: %s in memory of its own is an error", name,
            subject.spec->outputs[i].name);
    }
}

void checkContext(Subject const& subject, IPluginV3& plugin)
{
    char const* const name = subject.spec->name;
    Recorder recorder;
    Context context(recorder);
    {
        PluginPointer const attached(runtimeOf(plugin)->attachToContext(&context));
        check(attached != nullptr && attached.get() != &plugin && serialized(*attached) == serialized(plugin),
            "%s: attaching gives a copy of its own", name);
        check(recorder.references == 1, "%s: the copy holds the context's error recorder", name);
        auto const tensors = subject.tensors();
        runtimeOf(*attached)->onShapeChange(tensors.data(), subject.inputs() - 1, tensors.data(), subject.outputs());
        check(recorder.last.find("inputs were given") != std::string::npos, "%s: an error reaches the recorder", name);
        PluginPointer const without(runtimeOf(plugin)->attachToContext(nullptr));
        check(without != nullptr, "%s: attaching to no context", name);
    }
    check(recorder.references == 0, "%s: the error recorder is let go", name);
}

void checkPlugin(Subject const& subject, std::vector<int64_t> const& larger, Source const& source)
{
    IPluginCreatorV3One* const creator = source.find(subject.spec->name);
    if (!check(creator != nullptr, "%s: its creator is found", subject.spec->name))
    {
        return;
    }
    checkCreation(subject, *creator);
    checkWrongFields(subject, *creator);
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
        /*computes=*/false};
}

} // namespace

#ifdef LINKED
extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace
{

Source fromLinkedSources()
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
        /*computes=*/true};
}

int32_t gVersion = 0;
std::string gLogged;

void* findLogger(void* finder);
void logText(void*, int32_t severity, char const* text)
{
    gLogged = std::to_string(severity) + " " + text;
}
void unexpected()
{
    gLogged = "the wrong function was called";
}

// Tables of virtual functions as TensorRT 10 and 11 lay them out: getAPILanguage, getInterfaceInfo and two destructors
// come first in TensorRT 11.
void* const kFinder10[] = {reinterpret_cast<void*>(findLogger), reinterpret_cast<void*>(unexpected)};
void* const kLogger10[] = {reinterpret_cast<void*>(logText), reinterpret_cast<void*>(unexpected)};
void* const kFinder11[] = {reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected),
    reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(findLogger)};
void* const kLogger11[] = {reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected),
    reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(unexpected), reinterpret_cast<void*>(logText)};

struct Object
{
    void* const* table;
    Object* logger;
};
Object gLogger{nullptr, nullptr};
Object gFinder{nullptr, &gLogger};

void* findLogger(void* finder)
{
    return static_cast<Object*>(finder)->logger;
}

void checkLogger(Subject const& subject)
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
    setLoggerFinder(nullptr);
    gLogged.clear();
    creator->createPlugin("node 7", nullptr, TensorRTPhase::kBUILD);
    check(gLogged.empty(), "without a logger an error goes to stderr");
}

} // namespace

extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion()
{
    return gVersion;
}
#endif

int main(int argc, char** argv)
{
    // tokens, and batch, sequence, capacity, positions, in the order of the generated indices.
    Subject const moe{&qwenforge::moe_spec::kSpec, {64, 32, 8, 2, 2, 1, 1}, {5}};
    Subject const attention{&qwenforge::attention_spec::kSpec, {4, 2, 64, 0.125, 0, 0}, {2, 3, 16, 32}};
#ifdef LINKED
    if (argc == 2 && std::strcmp(argv[1], "linked") == 0)
    {
        Source const source = fromLinkedSources();
        checkLogger(moe);
        checkPlugin(moe, {1000000}, source);
        checkPlugin(attention, {64, 4096, 4096, 4096}, source);
        return failures() == 0 ? 0 : 1;
    }
#endif
    if (argc == 4 && std::strcmp(argv[1], "registry") == 0)
    {
        Source const source = fromRegistry(argv[2], argv[3]);
        checkPlugin(moe, {1000000}, source);
        checkPlugin(attention, {64, 4096, 4096, 4096}, source);
        return failures() == 0 ? 0 : 1;
    }
    std::fprintf(stderr, "usage: %s linked | registry LIBRARY PLUGINS\n", argv[0]);
    return 2;
}
