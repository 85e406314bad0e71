// The kernels as plain C functions, for tests and benchmarks that bring their own memory and stream. Element types are 0
// for fp16 and 1 for bf16; the results are CUDA error codes.

#include "attention/attention.h"
#include "moe/moe.h"

#define QWENFORGE_C_API extern "C" __attribute__((visibility("default")))

QWENFORGE_C_API size_t qwenforgeMoeWorkspaceBytes(qwenforge::MoeShape const* shape)
{
    return qwenforge::moeWorkspaceBytes(*shape);
}

QWENFORGE_C_API int qwenforgeMoe(qwenforge::MoeShape const* shape, int type, qwenforge::MoeTensors const* tensors,
    void* workspace, size_t workspaceBytes, void* stream, int path)
{
    return qwenforge::launchMoe(*shape, static_cast<qwenforge::ElementType>(type), *tensors, workspace, workspaceBytes,
        static_cast<cudaStream_t>(stream), static_cast<qwenforge::MoePath>(path));
}

QWENFORGE_C_API size_t qwenforgeAttentionWorkspaceBytes(qwenforge::AttentionShape const* shape)
{
    return qwenforge::attentionWorkspaceBytes(*shape);
}

QWENFORGE_C_API int qwenforgeAttention(qwenforge::AttentionShape const* shape, int type,
    qwenforge::AttentionTensors const* tensors, void* workspace, size_t workspaceBytes, void* stream)
{
    return qwenforge::launchAttention(*shape, static_cast<qwenforge::ElementType>(type), *tensors, workspace,
        workspaceBytes, static_cast<cudaStream_t>(stream));
}
