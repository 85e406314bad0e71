/* What of the CUDA runtime has to answer for ONNX Runtime's CUDA provider to make a session on a machine without a GPU:
 * one device of SM 9.0, its memory the host's. Everything else returns success and does nothing; no kernel ever runs. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMajor = 75, kMinor = 76 }; /* cudaDeviceAttr */

static int allocate(void** address, size_t size) {
    *address = aligned_alloc(256, (size + 511) / 256 * 256);
    return *address == NULL;
}

int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDriverGetVersion(int* version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int* version) { return *version = 13000, 0; }
int cudaMemGetInfo(size_t* unused, size_t* all) { return *unused = *all = (size_t)1 << 36, 0; }
int cudaMalloc(void** address, size_t size) { return allocate(address, size); }
int cudaHostAlloc(void** address, size_t size, unsigned flags) { return (void)flags, allocate(address, size); }
int cudaMallocHost(void** address, size_t size) { return allocate(address, size); }
int cudaFree(void* address) { return free(address), 0; }
int cudaFreeHost(void* address) { return free(address), 0; }
int cudaMemcpy(void* to, const void* from, size_t size, int kind) { return (void)kind, memcpy(to, from, size), 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
    return (void)kind, (void)stream, memcpy(to, from, size), 0;
}
int cudaMemset(void* address, int value, size_t size) { return memset(address, value, size), 0; }
int cudaMemsetAsync(void* address, int value, size_t size, void* stream) {
    return (void)stream, memset(address, value, size), 0;
}
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return (void)flags, allocate(stream, 64); }
int cudaStreamCreate(void** stream) { return allocate(stream, 64); }
int cudaEventCreateWithFlags(void** event, unsigned flags) { return (void)flags, allocate(event, 64); }
int cudaEventCreate(void** event) { return allocate(event, 64); }
/* Graphs: their life is told on standard error, a word each. */
int cudaStreamEndCapture(void* stream, void** graph) {
    return (void)stream, fputs("captured\n", stderr), allocate(graph, 64);
}
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long flags) {
    return (void)graph, (void)flags, allocate(executable, 64);
}
int cudaGraphLaunch(void* executable, void* stream) {
    return (void)executable, (void)stream, fputs("replayed\n", stderr), 0;
}
int cudaGraphExecDestroy(void* executable) { return fputs("released\n", stderr), free(executable), 0; }
int cublasCreate_v2(void** handle) { return allocate(handle, 64); }
int cublasLtCreate(void** handle) { return allocate(handle, 64); }
const char* cudaGetErrorString(int error) { return (void)error, "the stand-in"; }
const char* cudaGetErrorName(int error) { return (void)error, "the stand-in"; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    *value = attribute == kMajor ? 9 : attribute == kMinor ? 0 : 1024;
    return 0;
}
/* cudaDeviceProp of CUDA 13, of an H200, as far as ONNX Runtime looks. */
int cudaGetDeviceProperties(char* properties, int device) {
    (void)device;
    memset(properties, 0, 1008);
    strcpy(properties, "the stand-in");
    *(size_t*)(properties + 288) = (size_t)1 << 36; /* totalGlobalMem */
    *(size_t*)(properties + 296) = 49152;           /* sharedMemPerBlock */
    *(int*)(properties + 308) = 32;                 /* warpSize */
    *(int*)(properties + 320) = 1024;               /* maxThreadsPerBlock */
    *(int*)(properties + 360) = 9;                  /* major */
    *(int*)(properties + 384) = 132;                /* multiProcessorCount */
    *(int*)(properties + 604) = 2048;               /* maxThreadsPerMultiProcessor */
    *(size_t*)(properties + 624) = 233472;          /* sharedMemPerMultiprocessor */
    *(int*)(properties + 632) = 65536;              /* regsPerMultiprocessor */
    *(size_t*)(properties + 672) = 232448;          /* sharedMemPerBlockOptin */
    return 0;
}
