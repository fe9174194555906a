// A block's copies: control warps cut bodies of messages into slices, copy warps place them. What
// is shared with other blocks comes by another warp (offers.cuh).
//
// Slices go through a ring in shared memory. Who puts one in waits until its place has been read,
// who takes one out takes a number and waits until that place is filled: a turn counter in each
// place says which of the two it is in. A slice is at most what a warp has in flight at once.
//
// A slice's bytes are stored by all lanes of a copy warp, which then meet; its first lane fences
// and lowers the message's count of slices, in shared memory. A control lane that acquires the
// count and then fences at system scope has them all before what it does next: fences are
// cumulative.
#pragma once

#include "land.h"

namespace epcomm::emulated {

/// A lane loads and stores so many units of 16 bytes together, and has two such parts under way: so
/// a warp has 4 to 8 KiB in flight from a slice's beginning to its end.
constexpr uint32_t kUnroll = 8;
constexpr uint32_t kPartUnits = kUnroll * 32;
constexpr uint32_t kSliceBytes = 4 * kPartUnits * 16;
constexpr uint32_t kSlices = 256;  ///< places of the ring
/// Messages of a queue pair that may be under way in the copier.
constexpr uint32_t kMessages = 32;

/// In shared memory, among the threads of a block.
__device__ inline uint32_t load_here(const uint32_t* address) {
#ifdef __CUDA_ARCH__
    uint32_t value;
    asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

__device__ inline void store_here(uint32_t* address, uint32_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#else
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

/// 16 bytes, past the first-level cache: each is used once.
__device__ inline uint4 load_unit(const uint8_t* from) {
#ifdef __CUDA_ARCH__
    return __ldcg(reinterpret_cast<const uint4*>(from));
#else
    return *reinterpret_cast<const uint4*>(from);
#endif
}

__device__ inline void store_unit(uint8_t* to, uint4 value) {
#ifdef __CUDA_ARCH__
    __stcg(reinterpret_cast<uint4*>(to), value);
#else
    *reinterpret_cast<uint4*>(to) = value;
#endif
}

/// In shared memory: slices that the block has claimed of a message that blocks share.
struct Claim {
    uint32_t left;    ///< that have not been placed
    uint32_t slices;  ///< 0: there is no claim
    uint32_t* offer_left;
};

struct Slice {
    uint8_t* to;
    const uint8_t* from;
    uint32_t bytes;
    uint32_t turn;
    uint32_t* left;  ///< slices of the message, or claim, that have not been placed
    Claim* claim;    ///< or null
};

struct SliceRing {
    Slice slices[kSlices];
    uint32_t reserved;   ///< numbers given to slices
    uint32_t taken;      ///< numbers taken by copy warps, ahead of that where they wait
    uint32_t producers;  ///< warps that may still put in some

    /// Slices that no copy warp has taken; below 0: warps that wait for one.
    __device__ int32_t waiting() const { return int32_t(load_here(&reserved) - load_here(&taken)); }

    /// Numbers for up to `count` slices; returns how many.
    __device__ uint32_t reserve(uint32_t count, uint32_t* first) {
        uint32_t seen = load_here(&reserved);
        while (true) {
            const auto waiting = int32_t(seen - load_here(&taken));
            const uint32_t room = kSlices - uint32_t(waiting > 0 ? waiting : 0);
            if (count > room) count = room;
            if (count == 0) return 0;
            *first = seen;
            const uint32_t old = atomicCAS(&reserved, seen, seen + count);
            if (old == seen) return count;
            seen = old;
        }
    }

    __device__ void put(uint32_t number, const Slice& slice) {
        Slice* place = &slices[number % kSlices];
        // Its number before has been taken, by a warp that only has to read what it finds there.
        while (load_here(&place->turn) != number) __nanosleep(20);
        place->to = slice.to;
        place->from = slice.from;
        place->bytes = slice.bytes;
        place->left = slice.left;
        place->claim = slice.claim;
        store_here(&place->turn, number + 1);
    }

    /// By a warp. False: there will be none.
    __device__ bool take(Slice* slice) {
        const mlx5::WarpLanes group;
        uint32_t number = 0;
        if (group.lane() == 0) number = atomicAdd(&taken, 1u);
        number = group.from_first(number);
        Slice* place = &slices[number % kSlices];
        int found = 0;
        while (found == 0) {
            if (group.lane() == 0) {
                // In this order: the last slice is put in before the end is said.
                const bool is_last = load_here(&producers) == 0;
                const bool is_filled = load_here(&place->turn) == number + 1;
                found = is_filled ? 1 : is_last ? -1 : 0;
                if (found == 0) __nanosleep(20);
            }
            found = group.from_first(found);
        }
        group.sync();
        *slice = *place;
        group.sync();
        if (found > 0 && group.lane() == 0) store_here(&place->turn, number + kSlices);
        return found > 0;
    }
};

/// Of a part that begins at unit `first`; those from `units` on are not there.
__device__ inline void load_part(uint4 (&values)[kUnroll], const uint8_t* from, uint32_t first,
                                 uint32_t units) {
#pragma unroll
    for (uint32_t i = 0; i < kUnroll; ++i) {
        const uint32_t unit = first + i * 32;
        if (unit < units) values[i] = load_unit(from + unit * 16);
    }
}

__device__ inline void store_part(uint8_t* to, const uint4 (&values)[kUnroll], uint32_t first,
                                  uint32_t units) {
#pragma unroll
    for (uint32_t i = 0; i < kUnroll; ++i) {
        const uint32_t unit = first + i * 32;
        if (unit < units) store_unit(to + unit * 16, values[i]);
    }
}

/// By a warp: the loads of a part are on their way before the stores of the part before it.
__device__ inline void place_units(uint8_t* to, const uint8_t* from, uint32_t units) {
    const uint32_t lane = threadIdx.x & 31;
    uint4 even[kUnroll], odd[kUnroll];
    load_part(even, from, lane, units);
#pragma unroll 1
    for (uint32_t first = lane; first - lane < units; first += 2 * kPartUnits) {
        load_part(odd, from, first + kPartUnits, units);
        store_part(to, even, first, units);
        load_part(even, from, first + 2 * kPartUnits, units);
        store_part(to, odd, first + kPartUnits, units);
    }
}

__device__ inline void place_bytes(uint8_t* to, const uint8_t* from, uint32_t bytes) {
    for (uint32_t i = threadIdx.x & 31; i < bytes; i += 32) {
        to[i] = *static_cast<const volatile uint8_t*>(from + i);
    }
}

/// epcomm's places are multiples of 16; others go byte by byte as far as they must.
__device__ inline void place_slice(const Slice& slice) {
    const uint32_t skew = uint32_t(reinterpret_cast<uintptr_t>(slice.to) & 15);
    uint32_t head = (16 - skew) & 15;
    if (skew != (reinterpret_cast<uintptr_t>(slice.from) & 15) || head > slice.bytes) {
        head = slice.bytes;
    }
    const uint32_t units = (slice.bytes - head) / 16, end = head + units * 16;
    if (head != 0) place_bytes(slice.to, slice.from, head);
    place_units(slice.to + head, slice.from + head, units);
    if (end != slice.bytes) place_bytes(slice.to + end, slice.from + end, slice.bytes - end);
}

/// All of a claim has been placed: by the lane that brought its count to 0. The fence acquires what
/// the block's other warps placed, and releases it to whoever acquires the offer's count.
__device__ inline void report(Claim* claim) {
    mlx5::fence<mlx5::Scope::kDevice>();
    atomicSub(claim->offer_left, claim->slices);
    store_here(&claim->slices, 0);
}

/// A copy warp, until the end.
__device__ inline void place_slices(SliceRing* ring) {
    const mlx5::WarpLanes group;
    Slice slice{};
    while (ring->take(&slice)) {
        place_slice(slice);
        group.sync();
        if (group.lane() == 0) {
            __threadfence_block();
            if (atomicSub(slice.left, 1u) == 1 && slice.claim != nullptr) report(slice.claim);
        }
    }
}

}  // namespace epcomm::emulated
