// The engine's kernel.
//
//     control warp   looks at the doorbells of its queue pairs, a lane at each; takes those with
//                    something to do one by one (step.h), a lane for each request
//     a warp         brings slices of long messages, of its own block and of others (offers.cuh)
//     copy warp      places slices of messages (slices.cuh); where host threads fill queues, the
//                    first block's last one brings their doorbells instead (bells.cuh)
//
// What a lane does for a request is mostly waiting for memory, so a queue pair's requests are done
// by lanes at once, and several queue pairs by several warps. The state of queue pairs lies in
// shared memory, and where it fits that of requests.
//
// MEMORY ORDER. A lane acquires the doorbell, and its warp meets, before a request is read.
// Bodies: see slices.cuh. Last bytes are stored after a fence at system scope, atomics and the last
// 8 bytes of a completion are released at system scope after the warp has met.
//
// ENDING. Nothing in here waits for anything outside the block, so an order to stop is met soon:
// once the block's slices are placed, and those it offered claimed. Without a sign of life of its
// host the kernel ends too.
//
// The machine is a parameter, so that tests can run this on the host: the clock, how many warps do
// what (kControlWarps, kCopyWarps), and how many slices of a long message go straight into the ring
// of its block (kKept), wait there before others are brought (kStock) and are claimed at a time
// (kClaim).
#pragma once

#include "bells.cuh"
#include "offers.cuh"
#include "resident.h"

namespace epcomm::emulated {

/// The first ones control, the next one brings slices, the others copy.
template <class Machine>
constexpr uint32_t kWarps = Machine::kControlWarps + 1 + Machine::kCopyWarps;

/// What a control warp knows of a message in the copier, in one word that copy warps lower: slices
/// in the block's ring, and where the rest is offered (the offer's number + 1, its generation).
struct Underway {
    static constexpr uint32_t kCountBits = 12, kOfferBits = 4;

    uint32_t raw;

    __device__ static uint32_t offered(uint32_t offer, uint32_t generation) {
        return ((generation & 0xffff) << kOfferBits | (offer + 1)) << kCountBits;
    }
    __device__ uint32_t here() const { return raw & ((1u << kCountBits) - 1); }
    /// kOffers or more: nothing is offered.
    __device__ uint32_t offer() const { return (raw >> kCountBits & ((1u << kOfferBits) - 1)) - 1; }
    __device__ uint32_t generation() const { return raw >> (kCountBits + kOfferBits); }
};
static_assert(kSlices + 32 < 1u << Underway::kCountBits && kOffers < 1u << Underway::kOfferBits);

/// What a warp has heard from the host: the last sign of life and when, and since which count it
/// counts.
struct Heard {
    uint64_t sign;
    Picoseconds at;
    uint32_t counting;
};

/// A block's shared memory, in which it lies itself, for the registers.
struct BlockMemory {
    BlockMemory* self;
    SliceRing* ring;
    Claim* claims;          ///< [kClaims]
    uint32_t* generations;  ///< [control warps][kOffers]
    Nic** nics;             ///< [num_nics]
    const Key** near_keys;  ///< [num_nics]
    Key* own_keys;          ///< [num_planes][kMaxKeys]: of the own NICs, which have all of them
    int64_t* shifts;        ///< [num_nics][kMaxKeys]
    Traffic* traffic;       ///< [control warps][num_planes][32]
    Context* contexts;      ///< [control warps], as the next
    Heard* heard;
    Wire* wire;          ///< with what is near
    QueuePair* queues;   ///< [num_queues], as the rest
    Picoseconds* wakes;  ///< when to look at a queue pair again
    uint32_t* nic;
    uint32_t* plane;
    uint32_t* underway;  ///< [num_queues][kMessages]: Underway
    Flight* flights;     ///< [num_queues][kMessages], or null
    uint32_t num_queues;
};

/// Parts of memory one after the other.
struct Carver {
    uint8_t* next;

    template <typename T>
    EPCOMM_HD T* take(uint64_t count) {
        auto* part = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + 15) / 16 * 16;
        return part;
    }
};

/// Lay a block's memory out; returns its end.
EPCOMM_HD inline uint8_t* lay_out(BlockMemory* block, uint8_t* memory, const Resident& resident,
                                  uint32_t control_warps) {
    Carver carver{memory};
    const Wire& wire = resident.wire;
    const uint32_t num_planes = resident.num_planes, max_queues = resident.max_queues;
    block->self = carver.take<BlockMemory>(1);
    block->ring = carver.take<SliceRing>(1);
    block->claims = carver.take<Claim>(kClaims);
    block->generations = carver.take<uint32_t>(control_warps * kOffers);
    block->nics = carver.take<Nic*>(wire.num_nics);
    block->near_keys = carver.take<const Key*>(wire.num_nics);
    block->own_keys = carver.take<Key>(num_planes * kMaxKeys);
    block->shifts = carver.take<int64_t>(wire.shifts == nullptr ? 0 : wire.num_nics * kMaxKeys);
    block->traffic = carver.take<Traffic>(control_warps * num_planes * 32);
    block->contexts = carver.take<Context>(control_warps);
    block->heard = carver.take<Heard>(control_warps);
    block->wire = carver.take<Wire>(1);
    block->queues = carver.take<QueuePair>(max_queues);
    block->wakes = carver.take<Picoseconds>(max_queues);
    block->nic = carver.take<uint32_t>(max_queues);
    block->plane = carver.take<uint32_t>(max_queues);
    block->underway = carver.take<uint32_t>(max_queues * kMessages);
    block->flights = nullptr;
    if (resident.near_flights != 0) block->flights = carver.take<Flight>(max_queues * kMessages);
    return carver.next;
}

/// Bytes of shared memory that a block needs.
inline uint64_t shared_bytes(const Resident& resident, uint32_t control_warps) {
    BlockMemory block;
    return uint64_t(lay_out(&block, nullptr, resident, control_warps) -
                    static_cast<uint8_t*>(nullptr));
}

/// Takes bytes to place for one queue pair; see land.h.
template <class Machine>
struct ResidentPlacer {
    static constexpr uint64_t kWindow = kMessages;
    static constexpr uint32_t kKeptBytes = Machine::kKept * kSliceBytes;

    SliceRing* ring;
    uint32_t* underway;     ///< [kMessages], of the queue pair
    uint32_t* generations;  ///< [kOffers], of the warp, as the next
    Offer* offers;

    __device__ uint32_t start(mlx5::WarpLanes group, bool wants, uint64_t position,
                              const Body& body) const {
        uint32_t* mine = &underway[position % kMessages];
        const bool is_long = wants && body.bytes > kKeptBytes;
        uint32_t first = 0, kept = wants ? body.bytes : 0;
        if (group.ballot(is_long) != 0) {
            // Where enough waits in the ring, all of it is offered.
            const bool is_busy = group.from_first(ring->waiting()) >= int32_t(Machine::kStock);
            const uint32_t offer = free_offer(group, offers, is_long);
            if (is_long) first = is_busy || body.is_ahead ? 0 : kKeptBytes;
            if (is_long && offer < kOffers) kept = first;
            // What is not due yet can wait for an offer.
            if (body.is_ahead && offer >= kOffers) kept = 0;
            const uint32_t placed = fill_ring(group, kept, mine, body);
            if (!is_long || offer >= kOffers || placed < kept) return placed;
            const uint32_t generation = generations[offer] + 1;
            generations[offer] = generation;
            atomicAdd(mine, Underway::offered(offer, generation));
            make_offer(&offers[offer], generation, body.to + kept, body.from + kept,
                       body.bytes - kept, body.due);
            return body.bytes;
        }
        if (body.is_ahead) kept = 0;
        return fill_ring(group, kept, mine, body);
    }

    /// Of the warp's offers: another one for each lane that wants one; kOffers or more: none is
    /// free. Not inlined, for the registers: only long messages come here.
    __device__ static __noinline__ uint32_t free_offer(mlx5::WarpLanes group, const Offer* offers,
                                                       bool wants) {
        const uint32_t lane = group.lane(), before = group.ballot(wants) & mlx5::below(lane);
        uint32_t free =
            group.ballot(lane < kOffers && load_acquire_device(&offers[lane].left) == 0);
        group.sync();
        for (uint32_t i = mlx5::count_bits(before); i != 0; --i) free &= free - 1;
        return wants ? mlx5::lowest(free) : kOffers;
    }

    /// The first `bytes` of a body, or as many of them as there is room for.
    __device__ uint32_t fill_ring(mlx5::WarpLanes group, uint32_t bytes, uint32_t* mine,
                                  const Body& body) const {
        uint32_t count = slices_in(bytes);
        const uint32_t moving = group.ballot(count != 0), lane = group.lane();
        if (moving == 0) return 0;
        const bool are_several = group.ballot(count > 1) != 0;
        const uint32_t last = mlx5::highest(moving);
        const uint32_t before = are_several ? mlx5::sum_before(group, last + 1, count)
                                            : mlx5::count_bits(moving & mlx5::below(lane));
        const uint32_t all = group.at(before + count, last);
        uint32_t room = 0, first = 0;
        if (lane == 0) room = ring->reserve(all, &first);
        room = group.from_first(room);
        first = group.from_first(first);
        if (before >= room) return 0;
        if (before + count > room) count = room - before;
        if (count == 0) return 0;
        atomicAdd(mine, count);
        for (uint32_t i = 0; i < count; ++i) {
            const uint32_t done = i * kSliceBytes, rest = bytes - done;
            ring->put(first + before + i,
                      {body.to + done, body.from + done, rest < kSliceBytes ? rest : kSliceBytes, 0,
                       mine, nullptr});
        }
        const uint32_t placed = count * kSliceBytes;
        return placed < bytes ? placed : bytes;
    }
};

/// Places them, and keeps account.
template <class Machine>
struct ResidentCopier : ResidentPlacer<Machine> {
    static constexpr bool kCopiesAhead = true;

    Traffic* traffic;  ///< of this lane
    uint64_t tolerance_ns;
    PassageRing* passages;  ///< or null
    Machine* machine;

    __device__ ResidentPlacer<Machine> placer() const { return *this; }

    __device__ static Picoseconds started(Context*, uint32_t) { return 0; }

    __device__ Picoseconds placed(const Context& context, uint64_t position) const {
        uint32_t* mine = &this->underway[position % kMessages];
        const Underway seen{load_here(mine)};
        if (seen.here() != 0) return 0;
        // An offer of another generation was free before.
        if (seen.offer() < kOffers &&
            (this->generations[seen.offer()] & 0xffff) == seen.generation() &&
            load_acquire_device(&this->offers[seen.offer()].left) != 0) {
            return 0;
        }
        *mine = 0;
        return context.now;
    }

    __device__ static void settle(mlx5::WarpLanes group, bool needed) {
        if (group.ballot(needed) != 0) mlx5::fence<mlx5::Scope::kSystem>();
    }

    /// At most kTailBytes, as one word after the other if they are whole words.
    __device__ static void place(uint8_t* to, const uint8_t* from, uint32_t bytes) {
        const uint64_t skew = (reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from));
        if (((skew | bytes) & 7) != 0) {
            for (uint32_t i = 0; i < bytes; ++i) {
                to[i] = *static_cast<const volatile uint8_t*>(from + i);
            }
            return;
        }
        uint64_t words[kTailBytes / 8];
#pragma unroll
        for (uint32_t i = 0; i < kTailBytes / 8; ++i) {
            if (i * 8 < bytes) {
                words[i] = fabric::load_relaxed(reinterpret_cast<const uint64_t*>(from) + i);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kTailBytes / 8; ++i) {
            if (i * 8 < bytes) reinterpret_cast<uint64_t*>(to)[i] = words[i];
        }
    }

    __device__ void landed(const Context& context, const QueuePair& queue, uint64_t position,
                           const Flight& flight) const {
        traffic->add(context, flight, tolerance_ns);
        if (passages == nullptr) return;
        note(passages, &queue, position, &flight, context.nic, context.now);
    }

    /// Not inlined, for the registers: the kernel mostly runs without a timeline. Doorbell and
    /// completion would have to be remembered with each request, and are not noted.
    __device__ static __noinline__ void note(PassageRing* into, const QueuePair* queue,
                                             uint64_t position, const Flight* flight, uint32_t nic,
                                             Picoseconds now) {
        into->add({0, flight->times.depart, flight->times.arrive, now, 0, position, queue->number,
                   flight->request.bytes, nic});
    }

    __device__ void refresh(mlx5::WarpLanes group, Context* context) const {
        context->now = group.from_first(machine->now());
    }
};

/// Move what is known of a queue pair's requests elsewhere, and the queue pair with it.
__device__ inline void move_flights(QueuePair* queue, Flight* flights, uint32_t num_flights) {
    QueuePair old = *queue;
    queue->flights = flights;
    queue->num_flights = num_flights;
    for (uint64_t p = old.oldest(); p != old.fetched; ++p) queue->flight(p) = old.flight(p);
}

/// What a block's threads have in common, laid out and filled; all of them call it.
template <class Machine>
__device__ inline const BlockMemory& open_block(const Resident& resident, uint8_t* memory) {
    BlockMemory block;
    lay_out(&block, memory, resident, Machine::kControlWarps);
    const uint32_t thread = threadIdx.x, threads = blockDim.x;
    const uint32_t first = resident.first[blockIdx.x];
    block.num_queues = resident.first[blockIdx.x + 1] - first;
    const uint32_t num_nics = resident.wire.num_nics;
    for (uint32_t i = thread; i < kSlices; i += threads) block.ring->slices[i].turn = i;
    for (uint32_t i = thread; i < kClaims; i += threads) block.claims[i] = Claim();
    for (uint32_t i = thread; i < Machine::kControlWarps * kOffers; i += threads) {
        block.generations[i] = 0;
    }
    for (uint32_t i = thread; i < num_nics; i += threads) {
        block.nics[i] = resident.wire.nics[i];
        block.near_keys[i] = block.nics[i]->keys;
    }
    for (uint32_t i = thread; resident.wire.shifts != nullptr && i < num_nics * kMaxKeys;
         i += threads) {
        block.shifts[i] = resident.wire.shifts[i];
    }
    const uint32_t cells = Machine::kControlWarps * resident.num_planes * 32;
    for (uint32_t i = thread; i < cells; i += threads) block.traffic[i] = Traffic();
    __syncthreads();
    for (uint32_t i = thread; i < block.num_queues; i += threads) {
        const ResidentQueue& row = resident.queues[first + i];
        block.queues[i] = row.queue;
        if (block.flights != nullptr) {
            const uint32_t far = row.queue.num_flights;
            move_flights(&block.queues[i], &block.flights[i * kMessages],
                         far < kMessages ? far : kMessages);
        }
        block.nic[i] = row.nic;
        block.plane[i] = row.plane;
        block.wakes[i] = 0;
        for (uint32_t k = 0; k < kMessages; ++k) block.underway[i * kMessages + k] = 0;
        // Peers' keys may still be missing; the own ones are there. All write the same.
        Key* keys = &block.own_keys[row.plane * kMaxKeys];
        for (uint32_t k = 0; k < kMaxKeys; ++k) keys[k] = block.nics[row.nic]->keys[k];
        block.near_keys[row.nic] = keys;
    }
    if (thread < Machine::kControlWarps) {
        block.contexts[thread] = {block.wire,           0, resident.faults, resident.journal,
                                  resident.strict != 0, 0, kNever,          false};
    }
    if (thread == 0) {
        *block.wire = {resident.wire.epoch_ns, num_nics, block.nics,
                       resident.wire.shifts == nullptr ? nullptr : block.shifts, block.near_keys};
        block.ring->reserved = block.ring->taken = 0;
        block.ring->producers = Machine::kControlWarps + 1;
        *block.self = block;
    }
    __syncthreads();
    return *block.self;
}

/// Those of `count` blocks from one on.
template <class Machine>
__device__ inline OfferRange offers_of(const Resident& resident, uint32_t block, uint32_t count) {
    constexpr uint32_t kOfBlock = Machine::kControlWarps * kOffers;
    if (count > resident.num_blocks - block) count = resident.num_blocks - block;
    return {resident.offers + block * kOfBlock, count * kOfBlock};
}

/// Tell the host what the lanes of a control warp counted; it adds that up.
__device__ __noinline__ inline void publish_traffic(const Resident& resident,
                                                    const BlockMemory& block, uint32_t warp,
                                                    uint32_t control_warps) {
    const uint32_t cells = resident.num_planes * 32;
    Traffic* into = resident.traffic + blockIdx.x * control_warps * cells;
    for (uint32_t i = threadIdx.x & 31; i < cells; i += 32) {
        into[warp * cells + i] = block.traffic[warp * cells + i];
    }
}

/// One of a block's control warps.
template <class Machine>
class ControlWarp {
 public:
    __device__ ControlWarp(const Resident& resident, const BlockMemory& block, uint32_t warp)
        : resident_(resident),
          block_(block),
          warp_(warp),
          machine_(resident),
          context_(block.contexts[warp]) {
        if (group_.lane() == 0) block.heard[warp] = {0, machine_.now(), 0};
        group_.sync();
    }

    __device__ void serve() {
        for (uint64_t sweep = 0; sweep % kSweepsPerLook != 0 || goes_on(sweep); ++sweep) {
            Picoseconds wake = kNever;
            const bool progress = look_around(&wake);
            machine_.swept(warp_, progress, wake);
        }
        if (order_ == kStopClean) check_all();
        publish_traffic(resident_, block_, warp_, Machine::kControlWarps);
        group_.sync();
        if (group_.lane() == 0) {
            __threadfence_block();
            atomicSub(&block_.ring->producers, 1u);
            if (warp_ == 0) say(order_ == kServe ? kAbandoned : kEnded);
        }
    }

 private:
    static constexpr uint64_t kSweepsPerLook = Machine::kSweepsPerLook;

    /// Queue pairs are dealt to the warps in turn; the number of this warp's `i`-th in the block.
    __device__ uint32_t own(uint32_t i) const { return warp_ + i * Machine::kControlWarps; }

    /// Look at all doorbells, a lane at each, and take those with something to do.
    __device__ bool look_around(Picoseconds* wake) {
        bool progress = false;
        const Picoseconds now = group_.from_first(machine_.now());
        for (uint32_t first = 0; own(first) < block_.num_queues; first += group_.size()) {
            const uint32_t i = own(first + group_.lane());
            bool wants = false;
            uint64_t doorbell = 0;
            Picoseconds next = kNever;
            if (i < block_.num_queues) {
                QueuePair* queue = &block_.queues[i];
                const uint32_t dead = fabric::load_relaxed(&block_.nics[block_.nic[i]]->dead);
                doorbell = fabric::load_acquire(queue->doorbell);
                if (dead == 0 && is_connected(queue)) {
                    next = block_.wakes[i];
                    wants = doorbell != queue->doorbell_seen || next <= now;
                }
            }
            uint32_t asking = group_.ballot(wants);
            group_.sync();
            while (asking != 0) {
                const uint32_t who = mlx5::lowest(asking);
                asking &= asking - 1;
                const Picoseconds again =
                    visit(own(first + who), group_.at(doorbell, who), &progress);
                if (group_.lane() == who) next = again;
            }
            if (Machine::kReportsWakes) *wake = earliest(next, *wake);
        }
        return progress;
    }

    /// Of all lanes' times and `other`.
    __device__ Picoseconds earliest(Picoseconds time, Picoseconds other) const {
        for (uint32_t lane = 0; lane < group_.size(); ++lane) {
            const Picoseconds one = group_.at(time, lane);
            if (one < other) other = one;
        }
        return other;
    }

    __device__ Picoseconds visit(uint32_t i, uint64_t doorbell, bool* progress) {
        QueuePair* queue = &block_.queues[i];
        ResidentCopier<Machine> copier{
            {block_.ring, &block_.underway[i * kMessages], &block_.generations[warp_ * kOffers],
             offers_of<Machine>(resident_, blockIdx.x, 1).first + warp_ * kOffers},
            &block_.traffic[(warp_ * resident_.num_planes + block_.plane[i]) * 32 + group_.lane()],
            resident_.tolerance_ns,
            resident_.passages,
            &machine_};
        if (group_.lane() == 0) {
            context_.nic = block_.nic[i];
            context_.wake = kNever;
            context_.progress = false;
        }
        copier.refresh(group_, &context_);
        step(group_, &context_, queue, doorbell, copier);
        const Picoseconds next = context_.progress ? 0 : context_.wake;
        if (group_.lane() == 0) block_.wakes[i] = next;
        *progress = *progress || context_.progress;
        group_.sync();
        return next;
    }

    /// Say that this warp lives, and hear whether it is to go on.
    __device__ bool goes_on(uint64_t sweep) {
        const Picoseconds now = machine_.now();
        uint32_t order = kServe;
        bool is_alone = false;
        if (group_.lane() == 0) {
            if (warp_ == 0) say(kServing);
            order = fabric::load_relaxed(&resident_.mailbox->order);
            const uint64_t sign = fabric::load_relaxed(&resident_.mailbox->alive);
            Heard* last = &block_.heard[warp_];
            if (sign != last->sign) {
                last->sign = sign;
                last->at = now;
            }
            is_alone =
                resident_.patience_ns != 0 && now - last->at > resident_.patience_ns * kNanosecond;
        }
        order_ = group_.from_first(order);
        const uint32_t counting =
            group_.from_first(fabric::load_relaxed(&resident_.mailbox->counting));
        if (counting != block_.heard[warp_].counting) forget_traffic(counting);
        is_alone = group_.from_first(int(is_alone)) != 0;
        if (sweep % (64 * kSweepsPerLook) == 0) {
            publish_traffic(resident_, block_, warp_, Machine::kControlWarps);
        }
        return order_ == kServe && !is_alone;
    }

    __device__ void say(BlockState state) {
        BlockStatus* status = &resident_.status[blockIdx.x];
        status->granularity = machine_.granularity_ns();
        status->heartbeat = machine_.now() / kNanosecond;
        fabric::store_release(&status->state, uint32_t(state));
    }

    __device__ void forget_traffic(uint32_t counting) {
        const uint32_t cells = resident_.num_planes * 32;
        for (uint32_t i = group_.lane(); i < cells; i += group_.size()) {
            block_.traffic[warp_ * cells + i] = Traffic();
        }
        group_.sync();
        if (group_.lane() == 0) block_.heard[warp_].counting = counting;
        publish_traffic(resident_, block_, warp_, Machine::kControlWarps);
    }

    __device__ void check_all() {
        if (group_.lane() == 0) {
            for (uint32_t i = warp_; i < block_.num_queues; i += Machine::kControlWarps) {
                context_.nic = block_.nic[i];
                context_.now = machine_.now();
                check_idle(&context_, &block_.queues[i]);
            }
        }
        group_.sync();
    }

    const Resident& resident_;
    const BlockMemory& block_;
    mlx5::WarpLanes group_;
    uint32_t warp_;
    Machine machine_;
    Context& context_;  ///< in shared memory
    uint32_t order_ = kServe;
};

/// A block of the engine, until it is told to stop.
template <class Machine>
__device__ inline void serve_block(const Resident& resident, uint8_t* memory) {
    const BlockMemory& block = open_block<Machine>(resident, memory);
    const uint32_t warp = threadIdx.x / 32;
    if (warp < Machine::kControlWarps) {
        ControlWarp<Machine>(resident, block, warp).serve();
    } else if (warp == Machine::kControlWarps) {
        const uint32_t team = blockIdx.x / kTeam * kTeam;
        Bringer<Machine>(offers_of<Machine>(resident, team, kTeam),
                         offers_of<Machine>(resident, blockIdx.x, 1), block.ring, block.claims)
            .serve();
    } else if (resident.bells.bell != nullptr && blockIdx.x == 0 && warp + 1 == blockDim.x / 32) {
        carry_doorbells<Machine>(resident.bells, block.ring);
    } else {
        place_slices(block.ring);
    }
    __syncthreads();
    // The host may want to know how they stood, and to go on from there.
    for (uint32_t i = threadIdx.x; i < block.num_queues; i += blockDim.x) {
        QueuePair* kept = &resident.queues[resident.first[blockIdx.x] + i].queue;
        move_flights(&block.queues[i], kept->flights, kept->num_flights);
        *kept = block.queues[i];
    }
}

}  // namespace epcomm::emulated
