// The experts' products with weights of type INT8.

#include "moe/experts.h"

template void qwenforge::moe::launchExperts<qwenforge::WeightType::kInt8>(
    ExpertCall const&, ElementType, cudaStream_t);
