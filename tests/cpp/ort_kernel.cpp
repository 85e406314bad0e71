// A kernel of the custom ops against a stand-in for ONNX Runtime, for what its CPU build cannot show: a stream, launches
// that fail, and every single call of the runtime failing. Prints what is wrong and exits with 1, or exits with 0.

#include "moe_spec.h"
#include "onnxruntime/kernel.h"
#include "ort_checks.h"

using namespace qwenforge;

namespace
{

constexpr int64_t kTokens = 3;
constexpr int64_t kHidden = 64;
constexpr int64_t kExperts = 4;
constexpr size_t kWorkspace = 1000;

int gLaunches = 0;
cudaError_t gResult = cudaSuccess;
cudaStream_t gStream = nullptr;

size_t workspaceBytes(Contract const&, Binding const&) noexcept
{
    return kWorkspace;
}

bool checkSizes(Contract const&, Binding const& binding, Message& problem) noexcept
{
    return binding.sizes[moe_spec::Size::kTokens] != 7 || problem.set("seven tokens");
}

cudaError_t launch(Contract const&, Binding const&, Tensors const& tensors, void* workspace, size_t bytes,
    cudaStream_t stream) noexcept
{
    expect(bytes == kWorkspace && workspace != nullptr && fake::state.buffers == 1, "a workspace is at hand");
    expect(tensors.inputs[moe_spec::Input::kSharedGateLogits] == nullptr, "an absent input has no address");
    std::memset(workspace, 1, bytes);
    gStream = stream;
    ++gLaunches;
    return gResult;
}

constexpr OpTable kOp{moe_spec::kSpec, workspaceBytes, checkSizes, launch, nullptr};

OrtKernelInfo node()
{
    constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    return {{{"hidden_size", kHidden}, {"intermediate_size", 32}, {"num_experts", kExperts}, {"first_local_expert", 0},
                {"num_local_experts", kExperts}, {"num_shared_experts", 0}, {"top_k", 2}, {"normalize_topk", 0},
                {"weight_type", 0}, {"group_size", 65536}, {"layout_version", 1}},
        {{kHalf, {-1, kHidden}}, {kHalf, {}}, {kHalf, {kExperts, 64, kHidden}}, {kHalf, {kExperts, kHidden, 32}},
            {ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}}}};
}

OrtKernelContext call(void* stream, int64_t tokens = kTokens)
{
    alignas(16) static char data[16];
    OrtKernelContext context{{}, {OrtValue{{}, data}}, stream};
    for (OrtTensorTypeAndShapeInfo const& input : node().inputs)
    {
        context.inputs.push_back({input, data});
    }
    context.inputs[0].info.shape = {tokens, kHidden};
    context.inputs[1].info.shape = {tokens, kExperts};
    return context;
}

// One node made and called, `failing` the runtime's call that fails. Returns the first error.
std::string run(OrtApi const& api, OrtKernelContext context, int failing = -1)
{
    fake::state = {};
    fake::state.failing = failing;
    gLaunches = 0;
    OrtKernelInfo const info = node();
    Kernel* kernel = nullptr;
    std::string text = textOf(api, Kernel::create(api, kOp, &info, kernel));
    expect((kernel == nullptr) == !text.empty(), "a kernel or an error", failing);
    if (kernel != nullptr)
    {
        text = textOf(api, kernel->compute(&context));
        expect(fake::state.buffers == 0, "the workspace is given back at the end of the call", failing);
    }
    delete kernel;
    expectNothingLeft(failing);
    return text;
}

void checkStreams(OrtApi const& api)
{
    int stream = 0;
    expect(run(api, call(&stream)).empty() && gLaunches == 1 && fake::state.fromStream == 1,
        "on a stream the workspace is the stream's");
    expect(gStream == reinterpret_cast<cudaStream_t>(&stream), "the kernels get the stream");
    expect(run(api, call(nullptr)).empty() && gLaunches == 1 && fake::state.fromStream == 0,
        "without a stream the workspace is the allocator's");
    expect(run(api, call(&stream, 0)).empty() && gLaunches == 0 && fake::state.fromStream == 0, "no token, no work");
}

void checkFailures(OrtApi const& api)
{
    gResult = cudaErrorInvalidValue;
    int stream = 0;
    std::string const text = run(api, call(&stream));
    expect(text.find("could not be launched") != std::string::npos && text.find("CUDA error 1)") != std::string::npos,
        "a failed launch is an error with its number");
    gResult = cudaSuccess;
    expect(run(api, call(&stream, 7)) == "seven tokens", "the op's own check is heard");
    expect(run(api, call(nullptr, -1)).find("is not known") != std::string::npos, "a call has extents");
}

void checkEveryCall(OrtApi const& api)
{
    int stream = 0;
    for (void* const on : {static_cast<void*>(&stream), static_cast<void*>(nullptr)})
    {
        run(api, call(on));
        int const calls = fake::state.calls;
        for (int failing = 0; failing < calls; ++failing)
        {
            std::string const text = run(api, call(on), failing);
            bool const isLast = failing == calls - 1; // giving the workspace back, behind the kernels
            expect(isLast ? text.empty() : text == "injected" || text.find("attribute ") != std::string::npos,
                "the runtime's error is passed on", failing);
            expect(gLaunches == (isLast ? 1 : 0), "nothing is launched after an error", failing);
        }
    }
}

} // namespace

int main()
{
    OrtApi const api = fake::table();
    checkStreams(api);
    checkFailures(api);
    checkEveryCall(api);
    return gWrong == 0 ? 0 : 1;
}
