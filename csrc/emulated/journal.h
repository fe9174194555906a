// What happened: injected faults, violations and changes of state, in bounded lists.
#pragma once

#include <tuple>

#include "../protocol/fabric.h"
#include "fault.h"
#include "note_ring.h"
#include "parse.h"

namespace epcomm::emulated {

enum class EventKind : uint8_t {
    kFault = EPCOMM_FABRIC_FAULT,          ///< code: Fault
    kViolation = EPCOMM_FABRIC_VIOLATION,  ///< code: Violation
    kFailed = EPCOMM_FABRIC_FAILED,        ///< code: Syndrome; the queue pair is in the error state
    kRecovered = EPCOMM_FABRIC_RECOVERED,  ///< the doorbell record made up for a lost doorbell
};

struct Event {
    Picoseconds time;
    uint64_t position;
    Picoseconds amount;
    uint32_t queue;
    uint16_t nic;
    EventKind kind;
    uint8_t code;

    auto order() const { return std::make_tuple(time, nic, queue); }
};

using EventRing = NoteRing<Event>;

/// Rules that writers were found to have broken.
struct BrokenRules {
    uint64_t count = 0;
    Event first = {};  ///< if there is one
};

/// The first events of a run: those beyond the capacity are counted, not kept. Violations are
/// counted apart as well, and the first one is always kept: faults that are meant to happen must
/// not hide it.
struct Journal {
    Event* events;
    uint64_t capacity;
    uint64_t count;
    uint64_t violations;
    EventRing* newest = nullptr;  ///< the last ones, too, where somebody wants them
    Event violation = {};
    uint64_t violation_is_whole = 0;

    EPCOMM_HD void add(const Event& event) {
        const uint64_t slot = increase(&count);
        if (slot < capacity) events[slot] = event;
        if (newest != nullptr) newest->add(event);
        if (event.kind != EventKind::kViolation || increase(&violations) != 0) return;
        violation = event;
        fabric::store_release(&violation_is_whole, uint64_t(1));
    }

    /// May be called while others add.
    BrokenRules broken_rules() const {
        if (fabric::load_acquire(&violation_is_whole) == 0) return {};
        return {fabric::load_relaxed(&violations), violation};
    }
};

}  // namespace epcomm::emulated
