// Long messages that several blocks copy.
//
// A control lane puts the first slices of a long message into the ring of its own block
// (slices.cuh) and offers the rest to all blocks, in device memory. A warp of every block brings
// slices from there: it claims a few at a time by an atomic addition and puts them into its block's
// ring, whenever little waits there. Whose message is due first is claimed first.
//
//     control lane   to, from, bytes, left  -> release -> work
//     a block's      work += some, acquired -> ring of the block -> copy warps
//     last copy warp of a claim             fence -> left -= the claim's slices
//     control lane   left is 0, acquired    -> last bytes, words, completion
//
// MEMORY ORDER. The addition that claims acquires what the offer released: what lies there, and,
// because release is cumulative, the message's bytes. Copy warps count a claim down at block scope.
// Who brings it to 0 has then acquired what the others placed; its fence at device scope covers all
// of that and goes before its subtraction. Whoever acquires 0 has acquired all subtractions, as
// they are a chain of atomic operations. So nothing that follows is visible before any slice,
// whichever block placed it.
//
// An offer is free once nothing of it is left. Only its control warp makes a new one of it, which
// has another generation. A late addition to an old one is to the new one, and as good a claim.
#pragma once

#include "../mlx5/order.h"
#include "slices.cuh"

namespace epcomm::emulated {

constexpr uint32_t kOffers = 4;   ///< of a control warp
constexpr uint32_t kClaims = 16;  ///< of a block, under way
/// Blocks that help each other: whoever looks for work looks at all of their offers.
constexpr uint32_t kTeam = 8;

/// An offer's generation, its slices, and how many of them have been claimed: more than there are,
/// if some came too late.
struct Work {
    static constexpr uint32_t kBits = 24;
    static constexpr uint64_t kMask = (1u << kBits) - 1;

    uint64_t raw;

    __device__ static Work of(uint32_t generation, uint32_t slices) {
        return {uint64_t(generation) << 2 * kBits | uint64_t(slices) << kBits};
    }
    __device__ uint32_t claimed() const { return uint32_t(raw & kMask); }
    __device__ uint32_t slices() const { return uint32_t(raw >> kBits & kMask); }
    /// Of two words of one offer: whether they are of the same message.
    __device__ bool is_as(Work other) const { return (raw ^ other.raw) >> kBits == 0; }
    __device__ uint32_t unclaimed() const {
        return slices() > claimed() ? slices() - claimed() : 0;
    }
};

/// In device memory.
struct alignas(64) Offer {
    uint64_t work;    ///< Work
    Picoseconds due;  ///< in the model
    uint8_t* to;
    const uint8_t* from;
    uint32_t bytes;
    uint32_t left;  ///< slices that have not been placed
};

/// Among the blocks of a device.
__device__ inline uint32_t load_acquire_device(const uint32_t* address) {
#ifdef __CUDA_ARCH__
    uint32_t value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
#else
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
#endif
}

__device__ inline void store_release_device(uint64_t* address, uint64_t value) {
#ifdef __CUDA_ARCH__
    asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#else
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
#endif
}

__device__ inline uint64_t add_acquire_device(uint64_t* address, uint64_t amount) {
#ifdef __CUDA_ARCH__
    uint64_t before;
    asm volatile("atom.acquire.gpu.add.u64 %0, [%1], %2;"
                 : "=l"(before)
                 : "l"(address), "l"(amount)
                 : "memory");
    return before;
#else
    return __atomic_fetch_add(address, amount, __ATOMIC_ACQUIRE);
#endif
}

__device__ inline uint32_t slices_in(uint32_t bytes) {
    return (bytes + kSliceBytes - 1) / kSliceBytes;
}

/// By the lane whose message it is, of a free offer.
__device__ inline void make_offer(Offer* offer, uint32_t generation, uint8_t* to,
                                  const uint8_t* from, uint32_t bytes, Picoseconds due) {
    // Whoever looks for work reads it without an order: it only says what to take first.
    *static_cast<volatile Picoseconds*>(&offer->due) = due;
    offer->to = to;
    offer->from = from;
    offer->bytes = bytes;
    offer->left = slices_in(bytes);
    store_release_device(&offer->work, Work::of(generation, slices_in(bytes)).raw);
}

/// Offers that a block's warp looks at.
struct OfferRange {
    Offer* first;
    uint32_t count;
};

/// Brings slices into a block's ring: by one of its warps.
template <class Machine>
class Bringer {
 public:
    /// `team` has all offers of blocks that help each other, `own` those of this block.
    __device__ Bringer(OfferRange team, OfferRange own, SliceRing* ring, Claim* claims)
        : team_(team), own_(own), ring_(ring), claims_(claims) {}

    /// Until the block's control warps have ended, and nothing that they offered is unclaimed.
    __device__ void serve() {
        while (true) {
            // In this order: the last offer is made before the end is said.
            const bool is_last = group_.from_first(int(load_here(&ring_->producers) == 1)) != 0;
            const uint32_t free =
                group_.ballot(group_.lane() < kClaims && is_free(&claims_[group_.lane()]));
            bool brought = false;
            if (free != 0 && group_.from_first(ring_->waiting()) < int32_t(Machine::kStock)) {
                if (offer_ == nullptr) look(is_last ? own_ : team_);
                if (offer_ == nullptr && is_last) break;
                if (offer_ != nullptr) brought = claim(&claims_[mlx5::lowest(free)]);
            }
            if (!brought) __nanosleep(100);
        }
        if (group_.lane() == 0) atomicSub(&ring_->producers, 1u);
    }

 private:
    __device__ static bool is_free(const Claim* claim) { return load_here(&claim->slices) == 0; }

    /// The one that is due first, of those that have something unclaimed.
    __device__ void look(OfferRange range) {
        Picoseconds due = kNever;
        Offer* found = nullptr;
        for (uint32_t i = group_.lane(); i < range.count; i += group_.size()) {
            Offer* offer = &range.first[i];
            const Work work{fabric::load_relaxed(&offer->work)};
            const Picoseconds time = fabric::load_relaxed(&offer->due);
            if (work.unclaimed() == 0 || time >= due) continue;
            due = time;
            found = offer;
        }
        const Picoseconds first =
            ~group_.at(mlx5::largest_until(group_, group_.size(), ~due), group_.size() - 1);
        const uint32_t who = mlx5::lowest(group_.ballot(found != nullptr && due == first));
        offer_ = who == 32 ? nullptr : reinterpret_cast<Offer*>(group_.at(uint64_t(found), who));
    }

    /// Some slices of the offer at hand. False: there are none.
    __device__ bool claim(Claim* claim) {
        uint64_t before = 0;
        if (group_.lane() == 0) before = add_acquire_device(&offer_->work, Machine::kClaim);
        const Work work{group_.from_first(before)};
        group_.sync();
        const uint32_t first = work.claimed();
        uint32_t count = work.unclaimed();
        if (count > Machine::kClaim) count = Machine::kClaim;
        if (count != 0 && !(held_.is_as(work) && held_offer_ == offer_)) {
            // It stays as it is while a slice that was claimed is left.
            to_ = offer_->to;
            from_ = offer_->from;
            bytes_ = offer_->bytes;
            held_ = work;
            held_offer_ = offer_;
        }
        if (count != 0) bring(claim, first, count);
        if (first + count >= work.slices()) offer_ = nullptr;
        return count != 0;
    }

    __device__ void bring(Claim* claim, uint32_t first, uint32_t count) {
        if (group_.lane() == 0) {
            claim->offer_left = &offer_->left;
            claim->left = count;
            store_here(&claim->slices, count);
        }
        group_.sync();
        for (uint32_t done = 0; done < count;) {
            uint32_t number = 0, room = 0;
            if (group_.lane() == 0) room = ring_->reserve(count - done, &number);
            room = group_.from_first(room);
            number = group_.from_first(number);
            if (group_.lane() < room) {
                const uint64_t at = uint64_t(first + done + group_.lane()) * kSliceBytes;
                const uint64_t rest = bytes_ - at;
                ring_->put(number + group_.lane(),
                           {to_ + at, from_ + at, uint32_t(rest < kSliceBytes ? rest : kSliceBytes),
                            0, &claim->left, claim});
            }
            done += room;
            group_.sync();
            if (room == 0) __nanosleep(100);
        }
    }

    mlx5::WarpLanes group_;
    OfferRange team_, own_;
    SliceRing* ring_;
    Claim* claims_;
    Offer* offer_ = nullptr;  ///< at hand
    // What was read of the last offer.
    Offer* held_offer_ = nullptr;
    Work held_{};
    uint8_t* to_ = nullptr;
    const uint8_t* from_ = nullptr;
    uint32_t bytes_ = 0;
};

}  // namespace epcomm::emulated
