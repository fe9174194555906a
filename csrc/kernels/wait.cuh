// Waiting with an end: every spin has a deadline, writes an error record and leaves. No traps.
#pragma once

#include "epcomm_cuda.h"
#include "memory.cuh"

namespace epcomm {

/// What a wait is about, for the error record.
struct Waiting {
    int op;
    int phase;
    uint64_t epoch;
    const uint32_t* fabric_failed = nullptr;  ///< nonzero: the way to other nodes is broken
    /// How many ranks may wait one for another up to the one that is late: who waits for that one
    /// itself is to be the first to say so.
    int between = 0;
};

__device__ inline epcomm_cuda_control* own_control(const epcomm_cuda_world& world) {
    return world.controls[world.local_rank];
}

/// Copy `error` to the host. Only the first thread of this rank's kernels to get here writes.
__device__ inline void report_error(const epcomm_cuda_world& world,
                                    const epcomm_cuda_error& error) {
    if (atomicCAS(&own_control(world)->reporting, 0, 1) != 0) return;
    world.report->error = error;
    __threadfence_system();
    *reinterpret_cast<volatile int32_t*>(&world.report->failed) = 1;
}

/// Tell the host and the node's ranks that this rank gives up, so that all leave at once.
__device__ inline void give_up(const epcomm_cuda_world& world, const epcomm_cuda_error& error) {
    report_error(world, error);
    for (int l = 0; l < world.num_local; ++l) {
        epcomm_cuda_control* peer = world.controls[l];
        if (load_relaxed(&peer->aborted.value) != 0) continue;
        peer->error = error;
        store_release(&peer->aborted.value, uint64_t(world.rank) + 1);
    }
}

/// Tell the host that a rank gave up, which `aborted` says.
__device__ inline void report_abort(const epcomm_cuda_world& world) {
    epcomm_cuda_error error = own_control(world)->error;
    error.verdict = EPCOMM_CUDA_ABORTED;
    report_error(world, error);
}

/// How often a waiting thread looks at the fabric's flag, which lies in host memory. Thousands of
/// threads that read over PCIe all the time would hold up all else that crosses it: triggers, and
/// the copy engines' commands.
constexpr uint64_t kLookAtHostNs = 1000000;

/// Nothing to do while waiting.
struct NoLook {
    __device__ void operator()() {}
};

/// How long a wait may still last.
struct Patience {
    uint64_t start;
    uint64_t looked;

    __device__ Patience() : start(now_ns()), looked(start) {}

    /// Whether to go on waiting for `*counter` to become `expected`. False: gave up, or another
    /// rank did. One thread of those that wait for the same.
    __device__ bool lasts(const epcomm_cuda_world& world, const uint64_t* counter,
                          uint64_t expected, int rank, const Waiting& what) {
        if (load_acquire(&own_control(world)->aborted.value) != 0) {
            report_abort(world);
            return false;
        }
        const uint64_t now = now_ns();
        bool broken = false;
        if (what.fabric_failed != nullptr && now - looked > kLookAtHostNs) {
            looked = now;
            broken = load_acquire(what.fabric_failed) != 0;
        }
        const int64_t most = world.timeout_ns + what.between * (world.timeout_ns / 4);
        if (!broken && now - start <= uint64_t(most)) return true;
        epcomm_cuda_error error;
        error.verdict = broken ? EPCOMM_CUDA_FABRIC : EPCOMM_CUDA_TIMEOUT;
        error.op = what.op;
        error.phase = what.phase;
        error.channel = int(blockIdx.x);
        error.reporter = world.rank;
        error.rank = rank;
        error.epoch = what.epoch;
        error.expected = expected;
        error.seen = load_relaxed(counter);
        give_up(world, error);
        return false;
    }
};

constexpr int kPolls = 64;  ///< between two looks at anything else

/// Spin until `*counter` is at least `expected` (acquire). False: gave up, or another rank did.
/// `look` is called now and then.
template <class Look = NoLook>
__device__ inline bool wait_counter(const epcomm_cuda_world& world, const uint64_t* counter,
                                    uint64_t expected, int rank, const Waiting& what,
                                    Look look = Look()) {
    if (load_acquire(counter) >= expected) return true;
    Patience patience;
    while (true) {
// A loop: unrolled, each of a kernel's waits would be 5 KB of instructions to fetch.
#pragma unroll 1
        for (int i = 0; i < kPolls; ++i) {
            if (load_acquire(counter) >= expected) return true;
        }
        look();
        if (!patience.lasts(world, counter, expected, rank, what)) return false;
    }
}

/// Where a kernel starts: the number of its call, or 0 where a rank gave up before. A kernel after
/// one that gave up must do nothing: what the earlier one would have left is not there, and peers
/// may still read what was announced for that number. The whole block.
__device__ inline uint64_t begin_call(const epcomm_cuda_world& world) {
    await_stream();
    const epcomm_cuda_control* own = own_control(world);
    const uint64_t finished = load_relaxed(&own->epoch.value);
    const bool usable = load_acquire(&own->aborted.value) == 0;
    if (__syncthreads_and(usable)) return finished + 1;
    if (!usable) report_abort(world);
    return 0;
}

/// The whole block waits until every rank of the node has raised its counter in `counters`.
__device__ inline bool wait_node(const epcomm_cuda_world& world,
                                 const epcomm_cuda_counter* counters, uint64_t expected,
                                 const Waiting& what) {
    bool ok = true;
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        ok = wait_counter(world, &counters[l].value, expected, world.node_ranks[l], what) && ok;
    }
    return __syncthreads_and(ok);
}

}  // namespace epcomm
