// A queue pair as its NIC sees it, and the state of its requests.
//
//     rung for -> fetched, checked, -> body on its -> bytes placed -> completed
//     posted      scheduled: fetched   way: started   landed          completed     (positions)
//
// Nothing is fetched before the doorbell. Requests take effect and complete in order within the
// queue pair; there is no order across queue pairs. Only a message's last bytes, atomics and
// completions have effects that anybody may rely on; the bytes before are placed as soon as the
// message departs, which may be before an earlier request's effect, but not on the same memory
// (overlap.h).
//
// A queue pair is served by a group (mlx5/group.h): lane i looks at the i-th request from some
// position on, and steps of all lanes together take as long as those of one.
#pragma once

#include "../mlx5/order.h"
#include "journal.h"
#include "line.h"

namespace epcomm::emulated {

/// Vendor syndromes. The first three are seen with real hardware; the others are this NIC's own.
enum VendorSyndrome : uint8_t {
    kVendorMalformed = 0x68,
    kVendorRetry = 0x81,
    kVendorRemoteAccess = 0x88,
    kVendorFlushed = 0xf9,
    kVendorViolation = 0xe0,  ///< + Violation: broken rules other than a malformed request
};

/// A request between fetch and completion.
struct Flight {
    Request request;
    Schedule times;
    Picoseconds read_at;     ///< atomic: when the old value was read; kNever before
    Picoseconds copied_at;   ///< when the copier had placed the body; 0: not known yet
    Picoseconds last_piece;  ///< the last bytes are not placed before
    uint64_t old_value;      ///< of an atomic
    uint32_t body_placed;    ///< bytes given to the copier so far
    uint32_t num_pieces;     ///< 0: not in pieces
    uint32_t pieces_placed;
    uint8_t syndrome;  ///< mlx5::Syndrome; 0 = none so far
    uint8_t vendor;
    uint8_t landed;
    uint8_t relaxed;  ///< may pass earlier requests
    uint8_t completes_early;
    uint64_t padding;
};
static_assert(sizeof(Flight) / 8 % 2 == 1, "lanes' flights begin in different banks");

/// Outstanding reads and atomics an NIC keeps at most.
constexpr uint32_t kMaxResponses = 16;

struct QueuePair {
    // Given by software.
    const mlx5::Block* ring;
    const mlx5::Be32* record;
    const uint64_t* doorbell;
    mlx5::Completion* completions;
    uint32_t num_blocks;
    uint32_t num_completions;
    uint32_t number;
    uint32_t max_responses;  ///< reads and atomics under way, at most kMaxResponses

    // The NIC's.
    QueueEntry* entry;    ///< what peers see of it
    Flight* flights;      ///< [num_flights]
    mlx5::Block* shadow;  ///< [num_blocks]: the requests as they were fetched
    // As in `entry`, which is farther away.
    uint32_t state;
    uint32_t domain;
    uint32_t peer_nic;
    uint32_t peer_number;
    uint64_t doorbell_seen;
    uint64_t posted;
    uint64_t fetched;
    uint64_t started;
    uint64_t landed;
    uint64_t completed;
    uint64_t covered;        ///< below: software can know that they completed
    uint64_t entries;        ///< completions written
    uint64_t lock;           ///< what this queue pair holds the peer NIC's `atomics` with, or 0
    uint32_t refused;        ///< 1: a request fetched so far will fail; nothing behind it is read
    uint32_t passes;         ///< 1: there was a request that may pass others
    uint32_t next_response;  ///< in `responses`
    uint32_t num_flights;    ///< a power of two: so many are under way at most
    Picoseconds posted_at;   ///< when the last doorbell was seen
    Picoseconds recover_at;  ///< when the record is read in place of a lost doorbell
    Picoseconds departed;    ///< when the last scheduled message departs
    uint64_t early_until;    ///< below: fetched without regard to the line
    uint64_t late_judged;    ///< below: it has been decided whether to fetch late
    Picoseconds late_until;  ///< the next request is not fetched before
    uint64_t long_until;     ///< below: known not to leave with what went before
    Picoseconds responses[kMaxResponses];  ///< when the last ones are back
    Picoseconds last_response;

    EPCOMM_HD Flight& flight(uint64_t position) { return flights[position & (num_flights - 1)]; }
    /// The first one whose flight is still needed: also of what has completed too early.
    EPCOMM_HD uint64_t oldest() const { return landed < completed ? landed : completed; }
    EPCOMM_HD bool is_idle() const { return completed == posted && recover_at == kNever; }
};

/// What one look at a queue pair needs, and what it says back: one for the group. All lanes store
/// the same in it, or one lane does and the others wait.
struct Context {
    Wire* wire;
    uint32_t nic;
    FaultPlan faults;
    Journal* journal;
    /// A broken rule puts the queue pair into the error state; else it is only recorded.
    bool strict;
    Picoseconds now;
    Picoseconds wake;  ///< when there is something to do at the latest, unless a doorbell rings
    bool progress;

    EPCOMM_HD Nic& own() const { return wire->nic(nic); }
    EPCOMM_HD Subject subject(const QueuePair& queue, uint64_t position) const {
        return {nic, queue.number, position};
    }
    /// By one lane.
    EPCOMM_COLD void note(EventKind kind, const QueuePair& queue, uint64_t position, uint8_t code,
                          Picoseconds amount = 0) {
        journal->add({now, position, amount, queue.number, uint16_t(nic), kind, code});
    }
    EPCOMM_HD bool hits(Fault fault, const QueuePair& queue, uint64_t position,
                        Picoseconds* amount) {
        return faults.num_rules != 0 && rules_hit(fault, queue, position, amount);
    }
    EPCOMM_COLD bool rules_hit(Fault fault, const QueuePair& queue, uint64_t position,
                               Picoseconds* amount) {
        if (!faults.hits(fault, subject(queue, position), amount)) return false;
        note(EventKind::kFault, queue, position, fault, *amount);
        return true;
    }
    EPCOMM_HD void wake_at(Picoseconds time) {
        if (time < wake) wake = time;
    }
    /// Whether `time` has come; if not, it will be looked at again then.
    EPCOMM_HD bool is_due(Picoseconds time) {
        if (now >= time) return true;
        wake_at(time);
        return false;
    }
    /// How many requests are looked at together: where faults decide what happens to each, one.
    template <class Group>
    EPCOMM_HD uint32_t width(Group group) const {
        return faults.num_rules == 0 ? group.size() : 1;
    }
};

/// Start a queue pair with its counters at `position`.
EPCOMM_HD inline void reset(QueuePair* queue, uint64_t position) {
    queue->posted = queue->fetched = queue->started = queue->landed = position;
    queue->completed = queue->covered = position;
    queue->entries = queue->lock = 0;
    queue->refused = queue->passes = queue->next_response = 0;
    queue->posted_at = queue->departed = queue->last_response = 0;
    queue->recover_at = kNever;
    queue->early_until = queue->late_judged = queue->long_until = position;
    queue->late_until = 0;
    for (uint32_t i = 0; i < kMaxResponses; ++i) queue->responses[i] = 0;
}

}  // namespace epcomm::emulated
