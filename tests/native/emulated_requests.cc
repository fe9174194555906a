// What each request does, when, and what software learns of it.

#include "rig.h"

using namespace rig;

TEST(a_write_brings_its_bytes) {
    Rig r;
    Writer* w = r.pair();
    for (uint64_t i = 0; i < 1000; ++i) r.memory[0][i] = i * 0x0101010101010101;
    CHECK(r.write(w, 0, 2000, 8000) != 0);
    CHECK(r.flush(w));
    CHECK(memcmp(&r.memory[0][0], &r.memory[1][2000], 8000) == 0);
    CHECK_EQUAL(r.memory[1][3000], 0);
    CHECK_EQUAL(r.memory[1][1999], 0);
    r.expect_clean();
}

TEST(inline_bytes_of_every_length) {
    Rig r;
    Writer* w = r.pair();
    for (uint32_t bytes = 1; bytes <= mlx5::kMaxInline; ++bytes) {
        uint8_t payload[mlx5::kMaxInline];
        for (uint32_t i = 0; i < bytes; ++i) payload[i] = uint8_t(bytes * 7 + i);
        CHECK(r.post(w, [&](const Header& header) {
            return mlx5::inline_write_request(header, r.remote(1, bytes * 8), payload, bytes);
        }) != 0);
        CHECK(r.flush(w));
        const auto* at = reinterpret_cast<const uint8_t*>(&r.memory[1][bytes * 8]);
        CHECK(memcmp(at, payload, bytes) == 0);
        CHECK_EQUAL(at[bytes], 0);
    }
    r.expect_clean();
}

TEST(a_read_brings_the_peers_bytes) {
    Rig r;
    Writer* w = r.pair();
    for (uint64_t i = 0; i < 100; ++i) r.memory[1][i] = 1000 + i;
    CHECK(r.post(w, [&](const Header& header) {
        return mlx5::read_request(header, r.remote(1, 0), r.local(0, 50), 800);
    }) != 0);
    CHECK(r.flush(w));
    CHECK(memcmp(&r.memory[1][0], &r.memory[0][50], 800) == 0);
    r.expect_clean();
}

TEST(atomics_change_the_peers_word_and_return_the_old_one) {
    Rig r;
    Writer* w = r.pair();
    r.memory[1][7] = 40;
    CHECK(r.add_to(w, 7, 2, 3) != 0);
    CHECK(r.flush(w));
    CHECK_EQUAL(r.memory[1][7], 42);
    CHECK_EQUAL(r.memory[0][3], 40);
    for (uint64_t compare : {41u, 42u}) {
        CHECK(r.post(w, [&](const Header& header) {
            return mlx5::compare_swap_request(header, r.remote(1, 7), r.local(0, 4),
                                              mlx5::Atomic{99, compare});
        }) != 0);
        CHECK(r.flush(w));
        CHECK_EQUAL(r.memory[0][4], 42);
        CHECK_EQUAL(r.memory[1][7], compare == 42 ? 99 : 42);
    }
    r.expect_clean();
}

TEST(nothing_is_fetched_before_the_doorbell) {
    Rig r;
    Writer* w = r.pair();
    r.memory[0][0] = 5;
    CHECK(r.write(w, 0, 9, 8, true, Ring::kWhenDue) != 0);
    r.engine.settle();
    CHECK_EQUAL(r.memory[1][9], 0);
    // Not the record either: only the doorbell starts it.
    mlx5::store_record(&w->record[mlx5::kSendRecord], 1);
    r.engine.settle();
    CHECK_EQUAL(r.memory[1][9], 0);
    mlx5::ring(&w->queue);
    r.engine.settle();
    CHECK_EQUAL(r.memory[1][9], 5);
    r.expect_clean();
}

TEST(one_thread_rings_at_a_time) {
    Rig r;
    Writer* w = r.pair();
    r.memory[0][0] = 5;
    w->queue.ready |= mlx5::kRinging;  // another thread is between record and doorbell
    CHECK(r.write(w, 0, 9, 8) != 0);
    r.engine.settle();
    CHECK_EQUAL(w->record_word(mlx5::kSendRecord), 0);
    CHECK_EQUAL(r.memory[1][9], 0);
    mlx5::ring(&w->queue);  // nor does who only waits
    CHECK_EQUAL(w->record_word(mlx5::kSendRecord), 0);
    mlx5::ring_for(&w->queue, mlx5::kRinging);  // which rang for nothing yet, and finds it
    r.engine.settle();
    CHECK_EQUAL(r.memory[1][9], 5);
    CHECK_EQUAL(w->queue.ready, 1);
    CHECK_EQUAL(w->queue.rung, 1);
    r.expect_clean();
}

TEST(only_asked_for_completions_are_written) {
    Rig r;
    Writer* w = r.pair();
    w->queue.completion_interval = 8;
    for (uint64_t i = 0; i < 7; ++i) CHECK(r.write(w, i, i, 8, i == 2) != 0);
    r.engine.settle();
    CHECK_EQUAL(mlx5::opcode_of(w->completions[0].opcode_owner), mlx5::kCompleted);
    CHECK_EQUAL(w->completions[0].index, 2);
    CHECK_EQUAL(mlx5::opcode_of(w->completions[1].opcode_owner), mlx5::kInvalid);
    CHECK(mlx5::poll(&w->queue));
    CHECK_EQUAL(w->queue.done, 3);
    CHECK(r.write(w, 7, 7, 8, false) != 0);  // the interval's request asks by itself
    r.engine.settle();
    CHECK_EQUAL(w->completions[1].index, 7);
    CHECK(mlx5::poll(&w->queue));
    CHECK_EQUAL(w->queue.done, 8);
    r.expect_clean();
}

TEST(completions_that_nobody_read_are_read_together) {
    Options options;
    options.num_blocks = options.num_completions = 32;
    Rig r(options);
    Writer* w = r.pair();
    // Any number of them, from any place of the ring on; of a full one all but the last.
    for (uint64_t n = 1; n <= options.num_blocks; ++n) {
        for (uint64_t i = 0; i < n; ++i) CHECK(r.write(w, i, i, 8) != 0);
        r.engine.settle();
        mlx5::Tail tail;
        const uint64_t polled = w->queue.polled, end = w->queue.reserved;
        CHECK(mlx5::load_good(w->queue, polled, &tail));
        const uint64_t last = mlx5::find_last_good(w->queue, polled, &tail);
        CHECK_EQUAL(last, polled + (n < options.num_blocks ? n : n - 1) - 1);
        CHECK_EQUAL(tail.index, uint16_t(last));
        CHECK(mlx5::poll(&w->queue));
        CHECK_EQUAL(w->queue.polled, polled + n);
        CHECK_EQUAL(w->queue.done, end);
    }
    r.expect_clean();
}

TEST(both_doorbell_conventions_are_understood) {
    Rig r;
    Writer* w = r.pair();
    const auto mine = [&](uint64_t position) {
        return mlx5::write_request(mlx5::header_of(w->queue, position, true), r.remote(1, position),
                                   r.local(0, position), 8);
    };
    for (uint64_t i = 0; i < 40; ++i) {
        r.memory[0][i] = 100 + i;
        const Block block = mine(i);
        mlx5::store_request(&w->queue, i, block);
        mlx5::store_record(&w->record[mlx5::kSendRecord], uint16_t(i + 1));
        if (i % 2 == 0) {
            mlx5::store_doorbell(&w->doorbell,
                                 mlx5::next_index_doorbell(w->queue.number, uint16_t(i + 1)));
        } else {  // the request's own first 8 bytes
            mlx5::Doorbell first;
            memcpy(&first, &block, sizeof first);
            mlx5::store_doorbell(&w->doorbell, first);
        }
        r.engine.settle();
        CHECK_EQUAL(r.memory[1][i], 100 + i);
    }
    r.expect_clean();
}

TEST(counters_wrap) {
    for (uint64_t start : {65535u, 65534u, 65520u, 131071u, 32767u, 0u}) {
        for (uint32_t num_blocks : {4u, 16u, 64u}) {
            Options options;
            options.start = start;
            options.num_blocks = num_blocks;
            options.num_completions = num_blocks;
            Rig r(options);
            Writer* w = r.pair();
            constexpr uint64_t kRounds = kSlowness > 1 ? 70 : 3000;
            for (uint64_t i = 0; i < kRounds; ++i) {
                r.memory[0][i % 50] = i;
                CHECK(r.write(w, i % 50, 100 + i % 50, 8, i % 3 == 0) != 0);
                CHECK(r.add_to(w, 7, 1, 60, false) != 0);
                if (i % 10 == 9) CHECK(r.flush(w));
            }
            CHECK(r.flush(w));
            CHECK_EQUAL(r.memory[1][7], kRounds);
            CHECK_EQUAL(r.memory[1][100 + (kRounds - 1) % 50], kRounds - 1);
            CHECK(w->queue.reserved >= start + 2 * kRounds);
            r.expect_clean();
        }
    }
}

TEST(the_deepest_ring_goes_around_the_16_bits) {
    Options options;
    options.num_blocks = options.num_completions = mlx5::kMaxBlocks;
    options.start = 65000;
    Rig r(options);
    Writer* w = r.pair();
    constexpr uint64_t kRounds = kSlowness > 1 ? 1500 : 150'000;
    for (uint64_t i = 0; i < kRounds; ++i) {
        CHECK(r.add_to(w, 3, 1, 0, false, Ring::kWhenDue) != 0);
    }
    CHECK(r.flush(w));
    CHECK_EQUAL(r.memory[1][3], kRounds);
    r.expect_clean();
}

TEST(a_full_ring_waits_for_its_slots) {
    Options options;
    options.num_blocks = options.num_completions = 8;
    Rig r(options);
    Writer* w = r.pair();
    struct Never {
        bool again() { return false; }
    } never;
    for (int i = 0; i < 8; ++i) CHECK(r.write(w, 0, 1, 8) != 0);
    uint64_t first;
    CHECK(!mlx5::reserve(&w->queue, 1, never, &first));
    CHECK_EQUAL(w->queue.failed, mlx5::kQueueTimeout);
    // Given up with a position reserved: nobody can go on, and nobody hangs.
    CHECK(r.write(w, 0, 1, 8) == 0);
    CHECK(!r.flush(w));
}

TEST(too_many_requests_at_once_are_refused) {
    Rig r;
    Writer* w = r.pair();
    const auto make = [&](uint32_t, uint64_t position) {
        return mlx5::nop_request(mlx5::header_of(w->queue, position, false));
    };
    const uint32_t most = mlx5::max_at_once(w->queue);
    CHECK_EQUAL(most, 12);
    CHECK(mlx5::post(OneThread(), &w->queue, most + 1, Ring::kNow, make, r.wait) == 0);
    CHECK(mlx5::works(w->queue));
    for (int i = 0; i < 20; ++i) {
        CHECK(mlx5::post(OneThread(), &w->queue, most, Ring::kNow, make, r.wait) != 0);
    }
    CHECK(r.flush(w));
    r.expect_clean();
}

TEST(flush_returns_after_the_bytes_have_arrived) {
    for (uint64_t latency : {0u, 2000u, 50'000u}) {
        Options options;
        options.line.latency_ns = uint32_t(latency);
        Rig r(options);
        Writer* w = r.pair();
        for (uint64_t i = 1; i <= 50; ++i) {
            r.memory[0][0] = i;
            CHECK(r.write(w, 0, 10, 8, false, Ring::kWhenDue) != 0);
            CHECK(r.flush(w));
            CHECK_EQUAL(r.memory[1][10], i);
        }
        r.expect_clean();
    }
}

TEST(an_atomic_is_not_safe_against_the_processor) {
    // Between an NIC's read and its write anybody else's change is lost, as on hardware.
    Rig r;
    Writer* w = r.pair();
    CHECK(r.add_to(w, 5, 1) != 0);
    bool changed = false;
    while (!mlx5::has_room(w->queue, w->queue.num_blocks + 1)) {
        if (!changed && r.network.wire()->nic(1).atomics != 0) {
            r.memory[1][5] += 100;
            changed = true;
        }
        CHECK(r.engine.advance() && mlx5::poll(&w->queue));
    }
    CHECK(changed);
    CHECK_EQUAL(r.memory[1][5], 1);
}

TEST(atomics_of_many_queue_pairs_on_one_word_all_count) {
    for (uint64_t seed = 0; seed < 20 / kSlowness; ++seed) {
        Options options;
        options.num_nics = 3;
        options.engine.seed = seed;
        options.engine.shuffle = true;
        Rig r(options);
        std::vector<Writer*> all;
        for (int i = 0; i < 6; ++i) all.push_back(r.pair(i % 2 == 0 ? 0 : 2, 1));
        for (int i = 0; i < 100; ++i) {
            for (Writer* w : all) CHECK(r.add_to(w, 5, 1, 0, false, Ring::kWhenDue) != 0);
        }
        for (Writer* w : all) CHECK(r.flush(w));
        CHECK_EQUAL(r.memory[1][5], 600);
        r.expect_clean();
    }
}

TEST(a_write_may_pass_an_atomics_answer_but_not_a_fence) {
    for (bool fence : {false, true}) {
        Options options;
        options.line.bytes_per_ns = 0;
        Rig r(options);
        Writer* w = r.pair();
        r.memory[1][5] = 77;
        // The write's source is where the atomic's old value comes to.
        CHECK(r.add_to(w, 5, 1, 20, false, Ring::kWhenDue) != 0);
        CHECK(r.post(w, [&](Header header) {
            if (fence) header.flags |= mlx5::kFence;
            return mlx5::write_request(header, r.remote(1, 30), r.local(0, 20), 8);
        }) != 0);
        CHECK(r.flush(w));
        CHECK_EQUAL(r.memory[1][30], fence ? 77 : 0);
    }
}

TEST(reads_under_way_are_limited) {
    Picoseconds took[2];
    for (uint32_t limit : {1u, 16u}) {
        Options options;
        options.max_responses = limit;
        Rig r(options);
        Writer* w = r.pair();
        const Picoseconds start = r.engine.now();
        for (uint64_t i = 0; i < 16; ++i) {
            CHECK(r.add_to(w, 5, 1, 0, i == 15, i == 15 ? Ring::kNow : Ring::kWhenDue) != 0);
        }
        CHECK(r.flush(w));
        took[limit == 16] = r.engine.now() - start;
    }
    // One after the other: a round trip each.
    CHECK(took[0] >= 16 * 4000 * kNanosecond);
    CHECK(took[1] < 6000 * kNanosecond);
}
