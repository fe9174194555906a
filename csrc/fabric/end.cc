// One rank's end of a fabric: checks, memory layout, the transport's life; the C ABI over it.

#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "../emulated/event_name.h"
#include "proxy.h"
#include "report.h"

using namespace epcomm::fabric;

struct epcomm_fabric_end {
    epcomm_fabric_config config;
    Plan plan;
    epcomm_fabric fabric;
    std::vector<Region> regions;
    std::shared_ptr<Transport> transport;
    std::unique_ptr<Proxy> proxy;          // of a connected end that is not direct
    const epcomm_ibgda* direct = nullptr;  // of a connected end that is
    std::string text;
    bool stopped = false;
};

namespace {

thread_local std::string creation_text;

int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

void require(bool right, const std::string& text) {
    if (!right) throw std::runtime_error(text);
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    require(value >= low && value <= high, std::string(name) + ": expected " + std::to_string(low) +
                                               " to " + std::to_string(high) + ", got " +
                                               std::to_string(value));
}

void check_config(const epcomm_fabric_config& config) {
    check_range("num_nodes", config.num_nodes, 1, EPCOMM_FABRIC_MAX_NODES);
    check_range("node", config.node, 0, config.num_nodes - 1);
    check_range("num_channels", config.num_channels, 1, EPCOMM_FABRIC_MAX_CHANNELS);
    check_range("num_rings", config.num_rings, 1, EPCOMM_FABRIC_MAX_RINGS);
    check_range("num_threads", config.num_threads, 1, config.num_rings);
    check_range("num_slots", config.num_slots, 1, 1 << 20);
    require((config.num_slots & (config.num_slots - 1)) == 0,
            "num_slots: expected a power of two, got " + std::to_string(config.num_slots));
    check_range("max_in_flight", config.max_in_flight, 1, 1 << 20);
    check_range("max_messages", config.max_messages, 0, 1 << 24);
    require(config.host_memory != nullptr && config.producer_memory != nullptr,
            "host_memory, producer_memory: expected memory, got null");
}

/// The state, then every ring's slots.
void lay_out(epcomm_fabric_end* end) {
    const epcomm_fabric_config& config = end->config;
    epcomm_fabric& fabric = end->fabric;
    fabric = epcomm_fabric{};
    auto* memory = static_cast<uint8_t*>(config.host_memory);
    auto* producers = static_cast<epcomm_ring_producer*>(config.producer_memory);
    fabric.state = reinterpret_cast<epcomm_fabric_state*>(memory);
    memory += aligned(sizeof(epcomm_fabric_state));
    const int64_t ring_bytes = aligned(int64_t(sizeof(epcomm_trigger)) * config.num_slots);
    for (int32_t r = 0; r < config.num_rings; ++r) {
        auto* slots = reinterpret_cast<epcomm_trigger*>(memory + r * ring_bytes);
        fabric.rings[r] = {slots, producers + r, &fabric.state->consumers[r],
                           uint64_t(config.num_slots)};
    }
    fabric.timeout_ns = config.timeout_ns;
    fabric.num_rings = config.num_rings;
    fabric.num_threads = config.num_threads;
    fabric.num_channels = config.num_channels;
    fabric.num_nodes = config.num_nodes;
    fabric.node = config.node;
}

/// Run a step; on failure keep its text.
template <typename Step>
int attempt(epcomm_fabric_end* end, Step step) {
    try {
        step();
        return 0;
    } catch (const std::exception& error) {
        end->text = error.what();
        return -1;
    }
}

Region checked_region(const epcomm_fabric_end* end, const epcomm_fabric_region& region) {
    check_range("region id", region.id, 0, EPCOMM_FABRIC_MAX_REGIONS - 1);
    require(region.pointer != nullptr, "region: expected memory, got null");
    for (const Region& other : end->regions) {
        require(other.id != region.id,
                "region " + std::to_string(region.id) + " is registered already");
    }
    require(region.bytes % EPCOMM_FABRIC_UNIT == 0 &&
                reinterpret_cast<uintptr_t>(region.pointer) % EPCOMM_FABRIC_UNIT == 0,
            "region " + std::to_string(region.id) + ": address and size must be multiples of 16");
    // Every region may be local here and remote for a peer.
    check_range("region bytes", int64_t(region.bytes), 1, EPCOMM_FABRIC_MAX_LOCAL);
    return {region.id,       region.pointer,
            region.bytes,    region.device < 0 ? Memory::kHost : Memory::kCuda,
            region.device,   region.fd,
            region.fd_offset};
}

/// Put what a producer reported into the transport's words; a kernel writes none.
void explain(epcomm_fabric_end* end) {
    epcomm_fabric_error& error = end->fabric.state->error;
    if (error.status != EPCOMM_FABRIC_TRANSPORT || error.text[0] != 0) return;
    put_text(&error, end->transport->error_text({0, false, error.vendor, error.queue_pair}));
}

template <class Note>
int64_t copy_notes(const std::vector<Note>& kept, Note* into, int64_t capacity) {
    const int64_t count = std::min(int64_t(kept.size()), capacity);
    std::copy_n(kept.begin(), count, into);
    return count;
}

/// End every wait on a direct transport; proxy threads do it themselves.
void stop_direct(epcomm_fabric_end* end, int64_t timeout_ns) {
    epcomm_fabric_state* state = end->fabric.state;
    if (load_acquire(&state->failed) == 0) end->transport->drain(timeout_ns);
    report(state, plain_error(EPCOMM_FABRIC_STOPPED, "the fabric was stopped"));
}

}  // namespace

extern "C" {

int64_t epcomm_fabric_host_bytes(int32_t num_slots, int32_t num_rings) {
    return aligned(sizeof(epcomm_fabric_state)) +
           num_rings * aligned(int64_t(sizeof(epcomm_trigger)) * num_slots);
}

int64_t epcomm_fabric_producer_bytes(int32_t num_rings) {
    return num_rings * int64_t(sizeof(epcomm_ring_producer));
}

int64_t epcomm_fabric_transport_bytes(const char* transport, int32_t num_nodes,
                                      int32_t num_channels, int32_t num_signals) {
    try {
        return make_transport(transport)->memory_bytes(num_nodes, num_channels, num_signals);
    } catch (const std::exception&) {
        return -1;
    }
}

epcomm_fabric_end* epcomm_fabric_create(const epcomm_fabric_config* config, const char* transport,
                                        const char* options) {
    try {
        check_config(*config);
        auto end = std::make_unique<epcomm_fabric_end>();
        end->config = *config;
        end->plan = {config->node,
                     config->num_nodes,
                     config->num_channels,
                     config->num_rings,
                     config->num_threads,
                     config->max_in_flight,
                     options,
                     static_cast<epcomm_fabric_state*>(config->host_memory),
                     config->timeout_ns,
                     config->max_messages};
        end->transport = make_transport(transport);
        lay_out(end.get());
        return end.release();
    } catch (const std::exception& error) {
        creation_text = error.what();
        return nullptr;
    }
}

int epcomm_fabric_add_region(epcomm_fabric_end* end, const epcomm_fabric_region* region) {
    return attempt(end, [&] {
        const Region checked = checked_region(end, *region);
        end->transport->add_region(checked);
        end->regions.push_back(checked);
    });
}

int epcomm_fabric_open(epcomm_fabric_end* end) {
    return attempt(end, [&] {
        bool signals = false;
        for (const Region& region : end->regions) signals |= region.id == EPCOMM_FABRIC_SIGNALS;
        require(signals, "region 0, the signals, is not registered");
        end->transport->open(end->plan);
    });
}

int64_t epcomm_fabric_address(epcomm_fabric_end* end, int32_t peer, void* into, int64_t capacity) {
    int64_t size = -1;
    attempt(end, [&] {
        const std::string address = end->transport->address(peer);
        size = int64_t(address.size());
        if (size <= capacity) memcpy(into, address.data(), address.size());
    });
    return size;
}

int epcomm_fabric_connect(epcomm_fabric_end* end, const void* const* addresses,
                          const int64_t* sizes) {
    return attempt(end, [&] {
        std::vector<std::string> all(size_t(end->plan.num_nodes));
        for (size_t n = 0; n < all.size(); ++n) {
            all[n].assign(static_cast<const char*>(addresses[n]), size_t(sizes[n]));
        }
        end->transport->connect(all);
        end->direct = end->transport->direct();
        if (end->direct != nullptr) {
            // Nobody would take a trigger: pushing one is an error.
            end->fabric.num_channels = 0;
            return;
        }
        const Patience patience = {end->config.spin, end->config.device_fills,
                                   end->config.longest_nap_ns};
        end->proxy =
            std::make_unique<Proxy>(end->fabric, end->plan, patience, end->regions, end->transport);
        end->proxy->start();
    });
}

const char* epcomm_fabric_text(const epcomm_fabric_end* end) {
    return end == nullptr ? creation_text.c_str() : end->text.c_str();
}

const char* epcomm_fabric_transports(void) {
    static const std::string names = transport_names();
    return names.c_str();
}

const char* epcomm_fabric_describe(epcomm_fabric_end* end) {
    end->text = end->transport->describe();
    return end->text.c_str();
}

const epcomm_fabric* epcomm_fabric_of(const epcomm_fabric_end* end) { return &end->fabric; }

const epcomm_ibgda* epcomm_fabric_ibgda_of(const epcomm_fabric_end* end) { return end->direct; }

int epcomm_fabric_has_atomics(const epcomm_fabric_end* end) {
    return int(end->transport->has_atomics());
}

int epcomm_fabric_check(epcomm_fabric_end* end, int64_t stall_ns) {
    if (end->proxy != nullptr) end->proxy->check(stall_ns);
    const bool direct = end->direct != nullptr;
    const bool connected = !end->stopped && (direct || end->proxy != nullptr);
    if (connected) end->transport->look_after();
    const auto failed = int(load_acquire(&end->fabric.state->failed));
    if (connected && direct && failed != 0) explain(end);
    return failed;
}

int epcomm_fabric_count(epcomm_fabric_end* end, epcomm_fabric_traffic* into, int32_t restart) {
    return attempt(end, [&] {
        require(!end->stopped, "the fabric was stopped");
        require(end->transport->count(into, restart != 0), "this transport models no network");
    });
}

int epcomm_fabric_keep_messages(epcomm_fabric_end* end, uint64_t capacity) {
    bool keeps = false;
    const int result = attempt(end, [&] {
        require(!end->stopped, "the fabric was stopped");
        keeps = end->transport->keep_messages(capacity);
    });
    return result != 0 ? result : keeps ? 0 : 1;
}

int64_t epcomm_fabric_messages(epcomm_fabric_end* end, epcomm_fabric_message* into,
                               int64_t capacity, uint64_t* total) {
    int64_t count = 0;
    const int result = attempt(end, [&] {
        require(!end->stopped, "the fabric was stopped");
        count = copy_notes(end->transport->messages(total), into, capacity);
    });
    return result != 0 ? result : count;
}

int64_t epcomm_fabric_events(epcomm_fabric_end* end, epcomm_fabric_event* into, int64_t capacity,
                             uint64_t* total) {
    int64_t count = 0;
    const int result = attempt(end, [&] {
        require(!end->stopped, "the fabric was stopped");
        count = copy_notes(end->transport->events(total), into, capacity);
    });
    return result != 0 ? result : count;
}

const char* epcomm_fabric_event_text(int32_t kind, int32_t code) {
    static thread_local std::string text;
    text = epcomm::emulated::name(epcomm::emulated::EventKind(kind), uint8_t(code));
    return text.c_str();
}

uint32_t epcomm_fabric_num_losses(const epcomm_fabric_end* end) {
    return load_acquire(&end->fabric.state->num_losses);
}

const char* epcomm_fabric_loss_text(epcomm_fabric_end* end, uint32_t index, int32_t* peer) {
    if (index >= epcomm_fabric_num_losses(end) || index >= EPCOMM_FABRIC_MAX_LOSSES) return nullptr;
    const epcomm_fabric_loss& loss = end->fabric.state->losses[index];
    *peer = loss.peer;
    end->text = "plane " + std::to_string(loss.plane) + " is dead: " +
                end->transport->error_text({0, false, loss.vendor, loss.queue_pair}) +
                " (channel " + std::to_string(loss.channel) + ", queue pair " +
                std::to_string(loss.queue_pair) + ", request " + std::to_string(loss.position) +
                ", vendor code " + std::to_string(loss.vendor) + ")";
    return end->text.c_str();
}

int epcomm_fabric_peer_gone(epcomm_fabric_end* end, int32_t peer) {
    return end->transport->peer_gone(peer) ? 1 : 0;
}

int epcomm_fabric_stop(epcomm_fabric_end* end, int64_t timeout_ns) {
    if (end->stopped) return 0;
    end->stopped = true;
    if (end->direct != nullptr) stop_direct(end, timeout_ns);
    // A thread stuck in the transport still uses it.
    if (end->proxy != nullptr && !end->proxy->stop(timeout_ns)) return 1;
    attempt(end, [&] { end->transport->close(); });
    return 0;
}

void epcomm_fabric_destroy(epcomm_fabric_end* end) { delete end; }

uint64_t epcomm_fabric_put(const epcomm_fabric* fabric, int32_t peer, int32_t channel,
                           const epcomm_fabric_place* remote, const epcomm_fabric_place* local,
                           uint64_t bytes) {
    return put(*fabric, {peer, channel}, *remote, *local, bytes);
}

uint64_t epcomm_fabric_put_signal(const epcomm_fabric* fabric, int32_t peer, int32_t channel,
                                  const epcomm_fabric_place* remote,
                                  const epcomm_fabric_place* local, uint64_t bytes,
                                  int32_t signal) {
    return put_signal(*fabric, {peer, channel}, *remote, *local, bytes, signal);
}

uint64_t epcomm_fabric_signal_add(const epcomm_fabric* fabric, int32_t peer, int32_t channel,
                                  int32_t signal, uint64_t value) {
    return signal_add(*fabric, {peer, channel}, signal, value);
}

uint64_t epcomm_fabric_noop(const epcomm_fabric* fabric, int32_t channel) {
    return push(*fabric, {EPCOMM_FABRIC_NOOP, 0, channel, 0, {}, {}, 0, 0});
}

int epcomm_fabric_done(const epcomm_fabric* fabric, int32_t channel, uint64_t ticket) {
    return done(*fabric, channel, ticket) ? 1 : 0;
}

int epcomm_fabric_flush(const epcomm_fabric* fabric, int32_t channel, int64_t timeout_ns) {
    return flush(*fabric, channel, timeout_ns) ? 1 : 0;
}

}  // extern "C"
