// What TensorRT calls while it runs: shapes, enqueue, contexts.

#pragma once

#include "check.h"
#include "plugin_access.h"

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

inline void checkRuntime(Subject const& subject, IPluginV3& plugin, Source const& source)
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
    Call empty(subject, subject.nothing, *buildOf(plugin));
    check(shapes(empty) == 0 && enqueue(empty, nullptr) == 0, "%s: no token is no work and no error", name);

    check(enqueue(good, nullptr) != 0, "%s: enqueue without a workspace is an error", name);
    void* const space = good.alignedWorkspace();
    auto const* const in = good.tensors.data();
    auto const* const out = in + inputs;
    check(runtime.enqueue(nullptr, out, good.memory.inputs.data(), good.memory.outputs.data(), space, nullptr) != 0
            && runtime.enqueue(in, nullptr, good.memory.inputs.data(), good.memory.outputs.data(), space, nullptr) != 0
            && runtime.enqueue(in, out, nullptr, good.memory.outputs.data(), space, nullptr) != 0
            && runtime.enqueue(in, out, good.memory.inputs.data(), nullptr, space, nullptr) != 0,
        "%s: enqueue without descriptions or addresses is an error", name);
    for (size_t i = 0; i < inputs; ++i)
    {
        Call wrong = fresh();
        wrong.memory.inputs[i] = nullptr;
        check(enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: a null %s is an error", name,
            subject.input(static_cast<int32_t>(i)).name);
        wrong = fresh();
        wrong.memory.inputs[i] = static_cast<char const*>(wrong.memory.inputs[i]) + 2;
        check(enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: an unaligned %s is an error", name,
            subject.input(static_cast<int32_t>(i)).name);
        wrong = fresh();
        wrong.tensors[i].type = DataType::kINT64;
        check(shapes(wrong) != 0 && enqueue(wrong, wrong.alignedWorkspace()) != 0, "%s: %s in int64 is an error", name,
            subject.input(static_cast<int32_t>(i)).name);
        wrong = fresh();
        wrong.tensors[i].format = TensorFormat::kCHW32;
        check(shapes(wrong) != 0, "%s: %s in another format is an error", name, subject.input(static_cast<int32_t>(i)).name);
        for (int32_t axis = 0; axis < subject.input(static_cast<int32_t>(i)).rank; ++axis)
        {
            wrong = fresh();
            wrong.tensors[i].dims.d[axis] += 1;
            int32_t const size = subject.input(static_cast<int32_t>(i)).shape[axis].size;
            // What no other tensor brings may be of any extent.
            bool const shared = size < 0 || subject.inputsWith(size) > 1;
            check(!shared || (shapes(wrong) != 0 && enqueue(wrong, wrong.alignedWorkspace()) != 0),
                "%s: dimension %d of %s that does not fit is an error", name, axis, subject.input(static_cast<int32_t>(i)).name);
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

// Sizes that agree with each other and that the kernels do not take are refused, with their words.
inline void checkRefusedSizes(
    Subject const& subject, IPluginV3& plugin, std::vector<int64_t> const& sizes, char const* sentence, Source const& source)
{
    Call call(subject, sizes, *buildOf(plugin));
    int32_t const status = runtimeOf(plugin)->onShapeChange(call.tensors.data(), subject.inputs(),
        call.tensors.data() + subject.inputs(), subject.outputs());
    bool const heard = source.logged == nullptr || source.logged->find(sentence) != std::string::npos;
    check(status != 0 && heard, "%s: refused: %s", subject.spec->name, sentence);
}

inline void checkContext(Subject const& subject, IPluginV3& plugin)
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
