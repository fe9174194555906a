// Announcements: what every rank tells every other before data moves, pushed into the peers'
// control blocks, and the verdict all ranks reach on them.
//
// A rank announces epoch e + 1 only after its kernels of epoch e ended, and those end only once
// every peer has announced e. So a peer is at most one announcement ahead, and two slots suffice.
#pragma once

#include <stddef.h>

#include "wait.cuh"
#include "window.cuh"

namespace epcomm {

/// What the size of an announcement depends on.
struct WorldSize {
    int nodes;
    int ranks;
    int experts;
};

__host__ __device__ inline int64_t announcement_bytes(const WorldSize& size) {
    return epcomm_align(int64_t(sizeof(epcomm_announcement)) +
                            4 * (int64_t(size.nodes) + size.ranks + size.experts),
                        EPCOMM_LIMIT_window_align);
}

/// In a control block: the announcement of `rank` for `epoch`.
__host__ __device__ inline int64_t announcement_offset(const WorldSize& size, int rank,
                                                       uint64_t epoch) {
    return epcomm_align(sizeof(epcomm_cuda_control), EPCOMM_LIMIT_window_align) +
           (int64_t(epoch & 1) * size.ranks + rank) * announcement_bytes(size);
}

/// Where a refused call's announcement of `rank` is kept for the host, without counts: calls that
/// did not wait for the verdict have announced over it by the time the host asks.
__host__ __device__ inline int64_t refused_offset(const WorldSize& size, int rank) {
    return announcement_offset(size, 0, 0) + 2 * size.ranks * announcement_bytes(size) +
           rank * epcomm_align(sizeof(epcomm_announcement), EPCOMM_LIMIT_window_align);
}

/// In a control block: the counters of epochs announced, by rank.
__host__ __device__ inline int64_t announced_offset(const WorldSize& size) {
    return refused_offset(size, size.ranks);
}

__device__ inline WorldSize size_of(const epcomm_cuda_world& world) {
    return {world.num_nodes, world.num_ranks, world.num_experts};
}

/// The announcement of `from` for `epoch` as it lies at local rank `at`.
__device__ inline epcomm_announcement* announcement_of(const epcomm_cuda_world& world, int at,
                                                       int from, uint64_t epoch) {
    return reinterpret_cast<epcomm_announcement*>(reinterpret_cast<uint8_t*>(world.controls[at]) +
                                                  announcement_offset(size_of(world), from, epoch));
}

/// The same as it lies here.
__device__ inline epcomm_announcement* announcement_from(const epcomm_cuda_world& world, int from,
                                                         uint64_t epoch) {
    return announcement_of(world, world.local_rank, from, epoch);
}

/// The counters, at local rank `at`, of what every rank has announced.
__device__ inline epcomm_cuda_counter* announced_counters(const epcomm_cuda_world& world, int at) {
    return reinterpret_cast<epcomm_cuda_counter*>(reinterpret_cast<uint8_t*>(world.controls[at]) +
                                                  announced_offset(size_of(world)));
}

__device__ inline int32_t* node_tokens_of(epcomm_announcement* announcement) {
    return reinterpret_cast<int32_t*>(announcement + 1);
}

__device__ inline int32_t* rank_rows_of(const epcomm_cuda_world& world,
                                        epcomm_announcement* announcement) {
    return node_tokens_of(announcement) + world.num_nodes;
}

/// The counts that an announcement carries: `values` from `first` on in node_tokens, rank_rows,
/// expert_rows.
struct AnnouncedCounts {
    const int32_t* values;
    int first;
    int count;
};

/// Store this rank's announcement at `slot`; `status` may be worse than the host knew. Called by
/// one whole block.
__device__ inline void write_announcement(epcomm_announcement* slot,
                                          const epcomm_announcement& mine, int status,
                                          const AnnouncedCounts& counts, uint64_t epoch) {
    constexpr int kWords = int(sizeof(epcomm_announcement) / 4);
    const auto* words = reinterpret_cast<const uint32_t*>(&mine);
    auto* to = reinterpret_cast<uint32_t*>(slot);
    // The kernel knows the epoch, the host did not.
    for (int i = int(threadIdx.x); i < kWords; i += int(blockDim.x)) {
        uint32_t word = words[i];
        if (i == 0) word = uint32_t(epoch);
        if (i == 1) word = uint32_t(epoch >> 32);
        if (i == int(offsetof(epcomm_announcement, status) / 4)) word = uint32_t(status);
        to[i] = word;
    }
    int32_t* to_counts = node_tokens_of(slot) + counts.first;
    for (int i = int(threadIdx.x); i < counts.count; i += int(blockDim.x)) {
        to_counts[i] = counts.values[i];
    }
}

/// Push this rank's announcement to all ranks of its node, itself included. The whole block.
__device__ inline void announce(const epcomm_cuda_world& world, const epcomm_announcement& mine,
                                int status, const AnnouncedCounts& counts, uint64_t epoch) {
    for (int l = 0; l < world.num_local; ++l) {
        write_announcement(announcement_of(world, l, world.rank, epoch), mine, status, counts,
                           epoch);
    }
    // The barrier orders the block's stores before the release, which is cumulative.
    __syncthreads();
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        store_release(&announced_counters(world, l)[world.rank].value, epoch);
    }
}

/// The whole block waits until every rank's announcement is here, or only those `of_node`. First
/// for the node's own: a rank of it that is silent hands on nobody else's either, and is the one to
/// name.
template <bool of_node = false, class Look = NoLook>
__device__ inline bool wait_announced(const epcomm_cuda_world& world, uint64_t epoch,
                                      const Waiting& what, const Look& look = Look()) {
    const epcomm_cuda_counter* counters = announced_counters(world, world.local_rank);
    bool ok = true;
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        const int r = world.node_ranks[l];
        ok = wait_counter(world, &counters[r].value, epoch, r, what, look) && ok;
    }
    ok = __syncthreads_and(ok);
    if (of_node || !ok || world.num_nodes == 1) return ok;
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        ok = wait_counter(world, &counters[r].value, epoch, r, what, look) && ok;
    }
    return __syncthreads_and(ok);
}

/// What `mine` and the announcement of `rank` amount to; `rows` = rows that rank will hold.
__device__ inline int judge(const epcomm_announcement& mine, const epcomm_announcement& theirs,
                            const epcomm_cuda_row& row, int64_t rows) {
    if (theirs.status != EPCOMM_STATUS_OK || mine.status != EPCOMM_STATUS_OK) {
        return EPCOMM_CUDA_REFUSED;
    }
    const bool same = mine.op == theirs.op && mine.format == theirs.format &&
                      mine.layout == theirs.layout && mine.alignment == theirs.alignment &&
                      mine.with_weights == theirs.with_weights &&
                      mine.fixed_rows == theirs.fixed_rows && mine.wire == theirs.wire &&
                      mine.handle_epoch == theirs.handle_epoch;
    if (!same) return EPCOMM_CUDA_MISMATCH;
    if (mine.op != EPCOMM_OP_COMBINE && mine.fixed_rows >= 0 && rows > mine.fixed_rows) {
        return EPCOMM_CUDA_FIXED_ROWS;
    }
    // A rank without a window that will do announces one of no bytes.
    if (theirs.window_bytes == 0) return EPCOMM_CUDA_GROW;
    if (mine.op == EPCOMM_OP_COMBINE) return EPCOMM_CUDA_OK;
    const int64_t held = mine.fixed_rows >= 0 ? mine.fixed_rows : rows;
    if (window_parts(row, held).bytes > theirs.window_bytes) return EPCOMM_CUDA_GROW;
    return EPCOMM_CUDA_OK;
}

/// The block's verdict over all ranks: the gravest that is not a success (lowest code wins, so
/// that every rank names the same one). `rows` has one entry a rank, or is null (combine).
__device__ inline int judge_all(const epcomm_cuda_world& world, const epcomm_announcement& mine,
                                const epcomm_cuda_row& row, const int32_t* rows, uint64_t epoch) {
    __shared__ int verdict;
    constexpr int kNone = 1 << 20;
    if (threadIdx.x == 0) verdict = kNone;
    __syncthreads();
    const int refused_here = announcement_from(world, world.rank, epoch)->status;
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        const epcomm_announcement* theirs = announcement_from(world, r, epoch);
        int code = judge(mine, *theirs, row, rows == nullptr ? 0 : rows[r]);
        if (refused_here != EPCOMM_STATUS_OK) code = EPCOMM_CUDA_REFUSED;
        if (code != EPCOMM_CUDA_OK) atomicMin(&verdict, code);
    }
    __syncthreads();
    const int code = verdict;
    __syncthreads();
    return code == kNone ? EPCOMM_CUDA_OK : code;
}

/// What became of the dispatch that made `routes`: the same on all ranks. A handle made without
/// waiting for the verdict may belong to a call that was refused.
__device__ inline int judge_routes(const epcomm_cuda_routes& routes) {
    const bool moved = routes.verdict == nullptr || *routes.verdict == EPCOMM_CUDA_OK;
    return moved ? EPCOMM_CUDA_OK : EPCOMM_CUDA_STALE;
}

/// Free windows of the rank that has fewest; announced in `window_fd`. One thread.
__device__ inline int fewest_free_windows(const epcomm_cuda_world& world, uint64_t epoch) {
    constexpr int kTogether = 8;  // loads under way
    int fewest = INT32_MAX;
    for (int first = 0; first < world.num_ranks; first += kTogether) {
        int free[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int r = min(first + i, world.num_ranks - 1);
            free[i] = announcement_from(world, r, epoch)->window_fd;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) fewest = min(fewest, free[i]);
    }
    return fewest;
}

}  // namespace epcomm
