// The transport `mlx5`: reliable connections over ConnectX cards whose queues the producers fill.
//
// Direct: kernels (or host threads, where all regions are the host's) write requests and ring; see
// fabric/ibgda.h. This file makes what they need through DEVX and watches over it.
//
//     open      cards; regions registered; per card registers, queue memory, queue pairs (INIT)
//     address   a queue pair for each channel, and the keys of the regions on each card
//     connect   queue pairs to RTR and RTS; the producers' tables filled in
//
// Every resource belongs to an object that ends it, so that a step that fails leaves nothing.

#include <chrono>
#include <future>
#include <stdexcept>
#include <thread>

#include "../report.h"
#include "../transport.h"
#include "../verbs/failure.h"
#include "resources.h"
#include "tables.h"

namespace epcomm::fabric::devx {

namespace {

constexpr uint32_t kMagic = 0x6d6c7835;
/// How long `close` waits for the card and the driver, which a broken card may keep for minutes.
constexpr std::chrono::seconds kPatience(2);

/// What a rank tells a peer: this, then an Endpoint per channel, then a key per plane and region.
struct AddressHeader {
    uint32_t magic;
    uint32_t num_channels;
    uint32_t num_planes;
    uint32_t reserved;
};

ibv::Status status_of(uint8_t syndrome) {
    switch (syndrome) {
        case mlx5::kLocalLength: return ibv::kLocalLength;
        case mlx5::kLocalOperation: return ibv::kLocalQpOperation;
        case mlx5::kLocalProtection: return ibv::kLocalProtection;
        case mlx5::kFlushed: return ibv::kFlushed;
        case mlx5::kBadResponse: return ibv::kBadResponse;
        case mlx5::kLocalAccess: return ibv::kLocalAccess;
        case mlx5::kRemoteInvalid: return ibv::kRemoteInvalidRequest;
        case mlx5::kRemoteAccess: return ibv::kRemoteAccess;
        case mlx5::kRemoteOperation: return ibv::kRemoteOperation;
        case mlx5::kRetryExceeded: return ibv::kRetriesExceeded;
        case mlx5::kReceiverNotReady: return ibv::kRnrRetriesExceeded;
        default: return ibv::kGeneral;
    }
}

class Mlx5 : public Transport {
 public:
    ~Mlx5() override { close(); }

    void add_region(const Region& region) override { wanted_.push_back(region); }
    void open(const Plan& plan) override;
    std::string address(int32_t peer) override;
    void connect(const std::vector<std::string>& addresses) override;
    const epcomm_ibgda* direct() override { return &fabric_; }
    bool has_atomics() const override { return all_ != nullptr && all_->has_atomics(); }
    void drain(int64_t timeout_ns) override { fabric::devx::drain(*all_, timeout_ns); }
    void look_after() override;
    std::string error_text(const Completion& completion) const override;
    std::string describe() const override {
        return all_ != nullptr ? all_->describe() : "mlx5: not open";
    }
    void close() override;

    // Never called: producers post by themselves.
    size_t post(int32_t, const Operation*, size_t) override { return 0; }
    size_t poll(int32_t, Completion*, size_t) override { return 0; }

 private:
    Plane& plane_of(int32_t channel) const {
        return *all_->planes[size_t(channel) % all_->planes.size()];
    }
    Connection& connection(int32_t peer, int32_t channel) const;
    void report_event(Plane* plane, const Events::Entry& event);

    Plan plan_{};
    std::vector<Region> wanted_;
    std::shared_ptr<Resources> all_;
    epcomm_ibgda fabric_{};
};

void Mlx5::open(const Plan& plan) {
    plan_ = plan;
    all_ = std::make_shared<Resources>();
    all_->options = parse_options(plan.options);
    all_->world = {plan.node, plan.num_nodes, plan.num_channels};
    open_cards(all_.get(), wanted_);
    register_regions(all_.get(), wanted_);
    make_queues(all_.get());
}

Connection& Mlx5::connection(int32_t peer, int32_t channel) const {
    for (Connection& one : plane_of(channel).connections()) {
        if (one.peer == peer && one.channel == channel) return one;
    }
    throw std::runtime_error("mlx5: there is no node " + std::to_string(peer));
}

std::string Mlx5::address(int32_t peer) {
    std::string text;
    append_bytes(&text, AddressHeader{kMagic, uint32_t(plan_.num_channels),
                                      uint32_t(all_->planes.size()), 0});
    for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
        append_bytes(&text, connection(peer, channel).pair->endpoint());
    }
    for (size_t plane = 0; plane < all_->planes.size(); ++plane) {
        for (int32_t id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            append_bytes(&text, all_->key(plane, id, Side::kRemote));
        }
    }
    return text;
}

void Mlx5::connect(const std::vector<std::string>& addresses) {
    const size_t planes = all_->planes.size();
    std::vector<RegionKey> remote;
    for (int32_t peer = 0; peer < plan_.num_nodes; ++peer) {
        std::vector<RegionKey> keys(planes * EPCOMM_FABRIC_MAX_REGIONS);
        if (peer != plan_.node) {
            AddressReader reader(addresses[size_t(peer)], size_t(peer));
            AddressHeader header{};
            reader.read(&header);
            if (header.magic != kMagic || int32_t(header.num_channels) != plan_.num_channels) {
                throw std::runtime_error("node " + std::to_string(peer) +
                                         " has another transport or another number of channels");
            }
            if (header.num_planes != planes) {
                throw std::runtime_error("node " + std::to_string(peer) + " has " +
                                         std::to_string(header.num_planes) +
                                         " network cards a rank and this one has " +
                                         std::to_string(planes) + "; give all as many: nic=");
            }
            for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
                Endpoint endpoint{};
                reader.read(&endpoint);
                connection(peer, channel).pair->connect(endpoint, peer);
            }
            for (RegionKey& key : keys) reader.read(&key);
        }
        remote.insert(remote.end(), keys.begin(), keys.end());
    }
    fabric_ = fill_tables(all_.get(), remote);
    fabric_.state = plan_.state;
    fabric_.timeout_ns = plan_.timeout_ns;
    if (all_->ringer != nullptr) all_->ringer->start();
}

void Mlx5::look_after() {
    for (auto& plane : all_->planes) {
        Events::Entry event{};
        while (plane->events().next(&event)) {
            // Its producers find the requests flushed, and go on with another card.
            if (fabric_.failover != 0 && event.type == kQueuePairFatal) continue;
            report_event(plane.get(), event);
        }
    }
}

void Mlx5::report_event(Plane* plane, const Events::Entry& event) {
    const Connection* from = nullptr;
    for (const Connection& one : plane->connections()) {
        if (one.slot == event.cookie) from = &one;
    }
    if (from == nullptr) return;
    const int32_t state = from->pair->state();
    epcomm_fabric_error error = plain_error(
        EPCOMM_FABRIC_TRANSPORT,
        "mlx5: " + from->pair->where() + " (queue pair " + std::to_string(from->pair->number()) +
            ") reports: " + describe_event(event.type) + ", and is in state " +
            (state == queue_pair::kError ? "error" : std::to_string(state)) + "; " +
            advice(ibv::kGeneral, all_->options.card));
    error.peer = from->peer;
    error.channel = from->channel;
    error.vendor = event.type;
    error.queue_pair = from->pair->number();
    report(plan_.state, error);
}

std::string Mlx5::error_text(const Completion& completion) const {
    const auto syndrome = uint8_t(completion.vendor >> 8);
    return std::string("mlx5: ") + mlx5::describe(syndrome) + "; " +
           advice(status_of(syndrome), all_->options.card);
}

void Mlx5::close() {
    if (all_ == nullptr) return;
    // The driver's calls have no deadline of their own. What hangs is left to a thread of its own,
    // with all that the card may still use.
    auto ended = std::make_shared<std::promise<void>>();
    std::future<void> end = ended->get_future();
    std::thread closing([all = std::move(all_), ended]() mutable {
        all.reset();
        ended->set_value();
    });
    all_ = nullptr;
    if (end.wait_for(kPatience) == std::future_status::ready)
        closing.join();
    else
        closing.detach();
}

const RegisterTransport registered("mlx5", [] {
    return std::unique_ptr<Transport>(std::make_unique<Mlx5>());
});

}  // namespace

}  // namespace epcomm::fabric::devx
