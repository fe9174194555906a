// What only an engine of many lanes can get wrong: windows of requests that are done together, the
// gates they take at once, slices of messages; and that the kernel ends.

#include <random>

#include "rig.h"

using namespace rig;

namespace {

/// Lines of all kinds: without limit, of whole bytes, slow, with gaps between messages.
LineModel line_of(uint64_t draw) {
    LineModel line = kLine;
    line.bytes_per_ns = uint32_t(draw % 4 * 17);
    line.message_ns = uint32_t(draw / 4 % 3 * 40);
    line.latency_ns = uint32_t(draw / 16 % 3 * 700);
    return line;
}

/// Words of the peer that nobody writes; it stays open when a read looks at them.
constexpr uint64_t kOnlyRead = 1'200'000;

/// Of the requests one writer posts: everything at once, or in parts that follow each other.
template <class AnyRig>
void post_mixture(AnyRig& r, Writer* w, uint64_t seed, uint32_t count, bool at_once) {
    std::mt19937_64 random(seed);
    for (uint32_t i = 0; i < count; ++i) {
        const uint64_t kind = random() % 8, word = 100 + random() % 5, place = random() % 400;
        const uint64_t bytes = random() % 4 == 0 ? random() % 30'000 + 1 : random() % 200 + 1;
        const bool ask = random() % 3 == 0;
        const Ring when = at_once ? Ring::kWhenDue : Ring::kNow;
        const auto make = [&](Header header) {
            // Its own place at the peer, so that nothing depends on who comes first.
            const uint64_t to = 1000 + i * 4000 + place, back = 500'000 + i;
            switch (kind) {
                case 0:
                case 1:
                    if (place % 7 == 0) header.flags |= mlx5::kFence;
                    return mlx5::fetch_add_request(header, r.remote(1, word), r.local(0, back),
                                                   i + 1);
                case 2:
                    return mlx5::compare_swap_request(header, r.remote(1, word), r.local(0, back),
                                                      mlx5::Atomic{i, ~word});
                case 3: {
                    const uint64_t value = i * 77;
                    return mlx5::inline_write_request(header, r.remote(1, to), &value, 8);
                }
                case 4: return mlx5::nop_request(header);
                case 5:
                    return mlx5::read_request(header, r.remote(1, kOnlyRead + place),
                                              r.local(0, 600'000 + i * 4000), uint32_t(bytes));
                default: {
                    auto from = r.local(0, place);
                    from.address += place % 9;
                    auto there = r.remote(1, to);
                    there.address += place % 5;
                    return mlx5::write_request(header, there, from, uint32_t(bytes));
                }
            }
        };
        CHECK(r.post(w, make, ask, when) != 0);
    }
}

/// Post, wait, and say when each request that asked completed.
template <class AnyRig>
std::vector<uint64_t> run_mixture(AnyRig& r, uint64_t seed, uint32_t count, bool at_once) {
    for (uint64_t i = 0; i < 1000; ++i) r.memory[1][i] = ~i;
    for (uint64_t i = 0; i < 5000; ++i) r.memory[1][kOnlyRead + i] = i * 0xfedcba9876543210;
    for (uint64_t i = 0; i < 1000; ++i) r.memory[0][i] = i * 0x0123456789abcdef;
    Writer* w = r.pair();
    w->queue.doorbell_interval = w->queue.num_blocks;
    post_mixture(r, w, seed, count, at_once);
    CHECK(r.flush(w));
    r.expect_clean();
    std::vector<uint64_t> times;
    for (const mlx5::Completion& entry : w->completions) {
        if (mlx5::opcode_of(entry.opcode_owner) != mlx5::kInvalid) {
            times.push_back(uint64_t(uint16_t(entry.index)) << 48 | uint64_t(entry.timestamp));
        }
    }
    return times;
}

Options mixture_options(uint64_t seed) {
    Options options;
    options.line = line_of(seed);
    options.num_blocks = options.num_completions = 256;
    options.memory_bytes = 16 << 20;
    options.max_responses = seed % 2 == 0 ? 16 : 3;
    return options;
}

/// A block of one warp that calls something.
template <class Call>
void run_warp(const Call& call) {
    emulation::Block block;
    block.block_dim.x = 32;
    block.grid_dim.x = 1;
    block.kernel = &call;
    block.run = [](const void* kernel) { (*static_cast<const Call*>(kernel))(); };
    emulation::run_block(block);
}

}  // namespace

TEST(many_lanes_take_a_gate_as_if_one_after_the_other) {
    std::mt19937_64 random(1);
    for (int round = 0; round < 300; ++round) {
        const Picoseconds free = random() % 5000;
        bool takes[32];
        Picoseconds earliest[32], length[32], start[32];
        const bool equal = random() % 3 == 0, sparse = random() % 3 == 0;
        for (int i = 0; i < 32; ++i) {
            takes[i] = !sparse || random() % 5 == 0;
            earliest[i] = equal ? 3000 : 1000 + random() % 4000;
            length[i] = random() % 300;
        }
        Gate gate{free}, one_by_one{free};
        run_warp([&] {
            const uint32_t lane = threadIdx.x;
            const mlx5::WarpLanes group;
            const Passes passes = ask_for(group, takes[lane], earliest[lane], length[lane]);
            Picoseconds at = 0;
            if (lane == 0) at = take_gate(&gate, random() % 2 == 0 ? free : 0, passes);
            start[lane] = passes.start(group.from_first(at));
        });
        for (int i = 0; i < 32; ++i) {
            if (!takes[i]) continue;
            // Without a length a message alone would pass the gate.
            Picoseconds expected = std::max(one_by_one.free_at, earliest[i]);
            one_by_one.free_at = expected + length[i];
            CHECK_EQUAL(start[i], expected);
        }
        CHECK_EQUAL(gate.free_at, one_by_one.free_at);
    }
}

TEST(windows_of_requests_are_as_one_after_the_other) {
    // Everything is posted before the doorbell: so the line is the same, too.
    for (uint64_t seed = 0; seed < 20; ++seed) {
        const uint32_t count = uint32_t(1 + seed * 11);
        RigOf<Engine> one(mixture_options(seed));
        RigOf<ResidentEngine> many(mixture_options(seed));
        const auto expected = run_mixture(one, seed, count, true);
        const auto seen = run_mixture(many, seed, count, true);
        CHECK(!expected.empty());
        CHECK_EQUAL(seen.size(), expected.size());
        for (size_t i = 0; i < seen.size(); ++i) {
            // Atomics that are done together take the peer's once, not one after the other; and
            // what waits for their answers is earlier, too.
            const uint64_t atomics = 2 * count * kAtomicGap / kNanosecond;
            CHECK(seen[i] <= expected[i] && expected[i] - seen[i] <= atomics);
        }
        CHECK(one.memory == many.memory);
    }
}

TEST(any_mixture_ends_with_the_same_bytes) {
    for (uint64_t seed = 100; seed < 110; ++seed) {
        Options options = mixture_options(seed);
        options.num_blocks = options.num_completions = 64;
        options.start = seed % 2 == 0 ? 65500 : 0;
        options.engine.shuffle = true;
        options.engine.seed = seed;
        RigOf<Engine> one(options);
        RigOf<ResidentEngine> many(options);
        run_mixture(one, seed, 150, false);
        run_mixture(many, seed, 150, false);
        CHECK(one.memory == many.memory);
    }
}

// Words and other messages of a window land together, which must not show.
TEST(what_is_written_last_stays) {
    for (uint64_t seed = 0; seed < 30; ++seed) {
        Options options = mixture_options(0);
        options.engine.seed = seed;
        RigOf<ResidentEngine> r(options);
        std::mt19937_64 random(seed);
        Writer* w = r.pair();
        w->queue.doorbell_interval = w->queue.num_blocks;
        uint64_t expected[13] = {};
        for (uint64_t i = 1; i <= 60; ++i) {
            const uint64_t word = random() % 12;
            r.memory[0][2 * i] = i << 32;
            r.memory[0][2 * i + 1] = i << 40;
            const bool is_word = random() % 4 != 0;  // else it is two, which is not one
            const uint32_t bytes = is_word ? 8 : 16;
            CHECK(r.write(w, 2 * i, 900 + word, bytes, false, Ring::kWhenDue) != 0);
            expected[word] = i << 32;
            if (!is_word) expected[word + 1] = i << 40;
        }
        CHECK(r.flush(w));
        for (uint64_t word = 0; word < 13; ++word) {
            CHECK_EQUAL(r.memory[1][900 + word], expected[word]);
        }
        r.expect_clean();
    }
}

TEST(slices_of_every_skew_and_length) {
    Options options;
    options.memory_bytes = 1 << 20;
    options.num_blocks = options.num_completions = 64;
    Rig r(options);
    Writer* w = r.pair();
    std::mt19937_64 random(3);
    auto* from = reinterpret_cast<uint8_t*>(r.memory[0].data());
    auto* to = reinterpret_cast<uint8_t*>(r.memory[1].data());
    std::vector<uint8_t> expected(1 << 20);
    for (uint64_t i = 0; i < 1 << 20; ++i) from[i] = uint8_t(random());
    for (int round = 0; round < 300; ++round) {
        const uint64_t at = random() % 700'000, of = random() % 700'000;
        const uint32_t sizes[] = {1,    15,    16,    17,    63,     64,     65,     79,
                                  80,   8191,  8192,  8193,  8255,   8256,   8257,   16448,
                                  7168, 65536, 66000, 24640, 262144, 262145, 200000, 32};
        const uint32_t bytes = sizes[random() % 24];
        auto place = r.remote(1, 0);
        place.address += at;
        auto source = r.local(0, 0);
        source.address += round % 3 == 0 ? at : of;  // often with the same skew
        CHECK(r.post(w, [&](const Header& header) {
            return mlx5::write_request(header, place, source, bytes);
        }) != 0);
        // They overlap, so one after the other.
        CHECK(r.flush(w));
        memcpy(&expected[at], from + (round % 3 == 0 ? at : of), bytes);
        CHECK(memcmp(&expected[0], to, expected.size()) == 0);
    }
    r.expect_clean();
}

TEST(messages_longer_than_the_ring_of_slices) {
    Options options;
    options.memory_bytes = 24 << 20;
    Rig r(options);
    std::vector<Writer*> all;
    for (int i = 0; i < 6; ++i) all.push_back(r.pair());
    for (uint64_t i = 0; i < r.memory[0].size(); ++i) r.memory[0][i] = i * 3;
    const uint64_t words = (4 << 20) / 8;  // more than 256 slices
    for (uint64_t i = 0; i < 6; ++i) {
        CHECK(r.write(all[i], i * words / 2, i * words / 2, uint32_t(words * 4), true,
                      Ring::kWhenDue) != 0);
    }
    for (Writer* w : all) mlx5::ring(&w->queue);
    for (Writer* w : all) CHECK(r.flush(w));
    CHECK(memcmp(&r.memory[0][0], &r.memory[1][0], 6 * words * 4) == 0);
    CHECK_EQUAL(r.memory[1][3 * words], 0);
    r.expect_clean();
}

namespace {

void end_again_and_again(uint64_t seed) {
    Options options;
    options.engine.seed = seed;
    options.num_blocks = options.num_completions = 64;
    Rig r(options);
    Writer* w = r.pair();
    for (uint64_t i = 0; i < 60; ++i) {
        r.memory[0][i] = i + 1;
        CHECK(r.write(w, i, i, 8, true) != 0);
        CHECK(r.add_to(w, 100, 1, 200, false) != 0);
        r.engine.advance();
        r.engine.traffic(0);  // ends it, whatever is under way
    }
    CHECK(r.flush(w));
    for (uint64_t i = 0; i < 60; ++i) CHECK_EQUAL(r.memory[1][i], i + 1);
    CHECK_EQUAL(r.memory[1][100], 60);
    CHECK_EQUAL(r.engine.traffic(0).messages, 120);
    r.expect_clean();
}

}  // namespace

TEST(the_kernel_goes_on_where_it_ended) {
    end_again_and_again(0);
    end_again_and_again(1);  // what it knows of requests lies elsewhere
}

TEST(without_its_host_the_kernel_ends) {
    Options options;
    Rig r(options);
    Writer* w = r.pair();
    r.engine.set_patience(50'000);
    CHECK(r.write(w, 0, 0, 8) != 0 && r.flush(w));
    for (int i = 0; i < 20 && !r.engine.is_abandoned(); ++i) {
        r.engine.sign_of_life();
        r.engine.pass(40'000 * kNanosecond);
    }
    CHECK(!r.engine.is_abandoned());
    r.engine.pass(60'000 * kNanosecond);
    CHECK(r.engine.is_abandoned());
}
