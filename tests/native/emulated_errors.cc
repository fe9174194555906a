// Requests that fail: the syndrome, what is flushed behind them, and what stays unharmed.

#include "rig.h"
#include "wrong_requests.h"

using namespace rig;
using requests::Answer;
using requests::Wrong;

namespace {

/// Keys of a rig's memory that allow less.
requests::Places places_of(Rig& r) {
    const auto key = [&](uint32_t nic, uint32_t access, uint32_t domain = 1) {
        return r.network.add_memory(nic, r.memory[nic].data(), r.options.memory_bytes, access,
                                    domain);
    };
    const uint64_t to = r.address(1, 0), end = to + r.options.memory_bytes;
    return {r.remote(1, 10),
            r.local(0, 0),
            r.remote(1, 20),
            to,
            end,
            r.address(0, 0) + r.options.memory_bytes,
            {to, key(1, kRemoteRead | kRemoteAtomic)},
            {to, key(1, kRemoteWrite | kRemoteAtomic)},
            {to, key(1, kRemoteWrite | kRemoteRead)},
            {to, key(1, kRemoteWrite, 2)},
            {r.address(0, 0), key(0, kLocalWrite, 2)},
            {r.address(0, 0), key(0, 0)}};
}

/// Post it between two good writes; expect its error and the flush of the second.
void expect_error(Wrong what, const Options& options, const Answer& answer, bool asks = true) {
    Rig r(options);
    Writer* w = r.pair();
    r.memory[0][0] = 3, r.memory[0][1] = 4;
    CHECK(!requests::post_between(&w->queue, what, places_of(r), asks, r.wait));
    r.engine.settle();
    requests::expect_refused(w->queue, w->completions.data(), options.start, answer);
    requests::expect_words(&r.memory[1][10], r.memory[0].data(), true);
    CHECK_EQUAL(r.engine.violations(), answer.violation != kNoViolation);
    CHECK_EQUAL(r.count(EventKind::kViolation, answer.violation), r.engine.violations());
}

void expect_errors(Wrong first, Wrong last) {
    for (auto i = uint32_t(first); i <= uint32_t(last); ++i) {
        for (uint64_t start : {0u, 65534u}) {
            Options options;
            options.start = start;
            expect_error(Wrong(i), options, requests::answer_to(Wrong(i)));
        }
    }
}
void expect_error(Wrong what) { expect_errors(what, what); }

}  // namespace

TEST(an_unknown_remote_key) { expect_error(Wrong::kUnknownKey); }

TEST(beyond_the_remote_memory) {
    expect_errors(Wrong::kBeforeMemory, Wrong::kAroundTheAddressSpace);
}

TEST(a_key_without_the_permission) { expect_errors(Wrong::kNotWritable, Wrong::kNotAddable); }

TEST(memory_of_another_protection_domain) {
    expect_error(Wrong::kForeignMemory);
    expect_error(Wrong::kForeignLocalMemory);
}

TEST(beyond_the_local_memory) { expect_error(Wrong::kAcrossTheLocalEnd); }

TEST(an_atomic_with_nowhere_for_the_old_value) {
    expect_errors(Wrong::kNoLanding, Wrong::kReadOnlyLanding);
}

TEST(a_misaligned_atomic) { expect_error(Wrong::kMisalignedAtomic); }

TEST(malformed_requests) { expect_errors(Wrong::kNextIndex, Wrong::kInlineZeroBytes); }

TEST(a_right_request_that_a_fault_makes_fail) {
    for (Fault fault : {kRetryExceeded, kBadKey}) {
        Options options;
        options.engine.rules = {once(fault, 1)};
        expect_error(Wrong::kNone, options, requests::answer_to(fault));
    }
}

TEST(behind_a_failed_request_nothing_is_read) {
    Rig r;
    Writer* w = r.pair();
    for (int i = 0; i < 3; ++i) {
        CHECK(r.post(
                  w,
                  [&](Header header) {
                      header.index += 1;
                      return mlx5::write_request(header, r.remote(1, 5), r.local(0, 0), 8);
                  },
                  true, i == 2 ? Ring::kNow : Ring::kWhenDue) != 0);
    }
    CHECK(!r.flush(w));
    CHECK_EQUAL(r.engine.violations(), 1);
}

TEST(an_error_needs_no_request_for_a_completion) {
    expect_error(Wrong::kUnknownKey, {}, requests::answer_to(Wrong::kUnknownKey), false);
}

TEST(the_first_error_is_kept_behind_completions_that_nobody_read) {
    Options options;
    options.num_blocks = options.num_completions = 32;
    for (uint64_t good = 0; good + 1 < options.num_blocks; ++good) {
        Rig r(options);
        Writer* w = r.pair();
        const auto beyond = [&](const Header& header) {
            return mlx5::write_request(header, {r.address(1, 0), 0x77}, r.local(0, 0), 8);
        };
        for (uint64_t i = 0; i < good; ++i) CHECK(r.write(w, i, i, 8) != 0);
        CHECK(r.post(w, beyond) != 0);
        while (w->queue.reserved < options.num_blocks) CHECK(r.write(w, 0, 40, 8) != 0);
        r.engine.settle();
        CHECK(!mlx5::poll(&w->queue));
        CHECK_EQUAL(w->queue.done, good);
        CHECK_EQUAL(w->queue.error_position, good);
        CHECK_EQUAL(w->queue.error.syndrome, mlx5::kRemoteAccess);
    }
}

TEST(an_error_harms_its_own_queue_pair_only) {
    Rig r;
    Writer *bad = r.pair(), *good = r.pair();
    CHECK(r.post(bad, [&](const Header& header) {
        return mlx5::write_request(header, {0, 0}, r.local(0, 0), 8);
    }) != 0);
    CHECK(!r.flush(bad));
    r.memory[0][0] = 9;
    CHECK(r.write(good, 0, 3, 8) != 0);
    CHECK(r.flush(good));
    CHECK_EQUAL(r.memory[1][3], 9);
    // What is posted later to the failed one is flushed as well.
    const uint64_t entries = bad->queue.reserved;
    mlx5::store_record(&bad->record[mlx5::kSendRecord], uint16_t(entries + 2));
    mlx5::store_doorbell(&bad->doorbell,
                         mlx5::next_index_doorbell(bad->queue.number, uint16_t(entries + 2)));
    r.engine.settle();
    const auto* entry = reinterpret_cast<const mlx5::ErrorCompletion*>(bad->completions.data());
    CHECK_EQUAL(entry[entries + 1].syndrome, mlx5::kFlushed);
}

TEST(a_peer_that_does_not_answer) {
    Options options;
    options.num_nics = 3;
    Rig r(options);
    Writer *w = r.pair(0, 1), *other = r.pair(0, 2);
    r.network.kill_nic(1);
    const Picoseconds start = r.engine.now();
    CHECK(r.write(w, 0, 1, 8) != 0);
    CHECK(!r.flush(w));
    CHECK_EQUAL(w->queue.error.syndrome, mlx5::kRetryExceeded);
    CHECK_EQUAL(w->queue.error.vendor_syndrome, kVendorRetry);
    CHECK(r.engine.now() - start >= kLine.retry_ns * kNanosecond);
    r.memory[0][0] = 1;
    CHECK(r.post(other, [&](const Header& header) {
        return mlx5::write_request(header, r.remote(2, 5), r.local(0, 0), 8);
    }) != 0);
    CHECK(r.flush(other));
    CHECK_EQUAL(r.memory[2][5], 1);
}

TEST(a_peer_that_connects_late_is_reached) {
    Rig r;
    Writer *w = r.add(0), *other = r.add(1);
    r.engine.connect(0, w->queue.number, 1, other->queue.number);
    r.memory[0][0] = 5;
    CHECK(r.write(w, 0, 9, 8) != 0);
    for (int i = 0; i < 3; ++i) CHECK(r.engine.advance());
    CHECK_EQUAL(r.memory[1][9], 0);
    r.engine.connect(1, other->queue.number, 0, w->queue.number);
    CHECK(r.flush(w));
    CHECK_EQUAL(r.memory[1][9], 5);
}

TEST(a_queue_pair_answers_its_own_peer_only) {
    Rig r;
    Writer *w = r.pair(), *intruder = r.add(0);
    r.engine.connect(0, intruder->queue.number, 1, r.writers[1].queue.number);
    CHECK(r.write(intruder, 0, 1, 8) != 0);
    CHECK(!r.flush(intruder));
    CHECK_EQUAL(intruder->queue.error.syndrome, mlx5::kRetryExceeded);
    CHECK(r.write(w, 0, 1, 8) != 0 && r.flush(w));
}

TEST(a_dead_nic_does_nothing_more) {
    Rig r;
    Writer* w = r.pair();
    CHECK(r.write(w, 0, 1, 8) != 0);
    r.network.kill_nic(0);
    Stepping brief{r.engine, 1000};
    CHECK(!mlx5::flush(&w->queue, brief));
    CHECK_EQUAL(w->queue.failed,
                mlx5::kQueueWorks);  // nothing was said; only the deadline ended it
}

TEST(a_queue_pair_that_failed_does_not_answer) {
    Rig r;
    Writer* w = r.pair();
    Writer* back = &r.writers[1];  // the other end
    CHECK(r.post(back, [&](const Header& header) {
        return mlx5::write_request(header, {0, 0}, r.local(1, 0), 8);
    }) != 0);
    CHECK(!r.flush(back));
    CHECK(r.write(w, 0, 1, 8) != 0);
    CHECK(!r.flush(w));
    CHECK_EQUAL(w->queue.error.syndrome, mlx5::kRetryExceeded);
}

TEST(doorbells_and_records_that_cannot_be) {
    struct Wrong {
        Violation violation;
        uint32_t record;
        uint16_t doorbell;
    };
    const Wrong all[] = {
        {kDoorbellBackwards, 2, 1},  // two requests were posted before
        {kQueueOverflow, 19, 19},    // of 16 slots
        {kRecordWrong, 0x10003, 3},  // more than 16 bits
        {kRecordWrong, 30, 3},       // further ahead than slots allow
        {kRecordBehind, 2, 3},
    };
    for (const Wrong& wrong : all) {
        Rig r;
        Writer* w = r.pair();
        CHECK(r.write(w, 0, 0, 8) != 0 && r.write(w, 1, 1, 8) != 0 && r.flush(w));
        w->record[mlx5::kSendRecord] = wrong.record;
        mlx5::store_doorbell(&w->doorbell,
                             mlx5::next_index_doorbell(w->queue.number, wrong.doorbell));
        r.engine.settle();
        CHECK_EQUAL(r.engine.violations(), 1);
        CHECK_EQUAL(r.count(EventKind::kViolation, wrong.violation), 1);
        CHECK(!mlx5::poll(&w->queue));
        CHECK_EQUAL(w->queue.error.syndrome, mlx5::kLocalOperation);
        CHECK_EQUAL(w->queue.error.vendor_syndrome, kVendorViolation + wrong.violation);
    }
}

TEST(a_doorbell_that_quotes_another_request) {
    for (bool right : {true, false}) {
        Rig r;
        Writer* w = r.pair();
        mlx5::store_request(&w->queue, 0,
                            mlx5::write_request(mlx5::header_of(w->queue, 0, true), r.remote(1, 0),
                                                r.local(0, 0), 8));
        mlx5::store_record(&w->record[mlx5::kSendRecord], 1);
        Block quoted = w->ring[0];
        if (!right) quoted = mlx5::nop_request(mlx5::header_of(w->queue, 0, true));
        mlx5::Doorbell doorbell;
        memcpy(&doorbell, &quoted, sizeof doorbell);
        mlx5::store_doorbell(&w->doorbell, doorbell);
        r.engine.settle();
        CHECK_EQUAL(r.count(EventKind::kViolation, kDoorbellRequest), !right);
    }
}

TEST(a_record_that_runs_ahead_is_found_when_idle) {
    Rig r;
    Writer* w = r.pair();
    CHECK(r.write(w, 0, 0, 8) != 0 && r.flush(w));
    mlx5::store_record(&w->record[mlx5::kSendRecord], uint16_t(w->queue.reserved + 1));
    r.engine.settle();
    CHECK_EQUAL(r.engine.violations(), 0);  // a doorbell may follow
    r.engine.check_idle();
    CHECK_EQUAL(r.count(EventKind::kViolation, kRecordWrong), 1);
}

TEST(a_request_changed_before_its_completion) {
    for (bool late : {false, true}) {
        Rig r;
        Writer* w = r.pair();
        CHECK(r.write(w, 0, 0, 8, false) != 0 && r.write(w, 1, 1, 8) != 0);
        r.engine.step();  // the doorbell is seen and both are fetched
        if (late) {
            r.engine.settle();
            CHECK(mlx5::poll(&w->queue));
        }
        // The first one, which asked for no completion: its slot is free once the second's is
        // there.
        w->ring[0].unit[2].word[3] ^= 1;
        r.engine.settle();
        CHECK_EQUAL(r.count(EventKind::kViolation, kSlotReused), !late);
        CHECK_EQUAL(mlx5::poll(&w->queue), late);
    }
}

TEST(an_atomic_cut_off_by_an_error_lets_others_go_on) {
    Rig r;
    Writer *w = r.pair(), *other = r.pair();
    CHECK(r.add_to(w, 5, 1) != 0);
    while (r.network.wire()->nic(1).atomics == 0) CHECK(r.engine.advance());
    mlx5::store_doorbell(&w->doorbell, mlx5::next_index_doorbell(w->queue.number ^ 1, 2));
    CHECK(r.add_to(other, 6, 1) != 0);
    CHECK(r.flush(other));
    CHECK_EQUAL(r.memory[1][6], 1);
    CHECK_EQUAL(r.memory[1][5], 0);
    CHECK(!mlx5::poll(&w->queue));
}

TEST(atomics_that_a_dead_nic_holds_are_broken) {
    Options options;
    options.num_nics = 3;
    Rig r(options);
    Writer *w = r.pair(0, 1), *other = r.pair(2, 1);
    CHECK(r.add_to(w, 5, 1) != 0);
    while (r.network.wire()->nic(1).atomics == 0) CHECK(r.engine.advance());
    r.network.kill_nic(0);
    CHECK(r.add_to(other, 6, 1) != 0);
    const Picoseconds start = r.engine.now();
    CHECK(r.flush(other));
    CHECK(r.engine.now() - start < 10'000 * kNanosecond);
    CHECK_EQUAL(r.memory[1][6], 1);
    CHECK_EQUAL(r.memory[1][5], 0);
    CHECK_EQUAL(r.network.wire()->nic(1).atomics, 0);
}

TEST(atomics_that_are_held_for_ever_are_broken) {
    Rig r;
    Writer* w = r.pair();
    // By an NIC that is not in this network, for almost so long.
    const Picoseconds start = r.engine.now();
    const uint64_t since = start / kNanosecond - (kLongestHoldNs - 10'000);
    r.network.wire()->nic(1).atomics = since << 16 | 77;
    CHECK(r.add_to(w, 5, 1) != 0);
    CHECK(r.flush(w));
    CHECK(r.engine.now() - start >= 10'000 * kNanosecond);
    CHECK(r.engine.now() - start <= 13'000 * kNanosecond);
    CHECK_EQUAL(r.memory[1][5], 1);
}

TEST(who_lost_the_atomics_begins_again) {
    Rig r;
    Writer* w = r.pair();
    uint64_t& atomics = r.network.wire()->nic(1).atomics;
    CHECK(r.add_to(w, 5, 1) != 0);
    while (atomics == 0) CHECK(r.engine.advance());
    // Somebody else thought it dead, changed the word and has ended.
    r.memory[1][5] = 41;
    atomics = 0;
    CHECK(r.flush(w));
    CHECK_EQUAL(r.memory[1][5], 42);
    CHECK_EQUAL(r.memory[0][0], 41);
}

TEST(without_strictness_a_violation_is_only_recorded) {
    Options options;
    options.engine.strict = false;
    Rig r(options);
    Writer* w = r.pair();
    r.memory[0][0] = 5;
    w->record[mlx5::kReceiveRecord] = 1u;
    CHECK(r.write(w, 0, 3, 8) != 0 && r.flush(w));
    CHECK(r.engine.violations() != 0);
    CHECK_EQUAL(r.count(EventKind::kViolation, kReceiveRecord), r.engine.violations());
}

TEST(without_strictness_a_changed_request_completes) {
    Options options;
    options.engine.strict = false;
    Rig r(options);
    Writer* w = r.pair();
    CHECK(r.write(w, 0, 0, 8, false) != 0 && r.write(w, 1, 1, 8) != 0);
    while (r.writers[0].doorbell != 0 && r.engine.now() < 2000 * kNanosecond) r.engine.advance();
    w->ring[0].unit[2].word[3] ^= 1;
    CHECK(r.flush(w));
    CHECK_EQUAL(r.count(EventKind::kViolation, kSlotReused), 1);
}

TEST(a_completion_of_nothing_is_noticed) {
    Rig r;
    Writer* w = r.pair();
    CHECK(r.write(w, 0, 1, 8, true, Ring::kWhenDue) != 0);
    w->completions[0].index = 1000;
    w->completions[0].opcode_owner = mlx5::kCompleted << 4;
    CHECK(!mlx5::poll(&w->queue));
    CHECK_EQUAL(w->queue.failed, mlx5::kQueueConfused);
}
