// The send queues of a rank: which one serves what, how long one waits for it, how failure ends the
// fabric.
//
// Every (peer, channel) has a queue pair of its own. A rank may own several NICs (planes); a
// channel belongs to one of them, `channel % num_planes`.
#pragma once

#include "../mlx5/post.h"
#include "fabric.h"

namespace epcomm::fabric {

using Ibgda = epcomm_ibgda;
using RegionKey = epcomm_region_key;

/// Signals of a region of so many bytes. Its last word is none: answers of peers come there.
constexpr uint64_t signals_in(uint64_t bytes) { return bytes / sizeof(uint64_t) - 1; }

/// Bytes of an Ibgda's `raised`, which lies where the producers run: the counts, and a lock.
constexpr uint64_t raised_bytes(int32_t num_nodes, int32_t num_signals) {
    return (uint64_t(num_nodes) * uint64_t(num_signals) + 1) * sizeof(uint64_t);
}

EPCOMM_HD inline mlx5::SendQueue* queue_at(const Ibgda& fabric, int32_t index) {
    return static_cast<mlx5::SendQueue*>(fabric.queues) + index;
}

EPCOMM_HD inline mlx5::SendQueue* queue_of(const Ibgda& fabric, Lane lane) {
    return queue_at(fabric, lane.peer * fabric.num_channels + lane.channel);
}

/// Whose queue it is.
EPCOMM_HD inline Lane lane_of(const Ibgda& fabric, const mlx5::SendQueue* queue) {
    const auto index = int32_t(queue - queue_at(fabric, 0));
    return {index / fabric.num_channels, index % fabric.num_channels};
}

EPCOMM_HD inline int32_t plane_of(const Ibgda& fabric, Lane lane) {
    return lane.channel % fabric.num_planes;
}

/// The keys of a node's regions on a plane; of the own ones: `local`, and 0.
EPCOMM_HD inline const RegionKey* keys_on(const Ibgda& fabric, const RegionKey* keys, int32_t node,
                                          int32_t plane) {
    return &keys[(node * fabric.num_planes + plane) * EPCOMM_FABRIC_MAX_REGIONS];
}

EPCOMM_HD inline bool failed(const Ibgda& fabric) {
    return load_acquire(&fabric.state->failed) != 0;
}

/// A deadline, and the end of the fabric. A device reads the host's flag over PCIe, and many
/// threads that do so all the time would hold up what else crosses it: once in a while is enough.
struct FabricWait {
    static constexpr int64_t kLookNs = 1'000'000;

    const Ibgda& fabric;
    int64_t until;
    int64_t look_at;

    EPCOMM_HD FabricWait(const Ibgda& f, int64_t timeout_ns)
        : fabric(f), until(now_ns() + timeout_ns), look_at(until - timeout_ns + kLookNs) {}
    EPCOMM_HD bool again() {
        relax();
        const int64_t now = now_ns();
        if (now < look_at) return now < until;
        look_at = now + kLookNs;
        return !failed(fabric) && now < until;
    }
};

/// End the use of every queue. Producers look at these flags, which lie in memory of their own, and
/// at the host's only when they wait: a look at host memory with every call would cost more than
/// the call.
EPCOMM_HD inline void stop_all(const Ibgda& fabric) {
    for (int32_t i = 0; i < fabric.num_nodes * fabric.num_channels; ++i) {
        mlx5::SendQueue* queue = queue_at(fabric, i);
        if (mlx5::works(*queue)) mlx5::give_up(queue, mlx5::kQueueStopped);
    }
}

/// The call that met a failure.
struct Call {
    epcomm_fabric_op op;
    uint64_t bytes;
};

/// The NIC's syndrome << 8 | its vendor's.
EPCOMM_HD inline int32_t vendor_of(const mlx5::SendQueue& queue) {
    return queue.error.syndrome << 8 | queue.error.vendor_syndrome;
}

/// Report why a queue failed. What was under way is known by the request's position only.
EPCOMM_HD inline void report(const Ibgda& fabric, const mlx5::SendQueue* queue, Call call) {
    const uint32_t why = load_acquire(&queue->failed);
    // A deadline passed, by which nothing is lost; or what failed has been reported.
    if (why == mlx5::kQueueWorks || why == mlx5::kQueueStopped) return;
    const Lane lane = lane_of(fabric, queue);
    epcomm_fabric_error error;
    error.status = EPCOMM_FABRIC_TRANSPORT;
    error.vendor = 0;
    error.peer = lane.peer;
    error.channel = lane.channel;
    error.op = call.op;
    error.queue_pair = queue->number;
    error.bytes = call.bytes;
    if (why == mlx5::kQueueTimeout) {
        error.status = EPCOMM_FABRIC_RING_FULL;
        error.position = load_relaxed(&queue->reserved);
    } else {
        error.vendor = vendor_of(*queue);
        error.position = queue->error_position;
    }
    fail(fabric.state, error);
    stop_all(fabric);
}

EPCOMM_HD inline void report_bad_command(const Ibgda& fabric, const Command& command) {
    fail(fabric.state, error_of(EPCOMM_FABRIC_BAD_TRIGGER, command, 0));
    stop_all(fabric);
}

}  // namespace epcomm::fabric
