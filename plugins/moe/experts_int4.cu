// The experts' products with weights of type INT4.

#include "moe/experts.h"

template void qwenforge::moe::launchExperts<qwenforge::WeightType::kInt4>(
    ExpertCall const&, ElementType, cudaStream_t);
