// The fabric as kernels and host threads see it: put, put_signal, signal_add, flush.
//
// Free functions over a plain struct. A kernel that takes the struct's type as a template
// parameter is written once; another kind of fabric brings its own struct and overloads.
//
//     template <class Fabric>
//     __device__ void send_chunk(const Fabric& fabric, ...) {
//         ...                     // many threads write the chunk
//         __syncthreads();
//         if (threadIdx.x == 0) fabric::put_signal(fabric, lane, remote, local, bytes, signal);
//     }
//
// WHO MAKES DATA VISIBLE. The call releases, at system scope, everything that happened before it in
// the calling thread's causality order: its own stores, and those of other threads that reached it
// through a barrier (__syncthreads, __syncwarp) or an acquire at the scope they share. So:
//   - plain stores of a block's threads: a barrier, then one thread calls. No fence of its own.
//   - bulk stores (cp.async.bulk to global memory): the thread that issued them waits for them
//     (cp.async.bulk.wait_group 0, not wait_group.read), then fence.proxy.async, before the
//     barrier.
//   - stores past the cache by host threads: a full fence in the storing thread, then join it.
// The region's bytes must stay as they are until the operation has completed: until `flush`, or
// until something only its receiver can have sent after reading them.
//
// ORDER. On one (peer, channel): operations become visible at the peer in the order in which the
// producers' calls were ordered; a signal after the bytes put before it. Between channels, and
// between peers, there is none. So a receiver keeps a counter per (source node, channel) and trusts
// no other sign. Calls of different threads are ordered only if the threads order them.
//
// The receiver reads its counter with an acquire at system scope; once it has the expected value,
// the bytes that were put before the signal can be read. A counter is raised by one (source,
// channel) only; it never shrinks and is never cleared.
//
// FAILURE. When something failed, every call returns at once (0 or false). The host finds the
// reason in state->error.
#pragma once

#include "epcomm_fabric.h"
#include "ring.h"

namespace epcomm::fabric {

/// Where an operation goes.
struct Lane {
    int32_t peer;  ///< node number
    int32_t channel;
};

/// A completed call's proof: all of a ring's operations up to this one. 0: the call failed.
using Ticket = uint64_t;

EPCOMM_HD inline bool failed(const epcomm_fabric& fabric) {
    return load_acquire(&fabric.state->failed) != 0;
}

EPCOMM_HD inline const epcomm_ring& ring_of(const epcomm_fabric& fabric, int32_t channel) {
    return fabric.rings[channel % fabric.num_rings];
}

/// Report what a producer met; only the first report counts. The text stays empty: the host puts
/// the fields into words.
EPCOMM_HD inline void fail(epcomm_fabric_state* state, const epcomm_fabric_error& error) {
#ifdef __CUDA_ARCH__
    // The host may report at the same moment, and a device's atomics on host memory are not atomic
    // for it: then the record may mix two reports. Both are true, and either ends the fabric.
    if (atomicExch_system(&state->failing, 1u) != 0) return;
#else
    if (__atomic_exchange_n(&state->failing, 1u, __ATOMIC_ACQ_REL) != 0) return;
#endif
    state->error.status = error.status;
    state->error.vendor = error.vendor;
    state->error.peer = error.peer;
    state->error.channel = error.channel;
    state->error.op = error.op;
    state->error.queue_pair = error.queue_pair;
    state->error.bytes = error.bytes;
    state->error.position = error.position;
    store_release(&state->failed, uint32_t(error.status));
}

/// What a command has met before a queue pair had anything to do with it.
EPCOMM_HD inline epcomm_fabric_error error_of(epcomm_fabric_status status, const Command& command,
                                              uint64_t position) {
    epcomm_fabric_error error;
    error.status = status;
    error.vendor = 0;
    error.peer = command.peer;
    error.channel = command.channel;
    error.op = command.op;
    error.queue_pair = 0;
    error.bytes = command.bytes;
    error.position = position;
    return error;
}

EPCOMM_HD inline void fail(const epcomm_fabric& fabric, epcomm_fabric_status status,
                           const Command& command, uint64_t position) {
    fail(fabric.state, error_of(status, command, position));
}

/// Put a command into its channel's ring.
EPCOMM_HD inline Ticket push(const epcomm_fabric& fabric, const Command& command) {
    if (failed(fabric)) return 0;
    if (!fits(command) || command.peer >= fabric.num_nodes ||
        command.channel >= fabric.num_channels) {
        fail(fabric, EPCOMM_FABRIC_BAD_TRIGGER, command, 0);
        return 0;
    }
    const epcomm_ring& ring = ring_of(fabric, command.channel);
    const uint64_t position = fetch_add(&ring.producer->head, 1);
    if (!wait_for_slot(ring, position, &fabric.state->failed, fabric.timeout_ns)) {
        fail(fabric, EPCOMM_FABRIC_RING_FULL, command, position);
        return 0;
    }
    publish(ring, position, command);
#ifndef __CUDA_ARCH__
    epcomm_fabric_wake(&fabric, command.channel);
#endif
    return position + 1;
}

/// All but the last piece of a transfer that is longer than a trigger can say; the last is left in
/// `command`.
EPCOMM_HD inline bool push_pieces(const epcomm_fabric& fabric, Command* command) {
    while (command->bytes > EPCOMM_FABRIC_MAX_BYTES) {
        Command piece = *command;
        piece.op = EPCOMM_FABRIC_PUT;
        piece.bytes = EPCOMM_FABRIC_MAX_BYTES;
        if (push(fabric, piece) == 0) return false;
        command->local.offset += piece.bytes;
        command->remote.offset += piece.bytes;
        command->bytes -= piece.bytes;
    }
    return true;
}

/// Copy `bytes` from a place of this rank to one of the peer.
EPCOMM_HD inline Ticket put(const epcomm_fabric& fabric, Lane lane, epcomm_fabric_place remote,
                            epcomm_fabric_place local, uint64_t bytes) {
    Command command{EPCOMM_FABRIC_PUT, lane.peer, lane.channel, 0, local, remote, bytes, 0};
    return push_pieces(fabric, &command) ? push(fabric, command) : 0;
}

/// `put`; once the bytes are visible at the peer, its counter `signal` grows by 1. No bytes are
/// legal.
EPCOMM_HD inline Ticket put_signal(const epcomm_fabric& fabric, Lane lane,
                                   epcomm_fabric_place remote, epcomm_fabric_place local,
                                   uint64_t bytes, int32_t signal) {
    Command command{
        EPCOMM_FABRIC_PUT_SIGNAL, lane.peer, lane.channel, signal, local, remote, bytes, 0};
    return push_pieces(fabric, &command) ? push(fabric, command) : 0;
}

/// The peer's counter `signal` grows by `value` (below 2^63) after all this lane's earlier bytes.
EPCOMM_HD inline Ticket signal_add(const epcomm_fabric& fabric, Lane lane, int32_t signal,
                                   uint64_t value) {
    const epcomm_fabric_place none{0, 0, 0};
    return push(fabric,
                {EPCOMM_FABRIC_SIGNAL_ADD, lane.peer, lane.channel, signal, none, none, 0, value});
}

/// Whether the operation of a ticket, and with it every earlier one of its channel, has completed
/// at its peer. A failed call's, 0, never has.
EPCOMM_HD inline bool done(const epcomm_fabric& fabric, int32_t channel, Ticket ticket) {
    return ticket != 0 && load_acquire(&ring_of(fabric, channel).consumer->completed) >= ticket;
}

/// Wait until all operations that were put into this channel before have completed at their peers.
/// The count of completions is of the channel's ring, so it covers other channels of that ring too.
/// False: the fabric failed, or `timeout_ns` from now passed.
EPCOMM_HD inline bool flush(const epcomm_fabric& fabric, int32_t channel, int64_t timeout_ns) {
    const Ticket all = load_relaxed(&ring_of(fabric, channel).producer->head);
    const int64_t start = now_ns();
    while (!done(fabric, channel, all)) {
        if (failed(fabric) || now_ns() - start > timeout_ns) return false;
        relax();
    }
    return true;
}

}  // namespace epcomm::fabric
