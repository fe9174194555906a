// The host engine of the emulated NICs: a thread, or steps that a test takes itself.
//
// With the *machine's clock* a completion is never earlier than the line model says and never
// earlier than the bytes are copied: the later of the two, and the report says which it was. With
// the *virtual clock* time jumps to the next thing to do, so that a run is a function of its seed
// and takes no longer than its work: thousands of schedules in seconds.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "passage.h"
#include "step.h"
#include "traffic.h"

namespace epcomm::emulated {

/// A network all of whose NICs are in this process.
class Network {
 public:
    Network(uint32_t num_nics, const LineModel& line);
    Wire* wire() { return &wire_; }

    /// Register memory; returns its key.
    uint32_t add_memory(uint32_t nic, const void* start, uint64_t bytes, uint32_t access,
                        uint32_t domain = 1);

    /// From now on the NIC does not answer.
    void kill_nic(uint32_t nic);

 private:
    std::unique_ptr<Nic[]> nics_;
    std::vector<Nic*> pointers_;
    Wire wire_;
};

struct EngineOptions {
    bool virtual_clock = true;
    bool strict = true;
    uint64_t seed = 0;
    bool shuffle = false;  ///< look at queue pairs in an order that the seed decides
    /// Virtual clock: bytes per ns that the copier places; 0 = at once.
    uint64_t copy_bytes_per_ns = 0;
    uint64_t tolerance_ns = kToleranceNs;
    std::vector<FaultRule> rules;
    uint64_t journal_capacity = 4096;
};

class Engine {
 public:
    Engine(Wire* wire, EngineOptions options);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    /// Make a queue pair on `nic`; returns its number.
    uint32_t add_queue(uint32_t nic, const QueueMemory& memory);

    /// End a queue pair, whose memory is not looked at any more. While the engine does not run.
    void remove_queue(uint32_t nic, uint32_t number);

    /// Connect a queue pair of this engine to a peer's, which may be another engine's.
    void connect(uint32_t nic, uint32_t number, uint32_t peer_nic, uint32_t peer_number);

    /// Let every queue pair do what is due now. Whether anything happened.
    bool step();

    /// step, or with the virtual clock let time pass until something happens. False: idle.
    bool advance();

    /// advance until idle.
    void settle();

    /// Once writers are done: are records and doorbells at the same index? Violations are recorded.
    void check_idle();

    /// Serve in a thread of its own, with the machine's clock.
    void start();
    void stop();

    Picoseconds now() const;
    uint64_t violations() const { return journal_.violations; }
    /// Also while another thread takes steps.
    BrokenRules broken_rules() const { return journal_.broken_rules(); }
    /// The first ones.
    std::vector<Event> events() const;
    const Traffic& traffic(uint32_t nic) const { return traffic_[nic]; }
    /// Count from now on. Not while another thread takes steps.
    void restart_traffic(uint32_t nic) { traffic_[nic] = Traffic(); }

    /// From now on keep the last `capacity` messages' passages; 0: none. The same holds here.
    void keep_passages(uint64_t capacity);
    const Passages& passages() const { return passages_; }

    /// From now on keep the last `capacity` events; 0: only `events`. Not while another thread
    /// takes steps.
    void keep_events(uint64_t capacity);
    /// In order of time; `total`: all since keep_events.
    std::vector<Event> newest_events(uint64_t* total) const;

    /// One line on an NIC: rates, and what was the limit. Says that the network is modelled.
    std::string describe(uint32_t nic) const;

 private:
    struct Slot {
        uint32_t nic;
        QueuePair queue;
        std::vector<Flight> flights;
        std::vector<mlx5::Block> shadow;
        Moments moments;
    };
    class Copier;

    /// Look at all queue pairs but those whose bit in `skip` is set, from the `order`-th on.
    bool visit(uint64_t order, uint64_t skip);
    bool step_queue(Slot* slot, Picoseconds* wake);
    Context context_of(const Slot& slot, const FaultPlan& faults);
    Picoseconds clock() const;

    Wire* wire_;
    EngineOptions options_;
    std::vector<std::unique_ptr<Slot>> slots_;
    std::vector<Traffic> traffic_;
    Passages passages_;
    std::vector<Event> events_;
    Journal journal_;
    std::vector<Event> newest_;  ///< with the next, what `ring_` is made of
    std::vector<uint64_t> marks_;
    EventRing ring_ = {};
    Picoseconds virtual_now_ = 1000 * kNanosecond;
    Picoseconds copier_free_ = 0;
    Picoseconds wake_ = kNever;
    uint64_t steps_ = 0;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

/// Rules that repeat the injected faults of a run exactly.
std::vector<FaultRule> replay(const std::vector<Event>& events);

/// In words.
std::string describe(const Event& event);
std::string describe(uint32_t nic, const LineModel& line, const Traffic& traffic);

}  // namespace epcomm::emulated
