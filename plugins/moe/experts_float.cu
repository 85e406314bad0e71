// The experts' products with weights of the tokens' own type.

#include "moe/experts.h"

template void qwenforge::moe::launchExperts<qwenforge::WeightType::kFloat>(
    ExpertCall const&, ElementType, cudaStream_t);
