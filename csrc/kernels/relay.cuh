// Announcements between nodes: a rank puts its own to its rail peers, and hands those that reach
// it on to its node.
//
// Outbox and inbox have two slots, by parity of the epoch. A slot of epoch e is written again in
// epoch e + 2, which a rank begins after its kernels of e + 1 have ended; these saw every peer's
// announcement of e + 1, made after that peer had relayed all of e. So nobody reads it any more.
//
// Two announcements of a rank may be under way at once: who receives no records from a peer does
// not hear that the first has come. One signal counts both, and it grows only when the first one's
// bytes are there, because both go through one lane.
#pragma once

#include "announce.cuh"
#include "delay.cuh"
#include "fabric_kind.cuh"
#include "timeline.cuh"

namespace epcomm {

constexpr int kAnnounceChannel = 0;

/// A send failed: leave, and let the others leave.
__device__ inline void give_up_sending(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                       int node, const Waiting& what) {
    epcomm_cuda_error error = {};
    error.verdict = EPCOMM_CUDA_FABRIC;
    error.op = what.op;
    error.phase = what.phase;
    error.channel = int(blockIdx.x);
    error.reporter = world.rank;
    error.rank = rail.rail[node];
    error.epoch = what.epoch;
    give_up(world, error);
}

/// What is due before the kernel may end, for all its puts. The whole last block; false: the fabric
/// failed.
template <class Kind>
__device__ inline bool settle(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                              const Waiting& what) {
    if (Kind::settle(rail)) return true;
    if (threadIdx.x == 0) {
        const epcomm_fabric_state* state = Kind::fabric(rail).state;
        const int peer = state->failed != 0 ? state->error.peer : -1;
        give_up_sending(world, rail, peer < 0 ? rail.chunking.node : peer, what);
    }
    return false;
}

/// Put this rank's announcement to every rail peer. The whole block; false: the fabric failed.
template <class Kind>
__device__ inline bool announce_to_rail(const epcomm_cuda_world& world,
                                        const epcomm_cuda_rail& rail,
                                        const epcomm_announcement& mine, int status,
                                        const AnnouncedCounts& counts, const Waiting& what) {
    const int64_t bytes = announcement_bytes(size_of(world));
    const int64_t slot = int64_t(what.epoch & 1) * bytes;
    write_announcement(reinterpret_cast<epcomm_announcement*>(rail.outbox + slot), mine, status,
                       counts, what.epoch);
    __syncthreads();
    bool ok = true;
    const int own = rail.chunking.node;
    for (int n = int(threadIdx.x); n < world.num_nodes; n += int(blockDim.x)) {
        if (n == own) continue;
        const int place = epcomm_peer_index(n, own);  // among the peers of the one that receives
        const epcomm_fabric_place remote = {
            EPCOMM_REGION_INBOX, 0,
            uint64_t((int64_t(what.epoch & 1) * (world.num_nodes - 1) + place) * bytes)};
        const epcomm_fabric_place local = {EPCOMM_REGION_OUTBOX, 0, uint64_t(slot)};
        const Put put = {
            {n, kAnnounceChannel}, remote, local, uint64_t(bytes), epcomm_announce_signal(n, own)};
        if (!Kind::put_signal(rail, put)) {
            give_up_sending(world, rail, n, what);
            ok = false;
        }
    }
    return __syncthreads_and(ok);
}

/// Copy a rail peer's announcement to every rank of this node. A warp.
__device__ inline void relay_one(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                 int node, uint64_t epoch) {
    const int bytes = int(announcement_bytes(size_of(world)));
    const int place = epcomm_peer_index(rail.chunking.node, node), from = rail.rail[node];
    const uint8_t* inbox =
        rail.inbox + (int64_t(epoch & 1) * (world.num_nodes - 1) + place) * bytes;
    for (int at = lane_id() * 16; at < bytes; at += 32 * 16) {
        const uint4 v = load_once(inbox + at);
        for (int l = 0; l < world.num_local; ++l) {
            *reinterpret_cast<uint4*>(
                reinterpret_cast<uint8_t*>(announcement_of(world, l, from, epoch)) + at) = v;
        }
    }
    // Releases are cumulative over the warp's barrier.
    __syncwarp();
    for (int l = lane_id(); l < world.num_local; l += 32) {
        store_release(&announced_counters(world, l)[from].value, epoch);
    }
}

/// Hand on what the rail peers announce, a warp for each. The whole block; false: gave up.
template <class Kind>
__device__ inline bool relay(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                             const Waiting& what) {
    bool ok = true;
    for (int n = warp_id(); n < world.num_nodes && ok; n += int(blockDim.x >> 5)) {
        if (n == rail.chunking.node) continue;
        bool here = true;
        if (lane_id() == 0) {
            // A rank announces once in every call.
            const uint64_t* signal = rail.signals + epcomm_announce_signal(rail.chunking.node, n);
            here = wait_for_node<Kind>(world, rail, signal, what.epoch, n, what);
        }
        ok = __all_sync(kWarp, here);
        __syncwarp();  // what the first lane acquired is the warp's
        if (ok) relay_one(world, rail, n, what.epoch);
    }
    return __syncthreads_and(ok);
}

/// Announce to the world; what reaches this rank is handed on in `await_world`. The whole block 0.
template <class Kind>
__device__ inline bool announce_to_world(const epcomm_cuda_world& world,
                                         const epcomm_cuda_rail& rail,
                                         const epcomm_announcement& mine, int status,
                                         const AnnouncedCounts& counts, const Waiting& what) {
    delay(world, kDelayAnnounce);
    begin_block_role(world, EPCOMM_CUDA_ROLE_ANNOUNCE);
    const bool ok = announce_to_rail<Kind>(world, rail, mine, status, counts, what);
    announce(world, mine, status, counts, what.epoch);
    end_block_role(world);
    return ok;
}

/// Hand on what reaches this rank, if `hands_on` (block 0), and wait for all announcements. The
/// whole block; false: gave up.
template <class Kind>
__device__ inline bool await_world(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                   bool hands_on, uint64_t number, const Waiting& what) {
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    if (hands_on && blockIdx.x == 0 && !relay<Kind>(world, rail, what)) return false;
    if (!wait_announced(world, what.epoch, what, typename Kind::LookAround(rail))) return false;
    end_block_role(world);
    if (hands_on && blockIdx.x == 0 && threadIdx.x == 0) {
        stamp(world, number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    }
    delay(world, kDelayAnnounced);
    return true;
}

/// No verdict on the call yet, or none to come.
constexpr int kNoVerdict = -1;

/// Whether a rank may write its first records in staging before the verdict. They must be known:
/// the handle's dispatch was not refused, nor is this call here.
__device__ inline bool writes_ahead(const epcomm_cuda_rail& rail, const epcomm_announcement& mine,
                                    const epcomm_cuda_routes& routes) {
    return rail.chunking.ahead_records > 0 && mine.status == EPCOMM_STATUS_OK &&
           judge_routes(routes) == EPCOMM_CUDA_OK;
}

}  // namespace epcomm
