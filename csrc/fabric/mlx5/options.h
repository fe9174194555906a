// The mlx5 transport's options: those of network cards (verbs/options.h), and how queues are made.
#pragma once

#include "../verbs/options.h"
#include "doorbell.h"

namespace epcomm::fabric::devx {

struct Options {
    VerbsOptions card;
    int32_t depth = 512;    ///< requests under way per queue pair; rounded up to a power of two
    int32_t registers = 8;  ///< doorbell registers of a card that its queue pairs share
    DoorbellBy doorbell = DoorbellBy::kAuto;
    QueuesIn queues = QueuesIn::kAuto;
    int32_t failover = 0;  ///< 1: the lanes of a card that fails move to the rank's others
};

/// Throws std::runtime_error naming the option, what came, and what was expected.
Options parse_options(const std::string& text);

}  // namespace epcomm::fabric::devx
