// The stages of work of the CPU ops among threads, for ThreadSanitizer: nothing here is atomic, so whatever two threads
// touch without the stages' order between them is a race.

#include "cpu/team.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <thread>
#include <vector>

using qwenforge::cpu::Stages;

namespace
{

void require(bool condition, char const* what)
{
    if (!condition)
    {
        std::fprintf(stderr, "%s\n", what);
        std::exit(1);
    }
}

// Each stage reads what all items of the stage before it wrote.
struct Sums
{
    std::vector<long> first;
    std::vector<long> second;
    std::vector<long> prepared; // by worker
    long total{0};

    explicit Sums(size_t items, size_t workers)
        : first(items)
        , second(items)
        , prepared(workers)
    {
    }

    void addTo(Stages& stages)
    {
        stages.add(first.size(),
            [this](size_t item, size_t)
            {
                std::this_thread::yield(); // so that no thread does them all
                first[item] += static_cast<long>(item) + 1;
            });
        stages.add(
            second.size(),
            [this](size_t item, size_t worker) { second[item] += prepared[worker]; },
            [this](size_t worker) { prepared[worker] += std::accumulate(first.begin(), first.end(), 0l); });
        stages.add(1, [this](size_t, size_t) { total += std::accumulate(second.begin(), second.end(), 0l); });
        stages.add(0, [](size_t, size_t) { require(false, "a stage without items has one"); });
        stages.add(second.size(), [this](size_t item, size_t) { second[item] = total; });
    }

    void check() const
    {
        long const items = static_cast<long>(first.size());
        for (long item = 0; item < items; ++item)
        {
            require(first[static_cast<size_t>(item)] == item + 1, "an item was done more than once, or never");
            require(second[static_cast<size_t>(item)] == items * items * (items + 1) / 2, "a stage began too early");
        }
        for (long each : prepared)
        {
            require(each == 0 || each == items * (items + 1) / 2, "a worker was prepared more than once, or too early");
        }
    }
};

// `tasks` divided among `threads` as ONNX Runtime may do it: a thread does several, one after the other.
void run(size_t items, size_t tasks, size_t threads)
{
    Sums sums(items, tasks);
    Stages stages(tasks);
    sums.addTo(stages);
    std::vector<std::thread> team;
    std::atomic<size_t> started{0};
    for (size_t thread = 0; thread < threads; ++thread)
    {
        team.emplace_back(
            [&stages, &started, tasks, threads, thread]
            {
                ++started;
                while (started < threads)
                {
                    std::this_thread::yield();
                }
                for (size_t task = thread; task < tasks; task += threads)
                {
                    stages.work(task);
                }
            });
    }
    for (std::thread& each : team)
    {
        each.join();
    }
    sums.check();
}

} // namespace

int main()
{
    require(qwenforge::cpu::workerCount() >= 1, "there are no workers");
    for (int repeat = 0; repeat < 20; ++repeat)
    {
        for (size_t items : {1u, 2u, 3u, 7u, 100u})
        {
            run(items, 1, 1);
            run(items, 4, 1);
            run(items, 3, 2);
            run(items, 4, 4);
            run(items, 7, 3);
        }
    }
    return 0;
}
