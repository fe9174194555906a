// What became of every message of an engine's queue pairs, and when: for a timeline. Kept only
// where somebody asked for it, in a ring whose oldest entries are written over. The host engine
// keeps Passages; the GPU-resident engine a NoteRing.
#pragma once

#include <tuple>
#include <vector>

#include "note_ring.h"
#include "queue_pair.h"

namespace epcomm::emulated {

/// A message that has landed or completed. `depart` and `arrive` are the model's, the other times
/// are those at which the engine did it.
struct Passage {
    Picoseconds rung;  ///< the doorbell was seen; 0: not noted
    Picoseconds depart;
    Picoseconds arrive;
    Picoseconds landed;     ///< its last bytes were placed; 0: it completed before that
    Picoseconds completed;  ///< its completion was written, if it asked for one; 0: not noted
    uint64_t position;
    uint32_t queue;
    uint32_t bytes;
    uint32_t nic;

    auto order() const { return std::make_tuple(landed, nic, queue, position); }
};

using PassageRing = NoteRing<Passage>;

struct Passages {
    std::vector<Passage> kept;  ///< passage i lies at i % capacity; empty: none are wanted
    uint64_t count = 0;

    bool wanted() const { return !kept.empty(); }
    void add(const Passage& passage) { kept[count++ % kept.size()] = passage; }

    /// Oldest first.
    std::vector<Passage> in_order() const {
        std::vector<Passage> all;
        const uint64_t capacity = kept.size();
        for (uint64_t i = count > capacity ? count - capacity : 0; i < count; ++i) {
            all.push_back(kept[i % capacity]);
        }
        return all;
    }
};

/// What a queue pair's flights do not remember, by slot.
struct Moments {
    std::vector<Picoseconds> rung;
    std::vector<Picoseconds> landed;

    explicit Moments(size_t num_blocks = 0) : rung(num_blocks), landed(num_blocks) {}

    /// After a look at the queue pair, which had fetched and completed so much before.
    void note(uint32_t nic, QueuePair* queue, uint64_t fetched, uint64_t completed, Picoseconds now,
              Passages* into) {
        const uint64_t mask = queue->num_blocks - 1;
        for (uint64_t p = fetched; p < queue->fetched; ++p) rung[p & mask] = queue->posted_at;
        // What is behind a failed request has not been carried out, and its error tells.
        for (uint64_t p = completed; queue->state == kReady && p < queue->completed; ++p) {
            const Flight& flight = queue->flight(p);
            // Nor is anything known of what was fetched before it was asked for.
            if (flight.request.opcode == mlx5::kNop || rung[p & mask] == 0) continue;
            into->add({rung[p & mask], flight.times.depart, flight.times.arrive,
                       flight.landed != 0 ? landed[p & mask] : 0, now, p, queue->number,
                       flight.request.bytes, nic});
        }
    }
};

}  // namespace epcomm::emulated
