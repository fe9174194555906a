// Names of events, for people.
#pragma once

#include <string>

#include "../mlx5/mlx5.h"
#include "journal.h"

namespace epcomm::emulated {

/// Such as "fault: delay", "violation: slot reused", "failed: flushed: ...".
inline std::string name(EventKind kind, uint8_t code) {
    switch (kind) {
        case EventKind::kFault:
            return std::string("fault: ") + (code < kNumFaults ? name(Fault(code)) : "unknown");
        case EventKind::kViolation:
            return std::string("violation: ") +
                   (code < kNumViolations ? name(Violation(code)) : "unknown");
        case EventKind::kFailed: return std::string("failed: ") + mlx5::describe(code);
        case EventKind::kRecovered: return "doorbell recovered";
    }
    return "unknown event";
}

}  // namespace epcomm::emulated
