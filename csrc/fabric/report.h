// How host code fails a fabric.
#pragma once

#include <stdio.h>

#include <string>

#include "atomics.h"
#include "trigger.h"

namespace epcomm::fabric {

/// Write the fabric's error record, if this is the first report, and end every wait.
inline void report(epcomm_fabric_state* state, const epcomm_fabric_error& error) {
    if (__atomic_exchange_n(&state->failing, 1u, __ATOMIC_ACQ_REL) != 0) return;
    state->error = error;
    store_release(&state->failed, uint32_t(error.status));
}

inline void put_text(epcomm_fabric_error* error, const std::string& text) {
    snprintf(error->text, sizeof error->text, "%s", text.c_str());
}

/// An error that has to do with no peer in particular.
inline epcomm_fabric_error plain_error(epcomm_fabric_status status, const std::string& text) {
    epcomm_fabric_error error{};
    error.status = status;
    error.peer = error.channel = -1;
    put_text(&error, text);
    return error;
}

}  // namespace epcomm::fabric
