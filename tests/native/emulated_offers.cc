// Long messages whose slices several blocks copy, and which are copied before their turn on the
// line: what follows a message must not be visible before all of it, and its end not before its
// time. For the resident engine only, its kernel run on the host.

#include "rig.h"

using namespace rig;

namespace {

constexpr uint64_t kSlice = kSliceBytes / 8;  ///< in words, as what follows
constexpr uint64_t kLongest = 14 * kSlice;
constexpr uint64_t kSignals = 0, kData = 64;

struct Message {
    Writer* writer;
    uint64_t at, words, signal, value;
    bool seen = false;
};

/// Queue pairs of both blocks, and messages with a signal behind each.
struct Sharing {
    explicit Sharing(uint64_t seed, uint32_t num_writers = 3, Options options = {}) {
        options.engine.seed = seed;
        options.engine.shuffle = true;
        options.num_blocks = options.num_completions = 32;
        options.memory_bytes = 8 * (kData + 12 * kLongest);
        // On such a line everything is due at once, so that signals wait for slices.
        if (seed % 4 != 0) options.line = {0, 4096, 0, 0, 0, 0, 50'000, 0};
        rig = std::make_unique<Rig>(options);
        for (uint32_t i = 0; i < num_writers; ++i) {
            writers.push_back(rig->pair());
            rig->add(0);  // so that the next one's is another block
        }
        for (uint64_t i = 0; i < 12 * kLongest; ++i) rig->memory[0][kData + i] = mix(seed, i);
    }

    /// Of another length each, some of them too short to be shared.
    void post(uint64_t i) {
        Rig& r = *rig;
        const uint64_t draw = mix(r.options.engine.seed, i);
        Message m{writers[i % writers.size()], kData + i * kLongest, 0, i % writers.size(), 0};
        m.words = draw % 5 == 0 ? 1 + draw / 5 % kSlice : 1 + draw / 5 % kLongest;
        m.value = 1 + i / writers.size();
        CHECK(r.write(m.writer, m.at, m.at, uint32_t(m.words * 8), false, Ring::kWhenDue) != 0);
        CHECK(r.post(
                  m.writer,
                  [&](const Header& header) {
                      return mlx5::inline_write_request(header, r.remote(1, kSignals + m.signal),
                                                        &m.value, 8);
                  },
                  false) != 0);
        messages.push_back(m);
    }

    bool is_there(const Message& m) const {
        return memcmp(&rig->memory[0][m.at], &rig->memory[1][m.at], m.words * 8) == 0;
    }

    /// What a receiver may conclude from the signals that it sees.
    void observe() {
        for (Message& m : messages) {
            if (m.seen || rig->memory[1][kSignals + m.signal] < m.value) continue;
            m.seen = true;
            CHECK(is_there(m));
        }
    }

    void finish() {
        while (rig->engine.advance()) observe();
        observe();
        for (const Message& m : messages) CHECK(m.seen);
        rig->expect_clean();
    }

    std::unique_ptr<Rig> rig;
    std::vector<Writer*> writers;
    std::vector<Message> messages;
};

}  // namespace

TEST(a_signal_waits_for_the_slices_of_every_block) {
    uint64_t helped = 0;
    for (uint64_t seed = 0; seed < 60; ++seed) {
        Sharing s(seed, 1 + uint32_t(seed % 4));
        for (uint64_t i = 0; i < 12; ++i) {
            s.post(i);
            for (uint64_t k = mix(seed, i) % 4; k != 0; --k) {
                s.rig->engine.advance();
                s.observe();
            }
        }
        s.finish();
        helped += s.rig->engine.helped();
    }
    CHECK(helped > 60);
}

TEST(a_signal_waits_for_them_with_faults_too) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        Options options;
        options.engine.rules = {
            everywhere(kDelay, 30'000 * kNanosecond, 16384),
            everywhere(kPieces, 20'000 * kNanosecond, 4096),
            everywhere(kLateFetch, 20'000 * kNanosecond, 16384),
            everywhere(kLostDoorbell, 50'000 * kNanosecond, 16384),
        };
        Sharing s(seed, 2, options);
        for (uint64_t i = 0; i < 6; ++i) s.post(i);
        s.finish();
    }
}

TEST(bytes_are_copied_before_their_turn_but_for_the_last) {
    Options options;
    options.num_blocks = options.num_completions = 64;
    options.memory_bytes = 8 * 10 * kLongest;
    options.line = {10, 4096, 0, 0, 0, 1000, 500'000, 0};
    Rig r(options);
    Writer* w = r.pair();
    for (uint64_t i = 0; i < 5 * kLongest; ++i) r.memory[0][i] = i + 1;
    const Picoseconds start = r.engine.now();
    for (uint64_t i = 0; i < 2; ++i) {
        CHECK(r.write(w, i * kLongest, i * kLongest, uint32_t(kLongest * 8), true,
                      Ring::kWhenDue) != 0);
    }
    mlx5::ring(&w->queue);
    const uint64_t end = 2 * kLongest;
    const Picoseconds length = kLongest * 8 * kNanosecond / 10;
    while (r.engine.step()) {
    }
    // The second one waits for the first: it begins on the line after one length.
    CHECK_EQUAL(r.engine.now(), start);
    CHECK(r.memory[1][end - 9] != 0 && r.memory[1][end - 8] == 0);
    while (r.memory[1][end - 1] == 0) CHECK(r.engine.advance());
    CHECK(r.engine.now() >= start + 2 * length + 1000 * kNanosecond);
    CHECK(r.flush(w));
    CHECK(memcmp(&r.memory[0][0], &r.memory[1][0], end * 8) == 0);
    CHECK_EQUAL(r.engine.traffic(0).late_messages, 0);
    r.expect_clean();
}

TEST(who_is_copied_before_its_turn_is_judged_at_it) {
    Sharing s(0, 1);
    Rig& r = *s.rig;
    r.network.wire()->nic(0).line = {10, 4096, 0, 0, 0, 1000, 50'000, 0};
    const uint32_t bytes = uint32_t(kLongest * 8);
    for (uint64_t i = 0; i < 2; ++i) {
        const uint64_t at = kData + i * kLongest;
        CHECK(r.write(s.writers[0], at, at, bytes, true, Ring::kWhenDue) != 0);
    }
    mlx5::ring(&s.writers[0]->queue);
    // The second one's first bytes are there, and it has not departed.
    while (r.memory[1][kData + kLongest] == 0) CHECK(r.engine.advance());
    r.network.kill_nic(1);
    CHECK(!r.flush(s.writers[0]));
    CHECK_EQUAL(r.memory[1][kData + 2 * kLongest - 1], 0);
    CHECK_EQUAL(s.writers[0]->queue.error_position, 1);
}

TEST(a_failed_queue_pair_keeps_no_offers) {
    Options options;
    options.engine.rules = {{kKillQueue, 0, kFirstQueue, 6, 6, kAlways, 1, 0}};
    Sharing s(1, 4, options);
    for (int round = 0; round < 3; ++round) {
        // The first queue pair fails with copies under way.
        for (uint64_t i = 0; i < 4; ++i) {
            if (round > 0 && i == 0) continue;
            for (uint64_t k = 0; k < (i == 0 ? 7 : 2); ++k) {
                const uint64_t at = kData + (i * 2 + k % 2) * kLongest;
                s.rig->write(s.writers[i], at, at, uint32_t(kLongest * 8), true, Ring::kWhenDue);
            }
            mlx5::ring(&s.writers[i]->queue);
        }
        s.rig->engine.settle();
    }
    for (uint64_t i = 1; i < 4; ++i) CHECK(s.rig->flush(s.writers[i]));
    CHECK(!s.rig->flush(s.writers[0]));
    const uint64_t words = 6 * kLongest, from = kData + 2 * kLongest;
    CHECK(memcmp(&s.rig->memory[0][from], &s.rig->memory[1][from], words * 8) == 0);
    CHECK_EQUAL(s.rig->engine.offers_left(), 0);
}

TEST(the_kernel_places_what_was_offered_before_it_ends) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        Sharing s(seed, 2);
        for (uint64_t i = 0; i < 8; ++i) {
            s.post(i);
            s.rig->engine.advance();
            s.observe();
            s.rig->engine.traffic(0);  // ends it, whatever is under way
            CHECK_EQUAL(s.rig->engine.offers_left(), 0);
            s.observe();
        }
        s.finish();
    }
}
