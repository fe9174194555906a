// The bulk copy engine (TMA) of sm_90 and later: one instruction moves a row between global and
// shared memory. Addresses and sizes are multiples of 16 bytes.
#pragma once

#include <stdint.h>

#include "memory.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define EPCOMM_BULK 1
#else
#define EPCOMM_BULK 0
#endif

namespace epcomm {

#if EPCOMM_BULK

// L2 hint of rows that this kernel touches once (the encoding createpolicy makes).
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

/// Make initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

/// The phase of `barrier` completes once this many bytes have been loaded.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

/// Global to shared; counts on `barrier`, which expects the bytes already.
__device__ __forceinline__ void bulk_load_expected(void* to, const void* from, uint32_t bytes,
                                                   uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(kEvictFirst)
        : "memory");
}

/// Global to shared; completes on `barrier`.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
    barrier_expect(barrier, bytes);
    bulk_load_expected(to, from, bytes, barrier);
}

/// Shared to global; belongs to the group closed by the next bulk_commit.
__device__ __forceinline__ void bulk_store(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Wait until all but the `pending` latest groups have read their shared memory.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/// Wait until all groups have written their bytes, visibly to this thread.
__device__ __forceinline__ void bulk_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// Order this thread's ordinary accesses and the copy engine's, both ways, in every memory.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

#endif

}  // namespace epcomm
