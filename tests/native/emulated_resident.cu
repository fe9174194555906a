// The GPU-resident engine on a GPU: writers' kernels beside it. Every byte is compared.

#include "../../csrc/emulated/options.h"
#include "gpu_exchange.cuh"

using namespace gpu;

namespace {

__global__ void exchange_plainly(const __grid_constant__ Exchange x) {
    exchange_chunks(x, StorePlainly());
}

/// One thread puts, flushes and looks at the peer's memory, many times.
__global__ void put_and_flush(const __grid_constant__ Ibgda fabric, Lane lane, uint64_t* send,
                              const uint64_t* theirs, uint64_t bytes, int rounds,
                              uint64_t* result) {
    for (int i = 1; i <= rounds; ++i) {
        for (uint64_t w = 0; w < bytes / 8; ++w) send[w] = i * 1000 + w;
        const bool ok = fabric::put(fabric, lane, {kReceive, 0, 0}, {kSend, 0, 0}, bytes) != 0 &&
                        fabric::flush(fabric, lane.channel, fabric.timeout_ns);
        count(result, kFailedCalls, !ok);
        if (!ok) return;
        uint64_t different = 0;
        for (uint64_t w = bytes / 8; w-- > 0;) {  // the last ones come last
            different += fabric::load_relaxed(&theirs[w]) != i * 1000 + w;
        }
        count(result, kDifferent, different);
    }
}

/// All warps of all blocks add to one word of the peer, on any channel: what only the NIC's atomics
/// can do.
__global__ void add_to_word(const __grid_constant__ Ibgda fabric, int32_t peer, uint64_t word,
                            int rounds, uint64_t* result) {
    const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (threadIdx.x % 32 != 0) return;
    const RegionKey to = fabric.remote[peer * EPCOMM_FABRIC_MAX_REGIONS + kSignals];
    const RegionKey old = fabric.local[kSend];
    fabric::FabricWait wait(fabric, fabric.timeout_ns);
    for (int i = 0; i < rounds; ++i) {
        const int32_t channel = int32_t((warp + uint32_t(i)) % uint32_t(fabric.num_channels));
        SendQueue* queue = fabric::queue_of(fabric, {peer, channel});
        const auto make = [&](uint32_t, uint64_t position) {
            return mlx5::fetch_add_request(mlx5::header_of(*queue, position, false),
                                           {to.address + word * 8, to.key},
                                           {old.address + warp * 8, old.key}, 1);
        };
        count(result, kFailedCalls,
              mlx5::post(mlx5::OneThread(), queue, 1, mlx5::Ring::kNow, make, wait) == 0);
    }
    for (int32_t c = 0; c < fabric.num_channels; ++c) {
        count(result, kFailedCalls, !fabric::flush(fabric, c, fabric.timeout_ns));
    }
}

/// A warp posts a request a lane: writes, reads of what was written, inline bytes, nothing.
__global__ void post_by_lanes(const __grid_constant__ Ibgda fabric, Lane lane, int rounds,
                              uint64_t* result) {
    SendQueue* queue = fabric::queue_of(fabric, lane);
    const RegionKey from = fabric.local[kSend];
    const RegionKey to = fabric.remote[lane.peer * EPCOMM_FABRIC_MAX_REGIONS + kReceive];
    fabric::FabricWait wait(fabric, fabric.timeout_ns);
    for (int i = 0; i < rounds; ++i) {
        const auto make = [&](uint32_t k, uint64_t position) {
            const mlx5::Header header = mlx5::header_of(*queue, position, k == 31);
            const uint64_t offset = uint64_t(k) * 256;
            const uint64_t value = uint64_t(i) * 32 + k;
            if (k % 4 == 3) return mlx5::nop_request(header);
            if (k % 4 == 2) {
                return mlx5::inline_write_request(header, {to.address + offset, to.key}, &value, 8);
            }
            return mlx5::write_request(header, {to.address + offset, to.key},
                                       {from.address + offset, from.key}, 256);
        };
        const uint64_t end = mlx5::post(mlx5::WarpLanes(), queue, 32, mlx5::Ring::kNow, make, wait);
        if (threadIdx.x == 0) count(result, kFailedCalls, end == 0);
    }
    if (threadIdx.x == 0) count(result, kFailedCalls, !mlx5::flush(queue, wait));
}

/// Puts whose place at the peer is not its.
__global__ void put_beyond(const __grid_constant__ Ibgda fabric, Lane lane, uint64_t offset,
                           int before, uint64_t* result) {
    for (int i = 0; i < before; ++i) {
        count(result, kFailedCalls, fabric::signal_add(fabric, lane, 3, 1) == 0);
    }
    const bool put =
        fabric::put_signal(fabric, lane, {kReceive, 0, offset}, {kSend, 0, 0}, 64, 4) != 0;
    count(result, kFailedWaits, put && fabric::flush(fabric, lane.channel, fabric.timeout_ns));
}

struct Running : RunningWorld {
    explicit Running(const Options& o)
        : RunningWorld(o, exchange_plainly, put_and_flush, add_to_word, post_by_lanes, put_beyond) {
    }
};

void expect_exchange(const Options& options, const Load& load) {
    gpu::expect_exchange(options, load, exchange_plainly);
}

}  // namespace

TEST(chunks_of_several_warps) {
    Options options;
    expect_exchange(options, {4, 200, 65536});
}

TEST(one_block_serves_many_queue_pairs) {
    Options options;
    options.num_channels = 32;
    options.num_blocks = 1;
    expect_exchange(options, {2, 50, 16384});
}

TEST(four_blocks_and_no_line) {
    Options options;
    options.num_channels = 16;
    options.num_blocks = 4;
    options.line = kNoLimit;
    expect_exchange(options, {4, 100, 65536});
}

TEST(planes) {
    Options options;
    options.num_channels = 6;
    options.num_planes = 2;
    expect_exchange(options, {4, 100, 32768});
}

TEST(counters_wrap) {
    Options options;
    for (uint64_t start : {65500u, 131060u, 32760u}) {
        options.start = start;
        options.depth = 16;
        expect_exchange(options, {4, 100, 1024});
    }
}

TEST(long_messages) {
    Options options;
    options.num_channels = 2;
    options.region_bytes = 64 << 20;
    expect_exchange(options, {4, 20, 4 << 20});
}

TEST(harmless_faults) {
    const std::vector<FaultRule> all = {
        everywhere(kDelay, 30'000),     everywhere(kEarlyFetch, 0),
        everywhere(kLateFetch, 20'000), everywhere(kLostDoorbell, 50'000),
        everywhere(kPieces, 20'000),    everywhere(kLateCompletion, 30'000),
    };
    for (size_t i = 0; i <= all.size(); ++i) {
        Options options;
        options.server.seed = i;
        options.server.rules = i < all.size() ? std::vector<FaultRule>{all[i]} : all;
        options.start = 65500;
        Running world(options);
        expect_good(exchange(world, {3, 60, 8192}, exchange_plainly));
        world.expect_clean();
        size_t injected = 0;
        for (const Event& event : world.nodes[0].server->events()) {
            injected += event.kind == EventKind::kFault;
        }
        printf("%s: %zu\n", i < all.size() ? name(all[i].kind) : "all", injected);
        CHECK(injected > 20);
    }
}

TEST(a_slow_plane_harms_nothing) {
    Options options;
    options.num_channels = 6;
    options.num_planes = 2;
    options.server.rules = parse_options("planes=2 slow_plane=1 slow_us=200", 2).rules;
    expect_exchange(options, {4, 50, 32768});
}

// The test of the test: with such a connection signals must not be trusted.
TEST(relaxed_ordering_is_seen) {
    Options options;
    options.server.rules = {everywhere(kPieces, 100'000, kAlways),
                            everywhere(kRelaxed, 0, kAlways)};
    Running world(options);
    const Results seen = exchange(world, {2, 30, 8192}, exchange_plainly);
    CHECK(seen.different() != 0);
}

TEST(after_a_flush_the_bytes_are_there) {
    for (uint64_t bytes : {16u, 64u, 80u, 7168u, 40000u}) {
        Options options;
        Running world(options);
        Node& node = world.nodes[0];
        put_and_flush<<<1, 1, 0, world.stream>>>(node.fabric, {1, 2}, world.words(0, kSend),
                                                 world.words(1, kReceive), bytes, 30, world.result);
        CUDA(cudaGetLastError());
        expect_good(world.results());
        world.expect_clean();
    }
}

TEST(an_early_completion_is_seen) {
    Options options;
    options.server.rules = {everywhere(kEarlyCompletion, 0, kAlways)};
    options.line.latency_ns = 50'000;
    Running world(options);
    Node& node = world.nodes[0];
    put_and_flush<<<1, 1, 0, world.stream>>>(node.fabric, {1, 2}, world.words(0, kSend),
                                             world.words(1, kReceive), 7168, 30, world.result);
    CHECK(world.results().different() != 0);
}

TEST(atomics_of_all_queue_pairs_count) {
    Options options;
    options.num_channels = 8;
    options.num_nodes = 3;
    Running world(options);
    // Two nodes at once; 4 blocks of 4 warps each.
    for (int n : {0, 2}) {
        const cudaStream_t stream = n == 0 ? world.stream : world.side;
        add_to_word<<<4, 128, 0, stream>>>(world.nodes[size_t(n)].fabric, 1, 7, 50, world.result);
        CUDA(cudaGetLastError());
    }
    CUDA(cudaStreamSynchronize(world.side));
    expect_good(world.results());
    CHECK_EQUAL(world.signal(1, 7), 2 * 16 * 50);
    world.expect_clean();
}

TEST(a_warp_posts_a_request_a_lane) {
    Options options;
    Running world(options);
    post_by_lanes<<<1, 32, 0, world.stream>>>(world.nodes[0].fabric, {1, 0}, 200, world.result);
    CUDA(cudaGetLastError());
    expect_good(world.results());
    uint64_t value = 0;
    world.read(world.words(1, kReceive) + 6 * 32, &value);
    CHECK_EQUAL(value, 199 * 32 + 6);
    world.expect_clean();
}

TEST(a_place_beyond_the_region_is_an_error) {
    Options options;
    Running world(options);
    Node& node = world.nodes[0];
    put_beyond<<<1, 1, 0, world.stream>>>(node.fabric, {1, 1}, options.region_bytes - 16, 5,
                                          world.result);
    CUDA(cudaGetLastError());
    expect_good(world.results());
    CHECK_EQUAL(node.state->failed, EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(node.state->error.vendor, mlx5::kRemoteAccess << 8 | kVendorRemoteAccess);
    CHECK_EQUAL(node.state->error.position, 5);
    CHECK_EQUAL(world.signal(1, 3), 5);
    CHECK_EQUAL(world.signal(1, 4), 0);
}

TEST(a_killed_queue_pair_is_an_error) {
    Options options;
    options.server.rules = {{kKillQueue, 0, kAny, 20, 20, kAlways, 1, 0}};
    options.timeout_ns = 2 * kSecond;  // the other node waits so long
    Running world(options);
    const Results seen = exchange(world, {2, 100, 4096}, exchange_plainly);
    CHECK_EQUAL(seen.different(), 0);
    CHECK(seen.failed_calls() + seen.failed_waits() != 0);
    CHECK_EQUAL(world.nodes[0].state->failed, EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(world.nodes[0].state->error.vendor, mlx5::kFlushed << 8 | kVendorFlushed);
}

TEST(a_dead_peer_is_an_error) {
    Options options;
    Running world(options);
    world.kill_nic(1);
    Node& node = world.nodes[0];
    put_beyond<<<1, 1, 0, world.stream>>>(node.fabric, {1, 1}, 0, 1, world.result);
    CUDA(cudaGetLastError());
    expect_good(world.results());
    CHECK_EQUAL(node.state->error.vendor, mlx5::kRetryExceeded << 8 | kVendorRetry);
}

TEST(an_own_dead_nic_ends_in_the_deadline) {
    Options options;
    options.timeout_ns = kSecond / 5;
    Running world(options);
    world.kill_nic(0);
    put_beyond<<<1, 1, 0, world.stream>>>(world.nodes[0].fabric, {1, 1}, 0, 1, world.result);
    CUDA(cudaGetLastError());
    expect_good(world.results());
    CHECK_EQUAL(world.nodes[0].state->failed, 0);
}

TEST(the_kernel_stops_while_writers_wait) {
    Options options;
    options.line.latency_ns = 1'000'000'000;
    options.timeout_ns = 3 * kSecond;
    Running world(options);
    put_beyond<<<1, 1, 0, world.stream>>>(world.nodes[0].fabric, {1, 1}, 0, 1, world.result);
    CUDA(cudaGetLastError());
    const int64_t begin = fabric::now_ns();
    for (Node& node : world.nodes) CHECK(node.server->stop(kStop, kSecond));
    CHECK(fabric::now_ns() - begin < kSecond);
    world.wait_for_writers();
}

TEST(without_its_host_the_kernel_ends) {
    Options options;
    options.server.patience_ns = kSecond / 2;
    Running world(options);
    const int64_t begin = fabric::now_ns();
    while (fabric::now_ns() - begin < 2 * kSecond) {
        world.nodes[0].server->sign_of_life();
        world.nodes[1].server->sign_of_life();
        CHECK(!world.nodes[0].server->has_ended());
    }
    while (!world.nodes[0].server->has_ended()) CHECK(fabric::now_ns() - begin < 5 * kSecond);
    CHECK(world.nodes[0].server->look().abandoned);
}
