#include "cpu/products.h"

#include "cpu/instruction_set.h"

namespace qwenforge::cpu
{

Products const& products()
{
#if defined(__x86_64__)
    switch (instructionSet())
    {
    case InstructionSet::kAvx512Vnni: return kAvx512Products;
    case InstructionSet::kAvx2: return kAvx2Products;
    case InstructionSet::kBaseline: break;
    }
#endif
    return kBaselineProducts;
}

} // namespace qwenforge::cpu
