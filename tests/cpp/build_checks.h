// What TensorRT asks while it builds: types, shapes, formats, configuration, workspace, aliases.

#pragma once

#include "check.h"
#include "plugin_access.h"

#include <algorithm>

inline void checkTypesAndShapes(Subject const& subject, IPluginV3& plugin)
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
        for (int32_t i = 0; i < outputs; ++i)
        {
            // As the specification has it: of the inputs' type, or of the one that an attribute chooses.
            good = good && (!right || found[static_cast<size_t>(i)] == tensors[static_cast<size_t>(inputs + i)].type);
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
        TensorSpec const& tensor = subject.input(static_cast<int32_t>(i));
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
inline void checkFormats(Subject const& subject, IPluginV3& plugin)
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
                    bool const isFixed = desc.type != DataType::kHALF && desc.type != DataType::kBF16;
                    bool const right = isFixed ? type == static_cast<int>(desc.type)
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

inline void checkConfiguration(Subject const& subject, IPluginV3& plugin, std::vector<int64_t> const& larger)
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
    for (size_t varied = 0; varied < subject.sizes.size(); ++varied)
    {
        bool grows = true;
        size_t before = 0;
        std::vector<int64_t> sizes = subject.sizes;
        for (int64_t count = 0; count <= 1500; ++count)
        {
            sizes[varied] = count;
            size_t const bytes = workspace(sizes);
            grows = grows && bytes >= before && bytes % 256 == 0;
            before = bytes;
        }
        check(grows && before > 0, "%s: the workspace never shrinks as %s grows, and is a multiple of 256 bytes", name,
            subject.spec->sizes[varied]);
    }
    check(workspace(larger) > 0 && workspace(larger) < size_t{4} << 30, "%s: the largest workspace is %zu bytes", name,
        workspace(larger));

    // More rows of queries than a grid has blocks: 0 bytes must not pass for a workspace.
    std::vector<int64_t> absurd(subject.sizes.size(), int64_t{1} << 20);
    check((configure(dynamic(subject.tensors(absurd))) == 0) == (workspace(absurd) > 0),
        "%s: sizes that its kernels refuse are refused when it is configured", name);
}

inline void checkAliasing(Subject const& subject, IPluginV3& plugin)
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
        good = good && second->getAliasedInput(i) == subject.aliasedInput(i);
    }
    check(good, "%s: caches are aliased, the output is not", subject.spec->name);
}
