// Nodes whose emulated NICs are served by kernels of this process, and what writers' kernels take.
// For tests on a GPU: everything is in the memory of one device and of one process.
#pragma once

#include <cuda_runtime.h>

#include <iterator>
#include <memory>
#include <vector>

#include "../../csrc/emulated/engine.h"
#include "../../csrc/emulated/server.h"
#include "../../csrc/fabric/ibgda.h"
#include "check.h"

#define CUDA(call)                                                        \
    do {                                                                  \
        const cudaError_t seen_ = (call);                                 \
        if (seen_ != cudaSuccess) {                                       \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                    cudaGetErrorString(seen_));                           \
            fflush(stderr);                                               \
            _Exit(1);                                                     \
        }                                                                 \
    } while (0)

namespace gpu {

using namespace epcomm;
using namespace epcomm::emulated;
using fabric::Ibgda;
using fabric::Lane;
using fabric::RegionKey;
using mlx5::SendQueue;

constexpr int64_t kSecond = 1'000'000'000;
constexpr LineModel kLine = {50, 4096, 30, 5, 300, 2000, 50'000'000, 0};
constexpr LineModel kNoLimit = {0, 4096, 30, 0, 0, 0, 50'000'000, 0};

constexpr int32_t kMaxSignals = 512;

enum RegionId : int32_t { kSignals = 0, kSend = 1, kReceive = 2, kNumRegions = 3 };
/// kReceive's memory once more, in another protection domain: its key is good for nothing.
constexpr int32_t kForeign = kNumRegions;

/// By how many times a tool that watches kernels makes them slower, as who runs it says: deadlines
/// are so many times longer, and tests of many epochs so many times shorter.
inline int64_t slowness() {
    const char* text = getenv("EPCOMM_TEST_SLOWNESS");
    const int64_t times = text == nullptr ? 1 : atoll(text);
    return times < 1 ? 1 : times;
}

struct Options {
    int32_t num_nodes = 2;
    int32_t num_channels = 4;
    int32_t num_planes = 1;
    uint32_t num_blocks = 2;  ///< of each node's engine
    uint32_t depth = 256;
    uint64_t start = 0;
    uint64_t region_bytes = 16 << 20;
    int64_t timeout_ns = 20 * kSecond * slowness();
    bool by_host = false;  ///< host threads fill the queues
    LineModel line = kLine;
    ServerOptions server;
};

/// Device memory that lives as long as its owner; zeroed.
class Device {
 public:
    Device() = default;
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() {
        for (void* part : parts_) cudaFree(part);
    }
    template <typename T>
    T* zeros(uint64_t count) {
        void* part = nullptr;
        CUDA(cudaMalloc(&part, count * sizeof(T)));
        CUDA(cudaMemset(part, 0, count * sizeof(T)));
        parts_.push_back(part);
        return static_cast<T*>(part);
    }
    template <typename T>
    T* copy_of(const std::vector<T>& from) {
        T* part = zeros<T>(from.size() + 1);
        CUDA(cudaMemcpy(part, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
        return part;
    }

 private:
    std::vector<void*> parts_;
};

struct Node {
    uint8_t* regions[kNumRegions];
    epcomm_fabric_state* state;
    std::vector<SendQueue> queues;  ///< [num_nodes][num_channels], as they start
    SendQueue* device_queues;
    Ibgda fabric;
    std::unique_ptr<Server> server;
    // Where host threads fill the queues.
    uint8_t* host = nullptr;  ///< HostQueues
    uint64_t *own_records = nullptr, *own_doorbells = nullptr;
    std::vector<uint64_t> raised;
};

class World {
 public:
    explicit World(const Options& o) : options(o), nodes(size_t(o.num_nodes)) {
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
        CUDA(cudaHostAlloc(&pinned_, kPinnedBytes, cudaHostAllocDefault));
        result = device_.zeros<uint64_t>(4);
        const auto count = size_t(o.num_nodes * o.num_planes);
        images_.resize(count);
        nics = device_.zeros<Nic>(count);
        for (Nic& nic : images_) nic.line = o.line;
        for (int32_t n = 0; n < o.num_nodes; ++n) make_regions(n);
        for (int32_t n = 0; n < o.num_nodes; ++n) make_queues(n);
        for (int32_t n = 0; n < o.num_nodes; ++n) make_tables(n);
        CUDA(cudaMemcpy(nics, images_.data(), count * sizeof(Nic), cudaMemcpyHostToDevice));
        CUDA(cudaDeviceSynchronize());
    }
    ~World() {
        stop_engines();
        for (Node& node : nodes) {
            cudaFreeHost(node.state);
            cudaFreeHost(node.host);
        }
        cudaFreeHost(pinned_);
        cudaStreamDestroy(side);
        cudaStreamDestroy(stream);
    }

    /// All of them, before memory is freed: that waits for every kernel of the process.
    void stop_engines() {
        for (Node& node : nodes) {
            if (node.server != nullptr) node.server->stop(kStop, 5 * kSecond * slowness());
        }
        for (Node& node : nodes) node.server.reset();
    }

    uint32_t nic(int32_t node, int32_t plane) const {
        return uint32_t(node * options.num_planes + plane);
    }

    /// From here on only calls that wait for nothing but their stream.
    void start() {
        ServerOptions how = options.server;
        how.num_blocks = options.num_blocks;
        how.num_planes = uint32_t(options.num_planes);
        how.epoch_ns = fabric::now_ns() + device_ahead_ns() - 1'000'000;
        ServedWire wire;
        for (size_t i = 0; i < images_.size(); ++i) wire.nics.push_back(nics + i);
        for (int32_t n = 0; n < options.num_nodes; ++n) {
            if (options.by_host) how.bells = bells(n);
            nodes[size_t(n)].server = std::make_unique<Server>(wire, served(n), how);
        }
        CUDA(cudaDeviceSynchronize());
        for (Node& node : nodes) node.server->start();
    }

    /// Wait for the writers' kernels, in bounded time.
    void wait_for_writers() {
        const int64_t until = fabric::now_ns() + 60 * kSecond * slowness();
        while (cudaStreamQuery(stream) == cudaErrorNotReady) CHECK(fabric::now_ns() < until);
        CUDA(cudaStreamQuery(stream));
    }

    // Through pinned memory: other copies may wait for the engines.
    template <typename T>
    void read(const T* from, T* into, size_t count = 1) {
        CHECK(count * sizeof(T) <= kPinnedBytes);
        CUDA(cudaMemcpyAsync(pinned_, from, count * sizeof(T), cudaMemcpyDeviceToHost, side));
        CUDA(cudaStreamSynchronize(side));
        memcpy(static_cast<void*>(into), pinned_, count * sizeof(T));
    }
    template <typename T>
    void write(T* to, const T& value) {
        memcpy(pinned_, &value, sizeof value);
        CUDA(cudaMemcpyAsync(to, pinned_, sizeof value, cudaMemcpyHostToDevice, side));
        CUDA(cudaStreamSynchronize(side));
    }
    void kill_nic(int32_t node, int32_t plane = 0) { write(&nics[nic(node, plane)].dead, 1u); }

    HostQueues host_queues() const {
        return {uint32_t(options.num_nodes * options.num_channels), options.depth};
    }
    uint64_t* bell(int32_t node) const {
        return reinterpret_cast<uint64_t*>(nodes[size_t(node)].host + host_queues().bell);
    }

    uint64_t signal(int32_t node, int32_t index) {
        uint64_t value = 0;
        read(reinterpret_cast<uint64_t*>(nodes[size_t(node)].regions[kSignals]) + index, &value);
        return value;
    }

    /// All kernels end, and nobody broke a rule.
    void expect_clean() {
        for (Node& node : nodes) {
            CHECK(node.server->stop(kStopClean, 5 * kSecond * slowness()));
            if (node.server->look().broken_rules.count != 0) print_events(node);
            CHECK_EQUAL(node.server->look().broken_rules.count, 0);
        }
    }

    static void print_events(Node& node) {
        for (const Event& event : node.server->events()) {
            fprintf(stderr, "%s\n", describe(event).c_str());
        }
    }

    Options options;
    std::vector<Node> nodes;
    Nic* nics = nullptr;
    cudaStream_t stream = nullptr;  ///< for writers
    cudaStream_t side = nullptr;    ///< for looks at memory meanwhile
    uint64_t* result = nullptr;     ///< [4] zeros, for writers to count in

 private:
    void make_regions(int32_t n) {
        Node& node = nodes[size_t(n)];
        for (auto*& region : node.regions) region = device_.zeros<uint8_t>(options.region_bytes);
        CUDA(cudaHostAlloc(reinterpret_cast<void**>(&node.state), sizeof *node.state,
                           cudaHostAllocDefault));
        memset(node.state, 0, sizeof *node.state);
        for (int32_t plane = 0; plane < options.num_planes; ++plane) {
            Nic* image = &images_[nic(n, plane)];
            const auto add = [&](RegionId id, uint32_t access, uint32_t domain) {
                const auto address = reinterpret_cast<uint64_t>(node.regions[id]);
                const uint64_t bytes = options.region_bytes;
                return RegionKey{address, bytes, add_key(image, {address, bytes, domain, access})};
            };
            const uint32_t access[] = {kRemoteWrite | kRemoteAtomic, kLocalWrite | kRemoteRead,
                                       kRemoteWrite};
            RegionKey keys[EPCOMM_FABRIC_MAX_REGIONS] = {};
            for (int32_t id = 0; id < kNumRegions; ++id)
                keys[id] = add(RegionId(id), access[id], 1);
            keys[kForeign] = add(kReceive, kRemoteWrite | kLocalWrite, 2);
            keys_.insert(keys_.end(), std::begin(keys), std::end(keys));
        }
    }

    /// The queue pair of (from, to, channel) lies at this place of its NIC's.
    void make_queues(int32_t n) {
        Node& node = nodes[size_t(n)];
        node.queues.resize(size_t(options.num_nodes * options.num_channels));
        if (options.by_host) place_in_host_memory(&node);
        std::vector<mlx5::Completion> fresh(options.depth);
        for (auto& entry : fresh) entry.opcode_owner = mlx5::kInvalid << 4;
        for (int32_t peer = 0; peer < options.num_nodes; ++peer) {
            for (int32_t channel = 0; peer != n && channel < options.num_channels; ++channel) {
                SendQueue& queue = node.queues[size_t(peer * options.num_channels + channel)];
                queue.number = add_queue(&images_[nic(n, channel % options.num_planes)], 1);
                mlx5::start_at(&queue, options.start);
                if (options.by_host) continue;
                queue.ring = device_.zeros<mlx5::Block>(options.depth);
                queue.completions = device_.copy_of(fresh);
                queue.record = device_.zeros<mlx5::Be32>(32);
                queue.doorbell = device_.zeros<uint64_t>(16);
                queue.num_blocks = queue.num_completions = options.depth;
                const mlx5::Be32 record(uint32_t(options.start & 0xffff));
                CUDA(cudaMemcpy(&queue.record[mlx5::kSendRecord], &record, sizeof record,
                                cudaMemcpyHostToDevice));
            }
        }
    }

    /// Counters start at 0.
    void place_in_host_memory(Node* node) {
        const HostQueues layout = host_queues();
        CUDA(cudaHostAlloc(reinterpret_cast<void**>(&node->host), layout.bytes,
                           cudaHostAllocMapped));
        memset(node->host, 0, layout.bytes);
        node->own_records = device_.zeros<uint64_t>(node->queues.size() * kOwnStep);
        node->own_doorbells = device_.zeros<uint64_t>(node->queues.size() * kOwnStep);
        for (uint32_t i = 0; i < node->queues.size(); ++i) {
            layout.place(node->host, i, &node->queues[i]);
        }
    }

    HostBells bells(int32_t n) const {
        const Node& node = nodes[size_t(n)];
        HostBells bells{};
        bells.set_host(host_queues(), node.host, uint32_t(node.queues.size()));
        bells.own_records = node.own_records;
        bells.own_doorbells = node.own_doorbells;
        return bells;
    }

    void make_tables(int32_t n) {
        Node& node = nodes[size_t(n)];
        for (int32_t peer = 0; peer < options.num_nodes; ++peer) {
            for (int32_t channel = 0; peer != n && channel < options.num_channels; ++channel) {
                const int32_t plane = channel % options.num_planes;
                Nic* image = &images_[nic(n, plane)];
                QueueEntry* entry = find_queue(*image, number(n, peer, channel));
                *entry = {kReady, 1, nic(peer, plane), number(peer, n, channel)};
            }
        }
        const auto per_node = size_t(options.num_planes * EPCOMM_FABRIC_MAX_REGIONS);
        const RegionKey* all = device_.copy_of(keys_);
        node.device_queues = device_.copy_of(node.queues);
        Ibgda& fabric = node.fabric;
        fabric = {};
        fabric.queues = node.device_queues;
        fabric.local = all + size_t(n) * per_node;
        fabric.remote = all;
        fabric.state = node.state;
        fabric.timeout_ns = options.timeout_ns;
        fabric.num_channels = options.num_channels;
        fabric.num_nodes = options.num_nodes;
        fabric.num_planes = options.num_planes;
        fabric.node = n;
        fabric.num_signals = kMaxSignals;
        const uint64_t raised =
            fabric::raised_bytes(options.num_nodes, kMaxSignals) / sizeof(uint64_t);
        if (!options.by_host) {
            fabric.raised = device_.zeros<uint64_t>(raised);
            return;
        }
        node.raised.resize(raised);
        fabric.queues = node.queues.data();
        fabric.local = keys_.data() + size_t(n) * per_node;
        fabric.remote = keys_.data();
        fabric.raised = node.raised.data();
    }

    uint32_t number(int32_t n, int32_t peer, int32_t channel) const {
        return nodes[size_t(n)].queues[size_t(peer * options.num_channels + channel)].number;
    }

    std::vector<ServedQueue> served(int32_t n) const {
        std::vector<ServedQueue> all;
        for (int32_t peer = 0; peer < options.num_nodes; ++peer) {
            for (int32_t channel = 0; peer != n && channel < options.num_channels; ++channel) {
                const SendQueue& queue =
                    nodes[size_t(n)].queues[size_t(peer * options.num_channels + channel)];
                const int32_t plane = channel % options.num_planes;
                const Node& node = nodes[size_t(n)];
                const auto own = uint64_t(&queue - node.queues.data()) * kOwnStep;
                const auto* record = options.by_host
                                         ? reinterpret_cast<mlx5::Be32*>(node.own_records + own)
                                         : queue.record;
                const uint64_t* doorbell =
                    options.by_host ? node.own_doorbells + own : queue.doorbell;
                all.push_back({{queue.ring, record, doorbell, queue.completions, queue.num_blocks,
                                queue.num_completions, options.start},
                               queue.number,
                               nic(n, plane),
                               uint32_t(plane),
                               uint32_t(channel)});
            }
        }
        return all;
    }

    static constexpr size_t kPinnedBytes = 65536;

    Device device_;
    void* pinned_ = nullptr;
    std::vector<Nic> images_;
    std::vector<RegionKey> keys_;  ///< [num_nodes][num_planes][EPCOMM_FABRIC_MAX_REGIONS]
};

/// Load kernels, before any starts that does not end.
template <class... Kernels>
void load(Kernels... kernels) {
    cudaFuncAttributes attributes;
    const cudaError_t errors[] = {cudaFuncGetAttributes(&attributes, kernels)...};
    for (const cudaError_t error : errors) CUDA(error);
}

}  // namespace gpu
