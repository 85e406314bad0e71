// The kernels as plain C functions, for tests and benchmarks that bring their own memory and stream. Element types are 0
// for fp16 and 1 for bf16, paths those of MoePath and AttentionPath; results are CUDA error codes.

#include "attention/attention.h"
#include "moe/moe.h"

#include <cstdio>

#define QWENFORGE_C_API extern "C" __attribute__((visibility("default")))

namespace
{

int answer(bool good, qwenforge::Message const& problem, char* text, size_t bytes)
{
    std::snprintf(text, bytes, "%s", good ? "" : problem.text());
    return good ? 1 : 0;
}

} // namespace

// Writes what is wrong with `shape` on the current device to `text`, nothing when it can be computed. 1 when it can.
QWENFORGE_C_API int qwenforgeCheckMoe(qwenforge::MoeShape const* shape, char* text, size_t bytes)
{
    qwenforge::Message problem;
    bool const good = qwenforge::checkMoe(*shape, qwenforge::currentSm(), problem);
    return answer(good, problem, text, bytes);
}

// The path that the table chooses on the current device.
QWENFORGE_C_API int qwenforgeMoePath(qwenforge::MoeShape const* shape)
{
    return static_cast<int>(qwenforge::chosenPath(*shape, qwenforge::currentSm()));
}

QWENFORGE_C_API size_t qwenforgeMoeWorkspaceBytes(qwenforge::MoeShape const* shape, int path)
{
    return qwenforge::moeWorkspaceBytes(*shape, static_cast<qwenforge::MoePath>(path));
}

QWENFORGE_C_API int qwenforgeMoe(qwenforge::MoeShape const* shape, int type, qwenforge::MoeTensors const* tensors,
    void* workspace, size_t workspaceBytes, void* stream, int path)
{
    return qwenforge::launchMoe(*shape, static_cast<qwenforge::ElementType>(type), *tensors, workspace, workspaceBytes,
        static_cast<cudaStream_t>(stream), static_cast<qwenforge::MoePath>(path));
}

// As qwenforgeCheckMoe.
QWENFORGE_C_API int qwenforgeCheckAttention(qwenforge::AttentionShape const* shape, char* text, size_t bytes)
{
    qwenforge::Message problem;
    bool const good = qwenforge::checkAttention(*shape, qwenforge::currentSm(), problem);
    return answer(good, problem, text, bytes);
}

// The path that kAuto stands for on the current device.
QWENFORGE_C_API int qwenforgeAttentionPath(qwenforge::AttentionShape const* shape)
{
    return static_cast<int>(qwenforge::chosenPath(*shape));
}

// Of any path.
QWENFORGE_C_API size_t qwenforgeAttentionWorkspaceBytes(qwenforge::AttentionShape const* shape)
{
    return qwenforge::attentionWorkspaceBytes(*shape);
}

QWENFORGE_C_API int qwenforgeAttention(qwenforge::AttentionShape const* shape, int type,
    qwenforge::AttentionTensors const* tensors, void* workspace, size_t workspaceBytes, void* stream, int path)
{
    return qwenforge::launchAttention(*shape, static_cast<qwenforge::ElementType>(type), *tensors, workspace,
        workspaceBytes, static_cast<cudaStream_t>(stream), static_cast<qwenforge::AttentionPath>(path));
}
