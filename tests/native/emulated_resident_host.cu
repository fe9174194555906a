// The GPU-resident engine on a GPU with queues in host memory, which threads of the host fill as
// proxy threads do. Every byte is compared. Run with -s to see the times.

#include <algorithm>

#include "../../csrc/fabric/posting.h"
#include "gpu_world.cuh"

using namespace gpu;

namespace {

/// One node's proxy thread, whose turn this thread takes.
class Poster {
 public:
    Poster(World& world, int32_t node)
        : posting_(plan_of(world, node), world.nodes[size_t(node)].fabric, world.bell(node)) {}

    /// Put with a signal; waits for room.
    void put(const fabric::Command& command) {
        const fabric::Operation operation = {command, next_++};
        wait_until([&] { return posting_.post(0, &operation, 1) == 1; });
    }
    void finish() {
        wait_until([&] { return done_ == next_; });
    }
    /// An error has been seen, with its code.
    bool finish_with_error(int32_t* vendor) {
        wait_until([&] { return failed_ || done_ == next_; });
        *vendor = vendor_;
        return failed_;
    }

 private:
    static fabric::Plan plan_of(const World& world, int32_t node) {
        fabric::Plan plan{};
        plan.node = node;
        plan.num_nodes = world.options.num_nodes;
        plan.num_channels = world.options.num_channels;
        plan.num_rings = plan.num_lanes = 1;
        return plan;
    }

    template <class Condition>
    void wait_until(const Condition& condition) {
        const int64_t until = fabric::now_ns() + 20 * kSecond;
        while (!condition()) {
            fabric::Completion seen[64];
            const size_t count = posting_.poll(0, seen, 64);
            done_ += count;
            for (size_t i = 0; i < count; ++i) {
                if (seen[i].ok || failed_) continue;
                failed_ = true;
                vendor_ = seen[i].vendor;
            }
            CHECK(fabric::now_ns() < until);
        }
    }

    fabric::Posting posting_;
    uint64_t next_ = 0, done_ = 0;
    bool failed_ = false;
    int32_t vendor_ = 0;
};

Options by_host() {
    Options options;
    options.by_host = true;
    return options;
}

/// Both nodes put pieces of all lengths until the whole region has crossed; every byte and signal.
void cross(const Options& options) {
    World world(options);
    const uint64_t bytes = options.region_bytes;
    std::vector<std::vector<uint64_t>> sent;
    for (Node& node : world.nodes) {
        std::vector<uint64_t>& words = sent.emplace_back(bytes / 8);
        for (uint64_t i = 0; i < words.size(); ++i) words[i] = mix(i, sent.size());
        CUDA(cudaMemcpy(node.regions[kSend], words.data(), bytes, cudaMemcpyHostToDevice));
    }
    world.start();
    Poster posters[] = {{world, 0}, {world, 1}};
    uint64_t count = 0;
    for (uint64_t at = 0; at < bytes; ++count) {
        const uint64_t draw = mix(at, 7), most = draw % 4 == 0 ? 1 << 20 : 16384;
        const uint64_t length = std::min(bytes - at, (draw / 4 % (most / 16) + 1) * 16);
        const auto channel = int32_t(count % uint64_t(options.num_channels));
        for (int32_t node : {0, 1}) {
            posters[node].put(fabric::put_signal_command({1 - node, channel}, {kReceive, 0, at},
                                                         {kSend, 0, at}, length, channel));
        }
        at += length;
    }
    for (Poster& poster : posters) poster.finish();
    std::vector<uint64_t> got(8192);
    for (int32_t node : {0, 1}) {
        for (int32_t c = 0; c < options.num_channels; ++c) {
            const uint64_t channels = uint64_t(options.num_channels);
            CHECK_EQUAL(world.signal(node, c), (count + channels - 1 - uint64_t(c)) / channels);
        }
        const uint64_t* from = sent[size_t(1 - node)].data();
        const auto* to = reinterpret_cast<uint64_t*>(world.nodes[size_t(node)].regions[kReceive]);
        for (uint64_t i = 0; i < bytes / 8; i += got.size()) {
            world.read(to + i, got.data(), got.size());
            CHECK(memcmp(got.data(), from + i, got.size() * 8) == 0);
        }
    }
    world.expect_clean();
}

}  // namespace

TEST(host_threads_fill_the_queues) { cross(by_host()); }

TEST(full_rings_and_planes) {
    Options options = by_host();
    options.depth = 8;
    options.num_planes = 2;
    options.num_channels = 6;
    cross(options);
}

TEST(harmless_faults) {
    Options options = by_host();
    const Picoseconds late = 30'000 * kNanosecond;
    for (const Fault fault : {kDelay, kLateFetch, kLostDoorbell, kPieces, kLateCompletion}) {
        options.server.rules.push_back({fault, kAny, kAny, 0, ~uint64_t(0), kAlways / 4, 0, late});
    }
    cross(options);
}

TEST(a_dead_peer_is_an_error) {
    World world(by_host());
    world.start();
    world.kill_nic(1);
    Poster poster(world, 0);
    poster.put(fabric::put_signal_command({1, 0}, {kReceive, 0, 0}, {kSend, 0, 0}, 64, 0));
    int32_t vendor = 0;
    CHECK(poster.finish_with_error(&vendor));
    CHECK_EQUAL(vendor, mlx5::kRetryExceeded << 8 | kVendorRetry);
}

TEST(round_trip) {
    Options options = by_host();
    options.line = kNoLimit;
    World world(options);
    world.start();
    Poster poster(world, 0);
    std::vector<int64_t> times;
    for (int i = 0; i < 2000; ++i) {
        const int64_t start = fabric::now_ns();
        poster.put(fabric::put_signal_command({1, i % 4}, {kReceive, 0, 0}, {kSend, 0, 0}, 64, 0));
        poster.finish();
        times.push_back(fabric::now_ns() - start);
    }
    std::sort(times.begin(), times.end());
    printf(
        "emulated NIC, modelled network: 64 bytes and a signal, no line, post to completion: "
        "median %.2f us, 99th %.2f us\n",
        double(times[times.size() / 2]) / 1e3, double(times[times.size() * 99 / 100]) / 1e3);
    world.expect_clean();
}

TEST(posting_rate) {
    for (const uint64_t bytes : {64, 7168, 65536}) {
        World world(by_host());
        world.start();
        Poster poster(world, 0);
        const int count = 20000;
        const int64_t start = fabric::now_ns();
        for (int i = 0; i < count; ++i) {
            const uint64_t at = uint64_t(i) % 64 * bytes;
            poster.put(fabric::put_signal_command({1, i % 4}, {kReceive, 0, at}, {kSend, 0, at},
                                                  bytes, i % 4));
        }
        poster.finish();
        const double seconds = double(fabric::now_ns() - start) * 1e-9;
        printf(
            "modelled network: %6llu bytes and a signal, 4 channels: %.3f million/s, %.2f GB/s of "
            "50\n",
            static_cast<unsigned long long>(bytes), count / seconds / 1e6,
            double(bytes) * count / seconds / 1e9);
        world.expect_clean();
    }
}
