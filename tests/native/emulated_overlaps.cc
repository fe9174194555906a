// Requests of one queue pair that use the same memory: it is as if each had ended before the next.

#include <algorithm>

#include "plain_line.h"

using namespace rig;

namespace {

/// What memory becomes, request by request.
struct Model {
    std::vector<uint64_t> here, there;

    explicit Model(const Rig& r) : here(r.memory[0]), there(r.memory[1]) {}

    void write(uint64_t from, uint64_t to, uint64_t words) {
        std::copy_n(here.begin() + long(from), words, there.begin() + long(to));
    }
    void read(uint64_t from, uint64_t to, uint64_t words) {
        std::copy_n(there.begin() + long(from), words, here.begin() + long(to));
    }
    void add(uint64_t word, uint64_t amount, uint64_t landing) {
        here[landing] = there[word];
        there[word] += amount;
    }
};

/// Writes take from the first half of memory, what comes back goes to the second.
constexpr uint64_t kHalf = 1 << 16;

void read_back(Rig* r, Writer* w, uint64_t from, uint64_t to, uint64_t words) {
    CHECK(r->post(w, [&](const Header& header) {
        return mlx5::read_request(header, r->remote(1, from), r->local(0, to), uint32_t(words * 8));
    }) != 0);
}

Options overlapping(uint64_t seed) {
    Options options = plain();
    options.engine.seed = seed;
    options.engine.shuffle = seed != 0;
    return options;
}

void expect(const Rig& r, const Model& model) {
    CHECK(r.memory[1] == model.there);
    CHECK(r.memory[0] == model.here);
}

}  // namespace

TEST(of_two_writes_the_later_one_stays) {
    // The end of the first lies in the second; then the other way round; then all of it.
    for (uint64_t shift : {120u, 0u, 8u}) {
        Rig r(overlapping(0));
        Writer* w = r.pair();
        for (uint64_t i = 0; i < kHalf; ++i) r.memory[0][i] = mix(i, 1);
        Model model(r);
        const uint64_t first = 1000, second = first + shift - 4 * uint64_t(shift == 8);
        CHECK(r.write(w, 0, first, 128 * 8, false, Ring::kWhenDue) != 0);
        CHECK(r.write(w, 500, second, 128 * 8) != 0);
        model.write(0, first, 128);
        model.write(500, second, 128);
        CHECK(r.flush(w));
        expect(r, model);
        r.expect_clean();
    }
}

TEST(a_read_brings_what_was_written_before_it) {
    Rig r(overlapping(0));
    Writer* w = r.pair();
    for (uint64_t i = 0; i < kHalf; ++i) r.memory[0][i] = mix(i, 2);
    Model model(r);
    CHECK(r.write(w, 0, 1000, 4096, false, Ring::kWhenDue) != 0);
    read_back(&r, w, 1100, kHalf, 512);
    model.write(0, 1000, 512);
    model.read(1100, kHalf, 512);
    CHECK(r.flush(w));
    expect(r, model);
    r.expect_clean();
}

TEST(as_if_each_had_ended_before_the_next) {
    for (uint64_t seed = 0; seed < 60 / (kSlowness > 1 ? 5 : 1); ++seed) {
        Rig r(overlapping(seed));
        Writer* w = r.pair();
        for (uint64_t i = 0; i < kHalf; ++i) r.memory[0][i] = mix(i, seed);
        Model model(r);
        for (uint64_t i = 0; i < 150; ++i) {
            const uint64_t draw = mix(seed + 1, i);
            const uint64_t at = 2000 + draw % 600, from = draw / 600 % 1000;
            const uint64_t most = draw % 11 == 0 ? 5000 : draw % 3 == 0 ? 12 : 300;
            const uint64_t words = draw / 7 % most + 1;
            switch (draw / 13 % 8) {
                case 0:
                    CHECK(r.add_to(w, at, draw, kHalf + i) != 0);
                    model.add(at, draw, kHalf + i);
                    break;
                case 1:
                    read_back(&r, w, at, kHalf + 1000 + from, words);
                    model.read(at, kHalf + 1000 + from, words);
                    // What follows a read may change what it brings: only a fence would not let it.
                    CHECK(r.flush(w));
                    break;
                default:
                    CHECK(r.write(w, from, at, uint32_t(words * 8)) != 0);
                    model.write(from, at, words);
            }
            if (draw % 5 == 0) r.engine.advance();
        }
        CHECK(r.flush(w));
        expect(r, model);
        r.expect_clean();
    }
}

TEST(bodies_that_do_not_meet_go_side_by_side) {
    // Rising, falling, and in turn: the last body is begun before the first message has landed.
    for (const auto& places : {std::vector<uint64_t>{0, 1, 2, 3}, {3, 2, 1, 0}, {0, 2, 1, 3}}) {
        Rig r(overlapping(0));
        Writer* w = r.pair();
        for (uint64_t i = 0; i < kHalf; ++i) r.memory[0][i] = mix(i, 3);
        for (const uint64_t place : places) {
            CHECK(r.write(w, place * 1000, 1000 + place * 1000, 8000, place == places.back(),
                          Ring::kWhenDue) != 0);
        }
        mlx5::ring(&w->queue);
        // The line takes 800 ns for each, and 1000 ns to the peer: the first arrives at 1800 ns.
        bool all_begun = false;
        while (r.memory[1][1000 + places[0] * 1000 + 999] == 0) {
            all_begun = all_begun || r.memory[1][1000 + places[1] * 1000] != 0;
            r.engine.advance();
        }
        CHECK(all_begun);
        CHECK(r.flush(w));
        r.expect_clean();
    }
}
