// What the resident engine notes of every message, for a timeline: its kernel run on the host, and
// the ring of passages on its own.

#include <thread>

#include "plain_line.h"

using namespace rig;

namespace {

struct Posted {
    uint64_t position;
    uint32_t bytes;
};

/// A ring in this process, and its reader.
struct RingHere {
    std::vector<Passage> passages;
    std::vector<uint64_t> marks;
    PassageRing ring;

    explicit RingHere(uint64_t capacity)
        : passages(capacity), marks(capacity), ring{passages.data(), marks.data(), capacity, 0} {}

    std::vector<Passage> read(uint64_t first, uint64_t* total) const {
        return read_while([] {}, [] {}, first, total);
    }
    /// What happens before and after the passages are copied, between two looks at their marks.
    template <class Before, class After>
    std::vector<Passage> read_while(const Before& before, const After& after, uint64_t first,
                                    uint64_t* total) const {
        const auto copy = [&](const auto* from, uint64_t count, auto* into) {
            constexpr bool kPassages = sizeof *from == sizeof(Passage);
            if (kPassages) before();
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            std::copy(from, from + count, into);
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (kPassages) after();
        };
        return read_ring(&ring, first, copy, total);
    }
    /// The number is in every field.
    static Passage numbered(uint64_t number) {
        return {number, number,           number,           number,          number,
                number, uint32_t(number), uint32_t(number), uint32_t(number)};
    }
    void add(uint64_t number) { ring.add(numbered(number)); }
    /// Somebody takes the next number and is not heard of until later.
    uint64_t stall() { return increase(&ring.count); }
};

std::vector<uint64_t> positions(const std::vector<Passage>& passages) {
    std::vector<uint64_t> all;
    for (const Passage& passage : passages) all.push_back(passage.position);
    return all;
}

}  // namespace

TEST(passages_are_the_messages_that_were_posted) {
    for (uint64_t seed = 0; seed < 12; ++seed) {
        Options options = plain();
        options.engine.seed = seed;
        options.engine.shuffle = seed != 0;
        Rig r(options);
        r.engine.keep_passages(1 << 10);
        std::vector<Writer*> writers;
        std::map<uint32_t, std::vector<Posted>> posted;  // by queue pair
        for (int i = 0; i < 3; ++i) writers.push_back(r.pair());
        uint64_t bytes_of_all = 0, count = 0;
        for (uint64_t i = 0; i < 120; ++i) {
            Writer* w = writers[mix(seed, i) % writers.size()];
            const uint64_t draw = mix(seed + 1, i);
            // Short ones, ones of several slices, and words.
            uint32_t bytes = uint32_t(8 + draw / 3 % (draw % 7 == 0 ? 50'000 : 500));
            uint64_t end = 0;
            if (draw % 3 == 0) {
                bytes = 8;
                end = r.add_to(w, 2000, 1);
            } else {
                end = r.write(w, 8192, 16384, bytes);
            }
            CHECK(end != 0);
            posted[w->queue.number].push_back({end - 1, bytes});
            bytes_of_all += bytes;
            count += 1;
            if (draw % 5 == 0) r.engine.advance();
        }
        for (Writer* w : writers) CHECK(r.flush(w));
        r.engine.settle();
        uint64_t total = 0;
        const std::vector<Passage> seen = r.engine.passages(0, &total);
        CHECK_EQUAL(seen.size(), count);
        CHECK_EQUAL(total, count);
        std::map<uint32_t, size_t> next;
        uint64_t before = 0, bytes = 0;
        for (const Passage& passage : seen) {
            const std::vector<Posted>& expected = posted.at(passage.queue);
            const size_t i = next[passage.queue]++;
            CHECK(i < expected.size());
            CHECK_EQUAL(passage.position, expected[i].position);
            CHECK_EQUAL(passage.bytes, expected[i].bytes);
            CHECK_EQUAL(passage.nic, 0);
            // At 10 bytes for a nanosecond, and 1000 ns later.
            const Picoseconds line = passage.bytes * kNanosecond / 10 + 1000 * kNanosecond;
            CHECK(passage.depart != 0);
            CHECK(passage.arrive >= passage.depart + (passage.bytes == 8 ? 1 : line));
            CHECK(passage.landed >= passage.arrive);
            CHECK(passage.landed >= before && passage.landed <= r.engine.now());
            CHECK_EQUAL(passage.rung, 0);
            CHECK_EQUAL(passage.completed, 0);
            before = passage.landed;
            bytes += passage.bytes;
        }
        CHECK_EQUAL(bytes, bytes_of_all);
        CHECK_EQUAL(r.engine.traffic(0).messages, count);
        r.expect_clean();
    }
}

TEST(a_full_ring_keeps_the_newest_and_all_are_counted) {
    Rig r(plain());
    r.engine.keep_passages(8);
    Writer* w = r.pair();
    write_in_turn(r, w, 50);
    uint64_t total = 0;
    CHECK(positions(r.engine.passages(0, &total)) ==
          std::vector<uint64_t>({42, 43, 44, 45, 46, 47, 48, 49}));
    CHECK_EQUAL(total, 50);
    // What was shown may be forgotten, and the ring goes on.
    CHECK_EQUAL(r.engine.passages(total, &total).size(), size_t(0));
    for (int i = 0; i < 2; ++i) CHECK(r.write(w, 0, 0, 800) != 0);
    CHECK(r.flush(w));
    CHECK(positions(r.engine.passages(50, &total)) == std::vector<uint64_t>({50, 51}));
    r.expect_clean();
}

TEST(nothing_is_noted_unless_asked_for) {
    Rig r(plain());
    // The memory is there, and nobody is told of it.
    r.engine.keep_passages(8);
    const PassageRing there = *r.engine.ring();
    r.engine.ring()->capacity = 0;
    Writer* w = r.pair();
    write_in_turn(r, w, 20);
    r.expect_clean();
    CHECK_EQUAL(r.engine.ring()->count, 0);
    for (uint64_t i = 0; i < 8; ++i) {
        CHECK_EQUAL(there.marks[i], 0);
        CHECK_EQUAL(there.notes[i].bytes, 0);
    }
}

TEST(flushed_requests_are_not_noted) {
    Options options = plain();
    options.engine.rules.push_back(once(kKillQueue, 12));
    Rig r(options);
    r.engine.keep_passages(32);
    Writer* w = r.pair();
    for (int i = 0; i < 15; ++i) CHECK(r.write(w, 0, 0, 800) != 0);
    r.engine.settle();
    CHECK_EQUAL(r.count(EventKind::kFailed), size_t(1));
    uint64_t total = 0;
    CHECK(r.engine.passages(0, &total).size() <= 12);
    CHECK(total <= 12);
}

TEST(a_passage_that_is_not_whole_is_not_read) {
    RingHere r(4);
    uint64_t total = 0;
    r.add(0);
    CHECK_EQUAL(r.stall(), 1);
    r.add(2);
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({0, 2}));
    CHECK_EQUAL(total, 3);
    r.add(3);
    r.add(4);
    // Number 5 would write where number 1 still does.
    r.add(5);
    CHECK_EQUAL(r.passages[1].position, 0);
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({2, 3, 4}));
    CHECK_EQUAL(total, 6);
    // It comes to an end, too late to be shown; number 9 may have the place.
    r.passages[1] = RingHere::numbered(1);
    r.marks[1] = PassageRing::mark_of(1);
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({2, 3, 4}));
    for (uint64_t i = 6; i < 10; ++i) r.add(i);
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({6, 7, 8, 9}));
    // Also who exchanged the mark and has not ended.
    r.marks[2] = PassageRing::mark_of(10) + 1;
    CHECK_EQUAL(r.stall(), 10);
    for (uint64_t i = 11; i < 15; ++i) r.add(i);
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({11, 12, 13}));
    CHECK_EQUAL(r.passages[2].position, 6);
    CHECK_EQUAL(total, 15);
}

TEST(a_passage_that_is_written_over_while_it_is_read_is_not_shown) {
    RingHere r(4);
    uint64_t total = 0;
    for (uint64_t i = 0; i < 4; ++i) r.add(i);
    // Number 4 takes the place of number 0, after the marks were read.
    CHECK(positions(r.read_while([&] { r.add(4); }, [] {}, 0, &total)) ==
          std::vector<uint64_t>({1, 2, 3}));
    CHECK_EQUAL(total, 4);
    // Number 5 is whole only after the old number 1 was read in its place.
    CHECK_EQUAL(r.stall(), 5);
    r.marks[1] = PassageRing::mark_of(5) + 1;
    const auto finish = [&] {
        r.passages[1] = RingHere::numbered(5);
        r.marks[1] = PassageRing::mark_of(5);
    };
    CHECK(positions(r.read_while([] {}, finish, 0, &total)) == std::vector<uint64_t>({2, 3, 4}));
    CHECK(positions(r.read(0, &total)) == std::vector<uint64_t>({2, 3, 4, 5}));
    CHECK_EQUAL(total, 6);
}

TEST(threads_note_while_another_reads) {
    RingHere r(1 << 10);
    constexpr uint64_t kEach = 200'000;
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&r, t] {
            for (uint64_t i = 0; i < kEach; ++i) r.add(t << 20 | i);
        });
    }
    uint64_t seen = 0, total = 0;
    while (total < 3 * kEach) {
        for (const Passage& p : r.read(0, &total)) {
            const Passage expected = RingHere::numbered(p.position);
            CHECK(memcmp(&p, &expected, offsetof(Passage, nic) + sizeof p.nic) == 0);
            ++seen;
        }
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(seen >= 1 << 10);
    CHECK_EQUAL(total, 3 * kEach);
}
