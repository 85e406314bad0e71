// Calls launchGroupedGemm of the objects it is linked to.
//
//   driver bytes EXPERTS MULTIPROCESSORS                         -> the workspace in bytes
//   driver launch TYPE TILE EXPERTS ROWS DEPTH MULTIPROCESSORS OFFSET MISSING
//       -> the name of the error; addresses that are OFFSET bytes off and nowhere, workspace MISSING bytes too small
//   driver product TYPE TILE ROWS DEPTH COUNT...        needs a GPU; inputs and weights on stdin -> the outputs
//
// A product is computed twice, by a launch and by a graph that was captured when every count was 0. The exit code is 3
// if the bits differ, and 4 if a byte behind the outputs has changed.

#include "moe/cutlass/grouped_gemm.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>
#include <vector>

namespace
{

using namespace qwenforge;
using namespace qwenforge::moe;

constexpr size_t kBehind = 4096; // bytes behind the outputs that nothing may write to

void check(cudaError_t error, char const* what)
{
    if (error != cudaSuccess)
    {
        std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorName(error));
        std::exit(1);
    }
}

ElementType typeOf(char const* text)
{
    return std::strcmp(text, "float16") == 0 ? ElementType::kFloat16 : ElementType::kBFloat16;
}

std::vector<int32_t> numbersIn(char** first, char** last)
{
    std::vector<int32_t> numbers;
    std::transform(first, last, std::back_inserter(numbers), [](char const* text) { return std::atoi(text); });
    return numbers;
}

// Never freed: the process ends.
template <typename T>
T* onDevice(std::vector<T> const& values)
{
    void* address = nullptr;
    size_t const bytes = values.size() * sizeof(T);
    check(cudaMalloc(&address, std::max<size_t>(bytes, 1)), "cudaMalloc");
    check(cudaMemcpy(address, values.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    return static_cast<T*>(address);
}

std::vector<uint16_t> read(int64_t elements)
{
    std::vector<uint16_t> values(static_cast<size_t>(elements));
    if (std::fread(values.data(), sizeof(uint16_t), values.size(), stdin) != values.size())
    {
        std::exit(74);
    }
    return values;
}

std::vector<unsigned char> toHost(void const* address, size_t bytes)
{
    std::vector<unsigned char> values(bytes);
    check(cudaMemcpy(values.data(), address, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
}

int launch(char** arguments)
{
    std::vector<int32_t> const numbers = numbersIn(arguments + 1, arguments + 8);
    void* const nowhere = reinterpret_cast<void*>(static_cast<uintptr_t>(4096 + numbers[5]));
    GroupedGemm gemm{};
    gemm.inputs = gemm.weights = gemm.outputs = gemm.workspace = nowhere;
    gemm.counts = static_cast<int32_t const*>(nowhere);
    gemm.experts = numbers[1];
    gemm.rows = numbers[2];
    gemm.depth = numbers[3];
    gemm.multiprocessors = numbers[4];
    gemm.workspaceBytes
        = groupedGemmWorkspaceBytes(gemm.experts, gemm.multiprocessors) - static_cast<size_t>(numbers[6]);
    auto const tile = static_cast<GroupedTile>(numbers[0]);
    std::puts(cudaGetErrorName(launchGroupedGemm(gemm, typeOf(arguments[0]), tile, nullptr)));
    return 0;
}

int product(int count, char** arguments)
{
    std::vector<int32_t> const counts = numbersIn(arguments + 4, arguments + count);
    int64_t const positions = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    auto const tile = static_cast<GroupedTile>(std::atoi(arguments[1]));
    ElementType const type = typeOf(arguments[0]);
    GroupedGemm gemm{};
    gemm.experts = static_cast<int32_t>(counts.size());
    gemm.rows = std::atoi(arguments[2]);
    gemm.depth = std::atoi(arguments[3]);
    check(cudaDeviceGetAttribute(&gemm.multiprocessors, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
    gemm.inputs = onDevice(read(positions * gemm.depth));
    gemm.weights = onDevice(read(static_cast<int64_t>(gemm.experts) * gemm.rows * gemm.depth));
    gemm.workspaceBytes = groupedGemmWorkspaceBytes(gemm.experts, gemm.multiprocessors);
    gemm.workspace = onDevice(std::vector<unsigned char>(gemm.workspaceBytes, 0xff));
    int32_t* const onDeviceCounts = onDevice(std::vector<int32_t>(counts.size(), 0));
    gemm.counts = onDeviceCounts;
    size_t const bytes = static_cast<size_t>(positions) * static_cast<size_t>(gemm.rows) * sizeof(uint16_t);
    std::vector<unsigned char> const untouched(bytes + kBehind, 0xff);
    GroupedGemm replayed = gemm;
    gemm.outputs = onDevice(untouched);
    replayed.outputs = onDevice(untouched);

    cudaStream_t stream{};
    cudaGraph_t graph{};
    cudaGraphExec_t executable{};
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    check(launchGroupedGemm(replayed, type, tile, stream), "a launch without positions");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    check(launchGroupedGemm(replayed, type, tile, stream), "a captured launch");
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    check(cudaStreamSynchronize(stream), "without positions");
    check(cudaMemcpy(onDeviceCounts, counts.data(), counts.size() * sizeof(int32_t), cudaMemcpyHostToDevice), "counts");
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    check(launchGroupedGemm(gemm, type, tile, stream), "a launch");
    check(cudaStreamSynchronize(stream), "the products");

    std::vector<unsigned char> const first = toHost(gemm.outputs, bytes + kBehind);
    if (first != toHost(replayed.outputs, bytes + kBehind))
    {
        return 3;
    }
    auto const isUntouched = [](unsigned char byte) { return byte == 0xff; };
    if (!std::all_of(first.begin() + static_cast<int64_t>(bytes), first.end(), isUntouched))
    {
        return 4;
    }
    return std::fwrite(first.data(), 1, bytes, stdout) == bytes ? 0 : 74;
}

} // namespace

int main(int argc, char** argv)
{
    if (argc == 4 && std::strcmp(argv[1], "bytes") == 0)
    {
        std::printf("%zu\n", groupedGemmWorkspaceBytes(std::atoi(argv[2]), std::atoi(argv[3])));
        return 0;
    }
    if (argc == 10 && std::strcmp(argv[1], "launch") == 0)
    {
        return launch(argv + 2);
    }
    if (argc > 6 && std::strcmp(argv[1], "product") == 0)
    {
        return product(argc - 2, argv + 2);
    }
    return 64;
}
