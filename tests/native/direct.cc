// An end whose transport is direct: no proxy threads, and every wait on it ends all the same.

#include <atomic>
#include <thread>

#include "../../csrc/fabric/ibgda.h"
#include "../../csrc/fabric/report.h"
#include "check.h"
#include "test_end.h"

using namespace epcomm::fabric;

namespace {

/// What the tests tell the transport and see of it.
struct Script {
    bool fail_when_looked_after = false;
    int posts = 0, drained = 0, looked_after = 0, closed = 0;
    int64_t drain_ns = 0;
    bool stopped_before_drain = false;
};

Script script;

/// One queue, that nobody works: producers find it full.
class Direct : public Transport {
 public:
    void add_region(const Region&) override {}
    void open(const Plan& plan) override {
        queue_.ring = blocks_;
        queue_.completions = completions_;
        for (auto& entry : completions_) entry.opcode_owner = epcomm::mlx5::kInvalid << 4;
        queue_.record = record_;
        queue_.doorbell = &doorbell_;
        queue_.num_blocks = queue_.num_completions = 4;
        epcomm::mlx5::start_at(&queue_, 0);
        fabric_.queues = &queue_;
        fabric_.local = fabric_.remote = keys_;
        fabric_.state = plan.state;
        fabric_.timeout_ns = plan.timeout_ns;
        fabric_.num_channels = fabric_.num_planes = fabric_.num_signals = 1;
        fabric_.num_nodes = plan.num_nodes;
        fabric_.node = plan.node;
        fabric_.raised = raised_;
    }
    std::string address(int32_t) override { return ""; }
    void connect(const std::vector<std::string>&) override { connected_ = true; }
    size_t post(int32_t, const Operation*, size_t) override { return ++script.posts, 0; }
    size_t poll(int32_t, Completion*, size_t) override { return ++script.posts, 0; }
    const epcomm_ibgda* direct() override { return connected_ ? &fabric_ : nullptr; }
    void drain(int64_t timeout_ns) override {
        ++script.drained;
        script.drain_ns = timeout_ns;
        script.stopped_before_drain = load_acquire(&fabric_.state->failed) != 0;
    }
    void look_after() override {
        ++script.looked_after;
        if (!script.fail_when_looked_after) return;
        epcomm_fabric_error error = plain_error(EPCOMM_FABRIC_TRANSPORT, "");
        error.vendor = 0x1568;
        error.queue_pair = 77;
        report(fabric_.state, error);
    }
    std::string error_text(const Completion& completion) const override {
        return "code " + std::to_string(completion.vendor) + " of queue pair " +
               std::to_string(completion.queue_pair);
    }
    std::string describe() const override { return "direct"; }
    void close() override { ++script.closed; }

 private:
    epcomm::mlx5::Block blocks_[4] = {};
    epcomm::mlx5::Completion completions_[4] = {};
    epcomm::mlx5::Be32 record_[epcomm::mlx5::kRecordWords] = {};
    uint64_t doorbell_ = 0;
    epcomm::mlx5::SendQueue queue_ = {};
    uint64_t raised_[3] = {};
    epcomm_region_key keys_[2 * EPCOMM_FABRIC_MAX_REGIONS] = {};
    epcomm_ibgda fabric_ = {};
    bool connected_ = false;
};

const RegisterTransport kDirect("direct", []() -> std::unique_ptr<Transport> {
    return std::make_unique<Direct>();
});

/// The peer is node 0, so that the queue is its.
EndOptions options_of(int64_t timeout_ns) {
    EndOptions options;
    options.channels = 1;
    options.node = 1;
    options.timeout_ns = timeout_ns;
    return options;
}

}  // namespace

TEST(no_thread_serves_a_direct_end) {
    script = {};
    TestEnd end("direct", options_of(1'000'000'000));
    const epcomm_ibgda* ibgda = epcomm_fabric_ibgda_of(end.end);
    CHECK(ibgda != nullptr);
    CHECK(ibgda->state == end.fabric->state);
    CHECK_EQUAL(ibgda->timeout_ns, 1'000'000'000);
    CHECK_EQUAL(epcomm_fabric_check(end.end, 1), EPCOMM_FABRIC_OK);
    CHECK_EQUAL(script.looked_after, 1);
    CHECK_EQUAL(ibgda->state->threads[0].running, 0);
    CHECK_EQUAL(script.posts, 0);
}

TEST(a_trigger_for_nobody_is_an_error) {
    script = {};
    TestEnd end("direct", options_of(60'000'000'000));
    CHECK_EQUAL(put(*end.fabric, {0, 0}, {0, 0, 0}, {0, 0, 0}, 16), 0);
    CHECK_EQUAL(end.error().status, EPCOMM_FABRIC_BAD_TRIGGER);
}

TEST(stop_ends_a_producers_wait) {
    script = {};
    TestEnd end("direct", options_of(60'000'000'000));
    const epcomm_ibgda fabric = *epcomm_fabric_ibgda_of(end.end);
    std::atomic<int> sent{0};
    std::thread producer([&] {
        while (signal_add(fabric, {0, 0}, 0, 1) != 0) ++sent;
    });
    while (sent < 4) sched_yield();
    CHECK_EQUAL(epcomm_fabric_stop(end.end, 5), 0);
    producer.join();
    CHECK_EQUAL(end.error().status, EPCOMM_FABRIC_STOPPED);
    CHECK_EQUAL(script.drained, 1);
    CHECK_EQUAL(script.drain_ns, 5);
    CHECK(!script.stopped_before_drain);
    CHECK_EQUAL(script.closed, 1);
    CHECK_EQUAL(epcomm_fabric_check(end.end, 1), EPCOMM_FABRIC_STOPPED);
    CHECK_EQUAL(script.looked_after, 0);
}

TEST(a_lost_plane_gets_the_transports_words) {
    script = {};
    TestEnd end("direct", options_of(1'000'000'000));
    int32_t peer = -1;
    CHECK_EQUAL(epcomm_fabric_num_losses(end.end), 0);
    CHECK(epcomm_fabric_loss_text(end.end, 0, &peer) == nullptr);
    epcomm_fabric_state* state = epcomm_fabric_ibgda_of(end.end)->state;
    state->losses[0] = {0, 1, 3, 0x1581, 77, 0, 12};
    store_release(&state->num_losses, 1u);
    CHECK_EQUAL(epcomm_fabric_num_losses(end.end), 1);
    CHECK(epcomm_fabric_loss_text(end.end, 0, &peer) ==
          std::string("plane 1 is dead: code 5505 of queue pair 77 (channel 3, queue pair 77, "
                      "request 12, vendor code 5505)"));
    CHECK_EQUAL(peer, 0);
    store_release(&state->num_losses, EPCOMM_FABRIC_MAX_LOSSES + 1u);
    CHECK(epcomm_fabric_loss_text(end.end, EPCOMM_FABRIC_MAX_LOSSES, &peer) == nullptr);
}

TEST(an_error_gets_the_transports_words) {
    script = {};
    script.fail_when_looked_after = true;
    TestEnd end("direct", options_of(1'000'000'000));
    CHECK_EQUAL(epcomm_fabric_check(end.end, 1), EPCOMM_FABRIC_TRANSPORT);
    CHECK(end.error().text == std::string("code 5480 of queue pair 77"));
    // What is broken is not waited for.
    CHECK_EQUAL(epcomm_fabric_stop(end.end, 5), 0);
    CHECK_EQUAL(script.drained, 0);
}
