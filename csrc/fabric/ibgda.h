// The fabric API of fabric.h over mlx5 send queues that kernels (or host threads) fill themselves.
//
// Every (peer, channel) has a queue pair of its own; on a reliable connection its requests take
// effect at the peer in their order, which is the order the API promises.
//
// A signal is an 8-byte write of the counter's next value. The sender alone raises that counter, so
// it knows the value (`raised`): counted in the turn in which the request is published, since it
// must grow in the order of the requests.
//
// A rank may own several NICs (planes). A channel belongs to one of them, `channel % num_planes`,
// so planes need no order among themselves: receivers count per (source, channel) anyway.
#pragma once

#include "../mlx5/post.h"
#include "fabric.h"

namespace epcomm::fabric {

using Ibgda = epcomm_ibgda;
using RegionKey = epcomm_region_key;

/// Bytes of an Ibgda's `raised`, which lies where the producers run.
constexpr uint64_t raised_bytes(int32_t num_nodes, int32_t num_signals) {
    return uint64_t(num_nodes) * uint64_t(num_signals) * sizeof(uint64_t);
}

EPCOMM_HD inline mlx5::SendQueue* queue_at(const Ibgda& fabric, int32_t index) {
    return static_cast<mlx5::SendQueue*>(fabric.queues) + index;
}

EPCOMM_HD inline mlx5::SendQueue* queue_of(const Ibgda& fabric, Lane lane) {
    return queue_at(fabric, lane.peer * fabric.num_channels + lane.channel);
}

EPCOMM_HD inline int32_t plane_of(const Ibgda& fabric, Lane lane) {
    return lane.channel % fabric.num_planes;
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

/// Report why a queue failed. `vendor` is the NIC's syndrome << 8 | its vendor's; what was under
/// way is known by the request's position only, and `command` is the call that met the failure.
EPCOMM_HD inline void report(const Ibgda& fabric, Lane lane, const Command& command) {
    const mlx5::SendQueue* queue = queue_of(fabric, lane);
    const uint32_t why = load_acquire(&queue->failed);
    // A deadline passed, by which nothing is lost; or what failed has been reported.
    if (why == mlx5::kQueueWorks || why == mlx5::kQueueStopped) return;
    epcomm_fabric_error error;
    error.status = EPCOMM_FABRIC_TRANSPORT;
    error.vendor = 0;
    error.peer = lane.peer;
    error.channel = lane.channel;
    error.op = command.op;
    error.queue_pair = queue->number;
    error.bytes = command.bytes;
    if (why == mlx5::kQueueTimeout) {
        error.status = EPCOMM_FABRIC_RING_FULL;
        error.position = load_relaxed(&queue->reserved);
    } else {
        error.vendor = queue->error.syndrome << 8 | queue->error.vendor_syndrome;
        error.position = queue->error_position;
    }
    fail(fabric.state, error);
    stop_all(fabric);
}

EPCOMM_HD inline void report_bad_command(const Ibgda& fabric, const Command& command) {
    epcomm_fabric_error error;
    error.status = EPCOMM_FABRIC_BAD_TRIGGER;
    error.vendor = 0;
    error.peer = command.peer;
    error.channel = command.channel;
    error.op = command.op;
    error.queue_pair = 0;
    error.bytes = command.bytes;
    error.position = 0;
    fail(fabric.state, error);
    stop_all(fabric);
}

/// Whether the tables have what the command names. Bounds are the NIC's to check.
EPCOMM_HD inline bool fits(const Ibgda& fabric, const Command& command) {
    const auto region_fits = [](int32_t region) {
        return region >= 0 && region < EPCOMM_FABRIC_MAX_REGIONS;
    };
    return command.peer >= 0 && command.peer < fabric.num_nodes && command.peer != fabric.node &&
           command.channel >= 0 && command.channel < fabric.num_channels && command.signal >= 0 &&
           command.signal < fabric.num_signals && region_fits(command.local.region) &&
           region_fits(command.remote.region);
}

/// Bytes of the longest single write; half of what the hardware allows.
constexpr uint64_t kMaxWrite = mlx5::kMaxMessage / 2;

/// The requests of one command: writes, then the signal.
struct Requests {
    const mlx5::SendQueue* queue;
    RegionKey local;
    RegionKey remote;
    RegionKey signals;
    uint64_t* raised;  ///< the signal's count
    Command command;
    bool ask;  ///< for a completion of the last write; for that of a signal in any case

    EPCOMM_HD uint32_t num_writes() const {
        return uint32_t((command.bytes + kMaxWrite - 1) / kMaxWrite);
    }
    EPCOMM_HD bool has_signal() const { return command.op != EPCOMM_FABRIC_PUT; }
    EPCOMM_HD uint32_t count() const { return num_writes() + uint32_t(has_signal()); }

    EPCOMM_HD mlx5::Block write(uint32_t i, uint64_t position) const {
        const mlx5::Header header = mlx5::header_of(*queue, position, ask && i + 1 == count());
        const uint64_t offset = i * kMaxWrite, left = command.bytes - offset;
        return mlx5::write_request(header,
                                   {remote.address + command.remote.offset + offset, remote.key},
                                   {local.address + command.local.offset + offset, local.key},
                                   uint32_t(left < kMaxWrite ? left : kMaxWrite));
    }

    /// Raises. A signal ends a chunk: its completion says that the chunk has arrived.
    EPCOMM_HD mlx5::Block signal(uint64_t position) const {
        const uint64_t amount = command.op == EPCOMM_FABRIC_SIGNAL_ADD ? command.value : 1;
        const uint64_t value = load_relaxed(raised) + amount;
        *raised = value;
        return mlx5::word_request(mlx5::header_of(*queue, position, true),
                                  {signals.address + uint64_t(command.signal) * 8, signals.key},
                                  value);
    }
};

EPCOMM_HD inline Requests requests_of(const Ibgda& fabric, const Command& command, bool ask) {
    const Lane lane{command.peer, command.channel};
    const int32_t plane = plane_of(fabric, lane);
    const RegionKey* local = &fabric.local[plane * EPCOMM_FABRIC_MAX_REGIONS];
    const RegionKey* remote =
        &fabric.remote[(lane.peer * fabric.num_planes + plane) * EPCOMM_FABRIC_MAX_REGIONS];
    return {queue_of(fabric, lane),
            local[command.local.region],
            remote[command.remote.region],
            remote[EPCOMM_FABRIC_SIGNALS],
            &fabric.raised[int64_t(lane.peer) * fabric.num_signals + command.signal],
            command,
            ask};
}

/// Post them; returns the position behind the last one, 0: failed.
template <class Wait>
EPCOMM_HD inline uint64_t post(mlx5::SendQueue* queue, const Requests& requests, mlx5::Ring when,
                               Wait& wait) {
    const auto write = [&](uint32_t i, uint64_t position) { return requests.write(i, position); };
    const auto signal = [&](uint64_t position) { return requests.signal(position); };
    const uint32_t count = requests.num_writes();
    return requests.has_signal() ? mlx5::post_in_turn(queue, count, when, write, signal, wait)
                                 : mlx5::post(mlx5::OneThread(), queue, count, when, write, wait);
}

/// A ticket names the peer too, because every (peer, channel) counts on its own.
constexpr int kTicketPeerShift = 64 - 10;
static_assert(EPCOMM_FABRIC_MAX_NODES <= 1 << 10, "the peer's bits of a ticket");

/// 0 says that the call failed, so the first of all tickets, of nothing for peer 0, is 1.
EPCOMM_HD inline Ticket ticket_of(int32_t peer, uint64_t end) {
    return (uint64_t(peer) << kTicketPeerShift | end) + 1;
}

/// Post a command's requests with one reservation and, if it signals, ring.
EPCOMM_HD inline Ticket push(const Ibgda& fabric, const Command& command) {
    if (!fits(fabric, command)) {
        report_bad_command(fabric, command);
        return 0;
    }
    const Lane lane{command.peer, command.channel};
    mlx5::SendQueue* queue = queue_of(fabric, lane);
    const Requests requests = requests_of(fabric, command, false);
    const uint32_t count = requests.count();
    FabricWait wait(fabric, fabric.timeout_ns);
    if (count == 0) {  // nothing to move: done when all before it is
        const uint64_t end = load_relaxed(&queue->reserved);
        return mlx5::works(*queue) ? ticket_of(lane.peer, end) : 0;
    }
    if (count > mlx5::max_at_once(*queue)) {
        report_bad_command(fabric, command);
        return 0;
    }
    const mlx5::Ring when = requests.has_signal() ? mlx5::Ring::kNow : mlx5::Ring::kWhenDue;
    const uint64_t end = post(queue, requests, when, wait);
    if (end == 0) {
        report(fabric, lane, command);
        return 0;
    }
    if (requests.has_signal()) mlx5::raise_to(&queue->asked, end);
    return ticket_of(lane.peer, end);
}

EPCOMM_HD inline Ticket put(const Ibgda& fabric, Lane lane, epcomm_fabric_place remote,
                            epcomm_fabric_place local, uint64_t bytes) {
    return push(fabric, {EPCOMM_FABRIC_PUT, lane.peer, lane.channel, 0, local, remote, bytes, 0});
}

EPCOMM_HD inline Ticket put_signal(const Ibgda& fabric, Lane lane, epcomm_fabric_place remote,
                                   epcomm_fabric_place local, uint64_t bytes, int32_t signal) {
    return push(fabric, {EPCOMM_FABRIC_PUT_SIGNAL, lane.peer, lane.channel, signal, local, remote,
                         bytes, 0});
}

EPCOMM_HD inline Ticket signal_add(const Ibgda& fabric, Lane lane, int32_t signal, uint64_t value) {
    const epcomm_fabric_place none{0, 0, 0};
    return push(fabric,
                {EPCOMM_FABRIC_SIGNAL_ADD, lane.peer, lane.channel, signal, none, none, 0, value});
}

/// Read completions of one queue, and report an error among them. For those who wait for something
/// else: a kernel's queues have nobody else who looks.
EPCOMM_HD inline void look(const Ibgda& fabric, Lane lane) {
    if (mlx5::poll(queue_of(fabric, lane))) return;
    report(fabric, lane, {EPCOMM_FABRIC_NOOP, lane.peer, lane.channel, 0, {}, {}, 0, 0});
}

/// Never waits for the peer, but may post a request that asks for a completion.
EPCOMM_HD inline bool done(const Ibgda& fabric, int32_t channel, Ticket ticket) {
    const Lane lane{int32_t((ticket - 1) >> kTicketPeerShift), channel};
    const uint64_t end = (ticket - 1) & ((uint64_t(1) << kTicketPeerShift) - 1);
    mlx5::SendQueue* queue = queue_of(fabric, lane);
    FabricWait wait(fabric, fabric.timeout_ns);
    if (load_acquire(&queue->done) >= end) return true;
    if (!mlx5::poll(queue) || !mlx5::ask(queue, end, wait)) {
        report(fabric, lane, {EPCOMM_FABRIC_NOOP, lane.peer, channel, 0, {}, {}, 0, 0});
        return false;
    }
    return load_acquire(&queue->done) >= end;
}

/// On every peer's queue pair of the channel.
EPCOMM_HD inline bool flush(const Ibgda& fabric, int32_t channel, int64_t timeout_ns) {
    FabricWait wait(fabric, timeout_ns);
    // First ask everywhere, so that the peers' completions come at the same time.
    for (int pass = 0; pass < 2; ++pass) {
        for (int32_t peer = 0; peer < fabric.num_nodes; ++peer) {
            if (peer == fabric.node) continue;
            const Lane lane{peer, channel};
            mlx5::SendQueue* queue = queue_of(fabric, lane);
            const uint64_t end = load_relaxed(&queue->reserved);
            if (load_acquire(&queue->done) >= end) continue;
            if (pass == 0 ? mlx5::ask(queue, end, wait) : mlx5::flush(queue, wait)) continue;
            report(fabric, lane, {EPCOMM_FABRIC_NOOP, peer, channel, 0, {}, {}, 0, 0});
            return false;
        }
    }
    return !failed(fabric);
}

}  // namespace epcomm::fabric
