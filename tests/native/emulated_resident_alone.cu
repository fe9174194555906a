// The engine's kernel with nothing beside it: everything has been posted before it starts, and it
// ends by itself when its host is silent. So a tool that lets kernels run one by one can look into
// it (launch/sanitize.sh).

#include "gpu_running.cuh"

using namespace gpu;

namespace {

constexpr int32_t kChannels = 4;
constexpr uint64_t kPlace = 1 << 19;  ///< of a message in its region

/// What a channel's thread puts, one after another: in a block's ring, and shared among blocks.
__device__ uint64_t bytes_of(uint32_t number) {
    constexpr uint64_t kSizes[] = {16, 64, 80, 7168, 40'000, 300'000};
    return kSizes[number % 6];
}
constexpr uint32_t kPuts = 6;

__device__ uint64_t word_of(int32_t channel, uint64_t i) { return mix(uint64_t(channel), i); }

/// A block for each channel; its first thread posts, and waits for nothing.
__global__ void post_all(const __grid_constant__ Ibgda fabric, uint64_t* send, uint64_t* result) {
    const auto channel = int32_t(blockIdx.x);
    const uint64_t first = uint64_t(channel) * kPuts * kPlace;
    for (uint64_t i = threadIdx.x; i < kPuts * kPlace / 8; i += blockDim.x) {
        send[first / 8 + i] = word_of(channel, i);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    const Lane lane{1, channel};
    for (uint32_t k = 0; k < kPuts; ++k) {
        const uint64_t at = first + k * kPlace;
        count(result, kFailedCalls,
              fabric::put_signal(fabric, lane, {kReceive, 0, at}, {kSend, 0, at}, bytes_of(k),
                                 channel) == 0);
    }
    // Onto the signal, and its old value to where nothing was put from.
    count(result, kFailedCalls,
          fabric::fetch_add_at(fabric, lane, {kSignals, 0, uint64_t(channel) * 8},
                               {kSend, 0, first + kPlace - 8}, 100) == 0);
}

__global__ void compare(const __grid_constant__ Ibgda fabric, const uint64_t* receive,
                        const uint64_t* signals, const uint64_t* send, uint64_t* result) {
    const auto channel = int32_t(blockIdx.x);
    const uint64_t first = uint64_t(channel) * kPuts * kPlace;
    uint64_t different = 0;
    for (uint64_t i = threadIdx.x; i < kPuts * kPlace / 8; i += blockDim.x) {
        const bool is_put = i * 8 % kPlace < bytes_of(uint32_t(i * 8 / kPlace));
        different += receive[first / 8 + i] != (is_put ? word_of(channel, i) : 0);
    }
    if (threadIdx.x == 0) {
        different += signals[channel] != kPuts + 100;
        different += send[(first + kPlace) / 8 - 1] != kPuts;
        count(result, kFailedCalls, !fabric::flush(fabric, channel, fabric.timeout_ns));
    }
    count(result, kDifferent, different);
}

}  // namespace

TEST(everything_was_posted_before) {
    Options options;
    options.num_channels = kChannels;
    options.server.patience_ns = kSecond / 2 * slowness();
    World world(options);
    load(post_all, compare);
    Node& node = world.nodes[0];
    const auto words = [&](int32_t n, RegionId region) {
        return reinterpret_cast<uint64_t*>(world.nodes[size_t(n)].regions[region]);
    };
    post_all<<<kChannels, 128, 0, world.stream>>>(node.fabric, words(0, kSend), world.result);
    CUDA(cudaGetLastError());
    world.wait_for_writers();
    world.start();
    const int64_t until = fabric::now_ns() + 20 * options.server.patience_ns;
    while (!node.server->has_ended()) CHECK(fabric::now_ns() < until);
    CHECK(node.server->look().abandoned);
    CHECK_EQUAL(node.server->look().broken_rules.count, 0);
    compare<<<kChannels, 128, 0, world.stream>>>(node.fabric, words(1, kReceive),
                                                 words(1, kSignals), words(0, kSend), world.result);
    CUDA(cudaGetLastError());
    world.wait_for_writers();
    Results seen;
    world.read(world.result, seen.values, kNumCounted);
    expect_good(seen);
}
