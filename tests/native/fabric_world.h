// Nodes with some emulated NICs (planes) each, a queue pair per (peer, channel), and what their
// producers take: csrc/fabric/ibgda.h over emulated NICs of one process.
#pragma once

#include "../../csrc/fabric/planes.h"
#include "rig.h"

namespace rig {

using fabric::Ibgda;
using fabric::Lane;
using fabric::RegionKey;
using fabric::Ticket;

constexpr int64_t kSeconds = 1'000'000'000;
constexpr int32_t kSignals = 64;

/// What one node's producers have.
struct Node {
    std::vector<SendQueue> queues;
    std::vector<RegionKey> local, remote;
    std::vector<std::vector<uint64_t>> regions;  ///< 0: signals, 1: send, 2: receive
    std::vector<uint64_t> raised;
    epcomm_fabric_state state = {};
    Ibgda fabric = {};

    uint64_t signal(int32_t index) const { return fabric::load_acquire(&regions[0][index]); }
};

/// Call `use` with the fabric as producers take it: one whose lanes move off dead planes, or not.
template <class Use>
auto with_fabric(const Ibgda& fabric, const Use& use) {
    return fabric.failover != 0 ? use(fabric::Planes(fabric)) : use(fabric);
}

/// As kernels that wait for another node do: look at a queue, another one each `turn`.
inline void look_around(const Ibgda& ibgda, uint32_t turn) {
    const auto index = int32_t(turn % uint32_t(ibgda.num_nodes * ibgda.num_channels));
    const Lane lane = {index / ibgda.num_channels, index % ibgda.num_channels};
    if (lane.peer == ibgda.node) return;
    with_fabric(ibgda, [&](const auto& fabric) { fabric::look(fabric, lane); });
}

struct World {
    int32_t num_nodes, num_channels, num_planes;
    Rig rig;
    std::vector<Node> nodes;

    /// With the machine's clock the NICs are served by a thread, else by who steps `rig.engine`.
    World(int32_t n, int32_t channels, int32_t planes, Options options)
        : num_nodes(n),
          num_channels(channels),
          num_planes(planes),
          rig(with_nics(options, uint32_t(n * planes))),
          nodes(size_t(n)) {
        for (int32_t i = 0; i < n; ++i) register_memory(i);
        for (int32_t i = 0; i < n; ++i) fill(i);
        connect();
        if (!options.engine.virtual_clock) rig.engine.start();
    }
    ~World() { rig.engine.stop(); }

    static Options with_nics(Options options, uint32_t count) {
        options.num_nics = count;
        return options;
    }
    uint32_t nic(int32_t node, int32_t plane) const { return uint32_t(node * num_planes + plane); }

    void register_memory(int32_t i) {
        Node& node = nodes[size_t(i)];
        node.regions = {std::vector<uint64_t>(kSignals + 1), std::vector<uint64_t>(8192),
                        std::vector<uint64_t>(8192)};
        for (int32_t plane = 0; plane < num_planes; ++plane) {
            // A region's key is another one on each plane.
            for (int32_t k = 0; k < plane; ++k) {
                rig.network.add_memory(nic(i, plane), &rig, sizeof rig, 0);
            }
            for (int32_t id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
                if (id >= 3) {
                    node.local.push_back({});
                    continue;
                }
                auto& region = node.regions[size_t(id)];
                const uint32_t key =
                    rig.network.add_memory(nic(i, plane), region.data(), region.size() * 8,
                                           id == 0   ? kLocalWrite | kRemoteWrite | kRemoteRead
                                           : id == 2 ? uint32_t(kRemoteWrite)
                                                     : 0);
                node.local.push_back({uint64_t(region.data()), region.size() * 8, key});
            }
        }
    }

    void fill(int32_t i) {
        Node& node = nodes[size_t(i)];
        for (const Node& other : nodes) {
            node.remote.insert(node.remote.end(), other.local.begin(), other.local.end());
        }
        node.queues.resize(size_t(num_nodes * num_channels));
        node.raised.resize(fabric::raised_bytes(num_nodes, kSignals) / sizeof(uint64_t));
        Ibgda& fabric = node.fabric;
        fabric.queues = node.queues.data();
        fabric.local = node.local.data();
        fabric.remote = node.remote.data();
        fabric.state = &node.state;
        fabric.timeout_ns = 80 * kSeconds;
        fabric.num_channels = num_channels;
        fabric.num_nodes = num_nodes;
        fabric.num_planes = num_planes;
        fabric.node = i;
        fabric.num_signals = kSignals;
        fabric.raised = node.raised.data();
    }

    void connect() {
        const auto slot = [&](int32_t from, int32_t to, int32_t channel) -> SendQueue& {
            return nodes[size_t(from)].queues[size_t(to * num_channels + channel)];
        };
        for (int32_t channel = 0; channel < num_channels; ++channel) {
            const int32_t plane = channel % num_planes;
            for (int32_t a = 0; a < num_nodes; ++a) {
                for (int32_t b = a + 1; b < num_nodes; ++b) {
                    Writer *one = rig.add(nic(a, plane)), *other = rig.add(nic(b, plane));
                    rig.engine.connect(one->nic, one->queue.number, other->nic,
                                       other->queue.number);
                    rig.engine.connect(other->nic, other->queue.number, one->nic,
                                       one->queue.number);
                    slot(a, b, channel) = one->queue;
                    slot(b, a, channel) = other->queue;
                }
            }
        }
    }
};

}  // namespace rig
