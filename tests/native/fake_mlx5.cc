// The fake's cards, its account, and ranks over them.

#include "fake_mlx5.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "../../csrc/fabric/atomics.h"
#include "fake_state.h"

namespace fake {

World* world = nullptr;

uint64_t bits(const std::vector<uint8_t>& bytes, uint32_t offset, uint32_t width) {
    uint64_t value = 0;
    for (uint32_t i = offset; i < offset + width; ++i) {
        value = value * 2 + ((bytes[i / 8] & (128u >> (i % 8))) != 0);
    }
    return value;
}

void set_bits(std::vector<uint8_t>* bytes, uint32_t offset, uint32_t width, uint64_t value) {
    for (uint32_t i = width; i-- > 0; value /= 2) {
        if (value % 2 != 0) (*bytes)[(offset + i) / 8] |= uint8_t(128u >> ((offset + i) % 8));
    }
}

World::World(const std::vector<CardOptions>& cards)
    : network_(uint32_t(cards.size()), {0, 4096, 30, 0, 0, 1, 5'000'000, 0}),
      state_(std::make_unique<State>()) {
    epcomm::emulated::EngineOptions options;
    options.virtual_clock = false;
    engine_ = std::make_unique<epcomm::emulated::Engine>(network_.wire(), options);
    state_->world = this;
    const char* temporary = getenv("TMPDIR");
    std::string folder = std::string(temporary != nullptr ? temporary : "/tmp") + "/fake-XXXXXX";
    state_->sysfs = mkdtemp(folder.data());
    for (const CardOptions& options_of : cards) {
        auto card = std::make_unique<Card>();
        const auto i = uint32_t(state_->cards.size());
        card->options = options_of;
        if (i > 0) card->options.lid = uint16_t(options_of.lid + i);
        card->name = "mlx5_" + std::to_string(i);
        card->nic = i;
        const bool ethernet = options_of.network != kInfiniband;
        if (ethernet) {
            card->gid.raw[10] = card->gid.raw[11] = 0xff;
            card->gid.raw[12] = 10;
            card->gid.raw[15] = uint8_t(7 + i);
        } else {
            card->gid.raw[0] = 0xfe;
            card->gid.raw[1] = 0x80;
            card->gid.raw[15] = uint8_t(7 + i);
        }
        const uint8_t mac[6] = {0xb8, 0x3f, 0xd2, 0x01, 0x02, uint8_t(0x10 + i)};
        memcpy(card->mac, mac, sizeof mac);
        const std::string types =
            state_->sysfs + "/class/infiniband/" + card->name + "/ports/1/gid_attrs/types";
        std::filesystem::create_directories(types);
        if (ethernet) {
            std::ofstream(types + "/3")
                << (options_of.network == kRoceV2 ? "RoCE v2\n" : "IB/RoCE v1\n");
        }
        state_->cards.push_back(std::move(card));
    }
    world = this;
}

void World::start() {
    const std::lock_guard<std::mutex> lock(engine_mutex_);
    engine_->start();
    runs_ = true;
}

void World::stop() {
    const std::lock_guard<std::mutex> lock(engine_mutex_);
    engine_->stop();
    runs_ = false;
}

World::~World() {
    stop();
    for (auto& card : state_->cards) {
        if (card->one_for_all == nullptr) continue;
        free(card->one_for_all->base_addr);
        delete reinterpret_cast<Uar*>(card->one_for_all);
    }
    std::filesystem::remove_all(state_->sysfs);
    world = nullptr;
}

void World::fail(const std::string& name, int error, int nth) {
    state_->failures[name] = {error, nth, 0};
}

void World::fail_first(const std::string& name, int error, int count) {
    state_->failures[name] = {error, -count, 0};
}

void World::hang(const std::string& name) { state_->hanging.insert(name); }

void World::release() {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->let_go = true;
    state_->released.notify_all();
}

std::string World::live() const {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    std::string text;
    for (const auto& entry : state_->live) {
        if (entry.second != 0) text += std::to_string(entry.second) + " " + entry.first + "; ";
    }
    return text;
}

std::vector<Command> World::commands(uint16_t opcode) const {
    std::vector<Command> found;
    for (const Command& command : state_->commands) {
        if (command.opcode == opcode) found.push_back(command);
    }
    return found;
}

std::vector<Call> World::calls(const std::string& name) const {
    std::vector<Call> found;
    for (const Call& call : state_->calls) {
        if (call.name == name) found.push_back(call);
    }
    return found;
}

void World::tell(uint32_t queue_pair, uint8_t type) {
    State::Pair* pair = state_->find(queue_pair);
    devx::Event event{};
    event.cookie = pair->cookie;
    event.entry[1] = type;
    pair->channel->events.push_back(event);
    const uint64_t one = 1;
    if (write(pair->channel->out.fd, &one, sizeof one) != sizeof one) abort();
}

void World::set_state(uint32_t queue_pair, uint32_t state) {
    state_->find(queue_pair)->state = state;
}

// ---- Ranks

namespace {

void* aligned(std::vector<uint64_t>& memory) {
    return reinterpret_cast<void*>((uint64_t(memory.data()) + 127) / 128 * 128);
}

}  // namespace

Rank::Rank(int32_t node, int32_t num_nodes, int32_t channels, const std::string& options,
           bool on_gpu)
    : regions_(3, std::vector<uint64_t>(8192)), device_(on_gpu ? 0 : -1) {
    host_.resize(size_t(epcomm_fabric_host_bytes(64, 1)) / 8 + 16);
    producers_.resize(size_t(epcomm_fabric_producer_bytes(1)) / 8 + 16);
    epcomm_fabric_config config{};
    config.node = node;
    config.num_nodes = num_nodes;
    config.num_channels = channels;
    config.num_rings = config.num_threads = 1;
    config.num_slots = 64;
    config.max_in_flight = 32;
    config.timeout_ns = 60'000'000'000;
    config.host_memory = aligned(host_);
    config.producer_memory = aligned(producers_);
    end_ = epcomm_fabric_create(&config, "mlx5", options.c_str());
}

Rank::~Rank() { close(); }

std::string Rank::open() {
    for (int32_t id = 0; id < 3; ++id) {
        epcomm_fabric_region region{};
        region.id = id;
        region.device = device_;
        region.fd = -1;
        region.pointer = regions_[size_t(id)].data();
        region.bytes = regions_[size_t(id)].size() * 8;
        if (epcomm_fabric_add_region(end_, &region) != 0) return epcomm_fabric_text(end_);
    }
    return epcomm_fabric_open(end_) == 0 ? "" : epcomm_fabric_text(end_);
}

std::string Rank::address(int32_t peer) {
    std::string bytes(size_t(epcomm_fabric_address(end_, peer, nullptr, 0)), 0);
    epcomm_fabric_address(end_, peer, bytes.data(), int64_t(bytes.size()));
    return bytes;
}

std::string Rank::connect(const std::vector<std::string>& addresses) {
    std::vector<const void*> pointers;
    std::vector<int64_t> sizes;
    for (const std::string& one : addresses) {
        pointers.push_back(one.data());
        sizes.push_back(int64_t(one.size()));
    }
    const int result = epcomm_fabric_connect(end_, pointers.data(), sizes.data());
    return result == 0 ? "" : epcomm_fabric_text(end_);
}

double Rank::close() {
    if (end_ == nullptr) return 0;
    const int64_t start = epcomm::fabric::now_ns();
    if (epcomm_fabric_stop(end_, 1'000'000'000) == 0) epcomm_fabric_destroy(end_);
    end_ = nullptr;
    return double(epcomm::fabric::now_ns() - start) / 1e9;
}

std::string connect_all(const std::vector<Rank*>& ranks) {
    for (Rank* rank : ranks) {
        if (const std::string why = rank->open(); !why.empty()) return why;
    }
    for (size_t me = 0; me < ranks.size(); ++me) {
        std::vector<std::string> addresses(ranks.size());
        for (size_t peer = 0; peer < ranks.size(); ++peer) {
            if (peer != me) addresses[peer] = ranks[peer]->address(int32_t(me));
        }
        if (const std::string why = ranks[me]->connect(addresses); !why.empty()) return why;
    }
    return "";
}

}  // namespace fake

namespace epcomm::fabric {

const Sysfs& sysfs() {
    static Sysfs machine;
    machine.root = fake::world->state().sysfs;
    return machine;
}

}  // namespace epcomm::fabric
