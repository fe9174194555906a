// The newest notes of an engine of many threads, in device memory: messages that have landed, by
// the lane that landed them; events. The host reads while others are noted.
//
// Whoever notes takes the next number, and with it a place. A place is one thread's at a time: in
// the first lap because numbers differ, later because the place's *mark* is exchanged for one that
// says so. Who finds a place still being written, a whole lap later, leaves its note out. The
// mark of a whole note is released after it.
//
// The reader copies marks, notes and marks again. A note whose mark was there both times was
// whole before its copy began, and nobody wrote to it until the copy had ended.
#pragma once

#include <algorithm>
#include <vector>

#include "../mlx5/order.h"

namespace epcomm::emulated {

/// Count one more, among any threads of one side; returns the count before.
EPCOMM_HD inline uint64_t increase(uint64_t* counter) {
#ifdef __CUDA_ARCH__
    return atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
#else
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
#endif
}

/// `Note`: plain data; `order()` is what the reader sorts by.
template <class Note>
struct NoteRing {
    Note* notes;      ///< [capacity]: number i lies at i % capacity
    uint64_t* marks;  ///< [capacity], zeros at first
    uint64_t capacity;
    uint64_t count;

    /// Of note `number`, which is whole; one more while it is being written.
    EPCOMM_HD static uint64_t mark_of(uint64_t number) { return 2 * (number + 1); }

    EPCOMM_HD void add(const Note& note) {
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
        notes[at] = note;
        fabric::store_release(mark, mark_of(number));
    }
};

/// The whole notes from number `first` on, in order; `end`: numbers taken so far.
///
/// @param read copies: `read(from, count, into)`, one call after the other.
template <class Note, class Read>
std::vector<Note> read_ring(const NoteRing<Note>* from, uint64_t first, const Read& read,
                            uint64_t* end) {
    NoteRing<Note> ring;
    read(from, 1, &ring);
    const uint64_t kept = std::min(ring.count, ring.capacity);
    std::vector<uint64_t> before(kept), after(kept);
    std::vector<Note> notes(kept), whole;
    read(ring.marks, kept, before.data());
    read(ring.notes, kept, notes.data());
    read(ring.marks, kept, after.data());
    for (uint64_t i = std::max(first, ring.count - kept); i < ring.count; ++i) {
        const uint64_t at = i % ring.capacity, mark = NoteRing<Note>::mark_of(i);
        if (before[at] == mark && after[at] == mark) whole.push_back(notes[at]);
    }
    // Lanes that note together take their numbers in any order. Of what is the same in it, a
    // thread's own order stays.
    std::stable_sort(whole.begin(), whole.end(),
                     [](const Note& a, const Note& b) { return a.order() < b.order(); });
    *end = ring.count;
    return whole;
}

}  // namespace epcomm::emulated
