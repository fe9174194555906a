// What happened: injected faults, violations and changes of state, in a bounded list.
#pragma once

#include "fault.h"
#include "parse.h"

namespace epcomm::emulated {

enum class EventKind : uint8_t {
    kFault,      ///< code: Fault
    kViolation,  ///< code: Violation
    kFailed,     ///< code: Syndrome; the queue pair is in the error state
    kRecovered,  ///< a lost doorbell was made up for by the doorbell record
};

struct Event {
    Picoseconds time;
    uint64_t position;
    Picoseconds amount;
    uint32_t queue;
    uint16_t nic;
    EventKind kind;
    uint8_t code;
};

/// Count one more, among any threads of one side; returns the count before.
EPCOMM_HD inline uint64_t increase(uint64_t* counter) {
#ifdef __CUDA_ARCH__
    return atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
#else
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
#endif
}

/// Rules that writers were found to have broken.
struct BrokenRules {
    uint64_t count = 0;
    Event first = {};  ///< if there is one
};

/// Events beyond the capacity are counted, not kept. Violations are counted apart as well, and the
/// first one is always kept: faults that are meant to happen must not hide it.
struct Journal {
    Event* events;
    uint64_t capacity;
    uint64_t count;
    uint64_t violations;
    Event violation = {};
    uint64_t violation_is_whole = 0;

    EPCOMM_HD void add(const Event& event) {
        const uint64_t slot = increase(&count);
        if (slot < capacity) events[slot] = event;
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
