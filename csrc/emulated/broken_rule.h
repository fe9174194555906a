// Errors of an emulated NIC in words. It knows more than the syndrome tells: which rule of the
// interface a writer broke (violate() in complete.h).
//
// For completions of emulated NICs alone: real cards' vendor bytes mean other things.
#pragma once

#include <string>

#include "queue_pair.h"

namespace epcomm::emulated {

static_assert(kVendorViolation + kNumViolations <= kVendorFlushed, "codes that differ");

/// What a broken rule adds to any text.
inline std::string describe(Violation violation) {
    return std::string("the emulated NIC found a broken rule: ") + name(violation);
}

/// The rule that a completion with this vendor byte says was broken; kNoViolation: it says nothing
/// of one, or, with kVendorMalformed, not which.
inline Violation violation_of(uint8_t vendor) {
    const int code = vendor - kVendorViolation;
    return code > 0 && code < kNumViolations ? Violation(code) : kNoViolation;
}

/// An error completion in words. `vendor`: as in epcomm_fabric_error, syndrome and vendor byte.
inline std::string describe_error(int32_t vendor) {
    const auto syndrome = uint8_t(vendor >> 8);
    const Violation violation = violation_of(uint8_t(vendor));
    std::string text = mlx5::describe(syndrome);
    if (syndrome == mlx5::kLocalOperation && violation != kNoViolation) {
        text += "; " + describe(violation);
    }
    return text;
}

}  // namespace epcomm::emulated
