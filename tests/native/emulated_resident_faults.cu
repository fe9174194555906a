// Requests that fail beside the GPU-resident engine: the answers are those of the host's engine
// (wrong_requests.h), and other queue pairs do not notice.

#include "../../csrc/emulated/options.h"
#include "gpu_running.cuh"
#include "wrong_requests.h"

using namespace gpu;
using requests::Answer;
using requests::Wrong;

namespace {

/// A channel posts a wrong request each, the last one a right one.
struct Posts {
    Ibgda fabric;
    uint64_t region_bytes;
    Wrong first;        ///< of channel 0; what follows is of the next ones
    int32_t num_wrong;  ///< channels that post something wrong
    int64_t* took;      ///< [channels]: nanoseconds
    uint64_t* result;   ///< [kFailedCalls]: of right requests
};

constexpr uint64_t kStride = requests::kPlaceWords * 8;

__device__ requests::Places places_of(const Posts& posts, int32_t channel) {
    const RegionKey* mine = posts.fabric.local;
    const RegionKey* theirs = &posts.fabric.remote[EPCOMM_FABRIC_MAX_REGIONS];
    const auto remote = [&](int32_t region) {
        return mlx5::RemotePlace{theirs[region].address, theirs[region].key};
    };
    const auto local = [&](int32_t region) {
        return mlx5::LocalPlace{mine[region].address, mine[region].key};
    };
    const uint64_t begin = theirs[kReceive].address, bytes = posts.region_bytes;
    return {{begin + uint64_t(channel) * kStride, theirs[kReceive].key},
            local(kSend),
            remote(kSignals),
            begin,
            begin + bytes,
            mine[kSend].address + bytes,
            remote(kSend),
            remote(kReceive),
            remote(kReceive),
            remote(kForeign),
            local(kForeign),
            local(kReceive)};
}

__global__ void post_wrong_ones(const __grid_constant__ Posts posts) {
    const auto channel = int32_t(blockIdx.x);
    const bool is_wrong = channel < posts.num_wrong;
    const Wrong what = is_wrong ? Wrong(uint32_t(posts.first) + uint32_t(channel)) : Wrong::kNone;
    fabric::FabricWait wait(posts.fabric, posts.fabric.timeout_ns);
    const int64_t begin = fabric::now_ns();
    const bool went_well = requests::post_between(fabric::queue_of(posts.fabric, {1, channel}),
                                                  what, places_of(posts, channel), true, wait);
    posts.took[channel] = fabric::now_ns() - begin;
    if (!is_wrong) count(posts.result, kFailedCalls, !went_well);
}

/// The shortest time of a put with a signal and its flush.
__global__ void time_puts(const __grid_constant__ Ibgda fabric, int32_t channel, int rounds,
                          int64_t* shortest, uint64_t* result) {
    const Lane lane{1, channel};
    *shortest = INT64_MAX;
    for (int i = 0; i < rounds; ++i) {
        const int64_t begin = fabric::now_ns();
        const bool ok =
            fabric::put_signal(fabric, lane, {kReceive, 0, 0}, {kSend, 0, 0}, 1024, channel) != 0 &&
            fabric::flush(fabric, channel, fabric.timeout_ns);
        count(result, kFailedCalls, !ok);
        const int64_t took = fabric::now_ns() - begin;
        if (took < *shortest) *shortest = took;
    }
}

/// What channels of node 0 post, and what became of it.
class Refusals {
 public:
    Refusals(const Options& options, Wrong first, int32_t num_wrong)
        : took_(mine_.zeros<int64_t>(uint64_t(options.num_channels))),
          num_wrong_(num_wrong),
          world_(options, post_wrong_ones) {
        for (uint64_t i = 0; i < 2; ++i) world_.write(world_.words(0, kSend) + i, kSent[i]);
        const Posts posts = {world_.nodes[0].fabric, options.region_bytes, first, num_wrong, took_,
                             world_.result};
        post_wrong_ones<<<uint32_t(options.num_channels), 1, 0, world_.stream>>>(posts);
        CUDA(cudaGetLastError());
        expect_good(world_.results());
    }

    void expect(int32_t channel, const Answer& answer) {
        const Options& options = world_.options;
        const auto index = size_t(options.num_channels + channel);
        SendQueue queue;
        std::vector<mlx5::Completion> completions(options.depth);
        world_.read(world_.nodes[0].device_queues + index, &queue);
        // What a flush posted when the queue pair had failed is flushed a little later.
        const int64_t until = fabric::now_ns() + 5 * kSecond;
        const uint64_t last = queue.reserved - options.start - 1;
        do {
            CHECK(fabric::now_ns() < until);
            world_.read(queue.completions, completions.data(), completions.size());
        } while (mlx5::opcode_of(completions[last].opcode_owner) == mlx5::kInvalid);
        requests::expect_refused(queue, completions.data(), options.start, answer);
        expect_words(channel, true);
    }

    /// The channels with right requests are as they should be, and what the NIC recorded is
    /// `violations`.
    void expect_others(const std::vector<uint32_t>& violations) {
        for (int32_t c = num_wrong_; c < world_.options.num_channels; ++c) expect_words(c, false);
        for (Node& node : world_.nodes) CHECK(node.server->stop(kStopClean, 5 * kSecond));
        std::vector<uint32_t> seen(kNumViolations);
        for (const Event& event : world_.nodes[0].server->events()) {
            if (event.kind == EventKind::kViolation) seen[event.code] += 1;
        }
        for (uint32_t i = 0; i < kNumViolations; ++i) CHECK_EQUAL(seen[i], violations[i]);
        CHECK_EQUAL(world_.nodes[1].server->look().broken_rules.count, 0);
    }

    int64_t took(int32_t channel) {
        int64_t ns = 0;
        world_.read(took_ + channel, &ns);
        return ns;
    }

 private:
    static constexpr uint64_t kSent[2] = {0x1111222233334444, 0x5555666677778888};

    void expect_words(int32_t channel, bool failed) {
        uint64_t received[requests::kPlaceWords];
        world_.read(world_.words(1, kReceive) + channel * requests::kPlaceWords, received,
                    requests::kPlaceWords);
        requests::expect_words(received, kSent, failed);
    }

    Device mine_;  // given back after the engines have ended
    int64_t* took_;
    int32_t num_wrong_;
    RunningWorld world_;
};

Options small() {
    Options options;
    options.depth = 16;
    options.region_bytes = 1 << 20;
    return options;
}

/// The queue pair of a channel of node 0, which has one plane.
int64_t queue_of_channel(int32_t channel) { return kFirstQueue + channel; }

/// The second request of channel 0 meets the fault.
Options with_fault(Fault fault) {
    Options options = small();
    options.num_channels = 3;
    options.line.retry_ns = 500'000'000;
    options.server.rules = {{fault, 0, queue_of_channel(0), 1, 1, kAlways, 1, 0}};
    return options;
}

}  // namespace

TEST(a_wrong_request_ends_its_queue_pair_only) {
    for (uint64_t start : {0u, 65534u}) {
        Options options = small();
        options.start = start;
        const auto num_wrong = int32_t(requests::kNumWrong) - 1;
        options.num_channels = num_wrong + 2;
        Refusals refusals(options, Wrong(1), num_wrong);
        std::vector<uint32_t> violations(kNumViolations);
        for (int32_t channel = 0; channel < num_wrong; ++channel) {
            printf("wrong request %d\n", channel + 1);
            fflush(stdout);
            const Answer answer = requests::answer_to(Wrong(channel + 1));
            refusals.expect(channel, answer);
            violations[answer.violation] += answer.violation != kNoViolation;
        }
        refusals.expect_others(violations);
    }
}

TEST(a_refused_key_ends_its_queue_pair_only) {
    Refusals refusals(with_fault(kBadKey), Wrong::kNone, 1);
    refusals.expect(0, requests::answer_to(kBadKey));
    refusals.expect_others(std::vector<uint32_t>(kNumViolations));
}

TEST(retries_are_exceeded_in_their_time_and_others_do_not_wait_for_it) {
    const Options options = with_fault(kRetryExceeded);
    Refusals refusals(options, Wrong::kNone, 1);
    refusals.expect(0, requests::answer_to(kRetryExceeded));
    refusals.expect_others(std::vector<uint32_t>(kNumViolations));
    CHECK(refusals.took(0) >= int64_t(options.line.retry_ns));
    for (int32_t channel : {1, 2}) CHECK(refusals.took(channel) < refusals.took(0) / 2);
}

TEST(a_slow_plane_is_late_by_what_it_was_told) {
    constexpr int64_t kSlowNs = 3'000'000;
    Options options = small();
    options.num_planes = options.num_channels = 2;
    options.server.rules = parse_options("planes=2 slow_plane=1 slow_us=3000", 2).rules;
    Device mine;
    int64_t* shortest = mine.zeros<int64_t>(2);
    RunningWorld world(options, time_puts);
    for (int32_t channel : {0, 1}) {
        time_puts<<<1, 1, 0, world.stream>>>(world.nodes[0].fabric, channel, 20, shortest + channel,
                                             world.result);
        CUDA(cudaGetLastError());
    }
    expect_good(world.results());
    int64_t took[2];
    world.read(shortest, took, 2);
    printf("modelled network: %lld ns, on the slow plane %lld ns\n", (long long)took[0],
           (long long)took[1]);
    CHECK(took[0] < kSlowNs);
    CHECK(took[1] >= kSlowNs);
    for (int32_t channel : {0, 1}) CHECK_EQUAL(world.signal(1, channel), 20);
    world.expect_clean();
}
