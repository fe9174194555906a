// Stands for the PTX of csrc/kernels/memory.cuh in emulated kernels. Polling lets others run.
#pragma once

#include <sched.h>
#include <time.h>

#include "cuda_emulation.h"

namespace epcomm {

template <typename T>
T load_acquire(const T* address) {
    emulation::yield();
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline uint64_t load_relaxed(const uint64_t* address) {
    return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline void store_release(uint64_t* address, uint64_t value) {
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
inline void store_relaxed(uint64_t* address, uint64_t value) {
    __atomic_store_n(address, value, __ATOMIC_RELAXED);
}
inline uint4 load_once(const void* address) { return *static_cast<const uint4*>(address); }
inline void store_once(void* address, uint4 v) { *static_cast<uint4*>(address) = v; }
inline void await_stream() {}
inline void call_next() {}

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer);
}
inline uint4 load_shared(SharedAddress from) { return *reinterpret_cast<const uint4*>(from); }

inline void copy_async(SharedAddress to, const void* from) {
    emulation::Fiber* self = emulation::block->current;
    self->copies.push_back({reinterpret_cast<void*>(to), from, self->copy_groups});
}
inline void copy_async_commit() { ++emulation::block->current->copy_groups; }

/// Copies are made as late as they may be, of what lies there then.
template <int pending>
void copy_async_wait() {
    emulation::Fiber* self = emulation::block->current;
    auto& copies = self->copies;
    size_t made = 0;
    for (; made < copies.size() && copies[made].group + pending < self->copy_groups; ++made) {
        *static_cast<uint4*>(copies[made].to) = *static_cast<const uint4*>(copies[made].from);
    }
    copies.erase(copies.begin(), copies.begin() + long(made));
}

inline uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1000000000 + uint64_t(t.tv_nsec);
}

/// 1 / x, now and then off by one in the last place; a subnormal result becomes 0.
inline float reciprocal_about(float x) {
    if (fabsf(1.0f / x) < 0x1p-126f) return 0;
    return __uint_as_float(__float_as_uint(1.0f / x) + __float_as_uint(x) % 3 - 1);
}

inline int opaque(int value) { return value; }

/// Two values to BF16, nearest even; NaNs become 0x7FFF, as the hardware has it.
inline uint32_t two_bf16(float low, float high) {
    const auto one = [](float x) {
        const uint32_t bits = __float_as_uint(x);
        if (x != x) return 0x7fffu;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return one(low) | one(high) << 16;
}

inline uint32_t add_bf16(uint32_t a, uint32_t b) {
    const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
    return two_bf16(high(a << 16) + high(b << 16), high(a) + high(b));
}

}  // namespace epcomm
