// Matrix instructions and asynchronous copies (SM 80 and up; E4M3 SM 89 and up), for kernels whose warps multiply 16 rows by
// 8 columns.
//
// Fragments are those of PTX's mma.m16n8k16, with g = lane / 4 and t = lane % 4:
//     A  16 x 16, by rows:     registers 0..3 hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8 (and the next)
//     B  16 x 8, by columns:   registers 0..1 hold rows 2t, 2t + 8 (and the next) of column g
//     C  16 x 8, fp32:         0..3 hold (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// Those of mma.m16n8k32 for E4M3 are the same with two elements of 8 bits in the place of each of 16.

#pragma once

#include "common/device.cuh"
#ifdef QWENFORGE_SIMT
#include "matrices.h"
#endif

namespace qwenforge
{

struct FragmentA
{
    uint32_t registers[4];
};

struct FragmentB
{
    uint32_t registers[2];
};

#ifdef QWENFORGE_SIMT

template <typename T>
void multiplyAdd(float (&sums)[4], FragmentA const& a, FragmentB const& b)
{
    simt::multiplyAdd<T, 16 / sizeof(T) * 2>(sums, a.registers, b.registers);
}

inline void loadMatrices(uint32_t (&registers)[4], void const* row)
{
    simt::loadMatrices(registers, row);
}

inline void loadTransposed(uint32_t (&registers)[4], void const* row)
{
    simt::loadMatrices(registers, row, /*isTransposed=*/true);
}

inline void copyAsync16(void* to, void const* from, bool valid)
{
    simt::copyAsync(to, from, 16, valid);
}

inline void commitCopies()
{
    simt::commitCopies();
}

template <int kPending>
void waitForCopies()
{
    simt::waitForCopies(kPending);
}

#else

template <typename T>
__device__ __forceinline__ void multiplyAdd(float (&sums)[4], FragmentA const& a, FragmentB const& b);

template <>
__device__ __forceinline__ void multiplyAdd<__half>(float (&sums)[4], FragmentA const& a, FragmentB const& b)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]),
                 "r"(b.registers[0]), "r"(b.registers[1]));
}

template <>
__device__ __forceinline__ void multiplyAdd<__nv_bfloat16>(float (&sums)[4], FragmentA const& a, FragmentB const& b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]), "r"(b.registers[0]),
        "r"(b.registers[1]));
}

template <>
__device__ __forceinline__ void multiplyAdd<__nv_fp8_e4m3>(float (&sums)[4], FragmentA const& a, FragmentB const& b)
{
#if __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]), "r"(b.registers[0]),
        "r"(b.registers[1]));
#else
    __trap(); // never launched there: see checkMoe
#endif
}

// Four 8 x 8 matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned), and
// gets of each matrix the elements 2t and 2t + 1 of row g.
__device__ __forceinline__ void loadMatrices(uint32_t (&registers)[4], void const* row)
{
    auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// The same, but of each matrix a lane gets the elements of rows 2t and 2t + 1 in column g.
__device__ __forceinline__ void loadTransposed(uint32_t (&registers)[4], void const* row)
{
    auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, or zeros where the source is not valid (it is not read then).
__device__ __forceinline__ void copyAsync16(void* to, void const* from, bool valid)
{
    auto const address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commitCopies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void waitForCopies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

} // namespace qwenforge
