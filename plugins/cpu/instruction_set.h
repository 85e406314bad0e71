// The instruction set that the kernels of this process use: the best that both the library and the processor have, or a
// lesser one that the environment asks for.

#pragma once

namespace qwenforge::cpu
{

// In the order of preference, the least first.
enum class InstructionSet
{
    kBaseline,   // what the compiler assumes of every processor of the architecture
    kAvx2,       // AVX2 and FMA
    kAvx512Vnni, // AVX-512 F, BW, VL and VNNI
};

// "baseline", "avx2" or "avx512-vnni".
char const* nameOf(InstructionSet set) noexcept;

// What the processor and the operating system offer, whatever the environment says.
InstructionSet supportedInstructionSet() noexcept;

// What the kernels have to use. The environment variable QWENFORGE_CPU_ISA, read once, asks for a lesser one than the
// processor's: baseline, avx2 or avx512. Throws Refusal where it names another or one that the processor does not have.
InstructionSet instructionSet();

} // namespace qwenforge::cpu
