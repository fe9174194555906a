// The GPU-resident engine of the emulated NICs, its kernel run on the host: stands for the host
// engine in the tests of tests/native, step by step and with a clock that jumps.
//
// A step lets every control warp look once at all its queue pairs, in an order that a seed decides;
// between steps they wait. The kernel starts with the first step after a queue pair was made, ends
// before another is, and goes on with the next step from where it was.
#pragma once

#include <set>

#include "cuda_emulation.h"

// Behind it: csrc uses what it defines.
#include "../../csrc/emulated/engine.h"
#include "../../csrc/emulated/resident.cuh"

namespace rig {

using namespace epcomm::emulated;
namespace fabric = epcomm::fabric;

class ResidentEngine;

/// What the kernel runs on; see resident.cuh.
class TestMachine {
 public:
    static constexpr uint32_t kControlWarps = 2, kCopyWarps = 1;
    static constexpr uint32_t kKept = 2, kStock = 3, kClaim = 3;
    static constexpr uint64_t kSweepsPerLook = 1;
    static constexpr bool kReportsWakes = true;

    explicit TestMachine(const Resident&);
    Picoseconds now() const;
    static uint32_t granularity_ns() { return 1; }
    void swept(uint32_t warp, bool progress, Picoseconds wake);
    static void looked_at_bell();

 private:
    ResidentEngine* engine_;
};

class ResidentEngine {
 public:
    static constexpr uint32_t kBlocks = 2;

    ResidentEngine(Wire* wire, EngineOptions options)
        : wire_(wire),
          options_(std::move(options)),
          events_(options_.journal_capacity),
          journal_{events_.data(), options_.journal_capacity, 0, 0},
          traffic_(wire->num_nics) {}
    ResidentEngine(const ResidentEngine&) = delete;
    ResidentEngine& operator=(const ResidentEngine&) = delete;
    ~ResidentEngine() {
        stop();
        end(kStop);
    }

    uint32_t add_queue(uint32_t nic, const QueueMemory& memory) {
        end(kStop);
        Nic& owner = wire_->nic(nic);
        const uint32_t number = emulated_add(&owner, memory.domain);
        if (number == 0) return 0;
        flights_.push_back(std::make_unique<Flight[]>(memory.num_blocks));
        shadows_.push_back(std::make_unique<epcomm::mlx5::Block[]>(memory.num_blocks));
        ResidentQueue row{queue_pair(memory, number, find_queue(owner, number),
                                     flights_.back().get(), shadows_.back().get()),
                          nic, nic};
        row.queue.doorbell_seen = fabric::load_acquire(memory.doorbell);
        // Dealt to the blocks in turn.
        dealt_[added_++ % kBlocks].push_back(row);
        return number;
    }

    void connect(uint32_t nic, uint32_t number, uint32_t peer_nic, uint32_t peer_number) {
        QueueEntry* entry = find_queue(wire_->nic(nic), number);
        entry->peer_nic = peer_nic;
        entry->peer_number = peer_number;
        fabric::store_release(&entry->state, uint32_t(kReady));
    }

    /// Whether anything happened.
    bool step() {
        begin();
        progress_ = false;
        wake_ = kNever;
        arrived_ = 0;
        ++turn_;
        bool copying = run_until_swept();
        // How far the copier gets meanwhile is left to chance, or it is done at once.
        for (uint64_t left = options_.shuffle ? random_() % 4 : ~uint64_t(0); copying && left != 0;
             --left) {
            run_once();
            progress_ = true;
            copying = is_copying();
        }
        return progress_ || copying;
    }

    bool advance() {
        if (step()) return true;
        if (options_.virtual_clock && wake_ != kNever && wake_ > now_) now_ = wake_;
        return wake_ != kNever;
    }

    void settle() {
        while (advance()) {
        }
    }

    void check_idle() { end(kStopClean); }

    /// In a thread of its own. Its coroutines cannot change threads, so the kernel begins and ends
    /// there.
    void start() {
        end(kStop);
        stopping_ = false;
        thread_ = std::thread([this] {
            while (!stopping_.load(std::memory_order_relaxed)) {
                if (!step()) fabric::relax();
            }
            end(kStop);
        });
    }

    void stop() {
        stopping_ = true;
        if (thread_.joinable()) thread_.join();
    }

    Picoseconds now() const {
        if (options_.virtual_clock) return now_;
        return Picoseconds(fabric::now_ns() - wire_->epoch_ns) * kNanosecond;
    }

    /// Queues are filled by host threads. Before the kernel runs.
    void set_bells(const HostBells& bells) { bells_ = bells; }
    /// Threads, by block, that have looked at the bell.
    const std::set<std::pair<uint32_t, uint32_t>>& bell_lookers() const { return bell_lookers_; }

    /// The kernel ends if its host says nothing for so long.
    void set_patience(uint64_t ns) {
        end(kStop);
        patience_ns_ = ns;
    }
    void sign_of_life() { mailbox_.alive += 1; }
    /// Let time pass, and every warp look at its mailbox.
    void pass(Picoseconds time) {
        begin();
        now_ += time;
        ++turn_;
        for (int i = 0; i < 1000; ++i) run_once();
    }
    /// How often a block was seen to copy what another one had offered.
    uint64_t helped() const { return helped_; }
    /// Slices that were offered and have not been placed.
    uint64_t offers_left() const {
        uint64_t left = 0;
        for (const Offer& offer : offers_) left += offer.left;
        return left;
    }
    bool is_abandoned() const { return status_[0].state == kAbandoned; }

    /// From now on keep the last `capacity` messages' passages; 0: none.
    void keep_passages(uint64_t capacity) {
        end(kStop);
        passages_.resize(capacity);
        marks_.assign(capacity, 0);
        ring_ = {passages_.data(), marks_.data(), capacity, 0};
    }
    PassageRing* ring() { return &ring_; }
    /// Those from number `first` on; the kernel may run meanwhile.
    std::vector<Passage> passages(uint64_t first, uint64_t* total) const {
        const auto read = [](const auto* from, uint64_t count, auto* into) {
            std::copy(from, from + count, into);
        };
        return read_ring(&ring_, first, read, total);
    }

    uint64_t violations() const { return journal_.violations; }
    std::vector<Event> events() const {
        const uint64_t kept =
            journal_.count < journal_.capacity ? journal_.count : journal_.capacity;
        return {events_.begin(), events_.begin() + int64_t(kept)};
    }
    const Traffic& traffic(uint32_t nic) {
        end(kStop);
        return traffic_[nic];
    }
    std::string describe(uint32_t nic) {
        return epcomm::emulated::describe(nic, wire_->nic(nic).line, traffic(nic));
    }

 private:
    friend class TestMachine;
    static uint32_t emulated_add(Nic* nic, uint32_t domain) {
        return epcomm::emulated::add_queue(nic, domain);
    }

    static constexpr uint32_t kOffersOfBlock = TestMachine::kControlWarps * kOffers;
    static constexpr uint32_t kSweepers = kBlocks * TestMachine::kControlWarps * 32;

    static void run_block(const void* kernel) {
        const auto* resident = static_cast<const Resident*>(kernel);
        auto* memory = static_cast<uint8_t*>(running_->memory_[blockIdx.x].get());
        serve_block<TestMachine>(*resident, memory);
    }

    void begin() {
        if (runs_) return;
        runs_ = true;
        rows_.clear();
        first_ = {0};
        uint32_t most = 1;
        for (const auto& part : dealt_) {
            rows_.insert(rows_.end(), part.begin(), part.end());
            first_.push_back(uint32_t(rows_.size()));
            if (part.size() > most) most = uint32_t(part.size());
        }
        mailbox_.order = kServe;
        const uint32_t planes = wire_->num_nics;
        cells_.assign(size_t(kBlocks) * TestMachine::kControlWarps * planes * 32, Traffic());
        const FaultPlan faults{options_.rules.data(), uint32_t(options_.rules.size()), 0,
                               options_.seed};
        resident_ = {*wire_,
                     faults,
                     &journal_,
                     rows_.data(),
                     first_.data(),
                     &mailbox_,
                     status_,
                     cells_.data(),
                     offers_.data(),
                     kBlocks,
                     planes,
                     most,
                     uint32_t(options_.seed % 2),  // either place must do
                     options_.strict,
                     options_.tolerance_ns,
                     patience_ns_,
                     bells_,
                     ring_.capacity == 0 ? nullptr : &ring_};
        arrived_ = 0;
        for (uint32_t b = 0; b < kBlocks; ++b) {
            const uint64_t bytes = shared_bytes(resident_, TestMachine::kControlWarps);
            memory_[b].reset(new (std::align_val_t(128)) uint8_t[bytes]);
            memset(memory_[b].get(), 0xee, bytes);  // as it may be
            emulation::Block& block = blocks_[b];
            block.block.x = b;
            block.block_dim.x = 32 * (kWarps<TestMachine> + (bells_.bell == nullptr ? 0 : 1));
            block.grid_dim.x = kBlocks;
            block.random.seed(options_.seed * kBlocks + b);
            block.kernel = &resident_;
            block.run = run_block;
            emulation::open_block(block);
        }
        run_until_swept();
    }

    /// Let the kernel end, and keep what it leaves.
    void end(ResidentOrder order) {
        if (!runs_) return;
        mailbox_.order = order;
        ++turn_;
        while (blocks_[0].left + blocks_[1].left > 0) run_once();
        runs_ = false;
        for (uint32_t b = 0; b < kBlocks; ++b) {
            for (size_t i = 0; i < dealt_[b].size(); ++i) dealt_[b][i] = rows_[first_[b] + i];
        }
        const uint32_t planes = wire_->num_nics;
        for (size_t i = 0; i < cells_.size(); ++i) traffic_[i / 32 % planes].add(cells_[i]);
    }

    void run_once() {
        running_ = this;
        const uint32_t first = uint32_t(random_() % kBlocks);
        for (uint32_t b = 0; b < kBlocks; ++b) {
            emulation::Block& block = blocks_[(first + b) % kBlocks];
            if (block.left > 0) emulation::run_once(block);
        }
    }

    /// Whether slices are under way then.
    bool run_until_swept() {
        while (arrived_ < kSweepers) run_once();
        return is_copying();
    }

    bool is_copying() {
        bool is_copying = false;
        for (uint32_t b = 0; b < kBlocks; ++b) {
            BlockMemory block;
            lay_out(&block, memory_[b].get(), resident_, TestMachine::kControlWarps);
            for (uint32_t i = 0; i < dealt_[b].size() * kMessages; ++i) {
                is_copying = is_copying || Underway{block.underway[i]}.here() != 0;
            }
            for (uint32_t c = 0; c < kClaims; ++c) {
                if (block.claims[c].slices == 0) continue;
                const auto at = reinterpret_cast<Offer*>(uintptr_t(block.claims[c].offer_left) -
                                                         offsetof(Offer, left));
                helped_ += uint64_t(at - offers_.data()) / kOffersOfBlock != b;
            }
        }
        for (const Offer& offer : offers_) is_copying = is_copying || offer.left != 0;
        return is_copying;
    }

    struct Free {
        void operator()(uint8_t* memory) const {
            ::operator delete[](memory, std::align_val_t(128));
        }
    };

    static inline thread_local ResidentEngine* running_ = nullptr;

    Wire* wire_;
    EngineOptions options_;
    std::vector<Event> events_;
    Journal journal_;
    std::vector<Traffic> traffic_, cells_;
    std::vector<Offer> offers_ = std::vector<Offer>(kBlocks * kOffersOfBlock, Offer());
    uint64_t helped_ = 0;
    std::vector<std::unique_ptr<Flight[]>> flights_;
    std::vector<std::unique_ptr<epcomm::mlx5::Block[]>> shadows_;
    uint32_t added_ = 0;
    std::vector<ResidentQueue> dealt_[kBlocks], rows_;
    std::vector<uint32_t> first_;
    Mailbox mailbox_ = {};
    BlockStatus status_[kBlocks] = {};
    Resident resident_ = {};
    std::unique_ptr<uint8_t[], Free> memory_[kBlocks];
    emulation::Block blocks_[kBlocks];
    std::mt19937_64 random_{options_.seed};
    Picoseconds now_ = 1000 * kNanosecond;
    uint64_t patience_ns_ = 0;
    HostBells bells_ = {};
    std::vector<Passage> passages_;
    std::vector<uint64_t> marks_;
    PassageRing ring_ = {};
    std::set<std::pair<uint32_t, uint32_t>> bell_lookers_;
    bool runs_ = false;
    // Between the warps and a step.
    uint64_t turn_ = 0;
    uint32_t arrived_ = 0;
    bool progress_ = false;
    Picoseconds wake_ = kNever;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

inline TestMachine::TestMachine(const Resident&) : engine_(ResidentEngine::running_) {}

inline void TestMachine::looked_at_bell() {
    ResidentEngine::running_->bell_lookers_.insert({blockIdx.x, threadIdx.x});
}

inline Picoseconds TestMachine::now() const { return engine_->now(); }

inline void TestMachine::swept(uint32_t, bool progress, Picoseconds wake) {
    engine_->progress_ = engine_->progress_ || progress;
    if (wake < engine_->wake_) engine_->wake_ = wake;
    engine_->arrived_ += 1;
    emulation::wait_while(&engine_->turn_, engine_->turn_);
}

}  // namespace rig
