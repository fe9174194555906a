// Requests that fail: the syndrome, what is flushed behind them, and what stays unharmed.

#include "rig.h"

using namespace rig;

namespace {

/// Post what `make` makes between two good writes; expect its error and the flush of the second.
template <class Make>
void expect_error(Rig& r, Writer* w, Make make, uint8_t syndrome, uint8_t vendor,
                  bool completion = true) {
    const uint64_t first = w->queue.reserved;
    CHECK(r.write(w, 0, 10, 8, true, Ring::kWhenDue) != 0);
    CHECK(r.post(w, make, completion, Ring::kWhenDue) != 0);
    CHECK(r.write(w, 1, 11, 8, false) != 0);
    CHECK(!r.flush(w));
    CHECK_EQUAL(w->queue.failed, mlx5::kQueueError);
    CHECK_EQUAL(w->queue.error.syndrome, syndrome);
    CHECK_EQUAL(w->queue.error.vendor_syndrome, vendor);
    CHECK_EQUAL(w->queue.error_position, first + 1);
    CHECK_EQUAL(uint32_t(w->queue.error.queue_pair) & 0xffffff, w->queue.number);
    r.engine.settle();
    CHECK_EQUAL(r.memory[1][10], r.memory[0][0]);  // what came before the error is there
    CHECK_EQUAL(r.memory[1][11], 0);               // what came behind is not
    // Ring: a completion, the error, and a flushed entry for each request behind it.
    const auto* entry = reinterpret_cast<const mlx5::ErrorCompletion*>(w->completions.data());
    CHECK_EQUAL(mlx5::opcode_of(entry[0].opcode_owner), mlx5::kCompleted);
    CHECK_EQUAL(mlx5::opcode_of(entry[1].opcode_owner), mlx5::kRequestError);
    for (uint64_t i = first + 2; i < w->queue.reserved; ++i) {
        CHECK_EQUAL(entry[i - first].syndrome, mlx5::kFlushed);
        CHECK_EQUAL(entry[i - first].vendor_syndrome, kVendorFlushed);
        CHECK_EQUAL(entry[i - first].index, uint16_t(i));
    }
    CHECK(w->queue.reserved > first + 2);
}

template <class Make>
void expect_error(Make make, uint8_t syndrome, uint8_t vendor) {
    for (uint64_t start : {0u, 65534u}) {
        Options options;
        options.start = start;
        Rig r(options);
        Writer* w = r.pair();
        r.memory[0][0] = 3, r.memory[0][1] = 4;
        expect_error(r, w, [&](const Header& header) { return make(r, header); }, syndrome, vendor);
    }
}

}  // namespace

TEST(an_unknown_remote_key) {
    expect_error(
        [](Rig& r, const Header& header) {
            return mlx5::write_request(header, {r.address(1, 0), 0x77}, r.local(0, 0), 8);
        },
        mlx5::kRemoteAccess, kVendorRemoteAccess);
}

TEST(beyond_the_remote_memory) {
    for (int64_t off : {-8, 8}) {
        expect_error(
            [off](Rig& r, const Header& header) {
                auto place = r.remote(1, 0);
                place.address += uint64_t(off) + (off > 0 ? r.options.memory_bytes - 8 : 0);
                return mlx5::write_request(header, place, r.local(0, 0), 8);
            },
            mlx5::kRemoteAccess, kVendorRemoteAccess);
    }
    // An end that wraps around the address space.
    expect_error(
        [](Rig& r, const Header& header) {
            return mlx5::write_request(header, {~uint64_t(0) - 3, r.keys[1]}, r.local(0, 0), 8);
        },
        mlx5::kRemoteAccess, kVendorRemoteAccess);
}

TEST(a_key_without_the_permission) {
    for (uint32_t access :
         {kRemoteRead | kRemoteAtomic, kRemoteWrite | kRemoteAtomic, kRemoteWrite | kRemoteRead}) {
        expect_error(
            [access](Rig& r, const Header& header) {
                static uint64_t word[2];
                const uint32_t key = r.network.add_memory(1, word, sizeof word, access);
                const mlx5::RemotePlace place = {uint64_t(word), key};
                if ((access & kRemoteWrite) == 0) {
                    return mlx5::write_request(header, place, r.local(0, 0), 8);
                }
                return (access & kRemoteRead) == 0
                           ? mlx5::read_request(header, place, r.local(0, 0), 8)
                           : mlx5::fetch_add_request(header, place, r.local(0, 0), 1);
            },
            mlx5::kRemoteAccess, kVendorRemoteAccess);
    }
}

TEST(memory_of_another_protection_domain) {
    expect_error(
        [](Rig& r, const Header& header) {
            static uint64_t word;
            const uint32_t key = r.network.add_memory(1, &word, 8, kRemoteWrite, 2);
            return mlx5::write_request(header, {uint64_t(&word), key}, r.local(0, 0), 8);
        },
        mlx5::kRemoteAccess, kVendorRemoteAccess);
    expect_error(
        [](Rig& r, const Header& header) {
            static uint64_t word;
            const uint32_t key = r.network.add_memory(0, &word, 8, kLocalWrite, 2);
            return mlx5::write_request(header, r.remote(1, 0), {uint64_t(&word), key}, 8);
        },
        mlx5::kLocalProtection, 0);
}

TEST(beyond_the_local_memory) {
    expect_error(
        [](Rig& r, const Header& header) {
            auto place = r.local(0, 0);
            place.address += r.options.memory_bytes - 7;
            return mlx5::write_request(header, r.remote(1, 0), place, 8);
        },
        mlx5::kLocalProtection, 0);
}

TEST(an_atomic_with_nowhere_for_the_old_value) {
    expect_error(
        [](Rig& r, const Header& header) {
            return mlx5::fetch_add_request(header, r.remote(1, 0), {0, 0}, 1);
        },
        mlx5::kLocalProtection, 0);
    expect_error(  // memory that only may be read
        [](Rig& r, const Header& header) {
            static uint64_t word;
            const uint32_t key = r.network.add_memory(0, &word, 8, 0);
            return mlx5::fetch_add_request(header, r.remote(1, 0), {uint64_t(&word), key}, 1);
        },
        mlx5::kLocalProtection, 0);
}

TEST(a_misaligned_atomic) {
    expect_error(
        [](Rig& r, const Header& header) {
            auto place = r.remote(1, 0);
            place.address += 4;
            return mlx5::fetch_add_request(header, place, r.local(0, 0), 1);
        },
        mlx5::kRemoteInvalid, 0);
}

TEST(malformed_requests) {
    struct Wrong {
        Violation violation;
        void (*spoil)(Block*);
    };
    const auto control = [](Block* block) { return reinterpret_cast<mlx5::Control*>(block); };
    static const auto at = control;
    const Wrong all[] = {
        {kWrongIndex, [](Block* b) { at(b)->operation = at(b)->operation + 0x100; }},
        {kWrongIndex, [](Block* b) { at(b)->operation = at(b)->operation - 0x100; }},
        {kWrongQueueNumber, [](Block* b) { at(b)->queue_pair = at(b)->queue_pair + 0x100; }},
        {kWrongUnits, [](Block* b) { at(b)->queue_pair = at(b)->queue_pair + 1; }},
        {kWrongUnits, [](Block* b) { at(b)->queue_pair = at(b)->queue_pair - 1; }},
        {kUnknownOpcode, [](Block* b) { at(b)->operation = (at(b)->operation & ~0xffu) | 0x22; }},
        {kUnknownOpcode, [](Block* b) { at(b)->operation = at(b)->operation | 1; }},
        {kReservedBits, [](Block* b) { at(b)->operation = at(b)->operation | 1u << 24; }},
        {kReservedBits, [](Block* b) { at(b)->immediate = 1; }},
        {kReservedBits, [](Block* b) { at(b)->stream[1] = 1; }},
        {kReservedBits, [](Block* b) { at(b)->signature = 1; }},
        {kReservedBits, [](Block* b) { at(b)->flags |= 1; }},
        {kReservedBits, [](Block* b) { b->unit[1].word[3] = 1; }},
        {kNoBytes, [](Block* b) { b->unit[2].word[0] = 0; }},
        {kInlineTooLong, [](Block* b) { b->unit[2].word[0] = mlx5::Be32(mlx5::kInline | 13).raw; }},
        {kNoBytes, [](Block* b) { b->unit[2].word[0] = mlx5::Be32(mlx5::kInline).raw; }},
    };
    for (const Wrong& wrong : all) {
        Rig r;
        Writer* w = r.pair();
        expect_error(
            r, w,
            [&](const Header& header) {
                Block block = mlx5::write_request(header, r.remote(1, 5), r.local(0, 0), 8);
                wrong.spoil(&block);
                return block;
            },
            mlx5::kLocalOperation, kVendorMalformed);
        CHECK_EQUAL(r.count(EventKind::kViolation, wrong.violation), 1);
        CHECK_EQUAL(r.engine.violations(), 1);
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
    Rig r;
    Writer* w = r.pair();
    expect_error(
        r, w,
        [&](const Header& header) { return mlx5::write_request(header, {0, 0}, r.local(0, 0), 8); },
        mlx5::kRemoteAccess, kVendorRemoteAccess, false);
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
