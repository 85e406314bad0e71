#include "cpu/attention_kernels_inl.h"

namespace qwenforge::cpu
{

AttentionKernels const kAvx512Attention = kKernels;

} // namespace qwenforge::cpu
