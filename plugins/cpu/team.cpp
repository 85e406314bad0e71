#include "cpu/team.h"

#include <algorithm>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qwenforge::cpu
{
namespace
{

constexpr size_t kMostWorkers = 64;
// Items that a worker takes from a part together, a quarter of those left: a processor reads no memory ahead across the
// counter. The last are taken one by one, so that all workers end together.
constexpr size_t kMostAtOnce = 8;
constexpr size_t kSpins = 20000; // some 0.2 ms: the other thread has lost its core

void pause() noexcept
{
#if defined(__x86_64__)
    _mm_pause();
#endif
}

void waitUntil(std::atomic<size_t> const& done, size_t items) noexcept
{
    for (size_t spins = 0; done.load(std::memory_order_acquire) < items; ++spins)
    {
        if (spins < kSpins)
        {
            pause();
        }
        else
        {
            std::this_thread::yield();
        }
    }
}

} // namespace

size_t workerCount() noexcept
{
    static size_t const count = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, kMostWorkers);
    return count;
}

Stages::Stages(size_t workers)
    : mWorkers(workers)
{
}

void Stages::add(size_t items, Item item, Preparation prepare)
{
    Stage stage{items, std::move(item), std::move(prepare), std::make_unique<Part[]>(mWorkers),
        std::make_unique<std::atomic<size_t>>(0)};
    for (size_t i = 0; i < mWorkers; ++i)
    {
        stage.parts[i].next.store(i * items / mWorkers, std::memory_order_relaxed);
        stage.parts[i].end = (i + 1) * items / mWorkers;
    }
    mStages.push_back(std::move(stage));
}

void Stages::work(size_t worker)
{
    for (Stage& stage : mStages)
    {
        if (stage.done->load(std::memory_order_acquire) == stage.items)
        {
            continue; // a task that came late, as most do in a session with few threads
        }
        size_t mine = 0;
        for (size_t i = 0; i < mWorkers; ++i)
        {
            Part& part = stage.parts[(worker + i) % mWorkers];
            for (size_t left; (left = part.left()) > 0;)
            {
                size_t const wanted = std::clamp<size_t>(left / 4, 1, kMostAtOnce);
                size_t const first = part.next.fetch_add(wanted, std::memory_order_relaxed);
                size_t const end = std::min(first + wanted, part.end);
                for (size_t item = first; item < end; ++item)
                {
                    if (mine++ == 0 && stage.prepare)
                    {
                        stage.prepare(worker);
                    }
                    stage.item(item, worker);
                }
            }
        }
        stage.done->fetch_add(mine, std::memory_order_release);
        waitUntil(*stage.done, stage.items);
    }
}

} // namespace qwenforge::cpu
