// Memory order between the writers of a queue, and between writers and NIC.
//
// Two scopes occur. The writers of a queue are threads of one device (or of one host process):
// *device* scope. The NIC and the host are outside: *system* scope. A fence of the narrower scope
// is cumulative: what writer A released to writer B on the device is covered by B's system fence.
#pragma once

#include <string.h>

#include "../fabric/atomics.h"
#include "mlx5.h"

namespace epcomm::mlx5 {

enum class Scope { kDevice, kSystem };

/// Orders what came before, also of other threads that reached this one, before what follows.
template <Scope scope>
EPCOMM_HD inline void fence() {
#ifdef __CUDA_ARCH__
    if constexpr (scope == Scope::kDevice) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    } else {
        asm volatile("fence.acq_rel.sys;" ::: "memory");
    }
#else
    __atomic_thread_fence(__ATOMIC_ACQ_REL);
#endif
}

#ifdef __CUDACC__
/// Bulk stores (cp.async.bulk from shared to global memory) of the calling thread become visible
/// like plain stores of it: complete, not only read out of shared memory, and ordered between the
/// async and the generic proxy. Before the barrier that precedes a put.
__device__ inline void finish_bulk_stores() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
#endif

/// The store that rings. Whoever can be woken by it must find everything before it: the caller has
/// fenced at system scope.
EPCOMM_HD inline void store_doorbell(uint64_t* doorbell, Doorbell value) {
    uint64_t word;
    memcpy(&word, &value, sizeof word);
#ifdef __CUDA_ARCH__
    // Not merged with, repeated or split like a store to memory may be.
    asm volatile("st.mmio.relaxed.sys.global.u64 [%0], %1;" ::"l"(doorbell), "l"(word) : "memory");
#else
    // The register of real hardware needs write-back order before it; on x86 stores have it.
    __atomic_store_n(doorbell, word, __ATOMIC_RELEASE);
#endif
}

EPCOMM_HD inline void store_record(Be32* record, uint16_t next) {
    const Be32 value = uint32_t(next);
#ifdef __CUDA_ARCH__
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(record), "r"(value.raw) : "memory");
#else
    __atomic_store_n(&record->raw, value.raw, __ATOMIC_RELAXED);
#endif
}

/// Raise a counter that several threads raise to different values; releases at device scope.
EPCOMM_HD inline void raise_to(uint64_t* counter, uint64_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("red.release.gpu.max.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
#else
    uint64_t seen = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(counter, &seen, value, true,
                                                        __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
    }
#endif
}

/// What an exchange orders among threads in its scope. Who has fenced needs no release.
enum class Order { kAcquire, kAcquireRelease };

/// Exchange if the word is `*seen`; if not, `*seen` is what it is, acquired too.
template <Order order, Scope scope = Scope::kDevice>
EPCOMM_HD inline bool exchange_seen(uint64_t* word, uint64_t* seen, uint64_t value) {
#ifdef __CUDA_ARCH__
    const uint64_t expected = *seen;
    if constexpr (scope == Scope::kSystem) {
        asm volatile("atom.acq_rel.sys.cas.b64 %0, [%1], %2, %3;"
                     : "=l"(*seen)
                     : "l"(word), "l"(expected), "l"(value)
                     : "memory");
    } else if constexpr (order == Order::kAcquire) {
        asm volatile("atom.acquire.gpu.cas.b64 %0, [%1], %2, %3;"
                     : "=l"(*seen)
                     : "l"(word), "l"(expected), "l"(value)
                     : "memory");
    } else {
        asm volatile("atom.acq_rel.gpu.cas.b64 %0, [%1], %2, %3;"
                     : "=l"(*seen)
                     : "l"(word), "l"(expected), "l"(value)
                     : "memory");
    }
    return *seen == expected;
#else
    fabric::interleave();
    const bool won =
        __atomic_compare_exchange_n(word, seen, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    fabric::interleave();
    return won;
#endif
}

/// Exchange if equal; acquires and releases.
template <Scope scope = Scope::kDevice>
EPCOMM_HD inline bool exchange_if(uint64_t* word, uint64_t expected, uint64_t value) {
    return exchange_seen<Order::kAcquireRelease, scope>(word, &expected, value);
}

}  // namespace epcomm::mlx5
