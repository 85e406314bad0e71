#include "cpu/instruction_set.h"

#include "cpu/node.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qwenforge::cpu
{
namespace
{

constexpr char kVariable[] = "QWENFORGE_CPU_ISA";

struct Choice
{
    InstructionSet set;
    bool named; // of a known name
    bool supported;
    std::string asked;
};

Choice choose()
{
    InstructionSet const supported = supportedInstructionSet();
    char const* const asked = std::getenv(kVariable);
    if (asked == nullptr || *asked == '\0')
    {
        return {supported, true, true, ""};
    }
    struct
    {
        char const* word;
        InstructionSet set;
    } constexpr words[] = {
        {"baseline", InstructionSet::kBaseline},
        {"avx2", InstructionSet::kAvx2},
        {"avx512", InstructionSet::kAvx512Vnni},
    };
    for (auto const& known : words)
    {
        if (std::strcmp(asked, known.word) == 0)
        {
            return {known.set, true, known.set <= supported, asked};
        }
    }
    return {supported, false, false, asked};
}

#if defined(__x86_64__)
// Conversion from float16; compilers before GCC 11 have no name for it.
bool hasF16c() noexcept
{
    unsigned int eax = 0;
    unsigned int ebx = 0;
    unsigned int ecx = 0;
    unsigned int edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

} // namespace

char const* nameOf(InstructionSet set) noexcept
{
    switch (set)
    {
    case InstructionSet::kAvx512Vnni: return "avx512-vnni";
    case InstructionSet::kAvx2: return "avx2";
    case InstructionSet::kBaseline: break;
    }
    return "baseline";
}

InstructionSet supportedInstructionSet() noexcept
{
#if defined(__x86_64__)
    // libgcc asks the operating system too, whether it saves the registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512vnni"))
    {
        return InstructionSet::kAvx512Vnni;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && hasF16c())
    {
        return InstructionSet::kAvx2;
    }
#endif
    return InstructionSet::kBaseline;
}

InstructionSet instructionSet()
{
    static Choice const choice = choose();
    if (!choice.named)
    {
        throw Refusal(
            std::string(kVariable) + " is '" + choice.asked + "', which is none of baseline, avx2 and avx512; unset it");
    }
    if (!choice.supported)
    {
        throw Refusal(std::string(kVariable) + " asks for " + choice.asked + ", which this processor does not have ("
            + nameOf(supportedInstructionSet()) + " is its best); unset it");
    }
    return choice.set;
}

} // namespace qwenforge::cpu
