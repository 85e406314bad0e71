#include "cpu/attention_kernels_inl.h"

namespace qwenforge::cpu
{

AttentionKernels const kBaselineAttention = kKernels;

} // namespace qwenforge::cpu
