// The fabric API of fabric.h over mlx5 send queues that kernels (or host threads) fill themselves.
//
// Every (peer, channel) has a queue pair of its own; on a reliable connection its requests take
// effect at the peer in their order, which is the order the API promises.
//
// A signal is an 8-byte write of the counter's next value. The sender alone raises that counter, so
// it knows the value (`raised`): counted in the turn in which the request is published, since it
// must grow in the order of the requests.
//
// A rank may own several NICs (planes). A channel belongs to one of them, so planes need no order
// among themselves: receivers count per (source, channel) anyway. Here a queue pair that fails ends
// the fabric; planes.h has the same calls for lanes that then go to another plane.
#pragma once

#include "queues.h"

namespace epcomm::fabric {

/// Whether the tables have what the command names. Bounds at the peer are its NIC's to check; those
/// here are checked, as proxies do, before a queue pair is lost over them.
EPCOMM_HD inline bool fits(const Ibgda& fabric, const Command& command) {
    const auto region_fits = [](int32_t region) {
        return region >= 0 && region < EPCOMM_FABRIC_MAX_REGIONS;
    };
    if (command.peer < 0 || command.peer >= fabric.num_nodes || command.peer == fabric.node ||
        command.channel < 0 || command.channel >= fabric.num_channels || command.signal < 0 ||
        command.signal >= fabric.num_signals || !region_fits(command.local.region) ||
        !region_fits(command.remote.region)) {
        return false;
    }
    const int32_t plane = plane_of(fabric, {command.peer, command.channel});
    const uint64_t there = keys_on(fabric, fabric.local, 0, plane)[command.local.region].bytes;
    return command.bytes == 0 ||
           (command.bytes <= there && command.local.offset <= there - command.bytes);
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
        const mlx5::Header header = mlx5::header_of(*queue, position, true);
        const uint64_t amount = command.op == EPCOMM_FABRIC_SIGNAL_ADD ? command.value : 1;
        // A value that is there already would say that this request has taken effect.
        if (amount == 0) return mlx5::nop_request(header);
        const uint64_t value = load_relaxed(raised) + amount;
        *raised = value;
        return mlx5::word_request(
            header, {signals.address + uint64_t(command.signal) * 8, signals.key}, value);
    }

    /// Of the word at the command's remote place; its old value comes to the local one.
    EPCOMM_HD mlx5::Block fetch_add(uint64_t position, uint64_t amount) const {
        return mlx5::fetch_add_request(mlx5::header_of(*queue, position, true),
                                       {remote.address + command.remote.offset, remote.key},
                                       {local.address + command.local.offset, local.key}, amount);
    }
};

/// On the queue of `lane`, which may have taken over from the command's own.
EPCOMM_HD inline Requests requests_of(const Ibgda& fabric, Lane lane, const Command& command,
                                      bool ask) {
    const int32_t plane = plane_of(fabric, lane);
    const RegionKey* local = keys_on(fabric, fabric.local, 0, plane);
    const RegionKey* remote = keys_on(fabric, fabric.remote, lane.peer, plane);
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

/// A ticket names the queue, because every (peer, channel) counts on its own.
constexpr int kTicketPeerShift = 64 - 10, kTicketChannelShift = kTicketPeerShift - 6;
static_assert(EPCOMM_FABRIC_MAX_NODES <= 1 << 10, "the peer's bits of a ticket");
static_assert(EPCOMM_FABRIC_MAX_CHANNELS <= 1 << 6, "the channel's bits of a ticket");

/// 0 says that the call failed, so the first of all tickets, of nothing for peer 0, is 1.
EPCOMM_HD inline Ticket ticket_of(Lane lane, uint64_t end) {
    return (uint64_t(lane.peer) << kTicketPeerShift |
            uint64_t(lane.channel) << kTicketChannelShift | end) +
           1;
}

/// What a call does when the queue of a lane has failed: find the channel whose queue it goes on
/// with, -1: none. This one ends the fabric.
struct EndFabric {
    EPCOMM_HD static int32_t next_channel(const Ibgda& fabric, Lane lane, Call call) {
        report(fabric, queue_of(fabric, lane), call);
        return -1;
    }
};

/// Post a command's requests with one reservation and, if it signals, ring.
template <class Recovery>
EPCOMM_HD inline Ticket push(const Ibgda& fabric, const Command& command) {
    if (!fits(fabric, command)) {
        report_bad_command(fabric, command);
        return 0;
    }
    Lane lane{command.peer, command.channel};
    do {
        mlx5::SendQueue* queue = queue_of(fabric, lane);
        const Requests requests = requests_of(fabric, lane, command, false);
        const uint32_t count = requests.count();
        if (count > mlx5::max_at_once(*queue)) {
            report_bad_command(fabric, command);
            return 0;
        }
        if (count == 0) {  // nothing to move: done when all before it is
            const uint64_t end = load_relaxed(&queue->reserved);
            if (mlx5::works(*queue)) return ticket_of(lane, end);
        } else {
            FabricWait wait(fabric, fabric.timeout_ns);
            const bool signals = requests.has_signal();
            const uint64_t end =
                post(queue, requests, signals ? mlx5::Ring::kNow : mlx5::Ring::kWhenDue, wait);
            if (signals && end != 0) mlx5::raise_to(&queue->asked, end);
            if (end != 0) return ticket_of(lane, end);
        }
        lane.channel = Recovery::next_channel(fabric, lane, {command.op, command.bytes});
    } while (lane.channel >= 0);
    return 0;
}

EPCOMM_HD inline Command put_command(Lane lane, epcomm_fabric_place remote,
                                     epcomm_fabric_place local, uint64_t bytes) {
    return {EPCOMM_FABRIC_PUT, lane.peer, lane.channel, 0, local, remote, bytes, 0};
}

EPCOMM_HD inline Command put_signal_command(Lane lane, epcomm_fabric_place remote,
                                            epcomm_fabric_place local, uint64_t bytes,
                                            int32_t signal) {
    return {EPCOMM_FABRIC_PUT_SIGNAL, lane.peer, lane.channel, signal, local, remote, bytes, 0};
}

EPCOMM_HD inline Command signal_add_command(Lane lane, int32_t signal, uint64_t value) {
    const epcomm_fabric_place none{0, 0, 0};
    return {EPCOMM_FABRIC_SIGNAL_ADD, lane.peer, lane.channel, signal, none, none, 0, value};
}

EPCOMM_HD inline Ticket put(const Ibgda& fabric, Lane lane, epcomm_fabric_place remote,
                            epcomm_fabric_place local, uint64_t bytes) {
    return push<EndFabric>(fabric, put_command(lane, remote, local, bytes));
}

EPCOMM_HD inline Ticket put_signal(const Ibgda& fabric, Lane lane, epcomm_fabric_place remote,
                                   epcomm_fabric_place local, uint64_t bytes, int32_t signal) {
    return push<EndFabric>(fabric, put_signal_command(lane, remote, local, bytes, signal));
}

EPCOMM_HD inline Ticket signal_add(const Ibgda& fabric, Lane lane, int32_t signal, uint64_t value) {
    return push<EndFabric>(fabric, signal_add_command(lane, signal, value));
}

/// Add to a word of the peer; its old value comes to a local one. Both are aligned to 8 bytes.
/// Where the peer's cards have atomics (epcomm_fabric_has_atomics). There is no such call for
/// Planes: what was lost is sent again there, which would add twice.
EPCOMM_HD inline Ticket fetch_add_at(const Ibgda& fabric, Lane lane, epcomm_fabric_place remote,
                                     epcomm_fabric_place local, uint64_t amount) {
    // It is checked, and reported, like a put of the word.
    const Command command = put_command(lane, remote, local, sizeof amount);
    if (!fits(fabric, command)) {
        report_bad_command(fabric, command);
        return 0;
    }
    mlx5::SendQueue* queue = queue_of(fabric, lane);
    const Requests requests = requests_of(fabric, lane, command, true);
    const auto make = [&](uint32_t, uint64_t position) {
        return requests.fetch_add(position, amount);
    };
    FabricWait wait(fabric, fabric.timeout_ns);
    const uint64_t end = mlx5::post(mlx5::OneThread(), queue, 1, mlx5::Ring::kNow, make, wait);
    if (end == 0) {
        report(fabric, queue, {command.op, command.bytes});
        return 0;
    }
    mlx5::raise_to(&queue->asked, end);
    return ticket_of(lane, end);
}

/// In a word that waits for a peer's answer: no counter gets there.
constexpr uint64_t kNoAnswer = ~uint64_t(0);

/// The completion may lie in other memory than the answer, and so may come before it. False: the
/// wait is over.
template <class Wait>
EPCOMM_HD inline bool await_answer(const uint64_t* word, Wait& wait, uint64_t* answer) {
    while ((*answer = load_acquire(word)) == kNoAnswer) {
        if (!wait.again()) return false;
    }
    return true;
}

/// Read completions of one queue, and deal with an error among them. For those who wait for
/// something else: a kernel's queues have nobody else who looks.
template <class Recovery>
EPCOMM_HD inline void look_at_queue(const Ibgda& fabric, Lane lane) {
    if (mlx5::poll(queue_of(fabric, lane))) return;
    Recovery::next_channel(fabric, lane, {EPCOMM_FABRIC_NOOP, 0});
}

template <class Recovery>
EPCOMM_HD inline bool ticket_is_done(const Ibgda& fabric, Ticket ticket) {
    if (ticket == 0) return false;
    constexpr uint64_t kChannel = EPCOMM_FABRIC_MAX_CHANNELS - 1;
    Lane lane{int32_t((ticket - 1) >> kTicketPeerShift),
              int32_t((ticket - 1) >> kTicketChannelShift & kChannel)};
    uint64_t end = (ticket - 1) & ((uint64_t(1) << kTicketChannelShift) - 1);
    while (true) {
        mlx5::SendQueue* queue = queue_of(fabric, lane);
        FabricWait wait(fabric, fabric.timeout_ns);
        if (load_acquire(&queue->done) >= end) return true;
        if (mlx5::poll(queue) && mlx5::ask(queue, end, wait)) {
            return load_acquire(&queue->done) >= end;
        }
        const bool over = mlx5::works(*queue);  // it is the time that is
        if (over || Recovery::next_channel(fabric, lane, {EPCOMM_FABRIC_NOOP, 0}) < 0) return false;
        // What had not completed is on the successor.
        if (end <= queue->error_position) return true;
        end = queue->again_end;
        lane = lane_of(fabric, queue_at(fabric, int32_t(queue->successor) - 1));
    }
}

/// See to it that everything that was put into a lane completes, and if `wait_for_it` wait.
template <class Recovery>
EPCOMM_HD inline bool flush_lane(const Ibgda& fabric, Lane lane, bool wait_for_it,
                                 FabricWait& wait) {
    do {
        mlx5::SendQueue* queue = queue_of(fabric, lane);
        const uint64_t end = load_relaxed(&queue->reserved);
        if (load_acquire(&queue->done) >= end) return true;
        if (wait_for_it ? mlx5::flush(queue, wait) : mlx5::ask(queue, end, wait)) return true;
        if (mlx5::works(*queue)) return false;
        lane.channel = Recovery::next_channel(fabric, lane, {EPCOMM_FABRIC_NOOP, 0});
    } while (lane.channel >= 0);
    return false;
}

template <class Recovery>
EPCOMM_HD inline bool flush_channel(const Ibgda& fabric, int32_t channel, int64_t timeout_ns) {
    FabricWait wait(fabric, timeout_ns);
    // First ask everywhere, so that the peers' completions come at the same time.
    for (int pass = 0; pass < 2; ++pass) {
        for (int32_t peer = 0; peer < fabric.num_nodes; ++peer) {
            if (peer == fabric.node) continue;
            if (!flush_lane<Recovery>(fabric, {peer, channel}, pass == 1, wait)) return false;
        }
    }
    return !failed(fabric);
}

EPCOMM_HD inline void look(const Ibgda& fabric, Lane lane) {
    look_at_queue<EndFabric>(fabric, lane);
}

/// Never waits for the peer, but may post a request that asks for a completion.
EPCOMM_HD inline bool done(const Ibgda& fabric, int32_t /*channel*/, Ticket ticket) {
    return ticket_is_done<EndFabric>(fabric, ticket);
}

/// On every peer's queue pair of the channel.
EPCOMM_HD inline bool flush(const Ibgda& fabric, int32_t channel, int64_t timeout_ns) {
    return flush_channel<EndFabric>(fabric, channel, timeout_ns);
}

}  // namespace epcomm::fabric
