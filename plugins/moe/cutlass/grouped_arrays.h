// What a grouped GEMM reads of its groups, one an expert: arrays in device memory. No type of CUTLASS is named here;
// grouped_sm90.cuh asserts that its own have the size and the layout of these.

#pragma once

#include "moe/cutlass/grouped_gemm.h"

namespace qwenforge
{
namespace moe
{

constexpr int64_t kGroupedElementBytes = 2; // of both element types
constexpr size_t kGroupedAlignment = 256;   // of the parts of the workspace

struct GroupShape
{
    int32_t positions;
    int32_t rows;
    int32_t depth;
};

// Arrays of one element an expert, one behind the other in the workspace. Where `base` is null only the size counts.
struct GroupArrays
{
    GroupShape* shapes{nullptr};
    void const** inputs{nullptr};
    void const** weights{nullptr};
    void** outputs{nullptr};
    int64_t* depthStrides{nullptr}; // from a row of inputs or weights to the next, in elements
    int64_t* rowStrides{nullptr};   // from a row of outputs to the next
    size_t bytes{0};

    GroupArrays(int32_t experts, void* base) noexcept
    {
        take(shapes, experts, base);
        take(inputs, experts, base);
        take(weights, experts, base);
        take(outputs, experts, base);
        take(depthStrides, experts, base);
        take(rowStrides, experts, base);
    }

private:
    template <typename T>
    void take(T*& array, int32_t count, void* base) noexcept
    {
        array = base == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<unsigned char*>(base) + bytes);
        size_t const size = static_cast<size_t>(count) * sizeof(T);
        bytes += (size + kGroupedAlignment - 1) / kGroupedAlignment * kGroupedAlignment;
    }
};

} // namespace moe
} // namespace qwenforge
