// Errors that the emulated NICs of a rank have found, as the fabric's users are told.
#pragma once

#include "../emulated/broken_rule.h"
#include "fabric.h"
#include "report.h"
#include "transport.h"

namespace epcomm::fabric {

/// What fails a fabric whose writers broke rules: a bug of theirs, also where none of them reads
/// the completion that says so.
///
/// @param lane of the first one's queue pair.
inline epcomm_fabric_error error_of(const emulated::BrokenRules& found, Lane lane) {
    const emulated::Event& first = found.first;
    const auto violation = emulated::Violation(first.code);
    std::string text = emulated::describe(violation) + ", at request " +
                       std::to_string(first.position) + "; a bug of who writes the requests";
    if (found.count > 1) text += " (the first of " + std::to_string(found.count) + ")";
    epcomm_fabric_error error = plain_error(EPCOMM_FABRIC_TRANSPORT, text);
    error.vendor = emulated::vendor_of(violation);
    error.peer = lane.peer;
    error.channel = lane.channel;
    error.queue_pair = first.queue;
    error.position = first.position;
    return error;
}

/// An error completion in words. `found`, if the completion does not name the rule, may.
inline std::string describe_error(const Completion& completion,
                                  const emulated::BrokenRules& found) {
    const bool is_it = found.count != 0 && found.first.queue == completion.queue_pair;
    return emulated::describe_error(
        completion.vendor, is_it ? emulated::Violation(found.first.code) : emulated::kNoViolation);
}

}  // namespace epcomm::fabric
