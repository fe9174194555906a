// The NICs of an emulated world: send queues, keys and queue pairs for every rank, and the engine
// (csrc/emulated/engine.h) that serves them all.
#pragma once

#include "../../csrc/emulated/engine.h"
#include "emulated_world.h"

class Nics {
 public:
    Nics(const emulated_nic_plan& plan, const emulated_member* members, int32_t num_ranks);

    const epcomm_ibgda* fabric_of(int32_t rank) const { return &ranks_[size_t(rank)].fabric; }

    /// Serve while kernels run.
    void start() { engine_->start(); }
    void stop() { engine_->stop(); }

    /// The rank's NICs do not answer any more.
    void kill(int32_t rank);

    /// Let all that is under way end, within so long; then compare doorbells and records. What
    /// rules were broken, in words; empty: none.
    std::string finish(int64_t limit_ns);

    /// How many faults happened.
    uint64_t count_faults() const;

 private:
    using Key = epcomm_region_key;
    struct Queue {
        std::vector<epcomm::mlx5::Block> ring;
        std::vector<epcomm::mlx5::Completion> completions;
        epcomm::mlx5::Be32 record[epcomm::mlx5::kRecordWords] = {};
        uint64_t doorbell = 0;
    };
    struct Rank {
        std::vector<Key> local, remote;
        std::vector<uint64_t> raised;
        std::vector<epcomm::mlx5::SendQueue> queues;
        std::vector<Queue> memory;
        epcomm_ibgda fabric = {};
    };

    uint32_t nic(int32_t rank, int32_t plane) const {
        return uint32_t(rank * plan_.num_planes + plane);
    }
    uint32_t queue_number(int32_t rank, int32_t peer, int32_t channel) const;
    std::vector<epcomm::emulated::FaultRule> rules() const;
    void register_memory(int32_t rank);
    void open_queues(int32_t rank);
    void connect(int32_t rank);

    emulated_nic_plan plan_;
    std::vector<emulated_member> members_;
    std::vector<Rank> ranks_;
    epcomm::emulated::Network network_;
    std::unique_ptr<epcomm::emulated::Engine> engine_;
    bool killed_ = false;
};
