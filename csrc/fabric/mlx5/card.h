// A ConnectX opened for commands of this process (DEVX), and what it can do.
#pragma once

#include "../verbs/device.h"
#include "command.h"

namespace epcomm::fabric::devx {

/// What queues and connections of a card are held to.
struct Limits {
    uint32_t max_depth;         ///< blocks of a send queue, entries of a completion queue
    uint32_t log_max_message;   ///< bytes
    uint32_t log_max_reads;     ///< reads and atomics this side asks for at a time
    uint32_t log_max_answers;   ///< and answers at a time
    uint32_t register_bytes;    ///< of a doorbell register that is mapped write-combining
    uint32_t timestamp_format;  ///< that queue pairs must name
};

struct Card {
    Nic nic;
    uint32_t domain = 0;       ///< number of nic.pd
    uint32_t event_queue = 0;  ///< number
    Limits limits{};

    const std::string& name() const { return nic.name.device; }
};

/// Names of the devices that libmlx5 drives.
/// Throws std::runtime_error where there is none, naming the others.
std::vector<std::string> list_mlx5_devices();

/// The whole logarithm: what fits into `value`. 0 for 0.
uint32_t floor_log2(uint32_t value);

/// Throws std::runtime_error naming the step that failed; then nothing is left open.
Card open_card(const NicName& name, const VerbsOptions& options);

void close_card(Card* card);

}  // namespace epcomm::fabric::devx
