// Runs CUDA kernels on the CPU, thread by thread, so that they can be tested without a GPU.
//
// Every CUDA thread of a block is a fiber; blocks run one after the other. A fiber runs until it has to wait: at
// __syncthreads for the whole block, at a warp's collective (__shfl_xor_sync, __ballot_sync, ...) for the lanes in its
// mask. In which order waiting fibers go on is decided by simt::schedule(): 0 is thread 0 first, 1 the last thread first,
// 2 and 3 the same with every warp going on as far as it can before the next one gets a turn, every other number a shuffled
// order of its own; under 1 and 3 the last block comes first. A kernel without races computes the same bits in all of them.
//
// It stops the process, with a sentence on stderr, where a GPU would hang or do something undefined: lanes that meet in
// different collectives, a lane outside its own mask, a barrier or a collective that some threads never reach.
// Shared variables are allocated for each block, filled with 0xff (NaN), and freed after it: with AddressSanitizer,
// each has its own bounds.
//
// What it does not show: the memory model of the hardware (a fiber sees every earlier write at once), timing, and
// anything of PTX.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include "stack.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt
{

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kLargestOperand = 96;

inline unsigned& schedule()
{
    static unsigned number = 0;
    return number;
}

enum class State
{
    kRunnable,
    kAtBarrier,
    kInCollective,
    kDone,
};

// An asynchronous copy that was asked for: it happens when its thread waits for it, as late as it may on a GPU, and under
// schedules of odd numbers at once, as early as it may.
struct Copy
{
    void* to;
    void const* from;
    size_t bytes;
    bool valid;
};

struct Fiber
{
    Context context;
    State state;
    void* fakeStack; // AddressSanitizer's
    std::vector<Copy> newCopies;
    std::deque<std::vector<Copy>> copyGroups;
};

// The collective that the lanes of a warp are gathering for. Two sets of slots: a lane may enter the next collective
// before the last lane has read the results of this one.
struct Gathering
{
    uint32_t mask = 0;
    uint32_t arrived = 0;
    char const* name = nullptr;
    unsigned round = 0;
    alignas(16) unsigned char slots[2][kLanes][kLargestOperand];
};

struct Free
{
    void operator()(void* memory) const
    {
        std::free(memory);
    }
};
using Memory = std::unique_ptr<void, Free>;

struct Block
{
    dim3 size;
    dim3 grid;
    uint3 index;
    int threads = 0;
    int current = -1;
    int atBarrier = 0;
    int done = 0;
    std::vector<Fiber> fibers;
    std::vector<Gathering> warps;
    std::map<std::string, std::vector<unsigned char>> shared;
    size_t dynamicBytes = 0;
    Memory dynamic;
    std::function<void()> body;
    Context scheduler;
    void const* schedulerStack = nullptr;
    size_t schedulerStackBytes = 0;
    void* schedulerFakeStack = nullptr;
};

// Of fiber `thread`; kept from launch to launch.
inline char* stackOf(int thread)
{
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= static_cast<size_t>(thread))
    {
        stacks.emplace_back(new char[kStackBytes]);
    }
    return stacks[static_cast<size_t>(thread)].get();
}

inline Block*& block()
{
    static Block* running = nullptr;
    return running;
}

[[noreturn]] inline void fail(char const* what)
{
    Block const& b = *block();
    std::fprintf(stderr, "simt: %s (block %u, %u, %u, thread %d)\n", what, b.index.x, b.index.y, b.index.z, b.current);
    std::_Exit(70); // not std::exit: a fiber's stack is no place for destructors and leak checks
}

// Telling AddressSanitizer about the change of stacks, where it is there.
inline void leaveStack([[maybe_unused]] void** fake, [[maybe_unused]] void const* to, [[maybe_unused]] size_t bytes)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, to, bytes);
#endif
}

inline void enterStack([[maybe_unused]] void* fake, [[maybe_unused]] void const** from, [[maybe_unused]] size_t* bytes)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, from, bytes);
#endif
}

// Back to the scheduler, until it chooses this fiber again.
inline void wait(State state)
{
    Block& b = *block();
    Fiber& fiber = b.fibers[static_cast<size_t>(b.current)];
    fiber.state = state;
    leaveStack(&fiber.fakeStack, b.schedulerStack, b.schedulerStackBytes);
    switchContext(fiber.context, b.scheduler);
    enterStack(fiber.fakeStack, &b.schedulerStack, &b.schedulerStackBytes);
}

inline void openBarrier(Block& b)
{
    b.atBarrier = 0;
    for (Fiber& fiber : b.fibers)
    {
        if (fiber.state == State::kAtBarrier)
        {
            fiber.state = State::kRunnable;
        }
    }
}

inline void barrier()
{
    Block& b = *block();
    if (++b.atBarrier == b.threads)
    {
        openBarrier(b);
        b.fibers[static_cast<size_t>(b.current)].state = State::kRunnable;
        return;
    }
    wait(State::kAtBarrier);
}

// Deposits `operand`, waits for the other lanes of `mask`, and gives the operands of all lanes.
template <typename T>
unsigned char const (*gather(uint32_t mask, T const& operand, char const* name))[kLargestOperand]
{
    static_assert(sizeof(T) <= kLargestOperand);
    Block& b = *block();
    int const lane = b.current % kLanes;
    int const first = b.current - lane;
    Gathering& warp = b.warps[static_cast<size_t>(b.current / kLanes)];
    if ((mask >> lane & 1u) == 0)
    {
        fail("a lane is not in the mask of its own collective");
    }
    if (warp.arrived == 0)
    {
        warp.mask = mask;
        warp.name = name;
    }
    else if (warp.mask != mask || std::strcmp(warp.name, name) != 0)
    {
        fail("the lanes of a warp meet in different collectives");
    }
    unsigned const round = warp.round;
    auto* const slots = warp.slots[round % 2];
    std::memcpy(slots[lane], &operand, sizeof(T));
    warp.arrived |= 1u << lane;
    if (warp.arrived != mask)
    {
        wait(State::kInCollective);
        return slots;
    }
    warp.arrived = 0;
    ++warp.round;
    for (int other = 0; other < kLanes && first + other < b.threads; ++other)
    {
        Fiber& fiber = b.fibers[static_cast<size_t>(first + other)];
        if ((mask >> other & 1u) != 0 && fiber.state == State::kInCollective)
        {
            fiber.state = State::kRunnable;
        }
    }
    return slots;
}

template <typename T>
T operandOf(unsigned char const (*slots)[kLargestOperand], int lane)
{
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
}

// The same without a copy.
template <typename T>
T const& operandAt(unsigned char const (*slots)[kLargestOperand], int lane)
{
    return *reinterpret_cast<T const*>(slots[lane]);
}

inline void runFiber()
{
    Block& b = *block();
    enterStack(nullptr, &b.schedulerStack, &b.schedulerStackBytes);
    b.body();
    Fiber& fiber = b.fibers[static_cast<size_t>(b.current)];
    fiber.state = State::kDone;
    ++b.done;
    leaveStack(nullptr, b.schedulerStack, b.schedulerStackBytes);
    switchContext(fiber.context, b.scheduler);
}

inline void startFibers(Block& b)
{
    b.atBarrier = b.done = 0;
    b.warps.assign(static_cast<size_t>((b.threads + kLanes - 1) / kLanes), Gathering{});
    b.shared.clear();
    b.dynamic.reset(b.dynamicBytes == 0 ? nullptr : std::aligned_alloc(128, (b.dynamicBytes + 127) / 128 * 128));
    if (b.dynamicBytes > 0)
    {
        std::memset(b.dynamic.get(), 0xff, b.dynamicBytes);
#if defined(__SANITIZE_ADDRESS__)
        size_t const allocated = (b.dynamicBytes + 127) / 128 * 128;
        __asan_poison_memory_region(static_cast<char*>(b.dynamic.get()) + b.dynamicBytes, allocated - b.dynamicBytes);
#endif
    }
    for (int thread = 0; thread < b.threads; ++thread)
    {
        Fiber& fiber = b.fibers[static_cast<size_t>(thread)];
        fiber.state = State::kRunnable;
        fiber.fakeStack = nullptr;
        fiber.newCopies.clear();
        fiber.copyGroups.clear();
        startContext(fiber.context, stackOf(thread), kStackBytes, runFiber);
    }
}

inline bool runFiberOf(Block& b, int thread)
{
    Fiber& fiber = b.fibers[static_cast<size_t>(thread)];
    if (fiber.state != State::kRunnable)
    {
        return false;
    }
    b.current = thread;
    leaveStack(&b.schedulerFakeStack, stackOf(thread), kStackBytes);
    switchContext(b.scheduler, fiber.context);
    enterStack(b.schedulerFakeStack, nullptr, nullptr);
    return true;
}

// One round: every fiber once or, under the schedules that go warp by warp, until none of its warp can go on.
inline bool runRound(Block& b, std::vector<int> const& order)
{
    bool ran = false;
    if (schedule() != 2 && schedule() != 3)
    {
        for (int thread : order)
        {
            ran = runFiberOf(b, thread) || ran;
        }
        return ran;
    }
    for (size_t first = 0; first < order.size(); first += kLanes)
    {
        for (bool again = true; again;)
        {
            again = false;
            for (size_t i = first; i < std::min(first + kLanes, order.size()); ++i)
            {
                again = runFiberOf(b, order[i]) || again;
            }
            ran = ran || again;
        }
    }
    return ran;
}

inline void runBlock(Block& b, std::vector<int>& order, std::mt19937& random)
{
    startFibers(b);
    while (b.done < b.threads)
    {
        if (schedule() > 3)
        {
            std::shuffle(order.begin(), order.end(), random);
        }
        if (!runRound(b, order))
        {
            std::fprintf(stderr, "simt: deadlock: %d threads wait at a barrier, %d in a collective of their warp, %d are done\n",
                b.atBarrier, b.threads - b.done - b.atBarrier, b.done);
            fail("some threads never come to where others wait");
        }
    }
}

// Runs all blocks of a grid; what the <<<>>> of CUDA does.
inline void launch(dim3 grid, dim3 size, size_t dynamicBytes, std::function<void()> body)
{
    if (grid.x * grid.y * grid.z == 0 || size.x * size.y * size.z == 0 || grid.y > 65535 || grid.z > 65535)
    {
        std::fprintf(stderr, "simt: a grid of %u x %u x %u blocks cannot be launched\n", grid.x, grid.y, grid.z);
        std::exit(70);
    }
    Block b;
    b.grid = grid;
    b.size = size;
    b.threads = static_cast<int>(size.x * size.y * size.z);
    b.fibers.resize(static_cast<size_t>(b.threads));
    b.body = std::move(body);
    b.dynamicBytes = dynamicBytes;
    block() = &b;
    std::mt19937 random(schedule());
    std::vector<int> order(static_cast<size_t>(b.threads));
    std::iota(order.begin(), order.end(), 0);
    if (schedule() == 1 || schedule() == 3)
    {
        std::reverse(order.begin(), order.end());
    }
    // Blocks one after the other, under the schedules that begin with the last thread from the last one on.
    bool const isReversed = schedule() == 1 || schedule() == 3;
    unsigned const blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i)
    {
        unsigned const number = isReversed ? blocks - 1 - i : i;
        b.index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
        runBlock(b, order, random);
    }
    block() = nullptr;
}

// The block's shared variable that is declared at `place`.
template <typename T>
T& shared(char const* place)
{
    std::vector<unsigned char>& bytes = block()->shared[place];
    if (bytes.empty())
    {
        bytes.assign(sizeof(T), 0xff);
    }
    return *reinterpret_cast<T*>(bytes.data());
}

inline uint3 threadIndex()
{
    Block const& b = *block();
    auto const thread = static_cast<unsigned>(b.current);
    return {thread % b.size.x, thread / b.size.x % b.size.y, thread / (b.size.x * b.size.y)};
}

} // namespace simt

#define threadIdx simt::threadIndex()
#define blockIdx simt::block()->index
#define blockDim simt::block()->size
#define gridDim simt::block()->grid

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define SIMT_TEXT_OF(value) #value
#define SIMT_TEXT(value) SIMT_TEXT_OF(value)
#define QWENFORGE_SHARED(name, ...) \
    auto& name = simt::shared<typename qwenforge::SharedType<__VA_ARGS__>::Type>(__FILE__ ":" SIMT_TEXT(__LINE__))
// Bytes of a workspace that no kernel may touch, and bytes that it may.
#if defined(__SANITIZE_ADDRESS__)
#define QWENFORGE_FORBID(address, bytes) __asan_poison_memory_region(address, bytes)
#define QWENFORGE_ALLOW(address, bytes) __asan_unpoison_memory_region(address, bytes)
#endif
#define QWENFORGE_LAUNCH(kernel, grid, block, stream, ...) \
    (static_cast<void>(stream), simt::launch(grid, block, 0, [=] { kernel(__VA_ARGS__); }))
#define QWENFORGE_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
    (static_cast<void>(stream), simt::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); }))
// No block of any GPU of ours may have more than 99 KiB (SM 86, 89 and 120).
#define QWENFORGE_ALLOW_SHARED(kernel, bytes) ((bytes) <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue)
#define QWENFORGE_DYNAMIC simt::block()->dynamic.get()

inline void __syncthreads()
{
    simt::barrier();
}

inline void __syncwarp(uint32_t mask = 0xffffffffu)
{
    simt::gather(mask, 0, "__syncwarp");
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance)
{
    auto const* const slots = simt::gather(mask, value, "__shfl_xor_sync");
    return simt::operandOf<T>(slots, (simt::block()->current % simt::kLanes) ^ distance);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane)
{
    auto const* const slots = simt::gather(mask, value, "__shfl_sync");
    return simt::operandOf<T>(slots, lane % simt::kLanes);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate)
{
    auto const* const slots = simt::gather(mask, predicate, "__ballot_sync");
    uint32_t votes = 0;
    for (int lane = 0; lane < simt::kLanes; ++lane)
    {
        bool const inMask = (mask >> lane & 1u) != 0;
        votes |= inMask && simt::operandOf<bool>(slots, lane) ? 1u << lane : 0u;
    }
    return votes;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector)
{
    uint64_t const bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
    {
        result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    }
    return result;
}

inline int __popc(uint32_t bits)
{
    return __builtin_popcount(bits);
}
