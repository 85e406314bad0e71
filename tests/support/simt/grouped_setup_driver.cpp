// Runs describeGroups in the emulator: `driver SCHEDULE ROWS DEPTH INPUTS WEIGHTS OUTPUTS COUNT...`, the addresses any
// three numbers, since nothing reads what is there. The workspace, filled with 0xff before, goes to stdout.

#include "moe/cutlass/grouped_setup.cuh"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace
{

struct Release
{
    void operator()(void* address) const
    {
        std::free(address);
    }
};

void* address(char const* text)
{
    return reinterpret_cast<void*>(static_cast<uintptr_t>(std::strtoull(text, nullptr, 10)));
}

} // namespace

int main(int argc, char** argv)
{
    using namespace qwenforge::moe;
    if (argc < 8)
    {
        return 64;
    }
    simt::schedule() = static_cast<unsigned>(std::atoi(argv[1]));
    std::vector<int32_t> counts;
    for (int i = 7; i < argc; ++i)
    {
        counts.push_back(std::atoi(argv[i]));
    }
    GroupedGemm gemm{};
    gemm.rows = std::atoi(argv[2]);
    gemm.depth = std::atoi(argv[3]);
    gemm.inputs = address(argv[4]);
    gemm.weights = address(argv[5]);
    gemm.outputs = address(argv[6]);
    gemm.counts = counts.data();
    gemm.experts = static_cast<int32_t>(counts.size());
    size_t const bytes = GroupArrays(gemm.experts, nullptr).bytes;
    std::unique_ptr<void, Release> const workspace(std::aligned_alloc(kGroupedAlignment, bytes));
    std::memset(workspace.get(), 0xff, bytes);
    GroupArrays const groups(gemm.experts, workspace.get());
    launchDescribeGroups(gemm, groups, nullptr);
    return std::fwrite(workspace.get(), 1, bytes, stdout) == bytes ? 0 : 74;
}
