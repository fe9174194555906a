// Passages of an engine of many threads, in device memory. A message is noted when it has landed,
// by the lane that landed it; the host reads while others are noted.
//
// Whoever notes takes the next number, and with it a place. A place is one thread's at a time: in
// the first lap because numbers differ, later because the place's *mark* is exchanged for one that
// says so. Who finds a place still being written, a whole lap later, leaves its message out. The
// mark of a whole passage is released after it.
//
// The reader copies marks, passages and marks again. A passage whose mark was there both times was
// whole before its copy began, and nobody wrote to it until the copy had ended.
#pragma once

#include <algorithm>
#include <tuple>

#include "../mlx5/order.h"
#include "passage.h"

namespace epcomm::emulated {

struct PassageRing {
    Passage* passages;  ///< [capacity]: number i lies at i % capacity
    uint64_t* marks;    ///< [capacity], zeros at first
    uint64_t capacity;
    uint64_t count;

    /// Of passage `number`, which is whole; one more while it is being written.
    EPCOMM_HD static uint64_t mark_of(uint64_t number) { return 2 * (number + 1); }

    EPCOMM_HD void add(const Passage& passage) {
        const uint64_t number = increase(&count), at = number % capacity;
        uint64_t* mark = &marks[at];
        if (number >= capacity) {
            const uint64_t seen = fabric::load_relaxed(mark);
            const bool is_whole = seen != 0 && seen % 2 == 0;
            if (!is_whole || seen > mark_of(number) ||
                !mlx5::exchange_if<mlx5::Scope::kSystem>(mark, seen, mark_of(number) + 1)) {
                return;
            }
        }
        passages[at] = passage;
        fabric::store_release(mark, mark_of(number));
    }
};

/// The whole passages from number `first` on, as they landed; `end`: numbers taken so far.
///
/// @param read copies: `read(from, count, into)`, one call after the other.
template <class Read>
std::vector<Passage> read_ring(const PassageRing* from, uint64_t first, const Read& read,
                               uint64_t* end) {
    PassageRing ring;
    read(from, 1, &ring);
    const uint64_t kept = std::min(ring.count, ring.capacity);
    std::vector<uint64_t> before(kept), after(kept);
    std::vector<Passage> passages(kept), whole;
    read(ring.marks, kept, before.data());
    read(ring.passages, kept, passages.data());
    read(ring.marks, kept, after.data());
    for (uint64_t i = std::max(first, ring.count - kept); i < ring.count; ++i) {
        const uint64_t at = i % ring.capacity, mark = PassageRing::mark_of(i);
        if (before[at] == mark && after[at] == mark) whole.push_back(passages[at]);
    }
    // Lanes that land messages together take their numbers in any order.
    std::sort(whole.begin(), whole.end(), [](const Passage& a, const Passage& b) {
        return std::tie(a.landed, a.nic, a.queue, a.position) <
               std::tie(b.landed, b.nic, b.queue, b.position);
    });
    *end = ring.count;
    return whole;
}

}  // namespace epcomm::emulated
