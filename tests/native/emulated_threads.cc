// Threads as writers, the NICs in a thread of their own, the machine's clock.

#include <thread>

#include "rig.h"

using namespace rig;

namespace {

struct Deadline {
    int64_t until = fabric::now_ns() + 80'000'000'000;
    bool again() const {
        fabric::relax();
        return fabric::now_ns() < until;
    }
};

Options timed(uint64_t start) {
    Options options;
    options.start = start;
    options.engine.virtual_clock = false;
    options.line = {50, 4096, 30, 0, 0, 2, 20'000'000, 0};
    options.memory_bytes = 1 << 20;
    // So that threads change seldom enough for a machine with other work.
    options.num_blocks = options.num_completions = 128;
    return options;
}

}  // namespace

TEST(several_threads_share_a_queue_pair) {
    constexpr int kThreads = 4;
    constexpr uint64_t kChunks = 2000 / kSlowness * 2, kFlush = kChunks / 4;
    Rig r(timed(65000));
    Writer* w = r.pair();
    r.engine.start();
    std::vector<std::thread> threads;
    bool good[kThreads] = {};
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            Deadline wait;
            // Each thread has its words at the peer and raises its own signal.
            const uint64_t from = 1000 + uint64_t(t) * 100, to = from, word = uint64_t(t);
            for (uint64_t i = 1; i <= kChunks; ++i) {
                const auto make = [&](uint32_t part, uint64_t position) {
                    const Header header = mlx5::header_of(w->queue, position, false);
                    uint8_t value[8];
                    memcpy(value, &i, 8);
                    return part == 0 ? mlx5::inline_write_request(header, r.remote(1, to), value, 8)
                                     : mlx5::fetch_add_request(header, r.remote(1, word),
                                                               r.local(0, from), 1);
                };
                const Ring when = i % 3 == 0 ? Ring::kNow : Ring::kWhenDue;
                if (mlx5::post(OneThread(), &w->queue, 2, when, make, wait) == 0) return;
                if (i % kFlush != 0) continue;
                // What this thread posted before its flush is there after it.
                if (!mlx5::flush(&w->queue, wait)) return;
                if (fabric::load_acquire(&r.memory[1][word]) < i) return;
                if (fabric::load_acquire(&r.memory[1][to]) < i) return;
            }
            good[t] = true;
        });
    }
    for (auto& thread : threads) thread.join();
    r.engine.stop();
    for (const bool ok : good) CHECK(ok);
    for (int t = 0; t < kThreads; ++t) CHECK_EQUAL(r.memory[1][t], kChunks);
    CHECK(w->queue.reserved >= 65000 + 2 * kThreads * kChunks);
    CHECK_EQUAL(r.engine.violations(), 0);
}

TEST(a_reader_sees_the_bytes_behind_the_signal) {
    Rig r(timed(0));
    Writer* w = r.pair();
    constexpr uint64_t kWords = 512, kRounds = 1000 / kSlowness * 4;
    r.engine.start();
    bool good = true;
    std::thread reader([&] {
        Deadline wait;
        for (uint64_t i = 1; i <= kRounds && good; ++i) {
            while (fabric::load_acquire(&r.memory[1][0]) < i) good = good && wait.again();
            const uint64_t* half = &r.memory[1][1024 + i % 2 * kWords];
            for (uint64_t k = 0; k < kWords; ++k) good = good && half[k] == i * 1000 + k;
            fabric::store_release(&r.memory[1][1], i);  // the half may be written again
        }
    });
    Deadline wait;
    for (uint64_t i = 1; i <= kRounds && good; ++i) {
        while (fabric::load_acquire(&r.memory[1][1]) + 2 < i) CHECK(wait.again());
        const uint64_t at = 1024 + i % 2 * kWords;
        // The NIC has read the half when its earlier signal was seen.
        for (uint64_t k = 0; k < kWords; ++k) r.memory[0][at + k] = i * 1000 + k;
        const auto make = [&](uint32_t part, uint64_t position) {
            const Header header = mlx5::header_of(w->queue, position, false);
            return part == 0
                       ? mlx5::write_request(header, r.remote(1, at), r.local(0, at), kWords * 8)
                       : mlx5::fetch_add_request(header, r.remote(1, 0), r.local(0, 5), 1);
        };
        CHECK(mlx5::post(OneThread(), &w->queue, 2, Ring::kNow, make, wait) != 0);
    }
    reader.join();
    r.engine.stop();
    CHECK(good);
    CHECK_EQUAL(r.engine.violations(), 0);
}

TEST(the_machines_clock_never_beats_the_model) {
    Options options = timed(0);
    options.line.latency_ns = 200'000;
    options.line.bytes_per_ns = 1;
    Rig r(options);
    Writer* w = r.pair();
    r.engine.start();
    Deadline wait;
    const int64_t start = fabric::now_ns();
    for (int i = 0; i < 10; ++i) {
        const auto make = [&](uint32_t, uint64_t position) {
            return mlx5::write_request(mlx5::header_of(w->queue, position, false), r.remote(1, 0),
                                       r.local(0, 0), 100'000);
        };
        CHECK(mlx5::post(OneThread(), &w->queue, 1, Ring::kNow, make, wait) != 0);
    }
    CHECK(mlx5::flush(&w->queue, wait));
    const int64_t took = fabric::now_ns() - start;
    r.engine.stop();
    CHECK(took >= 1'400'000);  // 10 x 100 us and two latencies
    printf("%s\n", r.engine.describe(0).c_str());
    CHECK_EQUAL(r.engine.traffic(0).messages, 10);
}

TEST(every_thread_hears_of_an_error) {
    Rig r(timed(0));
    Writer* w = r.pair();
    r.engine.start();
    std::vector<std::thread> threads;
    uint64_t posted[4] = {};
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            Deadline wait;
            while (true) {
                const auto make = [&](uint32_t, uint64_t position) {
                    // One request in the middle of all has a bad key.
                    auto to = r.remote(1, 0);
                    if (position == 2000) to.key = 1;
                    return mlx5::write_request(mlx5::header_of(w->queue, position, false), to,
                                               r.local(0, 0), 8);
                };
                if (mlx5::post(OneThread(), &w->queue, 1, Ring::kNow, make, wait) == 0) return;
                posted[t] += 1;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    r.engine.stop();
    CHECK_EQUAL(w->queue.failed, mlx5::kQueueError);
    CHECK_EQUAL(w->queue.error.syndrome, mlx5::kRemoteAccess);
    CHECK_EQUAL(w->queue.error_position, 2000);
    CHECK(posted[0] + posted[1] + posted[2] + posted[3] >= 2000);
}
