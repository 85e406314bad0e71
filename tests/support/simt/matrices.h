// Asynchronous copies and matrix instructions, by PTX's tables: what common/mma.cuh calls where kernels are emulated.

#pragma once

#include "simt.h"

namespace simt
{

inline void perform(Copy const& copy)
{
    copy.valid ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
}

inline void copyAsync(void* to, void const* from, size_t bytes, bool valid)
{
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0))
    {
        fail("an asynchronous copy is not aligned");
    }
    Copy const copy{to, from, bytes, valid};
    if (schedule() % 2 == 1)
    {
        perform(copy);
        return;
    }
    block()->fibers[static_cast<size_t>(block()->current)].newCopies.push_back(copy);
}

inline void commitCopies()
{
    Fiber& fiber = block()->fibers[static_cast<size_t>(block()->current)];
    fiber.copyGroups.push_back(std::move(fiber.newCopies));
    fiber.newCopies.clear();
}

inline void waitForCopies(size_t pending)
{
    Fiber& fiber = block()->fibers[static_cast<size_t>(block()->current)];
    for (; fiber.copyGroups.size() > pending; fiber.copyGroups.pop_front())
    {
        for (Copy const& copy : fiber.copyGroups.front())
        {
            perform(copy);
        }
    }
}

// ldmatrix.x4: the address of row l % 8 of matrix l / 8 comes from lane l; of each matrix a lane gets two elements, of row
// l / 4 in columns 2 (l % 4) and the next, or transposed, of column l / 4 in those rows.
inline void loadMatrices(uint32_t (&registers)[4], void const* row, bool isTransposed = false)
{
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    {
        fail("a row of a matrix is not aligned");
    }
    auto const* const slots = gather(0xffffffffu, row, isTransposed ? "ldmatrix.trans" : "ldmatrix");
    int const lane = block()->current % kLanes;
    for (int element = 0; element < 8; ++element)
    {
        int const matrix = element / 2;
        int const other = 2 * (lane % 4) + element % 2;
        int const from = isTransposed ? other : lane / 4;
        int const column = isTransposed ? lane / 4 : other;
        auto const* const bytes = static_cast<unsigned char const*>(operandOf<void const*>(slots, 8 * matrix + from));
        std::memcpy(reinterpret_cast<unsigned char*>(&registers[matrix]) + 2 * (element % 2), bytes + 2 * column, 2);
    }
}

// mma.m16n8k16, and for elements of 8 bits m16n8k32, by PTX's tables of fragments.
template <typename T, int kDepth>
void multiplyAdd(float (&sums)[4], uint32_t const (&a)[4], uint32_t const (&b)[2])
{
    constexpr int kHalf = kDepth / 2;        // columns of registers 0 and 1 of A, rows of register 0 of B
    constexpr int kEach = 4 / sizeof(T);     // elements of a register
    struct Operands
    {
        float a[4][kEach];
        float b[2][kEach];
    };
    Operands own;
    for (int i = 0; i < 6; ++i)
    {
        T elements[kEach];
        std::memcpy(static_cast<void*>(elements), i < 4 ? &a[i] : &b[i - 4], sizeof(elements));
        std::transform(elements, elements + kEach, i < 4 ? own.a[i] : own.b[i - 4],
            [](T element) { return static_cast<float>(element); });
    }
    auto const* const slots = gather(0xffffffffu, own, "mma");
    int const lane = block()->current % kLanes;
    for (int i = 0; i < 4; ++i)
    {
        int const row = lane / 4 + i / 2 * 8;
        int const column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < kDepth; ++k)
        {
            auto const& left = operandAt<Operands>(slots, row % 8 * 4 + k % kHalf / kEach);
            auto const& right = operandAt<Operands>(slots, column * 4 + k % kHalf / kEach);
            sums[i] += left.a[row / 8 + k / kHalf * 2][k % kEach] * right.b[k / kHalf][k % kEach];
        }
    }
}

} // namespace simt
