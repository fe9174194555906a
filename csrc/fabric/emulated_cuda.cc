// The transport `emulated-cuda`: kernels post mlx5 requests to emulated NICs on the GPU.
//
// For ranks of virtual nodes on one machine. Direct: kernels fill the queues, which lie in the
// rank's arena, by themselves, with fabric/ibgda.h.

#include "emulated_gpu.h"
#include "report.h"

namespace epcomm::fabric {

namespace {

class EmulatedCuda : public EmulatedGpu {
 public:
    EmulatedCuda() : EmulatedGpu("emulated-cuda", false) {}

    void connect(const std::vector<std::string>& addresses) override {
        EmulatedGpu::connect(addresses);
        const carrier::NicArena arena = places();
        fabric_ = fabric();
        fabric_.queues = at(arena.queues);
        fabric_.local = reinterpret_cast<const RegionKey*>(at(arena.local));
        fabric_.remote = reinterpret_cast<const RegionKey*>(at(arena.remote));
        fabric_.raised = reinterpret_cast<uint64_t*>(at(arena.raised));
    }

    const epcomm_ibgda* direct() override { return fabric_.queues == nullptr ? nullptr : &fabric_; }
    bool has_atomics() const override { return true; }

    void look_after() override {
        const std::string why = why_dead();
        if (!why.empty()) report(plan_.state, plain_error(EPCOMM_FABRIC_STALLED, why));
        look_for_broken_rules();
    }

    size_t post(int32_t, const Operation*, size_t) override { return 0; }
    size_t poll(int32_t, Completion*, size_t) override { return 0; }

    std::string describe() const override {
        return "emulated-cuda: mlx5 requests by kernels, " + network();
    }

 private:
    void check(const emulated::TransportOptions&) const override {}

    void place(int32_t index, mlx5::SendQueue* queue) override {
        const carrier::NicArena arena = places();
        queue->ring = reinterpret_cast<mlx5::Block*>(at(arena.ring(index)));
        queue->completions = reinterpret_cast<mlx5::Completion*>(at(arena.completion(index)));
        queue->record = reinterpret_cast<mlx5::Be32*>(at(arena.record(index)));
        queue->doorbell = reinterpret_cast<uint64_t*>(at(arena.doorbell(index)));
        queue->num_blocks = queue->num_completions = carrier::kQueueDepth;
    }

    void set_up(Tables tables) override {
        const carrier::NicArena arena = places();
        mlx5::Completion none{};
        none.opcode_owner = mlx5::kInvalid << 4;
        upload(arena.completions, std::vector<mlx5::Completion>(
                                      size_t(shape_.num_queues()) * carrier::kQueueDepth, none));
        upload(arena.queues, tables.queues);
        upload(arena.local, tables.local);
        upload(arena.remote, tables.remote);
    }

    epcomm_ibgda fabric_{};
};

const RegisterTransport kRegistered("emulated-cuda", []() -> std::unique_ptr<Transport> {
    return std::make_unique<EmulatedCuda>();
});

}  // namespace

}  // namespace epcomm::fabric
