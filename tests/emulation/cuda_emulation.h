// Runs CUDA kernels on the host, to test what they compute and how they wait for each other.
//
// A thread block is a thread of the operating system, so that shared memory is thread-local memory;
// its CUDA threads are coroutines, which change places at warp and block collectives and whenever
// they poll. A collective that not all lanes call, or that lanes reach with different operations,
// ends the program. Memory order is the host's, stronger than a GPU's: fences are not tested.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "give_way.h"

#define EPCOMM_DEVICE_EMULATION 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
    uint32_t x, y;
};
struct int2 {
    int x, y;
};
struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
    unsigned x;
};

/// Values that all members of a warp or block bring, and what the last collective found.
struct Meeting {
    int size = 0, arrived = 0;
    uint64_t generation = 0;
    int kind = 0;
    std::vector<uint64_t> in, out;
};

/// Where a coroutine waits. The C library's own makes two system calls for each change.
#ifdef __x86_64__
using Place = void*;  // its stack pointer, above which its registers lie
extern "C" void emulation_change_place(Place* from, Place to);
inline void change_place(Place* from, Place* to) { emulation_change_place(from, *to); }
#else
using Place = ucontext_t;
inline void change_place(Place* from, Place* to) { swapcontext(from, to); }
#endif

/// Asked for and not waited for.
struct AsyncCopy {
    void* to;
    const void* from;
    uint64_t group;
};

struct Fiber {
    Place place;
    std::unique_ptr<char[]> stack;
    Index thread{0};
    bool done = false;
    // It is not run while this word has this value.
    const uint64_t* waits_on = nullptr;
    uint64_t waits_while = 0;
    std::vector<AsyncCopy> copies;
    uint64_t copy_groups = 0;  // closed
};

struct Block {
    Index block{0}, block_dim{0}, grid_dim{0};
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    Place scheduler;
    Fiber* current = nullptr;
    int left = 0;            ///< threads that have not ended
    std::vector<int> order;  ///< of warps
    std::mt19937_64 random;
    const void* kernel = nullptr;
    void (*run)(const void* kernel) = nullptr;
};

extern thread_local Block* block;

inline void yield() { change_place(&block->current->place, &block->scheduler); }

/// As `while (*word == value) yield();`
inline void wait_while(const uint64_t* word, uint64_t value) {
    Fiber* self = block->current;
    self->waits_on = word;
    self->waits_while = value;
    yield();
    self->waits_on = nullptr;
}

/// Make a block's threads, which do not run yet; then let each run until it waits, in some order,
/// again and again until none is left. Always by the same thread of the operating system.
void open_block(Block& of);
void run_once(Block& of);

/// A block from beginning to end, on this thread of the operating system.
void run_block(Block& of);

/// A launch from beginning to end, a thread of the operating system for each block.
void run_blocks(int count, int warps, uint64_t seed, const void* kernel,
                void (*run)(const void* kernel));

/// Meet with value; all members get to see the values of all.
inline const std::vector<uint64_t>& meet(Meeting& meeting, int place, int kind, uint64_t value) {
    if (meeting.arrived == 0) meeting.kind = kind;
    if (meeting.kind != kind) {
        fprintf(stderr, "emulation: lanes diverge: collectives %d and %d\n", meeting.kind, kind);
        abort();
    }
    meeting.in[place] = value;
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == meeting.size) {
        meeting.out = meeting.in;
        meeting.arrived = 0;
        ++meeting.generation;
    } else {
        wait_while(&meeting.generation, generation);
    }
    return meeting.out;
}

inline const std::vector<uint64_t>& meet_warp(int kind, uint64_t value) {
    const unsigned thread = block->current->thread.x;
    return meet(block->warps[thread / 32], int(thread % 32), kind, value);
}

inline const std::vector<uint64_t>& meet_block(int kind, uint64_t value) {
    return meet(block->all, int(block->current->thread.x), kind, value);
}

template <typename T>
uint64_t to_bits(T value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline int lane() { return int(block->current->thread.x % 32); }

}  // namespace emulation

#define threadIdx (emulation::block->current->thread)
#define blockIdx (emulation::block->block)
#define blockDim (emulation::block->block_dim)
#define gridDim (emulation::block->grid_dim)

inline void __syncthreads() { emulation::meet_block(1, 0); }
inline int __syncthreads_and(int value) {
    int all = 1;
    for (uint64_t v : emulation::meet_block(2, uint64_t(value != 0))) all = all && v != 0;
    return all;
}
inline int __syncthreads_or(int value) {
    int any = 0;
    for (uint64_t v : emulation::meet_block(3, uint64_t(value != 0))) any = any || v != 0;
    return any;
}
inline void __syncwarp() { emulation::meet_warp(11, 0); }
inline unsigned __ballot_sync(unsigned, int value) {
    const auto& all = emulation::meet_warp(12, uint64_t(value != 0));
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
    return bits;
}
inline int __all_sync(unsigned mask, int value) {
    return __ballot_sync(mask, value) == 0xffffffffu;
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return emulation::from_bits<T>(emulation::meet_warp(13, emulation::to_bits(value))[from & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int with) {
    return emulation::from_bits<T>(
        emulation::meet_warp(14, emulation::to_bits(value))[emulation::lane() ^ with]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
    const auto& all = emulation::meet_warp(15, emulation::to_bits(value));
    return emulation::from_bits<T>(
        all[emulation::lane() < by ? emulation::lane() : emulation::lane() - by]);
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
    const auto& all = emulation::meet_warp(16, emulation::to_bits(value));
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i] == emulation::to_bits(value)) << i;
    return bits;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T, typename U>
T atomicAdd(T* at, U value) {
    emulation::maybe_give_way();
    return __atomic_fetch_add(at, T(value), __ATOMIC_SEQ_CST);
}
inline int atomicMin(int* at, int value) {
    int seen = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (value < seen && !__atomic_compare_exchange_n(at, &seen, value, false, __ATOMIC_SEQ_CST,
                                                        __ATOMIC_SEQ_CST)) {
    }
    return seen;
}
template <typename T, typename U>
T atomicSub(T* at, U value) {
    return __atomic_fetch_sub(at, T(value), __ATOMIC_SEQ_CST);
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
    emulation::maybe_give_way();
    unsigned seen = __atomic_load_n(at, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(at, &seen, seen >= limit ? 0 : seen + 1, false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return seen;
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}
inline float __uint_as_float(uint32_t v) { return emulation::from_bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return uint32_t(emulation::to_bits(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
/// Rounded down; right where a double holds the sum.
inline float __fadd_rd(float a, float b) {
    const double sum = double(a) + double(b);
    const float near = float(sum);
    return double(near) > sum ? nextafterf(near, -INFINITY) : near;
}
inline float __uint2float_rn(uint32_t v) { return float(v); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a & 0xffff0000u, b & 0xffff0000u);
}
