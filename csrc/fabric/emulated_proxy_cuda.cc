// The transport `emulated-cuda-proxy`: kernels write triggers, proxy threads post mlx5 requests to
// emulated NICs on the GPU.
//
// For ranks of virtual nodes on one machine: it exists to compare proxies with kernels that post by
// themselves, over the same NICs, and for tests. The queues lie in host memory that the carrier has
// pinned (emulated/host_queues.h). Proxy threads touch nothing else, and call nothing of CUDA,
// which could wait for a kernel of this rank that waits for them.

#include <stdexcept>

#include "emulated_gpu.h"
#include "posting.h"
#include "report.h"

namespace epcomm::fabric {

namespace {

/// Polls of the first lane between two looks at the carrier, which cost a system call.
constexpr uint32_t kPollsPerLook = 1024;

class EmulatedProxyCuda : public EmulatedGpu {
 public:
    EmulatedProxyCuda() : EmulatedGpu("emulated-cuda-proxy", true) {}

    size_t post(int32_t lane, const Operation* operations, size_t count) override {
        return posting_->post(lane, operations, count);
    }

    size_t poll(int32_t lane, Completion* completions, size_t capacity) override {
        // Also with nothing under way: what peers wait for may be posted by nobody any more.
        if (lane == 0 && ++polls_ % kPollsPerLook == 0) {
            const std::string why = why_dead();
            if (!why.empty()) report(plan_.state, plain_error(EPCOMM_FABRIC_STALLED, why));
        }
        return posting_->poll(lane, completions, capacity);
    }

    void look_after() override { look_for_broken_rules(); }

    std::string describe() const override {
        return "emulated-cuda-proxy: mlx5 requests by proxy threads, " + network();
    }

    void close() override {
        posting_.reset();
        EmulatedGpu::close();
    }

 private:
    void check(const emulated::TransportOptions& options) const override {
        if (options.failover == 0) return;
        throw std::runtime_error(
            "transport emulated-cuda-proxy: failover: expected 0, got 1: only kernels move lanes "
            "off dead planes");
    }

    void place(int32_t index, mlx5::SendQueue* queue) override {
        memory().place(host_queues(), uint32_t(index), queue);
    }

    void set_up(Tables tables) override {
        tables_ = std::move(tables);
        raised_.resize(raised_bytes(shape_.num_nodes, shape_.num_signals) / sizeof(uint64_t));
        Ibgda writers = fabric();
        writers.queues = tables_.queues.data();
        writers.local = tables_.local.data();
        writers.remote = tables_.remote.data();
        writers.raised = raised_.data();
        auto* bell = reinterpret_cast<uint64_t*>(host_queues() + memory().bell);
        posting_ = std::make_unique<Posting>(plan_, writers, bell);
    }

    emulated::HostQueues memory() const { return carrier::NicShared(shape_).queues; }

    Tables tables_;
    std::vector<uint64_t> raised_;
    std::unique_ptr<Posting> posting_;
    uint32_t polls_ = 0;
};

const RegisterTransport kRegistered("emulated-cuda-proxy", []() -> std::unique_ptr<Transport> {
    return std::make_unique<EmulatedProxyCuda>();
});

}  // namespace

}  // namespace epcomm::fabric
