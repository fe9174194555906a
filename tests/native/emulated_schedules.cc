// Right writers under thousands of schedules and every fault: never torn, never stuck, nothing
// lost. And the harness itself: where the contract is broken on purpose, it must see that.

#include "chunks.h"
#include "wrong_requests.h"

using namespace rig;

namespace {

constexpr uint64_t kSeeds = kSlowness > 1 ? 25 : 3000;

ChunkOptions seeded(uint64_t seed) {
    ChunkOptions options;
    options.rig.engine.seed = seed;
    options.rig.engine.shuffle = true;
    options.rig.num_blocks = options.rig.num_completions = 4u << seed % 4;
    options.rig.num_completions <<= seed / 4 % 2;
    options.rig.start = seed % 3 == 0 ? 0 : 65536 - seed % 61;
    options.num_queues = 1 + seed % 3;
    options.num_writers = 1 + seed / 3 % 3;
    return options;
}

constexpr Picoseconds kMicrosecond = 1000 * kNanosecond;

/// Faults that a right program does not notice: any of them together, and each of them now and then
/// also where there are few seeds.
std::vector<FaultRule> harmless(uint64_t seed) {
    const FaultRule all[] = {
        everywhere(kDelay, 30 * kMicrosecond, 16384),
        everywhere(kEarlyFetch, 0, 32768),
        everywhere(kLateFetch, 20 * kMicrosecond, 16384),
        everywhere(kLostDoorbell, 50 * kMicrosecond, 16384),
        everywhere(kPieces, 20 * kMicrosecond, 32768),
        everywhere(kLateCompletion, 30 * kMicrosecond, 16384),
    };
    std::vector<FaultRule> rules;
    for (uint64_t i = 0; i < 6; ++i) {
        if ((seed >> i & 1) != 0 || (seed + i) % 6 == 0) rules.push_back(all[i]);
    }
    return rules;
}

void expect_good(Chunks& chunks, uint64_t seed) {
    if (chunks.run()) return;
    printf("seed %llu: torn %d, failed %d, stuck %d, flushed early %d\n", (unsigned long long)seed,
           chunks.torn, chunks.queue_failed, chunks.stuck, chunks.flushed_early);
    for (const Event& event : chunks.rig.engine.events()) printf("%s\n", describe(event).c_str());
    exit(1);
}

}  // namespace

TEST(thousands_of_schedules) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        Chunks chunks(seeded(seed));
        expect_good(chunks, seed);
    }
}

TEST(thousands_of_schedules_with_harmless_faults) {
    size_t injected[kNumFaults] = {};
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        ChunkOptions options = seeded(seed);
        options.rig.engine.rules = harmless(seed);
        Chunks chunks(options);
        expect_good(chunks, seed);
        for (const Event& event : chunks.rig.engine.events()) {
            if (event.kind == EventKind::kFault) injected[event.code] += 1;
        }
    }
    for (Fault fault : {kDelay, kEarlyFetch, kLateFetch, kLostDoorbell, kPieces, kLateCompletion}) {
        // Some tens in a seed that has the fault, as is at least every sixth.
        if (injected[fault] < kSeeds) printf("%s: %zu\n", name(fault), injected[fault]);
        CHECK(injected[fault] >= kSeeds);
    }
}

TEST(the_same_seed_is_the_same_run) {
    for (uint64_t seed = 0; seed < 60 / kSlowness; ++seed) {
        ChunkOptions options = seeded(seed);
        options.rig.engine.rules = harmless(63);
        Chunks one(options), two(options);
        expect_good(one, seed);
        expect_good(two, seed);
        const auto first = one.rig.engine.events(), second = two.rig.engine.events();
        CHECK_EQUAL(first.size(), second.size());
        CHECK(!first.empty());
        for (size_t i = 0; i < first.size(); ++i) {
            CHECK_EQUAL(first[i].time, second[i].time);
            CHECK_EQUAL(first[i].position, second[i].position);
            CHECK_EQUAL(first[i].amount, second[i].amount);
            CHECK_EQUAL(first[i].code, second[i].code);
        }
        CHECK_EQUAL(one.rig.engine.now(), two.rig.engine.now());
    }
}

TEST(recorded_faults_can_be_replayed) {
    for (uint64_t seed = 0; seed < 60 / kSlowness; ++seed) {
        ChunkOptions options = seeded(seed);
        options.rig.engine.rules = harmless(63);
        Chunks recorded(options);
        expect_good(recorded, seed);
        options.rig.engine.rules = replay(recorded.rig.engine.events());
        Chunks again(options);
        expect_good(again, seed);
        const auto first = recorded.rig.engine.events(), second = again.rig.engine.events();
        CHECK_EQUAL(first.size(), second.size());
        for (size_t i = 0; i < first.size(); ++i) {
            CHECK_EQUAL(first[i].time, second[i].time);
            CHECK_EQUAL(first[i].code, second[i].code);
            CHECK_EQUAL(first[i].amount, second[i].amount);
        }
        // Another seed draws others.
        ChunkOptions other = seeded(seed);
        other.rig.engine.rules = harmless(63);
        other.rig.engine.seed += 1'000'000;
        Chunks different(other);
        expect_good(different, seed);
        CHECK(different.rig.engine.now() != recorded.rig.engine.now());
    }
}

TEST(fatal_faults_end_in_an_error_and_never_in_torn_data) {
    for (Fault fault : {kRetryExceeded, kBadKey, kKillQueue}) {
        for (uint64_t seed = 0; seed < 300 / kSlowness; ++seed) {
            ChunkOptions options = seeded(seed);
            const uint64_t victim = options.rig.start + seed % 40;
            options.rig.engine.rules = harmless(seed);
            options.rig.engine.rules.push_back(once(fault, victim));
            Chunks chunks(options);
            CHECK(!chunks.run());
            CHECK(!chunks.torn && !chunks.stuck && !chunks.flushed_early);
            const SendQueue* failed = nullptr;
            for (Writer* w : chunks.queues) {
                if (!mlx5::works(w->queue)) failed = &w->queue;
            }
            CHECK(failed != nullptr);
            CHECK_EQUAL(failed->error.syndrome, requests::answer_to(fault).syndrome);
            if (fault != kKillQueue) CHECK_EQUAL(failed->error_position, victim);
            CHECK_EQUAL(chunks.rig.engine.violations(), 0);
        }
    }
}

TEST(relaxed_ordering_tears_what_trusts_an_order) {
    // Atomics that pass writes: with a connection like that, signals must not be trusted.
    int torn = 0;
    for (uint64_t seed = 0; seed < 100 / kSlowness; ++seed) {
        ChunkOptions options = seeded(seed);
        options.rig.engine.rules = {everywhere(kPieces, 20 * kMicrosecond),
                                    everywhere(kRelaxed, 0)};
        Chunks chunks(options);
        CHECK(!chunks.run() || !chunks.torn);
        torn += chunks.torn;
    }
    CHECK(torn > 90 / int(kSlowness));
}

TEST(an_early_completion_tears_a_flush) {
    int early = 0;
    for (uint64_t seed = 0; seed < 100 / kSlowness; ++seed) {
        ChunkOptions options = seeded(seed);
        options.rig.engine.rules = {everywhere(kEarlyCompletion, 0)};
        Chunks chunks(options);
        chunks.run();
        early += chunks.flushed_early;
    }
    CHECK(early > 90 / int(kSlowness));
}
