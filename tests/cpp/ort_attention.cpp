// An op whose outputs share the memory of inputs, with optional inputs in the middle and a type that an attribute chooses,
// against a stand-in for ONNX Runtime: addresses, refusals, the table of aliases, and the shapes that it tells before it
// runs, every single call of the runtime failing once. Prints what is wrong and exits with 1, or exits with 0.

#include "attention_spec.h"
#include "onnxruntime/kernel.h"
#include "onnxruntime/shape_inference.h"
#include "ort_checks.h"

using namespace qwenforge;

namespace
{

using Input = attention_spec::Input;
using Output = attention_spec::Output;

constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kNone = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

int gLaunches = 0;
alignas(16) char gData[3][16]; // of inputs and the output, and the two caches

struct Op
{
    static constexpr OpSpec const& spec() noexcept
    {
        return attention_spec::kSpec;
    }
    static size_t workspaceBytes(Contract const&, Binding const&) noexcept
    {
        return 100;
    }
    static bool checkSizes(Contract const&, Binding const&, Message&) noexcept
    {
        return true;
    }
    static cudaError_t launch(Contract const&, Binding const&, Tensors const& tensors, void*, size_t, cudaStream_t) noexcept
    {
        ++gLaunches;
        expect(tensors.inputs[Input::kQuery] == gData[0] && tensors.inputs[Input::kKey] == nullptr
                && tensors.inputs[Input::kValue] == nullptr && tensors.inputs[Input::kPastKey] == gData[1]
                && tensors.inputs[Input::kPastValue] == gData[2] && tensors.inputs[Input::kQueryNorm] == nullptr
                && tensors.inputs[Input::kValueScales] == gData[0] && tensors.inputs[Input::kPageTable] == nullptr,
            "inputs are at their places, and those that are absent have no address");
        expect(tensors.outputs[Output::kPresentKey] == gData[1] && tensors.outputs[Output::kPresentValue] == gData[2],
            "caches are updated where they are");
        return cudaSuccess;
    }
};

// INT8 caches, packed: two rows of three tokens over caches of 16.
std::map<std::string, double> const kAttributes{{"num_heads", 4}, {"num_key_value_heads", 2}, {"head_size", 64},
    {"scale", 0.125}, {"sliding_window", 0}, {"cache_type", 2}, {"page_size", 0}, {"packed_qkv", 1}, {"qk_norm", 0},
    {"epsilon", 1e-6}};

std::vector<OrtTensorTypeAndShapeInfo> inputs()
{
    return {{kHalf, {2, 3, 512}, {"rows"}}, {kNone, {}}, {kNone, {}}, {kInt8, {2, 2, -1, 64}, {"", "", "room"}},
        {kInt8, {2, 2, 16, 64}}, {kHalf, {32, 32}}, {kHalf, {32, 32}}, {kInt32, {2, 3}}, {kInt32, {2}}, {kNone, {}},
        {kNone, {}}, {kFloat, {2, 64}}, {kFloat, {2}}};
}

OrtKernelContext call()
{
    static int stream = 0;
    OrtKernelContext context{{}, {}, &stream};
    for (OrtTensorTypeAndShapeInfo const& info : inputs())
    {
        context.inputs.push_back({info, gData[0]});
    }
    context.inputs[Input::kPastKey].info.shape[2] = 16;
    context.inputs[Input::kPastKey].data = gData[1];
    context.inputs[Input::kPastValue].data = gData[2];
    context.outputs = {{{}, gData[0]}, {{}, gData[1]}, {{}, gData[2]}};
    return context;
}

std::string run(OrtApi const& api, OrtKernelContext context, int failing = -1)
{
    fake::state = {};
    fake::state.failing = failing;
    gLaunches = 0;
    OrtKernelInfo const info{kAttributes, inputs()};
    Kernel* kernel = nullptr;
    std::string text = textOf(api, Kernel::create(api, kOpTable<Op>, &info, kernel));
    if (kernel != nullptr)
    {
        text = textOf(api, kernel->compute(&context));
    }
    delete kernel;
    expectNothingLeft(failing);
    return text;
}

void checkCalls(OrtApi const& api)
{
    expect(run(api, call()).empty() && gLaunches == 1, "a call in place is launched");
    int const calls = fake::state.calls;
    for (int failing = 0; failing < calls - 1; ++failing) // the last gives the workspace back, behind the kernels
    {
        std::string const text = run(api, call(), failing);
        expect(gLaunches == 0 && !text.empty(), "an error of the runtime is passed on, and nothing is launched", failing);
    }
    for (size_t output : {Output::kPresentKey, Output::kPresentValue})
    {
        OrtKernelContext apart = call();
        apart.outputs[output].data = gData[0];
        std::string const text = run(api, apart);
        expect(gLaunches == 0 && text.find("whose memory it has to share: bind one OrtValue") != std::string::npos,
            "a cache with memory of its own is refused");
    }
}

void checkAliases()
{
    int* from = nullptr;
    int* to = nullptr;
    size_t const count = kOpTable<Op>.aliasMap(&from, &to);
    expect(count == 2 && from[0] == Input::kPastKey && to[0] == Output::kPresentKey && from[1] == Input::kPastValue
            && to[1] == Output::kPresentValue,
        "present outputs are aliases of past inputs");
    delete[] from;
    delete[] to;
}

OrtShapeInferContext graph()
{
    OrtShapeInferContext context{{}, inputs()};
    for (auto const& [name, value] : kAttributes)
    {
        context.attributes[name] = {value};
    }
    return context;
}

void checkShapes(OrtApi const& api)
{
    auto const infer = [&](OrtShapeInferContext& context, int failing = -1) {
        fake::state = {};
        fake::state.failing = failing;
        std::string const text = textOf(api, inferOutputShapes(api, Op::spec(), &context));
        expectNothingLeft(failing);
        return text;
    };
    OrtShapeInferContext good = graph();
    expect(infer(good).empty() && good.outputs.size() == 3, "every output has a shape");
    int const calls = fake::state.calls;
    OrtTensorTypeAndShapeInfo const& output = good.outputs[Output::kOutput];
    expect(output.type == kHalf && output.shape == std::vector<int64_t>{2, 3, 256},
        "of the query's type; a number in one input goes before a name in another");
    OrtTensorTypeAndShapeInfo const& cache = good.outputs[Output::kPresentKey];
    expect(cache.type == kInt8 && cache.shape == std::vector<int64_t>{2, 2, 16, 64}, "of the cache's type and shape");
    OrtShapeInferContext named = graph();
    named.inputs[Input::kPastValue] = named.inputs[Input::kPastKey];
    expect(infer(named).empty() && named.outputs[Output::kPresentValue].shape[2] == -1
            && named.outputs[Output::kPresentValue].names[2] == "room",
        "a name is passed on");
    OrtShapeInferContext open = graph();
    open.inputs[Input::kPastKey].names.clear();
    open.inputs[Input::kPastValue] = open.inputs[Input::kPastKey];
    expect(infer(open).empty() && open.outputs.size() == 1, "without number and name an output's shape stays open");
    OrtShapeInferContext without = graph();
    without.attributes.erase("head_size");
    expect(infer(without).empty() && without.outputs.empty(), "without an attribute nothing is told, and nothing is wrong");
    for (int failing = 0; failing < calls; ++failing)
    {
        OrtShapeInferContext context = graph();
        bool const isAttribute = failing < 2 * static_cast<int>(kAttributes.size());
        expect(infer(context, failing) == (isAttribute ? "" : "injected"), "the runtime's error is passed on", failing);
    }
}

} // namespace

int main()
{
    OrtApi const api = fake::table();
    checkCalls(api);
    checkAliases();
    checkShapes(api);
    return gWrong == 0 ? 0 : 1;
}
