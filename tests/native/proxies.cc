// Proxy threads under a transport whose behaviour each test sets.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "test_end.h"

using namespace epcomm::fabric;
using std::chrono::milliseconds;

namespace {

constexpr int64_t kSecond = 1'000'000'000;

/// What the tests tell the transport and see of it.
struct Script {
    std::mutex lock;
    struct Posted {
        int32_t lane;
        uint64_t token;
    };
    std::deque<Posted> posted;                            // not completed yet
    std::map<int32_t, std::vector<Completion>> finished;  // to hand out, by the lane that posted
    std::vector<Command> seen;                            // everything ever posted, in order
    bool complete_at_once = true;
    size_t accept = 1000;  // operations taken by a post
    std::atomic<bool> throw_in_poll{false};
    std::atomic<bool> stuck{false};
    std::atomic<int> closed{0};

    void finish(size_t index, bool ok = true) {
        const std::lock_guard<std::mutex> guard(lock);
        finished[posted[index].lane].push_back(
            {posted[index].token, ok, ok ? 0 : 42, ok ? 0u : 7u});
        posted.erase(posted.begin() + ptrdiff_t(index));
    }

    size_t under_way() {
        const std::lock_guard<std::mutex> guard(lock);
        return posted.size();
    }
};

Script* script = nullptr;

class Scripted : public Transport {
 public:
    void add_region(const Region&) override {}
    void open(const Plan&) override {}
    std::string address(int32_t) override { return ""; }
    void connect(const std::vector<std::string>&) override {}
    size_t post(int32_t lane, const Operation* operations, size_t count) override {
        const std::lock_guard<std::mutex> guard(script->lock);
        count = std::min(count, script->accept);
        for (size_t i = 0; i < count; ++i) {
            script->seen.push_back(operations[i].command);
            if (script->complete_at_once) {
                script->finished[lane].push_back({operations[i].token, true, 0, 0});
            } else {
                script->posted.push_back({lane, operations[i].token});
            }
        }
        return count;
    }
    size_t poll(int32_t lane, Completion* into, size_t capacity) override {
        while (script->stuck.load()) std::this_thread::sleep_for(milliseconds(1));
        if (script->throw_in_poll.load()) throw std::runtime_error("out of luck");
        const std::lock_guard<std::mutex> guard(script->lock);
        std::vector<Completion>& mine = script->finished[lane];
        const size_t count = std::min(capacity, mine.size());
        std::copy_n(mine.begin(), count, into);
        mine.erase(mine.begin(), mine.begin() + ptrdiff_t(count));
        return count;
    }
    std::string error_text(const Completion&) const override { return "as scripted"; }
    std::string describe() const override { return "scripted"; }
    int64_t longest_nap_ns() const override { return 10 * kSecond; }
    void close() override { ++script->closed; }
};

const RegisterTransport kScripted("scripted", []() -> std::unique_ptr<Transport> {
    return std::make_unique<Scripted>();
});

struct WithScript {
    WithScript() { script = &mine; }
    Script mine;
};

template <typename Condition>
bool soon(Condition condition, int64_t within_ns = 10 * kSecond) {
    const int64_t start = now_ns();
    while (!condition()) {
        if (now_ns() - start > within_ns) return false;
        std::this_thread::sleep_for(milliseconds(1));
    }
    return true;
}

const epcomm_fabric_place kStart{0, 0, 0};

}  // namespace

TEST(host_producer_in_order) {
    WithScript with;
    EndOptions options;
    options.slots = 8;
    options.max_in_flight = 4;
    TestEnd end("scripted", options);
    with.mine.accept = 3;
    Ticket last = 0;
    for (int i = 0; i < 1000; ++i) {
        last = put_signal(*end.fabric, {1, 0}, kStart, kStart, uint64_t(i % 3) * 16, i);
        CHECK(last == Ticket(i) + 1);
    }
    CHECK(flush(*end.fabric, 0, 10 * kSecond));
    CHECK(done(*end.fabric, 0, last));
    CHECK(with.mine.seen.size() == 1000);
    for (int i = 0; i < 1000; ++i) {
        CHECK(with.mine.seen[size_t(i)].signal == i);
        CHECK(with.mine.seen[size_t(i)].bytes == uint64_t(i % 3) * 16);
    }
}

TEST(several_producers_and_rings) {
    WithScript with;
    EndOptions options;
    options.slots = 4;
    options.rings = 3;
    options.threads = 2;
    options.channels = 6;
    TestEnd end("scripted", options);
    std::vector<std::thread> producers;
    for (int channel = 0; channel < 6; ++channel) {
        producers.emplace_back([&, channel] {
            for (int i = 0; i < 2000; ++i) {
                CHECK(put_signal(*end.fabric, {1, channel}, kStart, kStart, 0, i) != 0);
            }
            CHECK(flush(*end.fabric, channel, 20 * kSecond));
        });
    }
    for (std::thread& producer : producers) producer.join();
    std::vector<int> next(6, 0);
    for (const Command& command : with.mine.seen) {
        CHECK(command.signal == next[size_t(command.channel)]++);
    }
    CHECK(with.mine.seen.size() == 12000);
}

TEST(long_put_is_split_and_the_signal_comes_last) {
    WithScript with;
    EndOptions options;
    const uint64_t most = EPCOMM_FABRIC_MAX_BYTES;
    options.region_bytes = 3 * most;
    TestEnd end("scripted", options);
    CHECK(put_signal(*end.fabric, {1, 0}, {0, 0, 32}, {0, 0, 64}, most * 2 + 16, 3) != 0);
    CHECK(flush(*end.fabric, 0, 10 * kSecond));
    CHECK(with.mine.seen.size() == 3);
    for (uint64_t i = 0; i < 3; ++i) {
        const Command& piece = with.mine.seen[i];
        CHECK(piece.op == (i < 2 ? EPCOMM_FABRIC_PUT : EPCOMM_FABRIC_PUT_SIGNAL));
        CHECK(piece.bytes == (i < 2 ? most : 16));
        CHECK(piece.remote.offset == 32 + i * most && piece.local.offset == 64 + i * most);
    }
    CHECK(with.mine.seen[2].signal == 3);
}

TEST(quiet_means_quiet) {
    // A later operation overtakes: the count of completions reaches the ticket, the prefix not.
    WithScript with;
    with.mine.complete_at_once = false;
    TestEnd end("scripted");
    const Ticket first = put(*end.fabric, {1, 0}, kStart, kStart, 16);
    put(*end.fabric, {1, 0}, kStart, kStart, 32);
    put(*end.fabric, {1, 0}, kStart, kStart, 48);
    CHECK(soon([&] { return with.mine.under_way() == 3; }));
    with.mine.finish(2);
    with.mine.finish(1);
    CHECK(!flush(*end.fabric, 0, 100'000'000));
    CHECK(!done(*end.fabric, 0, first));
    with.mine.finish(0);
    CHECK(flush(*end.fabric, 0, 10 * kSecond));
    CHECK(!failed(*end.fabric));
}

TEST(flush_ends_at_its_deadline_or_failure) {
    WithScript with;
    with.mine.complete_at_once = false;
    TestEnd end("scripted");
    put(*end.fabric, {1, 0}, kStart, kStart, 16);
    int64_t start = now_ns();
    CHECK(!flush(*end.fabric, 0, 50'000'000));
    CHECK(now_ns() - start >= 50'000'000 && now_ns() - start < 5 * kSecond);
    CHECK(soon([&] { return with.mine.under_way() == 1; }));
    std::thread later([&] {
        std::this_thread::sleep_for(milliseconds(50));
        with.mine.finish(0, false);
    });
    start = now_ns();
    CHECK(!flush(*end.fabric, 0, 60 * kSecond));
    CHECK(now_ns() - start < 10 * kSecond);
    later.join();
}

TEST(failed_completion_says_what_and_where) {
    WithScript with;
    with.mine.complete_at_once = false;
    TestEnd end("scripted");
    put(*end.fabric, {1, 2}, kStart, kStart, 16);
    put_signal(*end.fabric, {1, 3}, kStart, kStart, 64, 5);
    CHECK(soon([&] { return with.mine.under_way() == 2; }));
    with.mine.finish(1, false);
    CHECK(soon([&] { return failed(*end.fabric); }));
    const epcomm_fabric_error& error = end.error();
    CHECK(error.status == EPCOMM_FABRIC_TRANSPORT && error.vendor == 42);
    CHECK(error.peer == 1 && error.channel == 3 && error.queue_pair == 7);
    CHECK(error.op == EPCOMM_FABRIC_PUT_SIGNAL && error.bytes == 64 && error.position == 1);
    CHECK(std::string(error.text) == "as scripted");
    // Nothing more is accepted or sent.
    CHECK(put(*end.fabric, {1, 0}, kStart, kStart, 16) == 0);
    CHECK(!flush(*end.fabric, 0, kSecond));
}

TEST(triggers_that_cannot_be_carried_out) {
    const auto expect = [](auto send) {
        WithScript with;
        TestEnd end("scripted");
        send(*end.fabric);
        CHECK(soon([&] { return failed(*end.fabric); }));
        CHECK(end.error().status == EPCOMM_FABRIC_BAD_TRIGGER);
        CHECK(with.mine.seen.empty());
    };
    expect([](const epcomm_fabric& f) { put(f, {2, 0}, kStart, kStart, 16); });
    expect([](const epcomm_fabric& f) { put(f, {0, 0}, kStart, kStart, 16); });
    expect([](const epcomm_fabric& f) { put(f, {1, 4}, kStart, kStart, 16); });
    expect([](const epcomm_fabric& f) { put(f, {1, 0}, kStart, {5, 0, 0}, 16); });
    expect([](const epcomm_fabric& f) { put(f, {1, 0}, kStart, {0, 0, 4096}, 16); });
    expect([](const epcomm_fabric& f) { put(f, {1, 0}, kStart, {0, 0, 4080}, 32); });
    expect([](const epcomm_fabric& f) { put(f, {1, 0}, kStart, kStart, 8); });
    expect([](const epcomm_fabric& f) { signal_add(f, {1, 0}, 0, uint64_t(1) << 63); });
}

TEST(full_ring_fails_the_fabric_at_the_deadline) {
    WithScript with;
    with.mine.accept = 0;
    EndOptions options;
    options.slots = 2;
    options.timeout_ns = 100'000'000;
    TestEnd end("scripted", options);
    const int64_t start = now_ns();
    int accepted = 0;
    while (put(*end.fabric, {1, 0}, kStart, kStart, 16) != 0) ++accepted;
    CHECK(now_ns() - start < 5 * kSecond);
    CHECK(accepted >= 2);
    CHECK(end.error().status == EPCOMM_FABRIC_RING_FULL);
}

TEST(thread_that_throws_is_noticed) {
    WithScript with;
    with.mine.complete_at_once = false;
    TestEnd end("scripted");
    put(*end.fabric, {1, 0}, kStart, kStart, 16);
    with.mine.throw_in_poll = true;
    CHECK(!flush(*end.fabric, 0, 60 * kSecond));
    CHECK(end.error().status == EPCOMM_FABRIC_STALLED);
    CHECK(strstr(end.error().text, "out of luck") != nullptr);
}

TEST(thread_without_a_sign_of_life_is_noticed) {
    WithScript with;
    TestEnd end("scripted");
    CHECK(epcomm_fabric_check(end.end, 300'000'000) == 0);
    std::this_thread::sleep_for(milliseconds(400));
    CHECK(epcomm_fabric_check(end.end, 300'000'000) == 0);  // idle, but alive
    with.mine.stuck = true;
    CHECK(soon([&] { return epcomm_fabric_check(end.end, 300'000'000) != 0; }));
    CHECK(end.error().status == EPCOMM_FABRIC_STALLED);
    with.mine.stuck = false;
}

TEST(stop_drains) {
    // What is in the ring is posted, and what is under way completes, before the threads end.
    WithScript with;
    with.mine.complete_at_once = false;
    auto end = std::make_unique<TestEnd>("scripted");
    for (int i = 0; i < 50; ++i) put(*end->fabric, {1, 0}, kStart, kStart, 16);
    std::atomic<int> completed{0};
    std::thread network([&] {
        while (completed < 50) {
            if (!soon([&] { return with.mine.under_way() != 0; })) return;
            std::this_thread::sleep_for(milliseconds(2));
            ++completed;
            with.mine.finish(0);
        }
    });
    CHECK(epcomm_fabric_stop(end->end, 20 * kSecond) == 0);
    CHECK(completed == 50);
    CHECK(load_acquire(&end->fabric->rings[0].consumer->completed) == 50);
    network.join();
    CHECK(with.mine.closed == 1);
}

TEST(stop_does_not_wait_for_ever) {
    // Neither for an operation that never completes, nor for a thread inside the transport; and
    // it lets waiters go.
    for (const bool stuck : {false, true}) {
        auto with = std::make_unique<WithScript>();
        with->mine.complete_at_once = false;
        auto* end = new TestEnd("scripted");
        put(*end->fabric, {1, 0}, kStart, kStart, 16);
        CHECK(soon([&] { return with->mine.under_way() == 1; }));
        with->mine.stuck = stuck;
        std::thread waiter([&] { CHECK(!flush(*end->fabric, 0, 60 * kSecond)); });
        std::this_thread::sleep_for(milliseconds(20));
        const int64_t start = now_ns();
        CHECK(epcomm_fabric_stop(end->end, 100'000'000) == (stuck ? 1 : 0));
        CHECK(now_ns() - start < 10 * kSecond);
        waiter.join();
        CHECK(end->error().status == EPCOMM_FABRIC_STOPPED);
        CHECK(with->mine.closed == (stuck ? 0 : 1));
        if (stuck) with.release();  // the thread and its memory stay until the process ends
    }
    _Exit(0);
}

TEST(host_producer_wakes_a_sleeping_thread) {
    // Naps are a second long: without the wake-up every round would take one.
    WithScript with;
    EndOptions options;
    options.nap_ns = kSecond;
    TestEnd end("scripted", options);
    const int64_t start = now_ns();
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(milliseconds(5));
        put(*end.fabric, {1, 0}, kStart, kStart, 16);
        CHECK(flush(*end.fabric, 0, 10 * kSecond));
    }
    CHECK(now_ns() - start < 2 * kSecond);
}

TEST(thread_nobody_can_wake_naps_shortly) {
    WithScript with;
    EndOptions options;
    options.device_fills = true;
    options.nap_ns = 200'000;
    TestEnd end("scripted", options);
    const epcomm_ring& ring = end.fabric->rings[0];
    int64_t waited = 0;
    for (uint64_t i = 0; i < 50; ++i) {
        std::this_thread::sleep_for(milliseconds(4));
        const int64_t start = now_ns();
        publish(ring, i, {EPCOMM_FABRIC_NOOP, 0, 0, 0, {}, {}, 0, 0});  // as a kernel: no wake-up
        while (load_acquire(&ring.consumer->completed) <= i) sched_yield();
        waited += now_ns() - start;
    }
    CHECK(waited / 50 < 5'000'000);
    CHECK(end.fabric->state->threads[0].heartbeat > 300);
}

TEST(many_ranks_on_few_cores_make_progress) {
    WithScript with;
    EndOptions options;
    options.rings = 2;
    options.threads = 2;
    std::vector<std::unique_ptr<TestEnd>> ends;
    for (int i = 0; i < 16; ++i) ends.push_back(std::make_unique<TestEnd>("scripted", options));
    std::vector<std::thread> producers;
    const int64_t start = now_ns();
    for (auto& end : ends) {
        producers.emplace_back([&end] {
            for (int i = 0; i < 200; ++i) {
                CHECK(epcomm_fabric_noop(end->fabric, i % 4) != 0);
                CHECK(flush(*end->fabric, i % 4, 20 * kSecond));
            }
        });
    }
    for (std::thread& producer : producers) producer.join();
    CHECK(now_ns() - start < 30 * kSecond);
    for (auto& end : ends) CHECK(!failed(*end->fabric));
}

TEST(setup_errors_have_texts) {
    TestEnd unknown("carrier pigeon");
    CHECK(unknown.end == nullptr);
    CHECK(strstr(epcomm_fabric_text(nullptr), "carrier pigeon") != nullptr);
    CHECK(strstr(epcomm_fabric_text(nullptr), "local") != nullptr);
    EndOptions odd;
    odd.slots = 12;
    TestEnd slots("scripted", odd);
    CHECK(slots.end == nullptr);
    CHECK(strstr(epcomm_fabric_text(nullptr), "num_slots") != nullptr);
}
