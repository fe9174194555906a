// Producers of the fabric API (csrc/fabric/ibgda.h) that race for the same queues and counters,
// over thousands of schedules. Compiled with EPCOMM_EMULATED.

#include "fabric_world.h"
#include "fibers.h"

using namespace rig;

namespace {

constexpr uint64_t kChunkWords = 40;

Options seeded(uint64_t seed) {
    Options options;
    options.num_blocks = options.num_completions = 4u << seed % 3;
    options.start = seed % 4 == 0 ? 0 : 65536 - seed % 29;
    options.memory_bytes = 64;
    options.engine.seed = seed;
    options.engine.shuffle = true;
    if (seed % 2 != 0) {
        options.engine.rules = {everywhere(kDelay, 30'000 * kNanosecond, 16384),
                                everywhere(kPieces, 20'000 * kNanosecond, 16384)};
    }
    return options;
}

uint64_t word_of(uint64_t chunk, uint64_t k) { return chunk << 32 | k | 1u << 20; }

}  // namespace

TEST(a_counter_of_many_producers_counts_what_has_arrived) {
    for (uint64_t seed = 0; seed < 3000; ++seed) {
        World world(2, 1, 1, seeded(seed));
        Node &node = world.nodes[0], &peer = world.nodes[1];
        constexpr uint64_t kProducers = 3, kChunks = 8;
        Fibers fibers(seed);
        bool good = true;
        for (uint64_t p = 0; p < kProducers; ++p) {
            fibers.add([&, p] {
                for (uint64_t i = 0; i < kChunks && good; ++i) {
                    const uint64_t chunk = p * kChunks + i, at = chunk * kChunkWords;
                    for (uint64_t k = 0; k < kChunkWords; ++k) {
                        node.regions[1][at + k] = word_of(chunk, k);
                    }
                    good = good && fabric::put_signal(node.fabric, {1, 0}, {2, 0, at * 8},
                                                      {1, 0, at * 8}, kChunkWords * 8, 5) != 0;
                }
            });
        }
        uint64_t seen = 0;
        const auto between = [&] {
            world.rig.engine.advance();
            const uint64_t now = peer.signal(5);
            good = good && now >= seen;
            if (now == seen) return;
            seen = now;
            uint64_t here = 0;
            for (uint64_t chunk = 0; chunk < kProducers * kChunks; ++chunk) {
                const uint64_t* words = &peer.regions[2][chunk * kChunkWords];
                uint64_t k = 0;
                while (k < kChunkWords && words[k] == word_of(chunk, k)) ++k;
                here += k == kChunkWords;
            }
            good = good && here >= seen;
        };
        good = fibers.run(between, 200'000) && good;
        while (good && world.rig.engine.advance()) between();
        if (!good || seen != kProducers * kChunks) {
            printf("seed %llu: counter %llu\n", (unsigned long long)seed, (unsigned long long)seen);
        }
        CHECK(good);
        CHECK_EQUAL(seen, kProducers * kChunks);
        CHECK_EQUAL(world.rig.engine.violations(), 0);
    }
}
