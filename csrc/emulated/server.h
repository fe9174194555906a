// The host of the GPU-resident engine: tables on the device, the kernel's beginning and end, and
// what it counted. For one rank's NICs; called by one thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "resident.h"

namespace epcomm::emulated {

/// A queue pair for the kernel to serve. Its NIC's entry is there, made by add_queue.
struct ServedQueue {
    QueueMemory memory;  ///< in device memory; requests and completions perhaps in the host's
    uint32_t number;
    uint32_t nic;    ///< in the wire
    uint32_t plane;  ///< among the rank's NICs
    uint32_t block;  ///< dealt to block `block % num_blocks`
};

/// The network as the rank's process sees it; see Wire.
struct ServedWire {
    std::vector<Nic*> nics;       ///< in device memory
    std::vector<int64_t> shifts;  ///< [nics][kMaxKeys], or empty
};

struct ServerOptions {
    uint32_t num_blocks = 2;
    uint32_t num_planes = 1;
    bool strict = true;
    uint64_t seed = 0;
    std::vector<FaultRule> rules;
    uint64_t journal_capacity = 4096;
    uint64_t tolerance_ns = kToleranceNs;
    uint64_t patience_ns = 0;   ///< without a sign of life for so long the kernel ends; 0: never
    int64_t epoch_ns = 0;       ///< of the device's timer, the same for all NICs
    HostBells bells = {};       ///< where host threads fill queues
    uint64_t max_passages = 0;  ///< messages that are kept, the newest; 0: none are noted
    uint64_t max_events = 0;    ///< likewise, beside those of the journal
};

/// What the kernel said when it was last looked at.
struct ServerReport {
    bool serving;             ///< all blocks
    bool abandoned;           ///< a block ended because it heard nothing of its host
    uint64_t heartbeat;       ///< the oldest of the blocks'
    uint32_t granularity_ns;  ///< of the device's timer
    BrokenRules broken_rules;
    uint64_t num_events;
    std::vector<Traffic> traffic;  ///< [num_planes]
};

/// All members throw std::runtime_error with CUDA's words.
class Server {
 public:
    /// Allocates, uploads, and loads the kernel. Nothing that never ends may run on the device yet.
    Server(const ServedWire& wire, const std::vector<ServedQueue>& queues,
           const ServerOptions& options);
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    /// Stops the kernel, waiting for 2 s at most; if it runs on, its memory stays.
    ~Server();

    void start();

    /// To be said more often than `patience_ns`.
    void sign_of_life();

    /// Whether the kernel has ended, by itself or as told.
    bool has_ended();

    /// Tell it to stop, and wait. Whether it has.
    bool stop(ResidentOrder order, int64_t timeout_ns);

    ServerReport look();

    /// Count from now on. Nothing is under way; soon after, `look` says so.
    void forget_counts();

    /// From now on the NIC, whosever it is, does not answer.
    void kill_nic(uint32_t nic);

    /// Those of the journal, the first ones.
    std::vector<Event> events();

    /// Messages that have landed, oldest first; `total`: all since `forget`. Others may be landing
    /// meanwhile.
    std::vector<Passage> passages(uint64_t* total);

    /// The newest events, as `passages`.
    std::vector<Event> newest_events(uint64_t* total);

    /// From now on `passages` and `newest_events` have none of before.
    void forget();

 private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

/// How far the device's timer is ahead of the host's monotonic clock. What the host sees is late by
/// a write over the bus, about as much for every device, so differences are better than this.
int64_t device_ahead_ns();

}  // namespace epcomm::emulated
