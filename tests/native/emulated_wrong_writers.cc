// Writers with one mistake each: the emulated NIC, or the receiver behind it, must see every one.

#include "chunks.h"
#include "writer_script.h"

using namespace rig;

namespace {

constexpr uint64_t kSeeds = 100 / kSlowness;

struct Caught {
    uint64_t by_nic = 0;       ///< a violation of the expected kinds
    uint64_t by_receiver = 0;  ///< torn data or an early flush
    uint64_t other = 0;        ///< only a violation of another kind
    uint64_t missed = 0;
};

Caught run(Mistake mistake, std::vector<Violation> expected) {
    Caught caught;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        ChunkOptions options;
        options.mistake = mistake;
        options.rig.engine.seed = seed;
        options.rig.engine.shuffle = true;
        options.rig.num_blocks = options.rig.num_completions = 8;
        options.rig.start = seed % 2 == 0 ? 0 : 65530;
        Chunks chunks(options);
        if (chunks.run()) {
            caught.missed += 1;
            continue;
        }
        bool named = false;
        for (Violation violation : expected) {
            named = named || chunks.rig.count(EventKind::kViolation, violation) != 0;
        }
        caught.by_nic += named;
        caught.by_receiver += chunks.torn || chunks.flushed_early;
        caught.other += !named && chunks.rig.engine.violations() != 0;
        // It must be known for what it is, not as a program that hangs.
        CHECK(!chunks.stuck);
    }
    printf("caught by the NIC %llu, by the receiver %llu, as another violation %llu, missed %llu\n",
           (unsigned long long)caught.by_nic, (unsigned long long)caught.by_receiver,
           (unsigned long long)caught.other, (unsigned long long)caught.missed);
    return caught;
}

/// Seen by the NIC in every schedule.
void expect_always(Mistake mistake, std::vector<Violation> expected) {
    CHECK_EQUAL(run(mistake, std::move(expected)).by_nic, kSeeds);
}

/// Depends on the schedule: in some at least, and more often than by chance in a few.
void expect_often(Mistake mistake, std::vector<Violation> expected) {
    CHECK(run(mistake, std::move(expected)).by_nic >= kSeeds / 2);
}

/// In the order that shows the mistake at any speed; see writer_script.h.
void run_script(Mistake mistake, uint64_t start) {
    Options options;
    options.num_blocks = options.num_completions = writers::kSlots;
    options.line.latency_ns = writers::kLatencyNs;
    options.start = start;
    Rig r(options);
    Writer *w = r.pair(), *other = r.pair();
    const writers::Script script = {
        &w->queue, &other->queue, r.local(0, 0), r.remote(1, 0), r.remote(1, writers::kAllWords),
        mistake};
    writers::Evidence seen;
    seen.outcome = writers::Play<Stepping>(script, r.wait).run();
    r.engine.settle();
    r.engine.check_idle();
    seen.received = r.memory[1];
    seen.events = r.engine.events();
    seen.start = start;
    writers::expect_caught(mistake, seen);
}

}  // namespace

TEST(right_writers_are_not_accused) {
    const Caught caught = run(Mistake::kNone, {});
    CHECK_EQUAL(caught.missed, kSeeds);
}

TEST(a_wrong_index) { expect_always(Mistake::kWrongIndex, {kWrongIndex}); }

TEST(a_slot_reused_too_early) {
    expect_always(Mistake::kStoreBeforeRoom, {kSlotReused, kWrongIndex});
}

TEST(no_check_for_a_free_slot) {
    expect_always(Mistake::kNoRoomCheck, {kQueueOverflow, kSlotReused, kWrongIndex});
}

TEST(no_doorbell_record) { expect_always(Mistake::kNoRecord, {kRecordBehind}); }

TEST(the_record_after_the_doorbell) {
    expect_always(Mistake::kRecordAfterDoorbell, {kRecordBehind});
}

TEST(the_record_of_the_last_request) { expect_always(Mistake::kRecordIsLast, {kRecordBehind}); }

TEST(the_receive_record) { expect_always(Mistake::kReceiveRecord, {kReceiveRecord}); }

TEST(the_doorbell_of_another_queue_pair) {
    expect_always(Mistake::kDoorbellElsewhere, {kDoorbellQueueNumber});
}

// What lies in the slot instead is an older request, or zeros: index 0 of queue pair 0.
TEST(published_out_of_order) {
    expect_often(Mistake::kPublishOutOfOrder, {kWrongIndex, kWrongQueueNumber});
}

TEST(published_before_it_was_stored) {
    expect_often(Mistake::kPublishBeforeStore, {kWrongIndex, kWrongQueueNumber});
}

TEST(a_completion_taken_for_one_request_more) {
    expect_often(Mistake::kCompletionOffByOne, {kQueueOverflow, kSlotReused, kWrongIndex});
}

TEST(a_signal_on_another_queue_pair) {
    CHECK(run(Mistake::kSignalElsewhere, {}).by_receiver >= kSeeds / 2);
}

TEST(a_flush_that_leaves_one_out) {
    CHECK(run(Mistake::kFlushOffByOne, {}).by_receiver >= kSeeds / 2);
}

TEST(every_mistake_shows_at_any_speed) {
    for (auto i = uint32_t(Mistake::kNone); i <= uint32_t(Mistake::kFlushOffByOne); ++i) {
        for (uint64_t start : {0u, 65530u}) {
            printf("mistake %u from %llu\n", i, (unsigned long long)start);
            fflush(stdout);
            run_script(Mistake(i), start);
        }
    }
}
