// The transport `local-cuda`: ranks of virtual nodes on one machine, regions in GPU memory.
//
// Regions are reached by CUDA IPC. The rank's carrier makes the copies (carrier/copies.h): proxy
// threads only hand operations over, in shared memory, and call nothing of CUDA, which could wait
// for a kernel of this rank that waits for them.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "../carrier/carrier.h"
#include "../carrier/copies.h"
#include "../carrier/shared_memory.h"
#include "peer_process.h"
#include "plain_address.h"
#include "transport.h"

namespace epcomm::fabric {

namespace {

using carrier::CopyAddress;
using carrier::CopyLane;
using carrier::CopyMemory;
using carrier::CopySetup;

class LocalCuda : public Transport {
 public:
    ~LocalCuda() override { close(); }

    void add_region(const Region& region) override {
        if (region.memory != Memory::kCuda || (device_ >= 0 && region.device != device_)) {
            throw std::runtime_error("transport local-cuda: region " + std::to_string(region.id) +
                                     " must be memory of one and the same GPU");
        }
        device_ = region.device;
        carrier::require(cudaSetDevice(device_), "cudaSetDevice");
        mine_.regions[region.id] = carrier::export_memory(region.pointer, region.bytes);
    }

    void open(const Plan& plan) override {
        plan_ = plan;
        mine_.pid = int32_t(getpid());
        mine_.node = plan.node;
        peers_.resize(size_t(plan.num_nodes));
        while (num_slots_ < uint32_t(plan.max_in_flight)) num_slots_ *= 2;
        memory_ =
            std::make_unique<carrier::SharedMemory>(CopyMemory::bytes(plan.num_lanes, num_slots_));
        lanes_.resize(size_t(plan.num_lanes));
        const CopyMemory places(memory_->start(), num_slots_);
        for (int32_t i = 0; i < plan.num_lanes; ++i) lanes_[size_t(i)].shared = places.lane(i);
    }

    std::string address(int32_t) override { return bytes_of(mine_); }

    void connect(const std::vector<std::string>& addresses) override {
        const CopySetup setup = {device_,         plan_.node, plan_.num_nodes, plan_.num_channels,
                                 plan_.num_lanes, num_slots_};
        std::string bytes = bytes_of(setup);
        for (int32_t n = 0; n < plan_.num_nodes; ++n) {
            const std::string& theirs = n == plan_.node ? address(n) : addresses[size_t(n)];
            const auto address = address_of<CopyAddress>(theirs, "local-cuda", n);
            if (n != plan_.node) peers_[size_t(n)].watch(address.pid);
            bytes += theirs;
        }
        carrier_ =
            std::make_unique<carrier::Carrier>("copies", bytes, std::vector<int>{memory_->fd()});
    }

    size_t post(int32_t number, const Operation* operations, size_t count) override {
        // Room is never short: a lane has at most as many operations under way as there are slots.
        Lane& lane = lanes_[size_t(number)];
        const CopyMemory places(memory_->start(), num_slots_);
        uint64_t position = lane.shared->posted;
        for (size_t i = 0; i < count; ++i) {
            if (peers_[size_t(operations[i].command.peer)].gone()) {
                lane.failed.push_back({operations[i].token, false, kPeerGone, 0});
                continue;
            }
            *places.operation(lane.shared, position++) = operations[i];
        }
        store_release(&lane.shared->posted, position);
        wake(places.asleep());
        return count;
    }

    size_t poll(int32_t number, Completion* completions, size_t capacity) override {
        Lane& lane = lanes_[size_t(number)];
        size_t count = 0;
        while (count < capacity && !lane.failed.empty()) {
            completions[count++] = lane.failed.back();
            lane.failed.pop_back();
        }
        const CopyMemory places(memory_->start(), num_slots_);
        const uint64_t completed = load_acquire(&lane.shared->completed);
        while (count < capacity && lane.collected != completed) {
            completions[count++] = *places.completion(lane.shared, lane.collected++);
        }
        // Nothing completes any more once the carrier is gone: the oldest operation says so.
        constexpr uint32_t kLooks = 1024;
        if (count == 0 && lane.collected != lane.shared->posted &&
            ++lane.empty_looks % kLooks == 0 && carrier_->gone()) {
            const Operation& oldest = *places.operation(lane.shared, lane.collected);
            completions[count++] = {oldest.token, false, kCarrierGone, 0};
        }
        return count;
    }

    bool peer_gone(int32_t node) override { return peers_[size_t(node)].gone(); }

    std::string error_text(const Completion& completion) const override {
        switch (completion.vendor) {
            case kPeerGone: return "the peer's process is gone";
            case kCarrierGone:
                return "the carrier, the process that makes this rank's copies, is gone: " +
                       carrier_->last_words();
            case kOutOfRange: return "the place at the peer is not in a region it registered";
            default: return cudaGetErrorString(cudaError_t(-completion.vendor));
        }
    }

    std::string describe() const override {
        return "local-cuda: CUDA IPC, copies of GPU " + std::to_string(device_) + " on " +
               std::to_string((plan_.num_nodes - 1) * plan_.num_channels) + " streams of process " +
               std::to_string(carrier_->pid());
    }

    void close() override {
        carrier_.reset();
        memory_.reset();
        peers_.clear();
    }

 private:
    struct Lane {
        CopyLane* shared = nullptr;
        uint64_t collected = 0;
        uint32_t empty_looks = 0;
        std::vector<Completion> failed;
    };

    /// The other half of the carrier's nap.
    static void wake(uint32_t* asleep) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (__atomic_load_n(asleep, __ATOMIC_SEQ_CST) == 0) return;
        __atomic_store_n(asleep, 0u, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, asleep, FUTEX_WAKE, 1, nullptr, nullptr, 0);
    }

    Plan plan_{};
    CopyAddress mine_{};
    int32_t device_ = -1;
    uint32_t num_slots_ = 1;
    std::vector<PeerProcess> peers_;
    std::unique_ptr<carrier::SharedMemory> memory_;
    std::vector<Lane> lanes_;
    std::unique_ptr<carrier::Carrier> carrier_;
};

const RegisterTransport kRegistered("local-cuda", []() -> std::unique_ptr<Transport> {
    return std::make_unique<LocalCuda>();
});

}  // namespace

}  // namespace epcomm::fabric
