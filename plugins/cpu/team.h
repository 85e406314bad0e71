// The threads of one call, and the stages of work that they go through together.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace qwenforge::cpu
{

// Work in stages: no item of a stage begins before the last of the stage before it is done.
//
// ONNX Runtime may give all tasks of a call to one thread, one after the other, so nobody ever waits for a task that has
// not begun: items belong to whoever comes first, and a thread waits only for items that another one is at. A task begins
// with its own part of a stage's items, which lie one behind the other in memory, and then helps with the others' parts.
class Stages
{
public:
    // `worker` counts the tasks of a call from 0; work that needs memory of its own takes that of its worker.
    using Item = std::function<void(size_t item, size_t worker)>;
    using Preparation = std::function<void(size_t worker)>;

    explicit Stages(size_t workers);

    size_t workers() const noexcept
    {
        return mWorkers;
    }

    // Each worker calls `prepare` for itself before its first item of the stage: what is cheaper done by each than once
    // by one of them whom the others wait for. A worker without an item does not.
    void add(size_t items, Item item, Preparation prepare = nullptr);

    // What task number `worker` does.
    void work(size_t worker);

private:
    struct alignas(64) Part
    {
        std::atomic<size_t> next{0};
        size_t end{0};

        size_t left() const noexcept
        {
            size_t const first = next.load(std::memory_order_relaxed);
            return first < end ? end - first : 0;
        }
    };

    struct Stage
    {
        size_t items;
        Item item;
        Preparation prepare;
        std::unique_ptr<Part[]> parts;
        std::unique_ptr<std::atomic<size_t>> done;
    };

    size_t mWorkers;
    std::vector<Stage> mStages;
};

// As many as the machine can run at once; a session with fewer threads gives several to one.
size_t workerCount() noexcept;

} // namespace qwenforge::cpu
