// The experts' products with weights of type FP8 E4M3.

#include "moe/experts.h"

template void qwenforge::moe::launchExperts<qwenforge::WeightType::kFloat8>(
    ExpertCall const&, ElementType, cudaStream_t);
