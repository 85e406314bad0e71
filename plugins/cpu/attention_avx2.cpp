#include "cpu/attention_kernels_inl.h"

namespace qwenforge::cpu
{

AttentionKernels const kAvx2Attention = kKernels;

} // namespace qwenforge::cpu
