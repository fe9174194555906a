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

/// Events beyond the capacity are counted, not kept. Violations are counted apart as well.
struct Journal {
    Event* events;
    uint64_t capacity;
    uint64_t count;
    uint64_t violations;

    EPCOMM_HD void add(const Event& event) {
        const uint64_t slot = increase(&count);
        if (event.kind == EventKind::kViolation) increase(&violations);
        if (slot < capacity) events[slot] = event;
    }
};

}  // namespace epcomm::emulated
