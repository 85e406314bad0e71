// Runs one call of the kernels: `driver SCHEDULE OP TYPE NUMBERS...` with the input tensors on stdin, one behind the other,
// and the output tensors on stdout. Tensors and workspace are allocated one by one, of their exact size, outputs filled with 0xff
// (NaN) and the experts' workspace with 0x7f (no index of anything). With QWENFORGE_SIMT the kernels run in the emulator; compiled by nvcc, on the GPU,
// where SCHEDULE means nothing.
//
//   moe        T C I E first El Es K normalize weights group path
//                              hidden logits gateUp down [sharedGate] [gateUpScales downScales [activationScales]] -> output
//   attention  as attention_driver.h says

// DRIVER_ONLY leaves out the others, to compile faster: 0 attention, 1 + WeightType the experts with such weights.
#ifdef DRIVER_ONLY
#define DRIVER_HAS(part) (DRIVER_ONLY == (part))
#else
#define DRIVER_HAS(part) 1
#endif

#if DRIVER_HAS(0)
#include "attention/attention.cu"
#include "attention/split.cu"
#include "attention/tiled.cu"
#endif
#include "moe/moe.cu"
#if DRIVER_HAS(1)
#include "moe/experts_float.cu"
#endif
#if DRIVER_HAS(2)
#include "moe/experts_int8.cu"
#endif
#if DRIVER_HAS(3)
#include "moe/experts_int4.cu"
#endif
#if DRIVER_HAS(4)
#include "moe/experts_float8.cu"
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#ifdef QWENFORGE_SIMT
cudaError_t cudaGetLastError()
{
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}
// Stands for CUTLASS's grouped GEMM, which no emulator runs: the same interface, refusals and use of its workspace, but
// plain loops, and sums in double.
namespace qwenforge::moe
{
bool hasGroupedGemm() noexcept
{
    return true;
}
size_t groupedGemmWorkspaceBytes(int32_t experts, int32_t multiprocessors) noexcept
{
    return experts < 1 || multiprocessors < 2 ? 0 : static_cast<size_t>(64 * experts + 512 * multiprocessors);
}
template <typename T>
void multiplyGroups(GroupedGemm const& gemm)
{
    int64_t position = 0;
    for (int32_t expert = 0; expert < gemm.experts; ++expert)
    {
        for (int32_t i = 0; i < gemm.counts[expert]; ++i, ++position)
        {
            for (int64_t row = 0; row < gemm.rows; ++row)
            {
                auto const* const input = static_cast<T const*>(gemm.inputs) + position * gemm.depth;
                auto const* const weights = static_cast<T const*>(gemm.weights) + (expert * gemm.rows + row) * gemm.depth;
                double sum = 0;
                for (int32_t k = 0; k < gemm.depth; ++k)
                {
                    sum += static_cast<double>(toFloat(input[k])) * static_cast<double>(toFloat(weights[k]));
                }
                static_cast<T*>(gemm.outputs)[position * gemm.rows + row] = fromFloat<T>(static_cast<float>(sum));
            }
        }
    }
}
cudaError_t launchGroupedGemm(GroupedGemm const& gemm, ElementType type, GroupedTile, cudaStream_t) noexcept
{
    size_t const bytes = groupedGemmWorkspaceBytes(gemm.experts, gemm.multiprocessors);
    if (bytes == 0 || gemm.workspaceBytes < bytes || reinterpret_cast<uintptr_t>(gemm.workspace) % 256 != 0
        || gemm.rows % 8 != 0 || gemm.depth % 8 != 0 || !isAddress(gemm.inputs) || !isAddress(gemm.weights)
        || !isAddress(gemm.outputs))
    {
        return cudaErrorInvalidValue;
    }
    std::memset(gemm.workspace, 0x5a, gemm.workspaceBytes);
    type == ElementType::kFloat16 ? multiplyGroups<__half>(gemm) : multiplyGroups<__nv_bfloat16>(gemm);
    return cudaSuccess;
}
} // namespace qwenforge::moe

// SIMT_SM is the emulated device's compute capability, 90 by default.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    char const* const text = std::getenv("SIMT_SM");
    int const sm = text == nullptr ? 90 : std::atoi(text);
    *value = attribute == cudaDevAttrMultiProcessorCount ? 4
        : attribute == cudaDevAttrComputeCapabilityMajor ? sm / 10
                                                         : sm % 10;
    return cudaSuccess;
}
#else
#include "moe/cutlass/grouped_missing.cpp"
#endif

namespace
{

// Where the kernels' memory is: the host's for the emulator, the device's on a GPU.
#ifdef QWENFORGE_SIMT
void* allocate(size_t bytes)
{
    void* address = nullptr;
    return posix_memalign(&address, 256, bytes == 0 ? 1 : bytes) == 0 ? address : nullptr;
}
void release(void* address)
{
    std::free(address);
}
bool copy(void* to, void const* from, size_t bytes, bool)
{
    if (bytes > 0) // an empty vector's address is null
    {
        std::memcpy(to, from, bytes);
    }
    return true;
}
cudaError_t finish()
{
    return cudaSuccess;
}
#else
void* allocate(size_t bytes)
{
    void* address = nullptr;
    return cudaMalloc(&address, bytes == 0 ? 1 : bytes) == cudaSuccess ? address : nullptr;
}
void release(void* address)
{
    cudaFree(address);
}
bool copy(void* to, void const* from, size_t bytes, bool toDevice)
{
    return cudaMemcpy(to, from, bytes, toDevice ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost) == cudaSuccess;
}
cudaError_t finish()
{
    return cudaDeviceSynchronize();
}
#endif

struct Release
{
    void operator()(void* address) const
    {
        release(address);
    }
};
using Buffer = std::unique_ptr<void, Release>;

[[noreturn]] void stop(char const* what)
{
    std::fprintf(stderr, "driver: %s\n", what);
    std::exit(71);
}

Buffer holding(std::vector<char> const& data)
{
    Buffer buffer(allocate(data.size()));
    if (buffer == nullptr || !copy(buffer.get(), data.data(), data.size(), /*toDevice=*/true))
    {
        stop("no memory");
    }
    return buffer;
}

Buffer filled(size_t bytes, int with = 0xff)
{
    return holding(std::vector<char>(bytes, static_cast<char>(with)));
}

Buffer read(int64_t bytes)
{
    std::vector<char> data(static_cast<size_t>(bytes));
    if (std::fread(data.data(), 1, data.size(), stdin) != data.size())
    {
        stop("stdin ends too early");
    }
    return holding(data);
}

void write(Buffer const& buffer, int64_t bytes)
{
    std::vector<char> data(static_cast<size_t>(bytes));
    if (!copy(data.data(), buffer.get(), data.size(), /*toDevice=*/false))
    {
        stop("the results cannot be read");
    }
    std::fwrite(data.data(), 1, data.size(), stdout);
}

// What the launch returned, or else what went wrong on the device.
cudaError_t completed(cudaError_t launched)
{
    cudaError_t const ran = finish();
    return launched != cudaSuccess ? launched : ran;
}

constexpr int64_t kElement = 2;

cudaError_t runMoe(std::vector<double> const& n, qwenforge::ElementType type)
{
    using qwenforge::WeightType;
    qwenforge::MoeShape shape{};
    shape.tokens = static_cast<int64_t>(n[0]);
    shape.hiddenSize = static_cast<int32_t>(n[1]);
    shape.intermediateSize = static_cast<int32_t>(n[2]);
    shape.numExperts = static_cast<int32_t>(n[3]);
    shape.firstLocalExpert = static_cast<int32_t>(n[4]);
    shape.numLocalExperts = static_cast<int32_t>(n[5]);
    shape.numSharedExperts = static_cast<int32_t>(n[6]);
    shape.topK = static_cast<int32_t>(n[7]);
    shape.normalizeTopK = static_cast<int32_t>(n[8]);
    shape.weightType = static_cast<WeightType>(static_cast<int32_t>(n[9]));
    shape.groupSize = static_cast<int32_t>(n[10]);
    bool const isInt4 = shape.weightType == WeightType::kInt4;
    bool const isPacked = shape.weightType != WeightType::kFloat;
    int64_t const stored = shape.numLocalExperts + shape.numSharedExperts;
    int64_t const matrix = static_cast<int64_t>(shape.hiddenSize) * shape.intermediateSize;
    int64_t const weightBytes = isPacked ? (isInt4 ? matrix / 2 : matrix) : kElement * matrix;
    int64_t const scale = isInt4 ? kElement : 4;
    auto const scaleBytes = [&](int64_t rows, int64_t depth) {
        int64_t const groups = shape.groupSize > 0 ? (depth + shape.groupSize - 1) / shape.groupSize : 0;
        return isPacked ? scale * stored * groups * rows : 0;
    };
    int64_t const states = kElement * shape.tokens * shape.hiddenSize;
    Buffer const hidden = read(states);
    Buffer const logits = read(kElement * shape.tokens * shape.numExperts);
    Buffer const gateUp = read(stored * 2 * weightBytes);
    Buffer const down = read(stored * weightBytes);
    Buffer const gates = read(shape.numSharedExperts > 0 ? kElement * shape.tokens : 0);
    Buffer const gateUpScales = read(scaleBytes(2 * shape.intermediateSize, shape.hiddenSize));
    Buffer const downScales = read(scaleBytes(shape.hiddenSize, shape.intermediateSize));
    Buffer const activationScales = read(shape.weightType == WeightType::kFloat8 ? 4 * (1 + stored) : 0);
    Buffer const output = filled(static_cast<size_t>(states));
    auto const path = static_cast<qwenforge::MoePath>(static_cast<int32_t>(n[11]));
    size_t const bytes = qwenforge::moeWorkspaceBytes(shape, path);
    Buffer const workspace = filled(bytes, 0x7f);
    qwenforge::MoeTensors tensors{};
    tensors.hiddenStates = hidden.get();
    tensors.routerLogits = logits.get();
    tensors.gateUpWeights = gateUp.get();
    tensors.downWeights = down.get();
    tensors.sharedGateLogits = shape.numSharedExperts > 0 ? gates.get() : nullptr;
    tensors.gateUpScales = isPacked ? gateUpScales.get() : nullptr;
    tensors.downScales = isPacked ? downScales.get() : nullptr;
    tensors.activationScales = shape.weightType == WeightType::kFloat8 ? activationScales.get() : nullptr;
    tensors.output = output.get();
    qwenforge::Message problem;
    if (!qwenforge::checkMoe(shape, qwenforge::currentSm(), problem))
    {
        std::fprintf(stderr, "%s\n", problem.text());
    }
    cudaError_t const error
        = completed(qwenforge::launchMoe(shape, type, tensors, workspace.get(), bytes, nullptr, path));
    write(output, states);
    return error;
}

#if DRIVER_HAS(0)
#include "attention_driver.h"
#else
cudaError_t runAttention(std::vector<double> const&, qwenforge::ElementType)
{
    stop("compiled without attention");
}
#endif
constexpr size_t kAttentionNumbers = 16;

} // namespace

int main(int argc, char** argv)
{
    if (argc < 5)
    {
        return 64;
    }
#ifdef QWENFORGE_SIMT
    simt::schedule() = static_cast<unsigned>(std::atoi(argv[1]));
#endif
    std::vector<double> numbers;
    std::transform(argv + 4, argv + argc, std::back_inserter(numbers), [](char const* text) { return std::atof(text); });
    bool const isHalf = std::strcmp(argv[3], "float16") == 0;
    auto const type = isHalf ? qwenforge::ElementType::kFloat16 : qwenforge::ElementType::kBFloat16;
    bool const isMoe = std::strcmp(argv[2], "moe") == 0;
    if (numbers.size() != (isMoe ? 12 : kAttentionNumbers))
    {
        return 64;
    }
    cudaError_t const error = isMoe ? runMoe(numbers, type) : runAttention(numbers, type);
    return error == cudaSuccess ? 0 : 1;
}
