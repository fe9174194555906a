// What the transports over emulated NICs on a GPU have in common: the rank's NICs, one for each
// plane, in its arena in device memory (carrier/nic.h), and the carrier that serves them.
//
// Who fills the send queues is theirs: kernels (emulated_cuda.cc) or proxy threads
// (emulated_proxy_cuda.cc).
//
// Options: emulated/options.h.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../carrier/carrier.h"
#include "../carrier/nic.h"
#include "../carrier/shared_memory.h"
#include "peer_process.h"
#include "transport.h"

namespace epcomm::fabric {

/// Device memory of this process, zeroed.
class DeviceMemory {
 public:
    explicit DeviceMemory(uint64_t bytes);
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory();
    uint8_t* start() const { return static_cast<uint8_t*>(start_); }

 private:
    void* start_ = nullptr;
};

class EmulatedGpu : public Transport {
 public:
    void add_region(const Region& region) override;
    void open(const Plan& plan) override;
    std::string address(int32_t peer) override;
    void connect(const std::vector<std::string>& addresses) override;
    bool count(epcomm_fabric_traffic* into, bool restart) override;
    bool keep_messages(uint64_t capacity) override;
    std::vector<epcomm_fabric_message> messages(uint64_t* total) override;
    std::vector<epcomm_fabric_event> events(uint64_t* total) override;
    bool peer_gone(int32_t node) override { return peers_[size_t(node)].gone(); }
    std::string error_text(const Completion& completion) const override;
    int64_t memory_bytes(int32_t num_nodes, int32_t num_channels,
                         int32_t num_signals) const override;
    void close() override;

 protected:
    /// What writers are given, once all addresses are known; keys as in epcomm_ibgda.
    struct Tables {
        std::vector<mlx5::SendQueue> queues;
        std::vector<RegionKey> local, remote;
    };

    /// @param name of the transport, for errors.
    /// @param by_host proxy threads fill the send queues.
    EmulatedGpu(std::string name, bool by_host) : name_(std::move(name)), by_host_(by_host) {}
    ~EmulatedGpu() override { EmulatedGpu::close(); }

    /// Whatever is wrong with options that other transports take.
    virtual void check(const emulated::TransportOptions& options) const = 0;

    /// Say where the queue's parts lie, empty.
    virtual void place(int32_t index, mlx5::SendQueue* queue) = 0;

    /// Keep or copy the tables. Peers do not find the queue pairs ready yet.
    virtual void set_up(Tables tables) = 0;

    /// Why nothing moves any more: the carrier is gone, or its kernel gives no sign of life. Empty:
    /// all is well. Called now and then, by one thread at a time.
    std::string why_dead();

    /// Report rules that writers broke, as of the carrier's last look.
    void look_for_broken_rules();

    /// Counts and flags of what writers are given; the pointers are not set.
    Ibgda fabric() const;

    /// Throws std::runtime_error naming the option.
    void require_range(const char* option, uint64_t value, uint64_t least, uint64_t most) const;

    /// In one line: "modelled network of ... and ... ns, served by ... SMs by process ...".
    std::string network() const;

    uint8_t* at(uint64_t offset) const { return arena_->start() + offset; }
    carrier::NicArena places() const { return carrier::NicArena(shape_); }
    void upload(uint64_t offset, const void* from, uint64_t bytes) const;
    template <typename T>
    void upload(uint64_t offset, const std::vector<T>& values) const {
        upload(offset, values.data(), values.size() * sizeof(T));
    }
    /// Of the memory that the carrier shares, behind its report.
    uint8_t* host_queues() const {
        return static_cast<uint8_t*>(shared_->start()) + carrier::NicShared::kQueuesAt;
    }

    Plan plan_{};
    emulated::TransportOptions options_;
    carrier::NicShape shape_{};

 private:
    carrier::NicReport* said() const { return static_cast<carrier::NicReport*>(shared_->start()); }
    /// Wait for the carrier's answer, which is there until the next question: `asking_` is held
    /// until it has been read.
    void ask(carrier::NicQuestion question) const;
    emulated::BrokenRules broken_rules() const;
    int32_t plane_of(uint32_t nic) const { return int32_t(nic - shape_.nic(shape_.node, 0)); }
    Lane lane_of(int32_t plane, uint32_t number) const;
    /// Fill in whose a message or an event is.
    template <class Told>
    void name_lane(uint32_t nic, Told* told) const;
    void register_regions();
    carrier::NicAddress checked(int32_t node, const std::string& bytes) const;
    Tables fill_tables(const std::vector<carrier::NicAddress>& all);
    void start_carrier(const std::vector<carrier::NicAddress>& all);

    const std::string name_;
    const bool by_host_;
    carrier::NicAddress mine_{};
    int32_t device_ = -1;
    std::vector<emulated::Nic> nics_;
    std::unique_ptr<DeviceMemory> arena_;
    std::unique_ptr<carrier::SharedMemory> shared_;
    std::vector<PeerProcess> peers_;
    std::unique_ptr<carrier::Carrier> carrier_;
    mutable std::mutex asking_;
    int64_t epoch_ns_ = 0;        ///< where time begins, on the device's timer
    int64_t host_epoch_ns_ = 0;   ///< and on the host's clock
    uint64_t kept_messages_ = 0;  ///< at most, and events
    uint64_t beat_ = 0;
    int64_t beat_at_ns_ = 0;
};

}  // namespace epcomm::fabric
