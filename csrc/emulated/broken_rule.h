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

/// Syndrome and vendor byte, as in epcomm_fabric_error, of what a broken rule completes with.
inline int32_t vendor_of(Violation violation) {
    const bool is_malformed = violation <= kInlineTooLong;
    const int code = is_malformed ? int(kVendorMalformed) : kVendorViolation + violation;
    return mlx5::kLocalOperation << 8 | code;
}

/// Whether a completion says that a rule was broken, but not which.
inline bool is_malformed(int32_t vendor) {
    return vendor == (mlx5::kLocalOperation << 8 | kVendorMalformed);
}

/// The rule that a completion names; kNoViolation: none.
inline Violation violation_of(int32_t vendor) {
    const int code = vendor - (mlx5::kLocalOperation << 8 | kVendorViolation);
    return code > 0 && code < kNumViolations ? Violation(code) : kNoViolation;
}

/// An error completion in words.
///
/// @param vendor syndrome and vendor byte, as in epcomm_fabric_error.
/// @param malformed where `is_malformed`: the rule, if it is known.
inline std::string describe_error(int32_t vendor, Violation malformed = kNoViolation) {
    const std::string text = mlx5::describe(uint8_t(vendor >> 8));
    const Violation violation = is_malformed(vendor) ? malformed : violation_of(vendor);
    return violation == kNoViolation ? text : text + "; " + describe(violation);
}

}  // namespace epcomm::emulated
