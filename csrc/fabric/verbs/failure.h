// A failed work request in words.
#pragma once

#include <stdint.h>

#include <string>

#include "../transport.h"
#include "abi.h"
#include "device.h"

namespace epcomm::fabric {

struct Failure {
    Command command;
    ibv::Status status;
    uint32_t vendor;  ///< the card's own code
    uint32_t queue_pair;
    bool of_signal;  ///< the part of the operation that raises the counter
    bool sent;       ///< false: refused here, before anything was sent
    std::string nic;
};

/// What a user can do about a status.
std::string advice(ibv::Status status, const VerbsOptions& options);

const char* status_name(ibv::Status status);

/// What was being sent, to whom, over which queue pair, what went wrong, and what to do about it.
std::string describe(const Failure& failure, const VerbsOptions& options);

}  // namespace epcomm::fabric
