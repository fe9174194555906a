// How fast the GPU-resident engine is. Every table is of a modelled network: none of these figures
// is one of a network, and payload rates without a line are those of the copier alone.

#include <algorithm>

#include "gpu_world.cuh"

using namespace gpu;

namespace {

/// `count` puts of every warp, a block for each channel; each warp in its own part of the regions.
struct Load {
    Ibgda fabric;
    uint64_t* result;  ///< [1] calls that failed, [2] longest time from first to last post, ns
    uint64_t bytes;
    uint64_t part;  ///< bytes of a warp's part
    int32_t count;
    int32_t by_lanes;  ///< 32 requests with one reservation
    int32_t flush;
};

__device__ void note(uint64_t* result, bool ok, int64_t ns) {
    auto* counters = reinterpret_cast<unsigned long long*>(result);
    if (!ok) atomicAdd(&counters[1], 1ull);
    atomicMax(&counters[2], static_cast<unsigned long long>(ns));
}

/// The requests from the `first` of a warp on, whose part begins at `base`.
__device__ bool put_by_lanes(const Load& load, Lane lane, uint64_t base, uint64_t first) {
    SendQueue* queue = fabric::queue_of(load.fabric, lane);
    const int32_t plane = fabric::plane_of(load.fabric, lane);
    const RegionKey from = load.fabric.local[plane * EPCOMM_FABRIC_MAX_REGIONS + kSend];
    const RegionKey to =
        load.fabric
            .remote[(lane.peer * load.fabric.num_planes + plane) * EPCOMM_FABRIC_MAX_REGIONS +
                    kReceive];
    fabric::FabricWait wait(load.fabric, load.fabric.timeout_ns);
    const auto make = [&](uint32_t k, uint64_t position) {
        const uint64_t offset = base + (first + k) * load.bytes % load.part;
        return mlx5::write_request(mlx5::header_of(*queue, position, false),
                                   {to.address + offset, to.key}, {from.address + offset, from.key},
                                   uint32_t(load.bytes));
    };
    return mlx5::post(mlx5::WarpLanes(), queue, 32, mlx5::Ring::kWhenDue, make, wait) != 0;
}

__global__ void put_all(const __grid_constant__ Load load) {
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const Lane lane{1 - load.fabric.node, int32_t(blockIdx.x)};
    const uint64_t mine = (blockIdx.x * warps + warp) * load.part;
    const int64_t begin = fabric::now_ns();
    bool ok = true;
    if (load.by_lanes != 0) {
        for (int32_t i = 0; i < load.count && ok; i += 32) {
            ok = put_by_lanes(load, lane, mine, uint64_t(i));
        }
    } else if (threadIdx.x % 32 == 0) {
        for (int32_t i = 0; i < load.count && ok; ++i) {
            const uint64_t at = mine + uint64_t(i) * load.bytes % load.part;
            ok = fabric::put(load.fabric, lane, {kReceive, 0, at}, {kSend, 0, at}, load.bytes) != 0;
        }
    }
    __syncwarp();
    const int64_t posted = fabric::now_ns() - begin;
    if (threadIdx.x % 32 != 0) return;
    if (load.flush != 0)
        ok = ok && fabric::flush(load.fabric, lane.channel, load.fabric.timeout_ns);
    note(load.result, ok, posted);
}

/// Round trips: each put is flushed, with a signal or without.
__global__ void round_trips(const __grid_constant__ Ibgda fabric, uint64_t bytes, int32_t count,
                            int32_t signal, int64_t* times, uint64_t* result) {
    for (int32_t i = 0; i < count; ++i) {
        const int64_t begin = fabric::now_ns();
        const Lane lane{1, 0};
        const fabric::Ticket ticket =
            signal != 0
                ? fabric::put_signal(fabric, lane, {kReceive, 0, 0}, {kSend, 0, 0}, bytes, 0)
                : fabric::put(fabric, lane, {kReceive, 0, 0}, {kSend, 0, 0}, bytes);
        const bool ok = ticket != 0 && fabric::flush(fabric, 0, fabric.timeout_ns);
        times[i] = fabric::now_ns() - begin;
        if (!ok) note(result, false, 0);
        if (!ok) return;
    }
}

struct Timed : World {
    explicit Timed(const Options& o) : World(o) {
        load(put_all, round_trips);
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
        times = device.zeros<int64_t>(1024);
        start();
    }
    ~Timed() {
        stop_engines();  // freeing memory waits for them
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
    }

    /// Returns milliseconds.
    float run(Load load, int32_t channels, int32_t warps) {
        load.fabric = nodes[0].fabric;
        load.result = result;
        CUDA(cudaEventRecord(begin, stream));
        put_all<<<channels, warps * 32, 0, stream>>>(load);
        CUDA(cudaGetLastError());
        CUDA(cudaEventRecord(end, stream));
        wait_for_writers();
        uint64_t seen[3];
        read(result, seen, 3);
        CHECK_EQUAL(seen[1], 0);
        posted_ns = seen[2];
        float ms = 0;
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        return ms;
    }

    Device device;
    cudaEvent_t begin, end;
    int64_t* times;
    uint64_t posted_ns = 0;
};

constexpr int32_t kChannels = 16;
constexpr uint64_t kSizes[] = {1024, 4096, 7168, 65536, 491520, 1048576};

/// Payload GB/s from one node to the other.
double rate_of(const LineModel& line, uint64_t bytes, uint32_t blocks, std::string* report) {
    Options options;
    options.num_channels = kChannels;
    options.num_blocks = blocks;
    options.line = line;
    options.region_bytes = 256 << 20;
    options.depth = 512;
    Timed world(options);
    Load load = {};
    load.bytes = bytes;
    load.part = options.region_bytes / kChannels / bytes * bytes;
    load.flush = 1;
    const uint64_t total = std::min<uint64_t>(uint64_t(4) << 30, bytes * 400'000);
    load.by_lanes = 1;  // so that posting is not the limit
    load.count = int32_t(total / bytes / kChannels / 32 * 32);
    world.run(load, kChannels, 1);  // once to get warm
    const float ms = world.run(load, kChannels, 1);
    world.expect_clean();
    *report = describe(0, line, world.nodes[0].server->look().traffic[0]);
    return double(load.count) * kChannels * double(bytes) / double(ms) / 1e6;
}

void print_title(const char* what) { printf("\nmodelled network: %s\n", what); }

}  // namespace

TEST(payload_rate) {
    print_title(
        "payload GB/s of one NIC without a line, 16 queue pairs, by message size and blocks");
    printf("%10s %8s %8s %8s\n", "bytes", "1", "2", "4");
    for (const uint64_t bytes : kSizes) {
        printf("%10llu", (unsigned long long)bytes);
        for (const uint32_t blocks : {1u, 2u, 4u}) {
            std::string report;
            printf(" %8.1f", rate_of(kNoLimit, bytes, blocks, &report));
            fflush(stdout);
        }
        printf("\n");
    }
}

TEST(share_of_the_line) {
    print_title("50 GB/s, 2 us: payload GB/s, share of what headers leave, by size and blocks");
    for (const uint64_t bytes : kSizes) {
        const double best = 50.0 * double(bytes) / double(wire_bytes(kLine, uint32_t(bytes)));
        for (const uint32_t blocks : {1u, 2u, 4u}) {
            std::string report;
            const double rate = rate_of(kLine, bytes, blocks, &report);
            printf("%10llu bytes %u blocks %8.2f GB/s %6.1f %%  %s\n", (unsigned long long)bytes,
                   blocks, rate, 100 * rate / best, report.c_str());
            fflush(stdout);
        }
    }
}

TEST(round_trip) {
    print_title("median us from a put to its completion, one thread");
    const struct {
        const char* name;
        LineModel line;
    } lines[] = {{"no line", kNoLimit}, {"50 GB/s 2 us", kLine}};
    for (const auto& line : lines) {
        Options options;
        options.line = line.line;
        Timed world(options);
        for (const uint64_t bytes : {16u, 64u, 1024u, 7168u, 65536u}) {
            for (const int32_t signal : {0, 1}) {
                constexpr int32_t kCount = 500;
                round_trips<<<1, 1, 0, world.stream>>>(world.nodes[0].fabric, bytes, kCount, signal,
                                                       world.times, world.result);
                CUDA(cudaGetLastError());
                world.wait_for_writers();
                std::vector<int64_t> times(kCount);
                world.read(world.times, times.data(), times.size());
                std::sort(times.begin(), times.end());
                printf("%14s %8llu bytes%s %8.2f (5 %%: %.2f, 95 %%: %.2f)\n", line.name,
                       (unsigned long long)bytes, signal != 0 ? " + signal" : "         ",
                       double(times[kCount / 2]) / 1e3, double(times[kCount / 20]) / 1e3,
                       double(times[kCount - kCount / 20]) / 1e3);
            }
        }
        const ServerReport report = world.nodes[0].server->look();
        printf("the timer's granularity is %u ns\n", report.granularity_ns);
        printf("%s\n", describe(0, line.line, report.traffic[0]).c_str());
    }
}

TEST(posting_rate) {
    print_title("million requests/s of 16 bytes: posted alone, and with their completion");
    printf("%6s %6s %10s %10s %12s\n", "pairs", "warps", "by", "posted", "completed");
    for (const int32_t pairs : {1, 4, 16}) {
        for (const int32_t by_lanes : {0, 1}) {
            for (const int32_t warps : {1, 2, 4, 8, 16, 32}) {
                Options options;
                options.num_channels = pairs;
                options.depth = 8192;  // all of them fit
                options.line = kNoLimit;
                Timed world(options);
                Load load = {};
                load.bytes = 16;
                load.part = 4096;
                load.by_lanes = by_lanes;
                load.flush = 1;
                load.count = 4096 / warps;
                const float ms = world.run(load, pairs, warps);
                const double total = double(load.count) * warps * pairs;
                printf("%6d %6d %10s %10.2f %12.2f\n", pairs, warps,
                       by_lanes != 0 ? "lanes" : "threads", total / double(world.posted_ns) * 1e3,
                       total / double(ms) / 1e3);
                fflush(stdout);
            }
        }
    }
}
