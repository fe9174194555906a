// Loads, stores and atomic operations at system scope, the same from host and device, and clocks.
#pragma once

#include <stdint.h>

#include "../protocol/host_device.h"

#ifndef __CUDA_ARCH__
#include <sched.h>
#include <time.h>
#endif
#ifdef EPCOMM_EMULATED
#include "give_way.h"  // a test runs kernels on the host
#endif

namespace epcomm::fabric {

/// Where tests that run kernels on the host let other threads of the block go on.
EPCOMM_HD inline void interleave() {
#ifdef EPCOMM_EMULATED
    emulation::maybe_give_way();
#endif
}

/// On a device also ordered with the host's and the NIC's accesses.
EPCOMM_HD inline uint64_t load_acquire(const uint64_t* address) {
#ifdef __CUDA_ARCH__
    uint64_t value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

EPCOMM_HD inline uint32_t load_acquire(const uint32_t* address) {
#ifdef __CUDA_ARCH__
    uint32_t value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

EPCOMM_HD inline uint64_t load_relaxed(const uint64_t* address) {
#ifdef __CUDA_ARCH__
    uint64_t value;
    asm volatile("ld.relaxed.sys.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

EPCOMM_HD inline uint32_t load_relaxed(const uint32_t* address) {
#ifdef __CUDA_ARCH__
    uint32_t value;
    asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_RELAXED);
#endif
}

/// What an earlier fence orders, or nothing does.
EPCOMM_HD inline void store_relaxed(uint64_t* address, uint64_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
    interleave();
    __atomic_store_n(address, value, __ATOMIC_RELAXED);
#endif
}

EPCOMM_HD inline void store_release(uint64_t* address, uint64_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

EPCOMM_HD inline void store_release(uint32_t* address, uint32_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

/// Among the producers of one ring: device threads of one GPU, or host threads.
EPCOMM_HD inline uint64_t fetch_add(uint64_t* address, uint64_t amount) {
#ifdef __CUDA_ARCH__
    return atomicAdd(reinterpret_cast<unsigned long long*>(address), amount);
#else
    interleave();
    const uint64_t before = __atomic_fetch_add(address, amount, __ATOMIC_RELAXED);
    interleave();
    return before;
#endif
}

/// Both words of a trigger. Each is a release of everything that happened before in this thread,
/// and, because release is cumulative, of everything other threads did before a barrier or an
/// acquire in this thread. The two words need no order: each one carries the parity.
EPCOMM_HD inline void store_release_pair(uint64_t* address, uint64_t first, uint64_t second) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.sys.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second)
                 : "memory");
#else
    __atomic_store_n(address, first, __ATOMIC_RELEASE);
    __atomic_store_n(address + 1, second, __ATOMIC_RELEASE);
#endif
}

/// Nanoseconds of a clock that only grows; each side compares only its own values.
EPCOMM_HD inline int64_t now_ns() {
#ifdef __CUDA_ARCH__
    int64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
#else
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
#endif
}

/// Between two looks at something another thread will change.
EPCOMM_HD inline void relax() {
#ifdef __CUDA_ARCH__
    __nanosleep(32);
#elif defined(EPCOMM_EMULATED)
    emulation::give_way();
#else
    // The one that is waited for may need this core.
    sched_yield();
#endif
}

}  // namespace epcomm::fabric
