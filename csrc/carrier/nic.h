// The job `nic`: what the transports over emulated NICs on GPUs and their carrier share.
//
// A rank's NICs, one for each plane, and its send queues lie in one block of device memory, the
// arena, which the rank allocates and its carrier and its peers' carriers open. The carrier runs
// the kernel that serves the rank's queue pairs: it reads requests from the own arena, bytes from
// the own regions, and stores them in the peers'. Queues that proxy threads fill lie in host memory
// instead (emulated/host_queues.h), which the rank shares with its carrier alone.
//
// NICs of a rail are numbered node * num_planes + plane.
#pragma once

#include "../emulated/host_queues.h"
#include "../emulated/options.h"
#include "../emulated/passage.h"
#include "../emulated/step.h"
#include "../emulated/traffic.h"
#include "../fabric/ibgda.h"
#include "ipc.h"

namespace epcomm::carrier {

constexpr uint32_t kQueueDepth = 1024;  ///< requests of a send queue
constexpr int32_t kMaxPlanes = 8;

/// What layouts of memory depend on; the same on all ranks of a rail but for `node`.
struct NicShape {
    int32_t num_nodes;
    int32_t node;
    int32_t num_channels;
    int32_t num_planes;
    int32_t num_signals;
    int32_t by_host;       ///< 1: host threads fill the send queues
    int32_t max_messages;  ///< that are kept for a timeline, and events; 0: none is noted

    int32_t num_queues() const { return num_nodes * num_channels; }
    uint32_t nic(int32_t of_node, int32_t plane) const {
        return uint32_t(of_node * num_planes + plane);
    }
};

/// Offsets in an arena.
struct NicArena {
    uint64_t nics, queues, rings, completions, records, doorbells, raised, local, remote, bytes;

    explicit NicArena(const NicShape& shape) {
        uint64_t next = 0;
        const auto take = [&next](uint64_t size) {
            const uint64_t at = next;
            next += (size + 127) / 128 * 128;
            return at;
        };
        const auto count = uint64_t(shape.num_queues());
        nics = take(sizeof(emulated::Nic) * uint64_t(shape.num_planes));
        records = take(kLine * count);
        doorbells = take(kLine * count);
        queues = rings = completions = raised = local = remote = bytes = next;
        if (shape.by_host != 0) return;
        // What kernels fill and look things up in.
        const auto keys = uint64_t(EPCOMM_FABRIC_MAX_REGIONS * shape.num_planes);
        queues = take(sizeof(mlx5::SendQueue) * count);
        rings = take(sizeof(mlx5::Block) * kQueueDepth * count);
        completions = take(sizeof(mlx5::Completion) * kQueueDepth * count);
        raised = take(fabric::raised_bytes(shape.num_nodes, shape.num_signals));
        local = take(sizeof(fabric::RegionKey) * keys);
        remote = take(sizeof(fabric::RegionKey) * keys * uint64_t(shape.num_nodes));
        bytes = next;
    }

    /// Places of a queue's own; its number is peer * num_channels + channel.
    uint64_t ring(int32_t queue) const {
        return rings + sizeof(mlx5::Block) * kQueueDepth * uint64_t(queue);
    }
    uint64_t completion(int32_t queue) const {
        return completions + sizeof(mlx5::Completion) * kQueueDepth * uint64_t(queue);
    }
    uint64_t record(int32_t queue) const { return records + kLine * uint64_t(queue); }
    uint64_t doorbell(int32_t queue) const { return doorbells + kLine * uint64_t(queue); }

 private:
    /// Records and doorbells of different queues are written by different warps.
    static constexpr uint64_t kLine = 64;
    static_assert(kLine == emulated::kOwnStep * sizeof(uint64_t), "as doorbells are carried");
};

/// What a rank tells its peers, each of them something else in `numbers`; plain data.
struct NicAddress {
    int32_t pid;
    int32_t node;
    NicShape shape;
    char gpu[32];       ///< its place on the PCI bus, as text
    int64_t ahead_ns;   ///< its timer, of the host's monotonic clock
    int64_t opened_ns;  ///< on the host's clock; node 0's is where time begins
    IpcMemory arena;
    uint64_t arena_address;  ///< in the rank's process
    IpcMemory regions[EPCOMM_FABRIC_MAX_REGIONS];
    uint64_t region_addresses[EPCOMM_FABRIC_MAX_REGIONS];  ///< as requests name them
    fabric::RegionKey keys[kMaxPlanes][EPCOMM_FABRIC_MAX_REGIONS];
    uint32_t numbers[EPCOMM_FABRIC_MAX_CHANNELS];  ///< of the queue pairs for this peer
};

/// The setup: this, the fault rules, then all nodes' addresses, the own one included.
struct NicSetup {
    NicShape shape;
    int32_t device;
    int32_t num_blocks;
    int32_t num_rules;
    int64_t epoch_ns;
    uint64_t seed;
};

/// What a rank asks of its carrier.
enum NicQuestion : uint64_t {
    kCount = 0,
    kCountAnew = 1,       ///< count; later counts begin here
    kTellMessages = 2,    ///< those kept
    kForgetMessages = 3,  ///< those that landed so far, and events
    kTellBrokenRules = 4,
    kTellEvents = 5,  ///< those kept
};

/// At the start of the memory that the carrier shares with its rank.
struct NicReport {
    uint64_t asked;     ///< rank: one more than before
    uint64_t question;  ///< rank: NicQuestion
    uint64_t answered;  ///< carrier: `asked`, once what follows is there
    emulated::Traffic traffic;
    /// The count is written (release) after the first one; now and then without being asked.
    emulated::BrokenRules broken_rules;
    uint64_t num_messages;              ///< that are told
    uint64_t total_messages;            ///< that landed since they were forgotten
    uint64_t num_events, total_events;  ///< likewise
    uint64_t heartbeat_ns;              ///< of the kernel's slowest block, device's timer
};

/// Places in that memory; it is pinned if there are queues in it. Messages are
/// emulated::Passage[max_messages], events emulated::Event[max_messages].
struct NicShared {
    static constexpr uint64_t kQueuesAt = 4096;
    static_assert(sizeof(NicReport) <= kQueuesAt, "queues come behind the report");

    emulated::HostQueues queues;
    uint64_t messages, events, bytes;

    explicit NicShared(const NicShape& shape)
        : queues(uint32_t(shape.num_queues()), kQueueDepth),
          messages(shape.by_host != 0 ? kQueuesAt + queues.bytes : sizeof(NicReport)),
          events(messages + sizeof(emulated::Passage) * uint64_t(shape.max_messages)),
          bytes(events + sizeof(emulated::Event) * uint64_t(shape.max_messages)) {}
};

/// Call `use(queue, peer, channel, plane, number)` for every queue pair, in the order in which an
/// NIC numbers them.
template <class Use>
void for_each_queue(const NicShape& shape, const Use& use) {
    std::vector<uint32_t> next(size_t(shape.num_planes), emulated::kFirstQueue);
    for (int32_t peer = 0; peer < shape.num_nodes; ++peer) {
        for (int32_t channel = 0; peer != shape.node && channel < shape.num_channels; ++channel) {
            const int32_t plane = channel % shape.num_planes;
            use(peer * shape.num_channels + channel, peer, channel, plane, next[size_t(plane)]++);
        }
    }
}

}  // namespace epcomm::carrier
