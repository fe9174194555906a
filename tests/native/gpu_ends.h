// Ranks' ends of the transports over emulated NICs on a GPU, with carriers as processes of their
// own, on a device that the host stands for (fake_device). The program is its own carrier: its
// `main` is here, too.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/carrier/carrier.h"
#include "../../csrc/carrier/wire.h"
#include "../../csrc/emulated/options.h"
#include "../../csrc/fabric/posting_rate.h"
#include "cuda_runtime.h"

// The program is run as "epcomm-carrier" by the code under test.
#define main main_of_tests
#include "check.h"
#undef main

using namespace epcomm;
using fabric::Lane;

namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int32_t kNodes = 3, kChannels = 4, kSignals = 64;
constexpr uint64_t kChunk = 9216, kRegion = kNodes * kChannels * kChunk;
const char* const kTransports[] = {"emulated-cuda", "emulated-cuda-proxy"};

/// One rank's end of the fabric over memory of the device.
class End {
 public:
    End(const std::string& transport, const std::string& options, int32_t node,
        int32_t max_messages = 0, int32_t device = 0)
        : node_(node),
          host_(size_t(epcomm_fabric_host_bytes(kSlots, kRings)) / 8 + 16),
          producers_(size_t(epcomm_fabric_producer_bytes(kRings)) / 8 + 16) {
        epcomm_fabric_config config{};
        config.node = node;
        config.num_nodes = kNodes;
        config.num_channels = kChannels;
        config.num_rings = config.num_threads = kRings;
        config.num_slots = kSlots;
        config.max_in_flight = 32;
        config.timeout_ns = 80 * kSecond;
        config.longest_nap_ns = 1'000'000;
        config.max_messages = max_messages;
        config.host_memory = aligned(host_);
        config.producer_memory = aligned(producers_);
        end_ = epcomm_fabric_create(&config, transport.c_str(), options.c_str());
        require(end_ == nullptr ? -1 : 0);
        const uint64_t sizes[] = {8 * (kSignals + 2), kRegion, kRegion};
        for (int32_t id = 0; id < 3; ++id) {
            epcomm_fabric_region region{};
            region.id = id;
            region.fd = -1;
            region.device = device;
            region.bytes = sizes[id];
            if (cudaMalloc(&region.pointer, region.bytes) != cudaSuccess) abort();
            memory_[id] = static_cast<uint8_t*>(region.pointer);
            require(epcomm_fabric_add_region(end_, &region));
        }
        require(epcomm_fabric_open(end_));
    }
    End(const End&) = delete;
    End& operator=(const End&) = delete;
    ~End() {
        if (end_ != nullptr && epcomm_fabric_stop(end_, kSecond) == 0) epcomm_fabric_destroy(end_);
        for (uint8_t* memory : memory_) cudaFree(memory);
    }

    std::string address(int32_t peer) {
        std::string bytes(size_t(epcomm_fabric_address(end_, peer, nullptr, 0)), 0);
        epcomm_fabric_address(end_, peer, bytes.data(), int64_t(bytes.size()));
        return bytes;
    }
    void connect(const std::vector<std::string>& all) {
        std::vector<const void*> addresses;
        std::vector<int64_t> sizes;
        for (const std::string& one : all) addresses.push_back(one.data());
        for (const std::string& one : all) sizes.push_back(int64_t(one.size()));
        require(epcomm_fabric_connect(end_, addresses.data(), sizes.data()));
    }

    /// Call `use` with what producers take.
    template <class Use>
    auto with(const Use& use) const {
        const epcomm_ibgda* ibgda = epcomm_fabric_ibgda_of(end_);
        return ibgda != nullptr ? use(*ibgda) : use(*epcomm_fabric_of(end_));
    }
    bool put_signal(Lane lane, uint64_t remote, uint64_t local, int32_t signal) const {
        return with([&](const auto& fabric) {
            return fabric::put_signal(fabric, lane, {2, 0, remote}, {1, 0, local}, kChunk,
                                      signal) != 0;
        });
    }
    bool add(Lane lane, int32_t signal) const {
        return with(
            [&](const auto& fabric) { return fabric::signal_add(fabric, lane, signal, 1) != 0; });
    }
    bool flush(int32_t channel, int64_t timeout_ns = 80 * kSecond) const {
        return with([&](const auto& fabric) { return fabric::flush(fabric, channel, timeout_ns); });
    }
    /// Also looks for errors, as a waiting kernel and the host do.
    bool wait(int32_t signal, uint64_t value) const {
        const int64_t until = fabric::now_ns() + 80 * kSecond;
        const auto* signals = reinterpret_cast<const uint64_t*>(memory_[0]);
        while (fabric::load_acquire(&signals[signal]) < value) {
            if (check() != 0 || fabric::now_ns() > until) return false;
            fabric::relax();
        }
        return true;
    }
    int check() const { return epcomm_fabric_check(end_, 10 * kSecond); }
    const epcomm_fabric_error& error() const { return epcomm_fabric_of(end_)->state->error; }
    std::string describe() const { return epcomm_fabric_describe(end_); }
    epcomm_fabric_traffic count() const {
        epcomm_fabric_traffic traffic{};
        CHECK_EQUAL(epcomm_fabric_count(end_, &traffic, 0), 0);
        return traffic;
    }
    bool keeps(uint64_t capacity) const { return epcomm_fabric_keep_messages(end_, capacity) == 0; }
    std::vector<epcomm_fabric_message> messages(uint64_t* total) const {
        return notes<epcomm_fabric_message>(epcomm_fabric_messages, total);
    }
    /// Once so many have been told of.
    std::vector<epcomm_fabric_message> messages_of(uint64_t expected) const {
        const int64_t until = fabric::now_ns() + 20 * kSecond;
        while (true) {
            uint64_t total = 0;
            const std::vector<epcomm_fabric_message> all = messages(&total);
            if (total == expected) return all;
            CHECK(total < expected && fabric::now_ns() < until);
        }
    }
    std::vector<epcomm_fabric_event> events(uint64_t* total) const {
        return notes<epcomm_fabric_event>(epcomm_fabric_events, total);
    }
    /// Once there are so many.
    std::vector<epcomm_fabric_event> events_of(size_t expected) const {
        const int64_t until = fabric::now_ns() + 20 * kSecond;
        while (true) {
            uint64_t total = 0;
            const std::vector<epcomm_fabric_event> all = events(&total);
            CHECK_EQUAL(all.size(), total);
            if (total >= expected) return all;
            CHECK(fabric::now_ns() < until);
        }
    }
    void kill_carrier() const {
        const std::string text = describe();
        kill(std::stoi(text.substr(text.rfind(' ') + 1)), SIGKILL);
    }
    /// Of a direct end: what kernels write to, and how they look at it while they wait. Whether the
    /// fabric has failed.
    mlx5::SendQueue* queue(Lane lane) const {
        return fabric::queue_of(*epcomm_fabric_ibgda_of(end_), lane);
    }
    bool look(Lane lane) const {
        const epcomm_ibgda& ibgda = *epcomm_fabric_ibgda_of(end_);
        fabric::look(ibgda, lane);
        return fabric::load_acquire(&ibgda.state->failed) != 0;
    }
    uint8_t* send() const { return memory_[1]; }
    uint8_t* receive() const { return memory_[2]; }

 private:
    template <class Note, class Tell>
    std::vector<Note> notes(const Tell& tell, uint64_t* total) const {
        std::vector<Note> all(1 << 12);
        const int64_t count = tell(end_, all.data(), int64_t(all.size()), total);
        CHECK(count >= 0);
        all.resize(size_t(count));
        return all;
    }
    static constexpr int32_t kRings = 2, kSlots = 64;

    void require(int result) const {
        if (result < 0) throw std::runtime_error(epcomm_fabric_text(end_));
    }
    static void* aligned(std::vector<uint64_t>& memory) {
        return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 *
                                       128);
    }

    const int32_t node_;
    std::vector<uint64_t> host_, producers_;
    uint8_t* memory_[3] = {};
    epcomm_fabric_end* end_ = nullptr;
};

using Ends = std::vector<std::unique_ptr<End>>;

Ends connected(const std::string& transport, const std::string& options = "",
               int32_t max_messages = 0, bool own_devices = false) {
    Ends ends;
    for (int32_t n = 0; n < kNodes; ++n) {
        const int32_t device = own_devices ? n : 0;
        ends.push_back(std::make_unique<End>(transport, options, n, max_messages, device));
    }
    for (int32_t n = 0; n < kNodes; ++n) {
        std::vector<std::string> all(kNodes);
        for (int32_t peer = 0; peer < kNodes; ++peer) {
            if (peer != n) all[size_t(peer)] = ends[size_t(peer)]->address(n);
        }
        ends[size_t(n)]->connect(all);
    }
    return ends;
}

uint64_t place(int32_t node, int32_t channel) {
    return uint64_t(node * kChannels + channel) * kChunk;
}

/// Call `use(me, peer, channel)` for all lanes of all nodes.
template <class Use>
void for_lanes(const Use& use) {
    for (int32_t me = 0; me < kNodes; ++me) {
        for (int32_t peer = 0; peer < kNodes; ++peer) {
            for (int32_t c = 0; me != peer && c < kChannels; ++c) use(me, peer, c);
        }
    }
}

/// Chunks from everybody to everybody on every channel, each compared when its signal comes. There
/// have been `before` rounds.
void exchange(const Ends& ends, int rounds, int before = 0) {
    std::vector<uint8_t> wanted(kChunk);
    for (int round = before + 1; round <= before + rounds; ++round) {
        const auto fill = [&](uint8_t* into, int32_t from, int32_t to, int32_t channel) {
            memset(into, round * 7 + from * 50 + to * 11 + channel, kChunk);
        };
        for_lanes([&](int32_t me, int32_t peer, int32_t c) {
            const End& end = *ends[size_t(me)];
            fill(end.send() + place(peer, c), me, peer, c);
            CHECK(end.put_signal({peer, c}, place(me, c), place(peer, c), me * kChannels + c));
        });
        for_lanes([&](int32_t peer, int32_t me, int32_t c) {
            const End& end = *ends[size_t(me)];
            CHECK(end.wait(peer * kChannels + c, uint64_t(round)));
            fill(wanted.data(), peer, me, c);
            CHECK(memcmp(end.receive() + place(peer, c), wanted.data(), kChunk) == 0);
        });
        // All are read; who sends again has completed before.
        for (const auto& end : ends) {
            for (int32_t c = 0; c < kChannels; ++c) CHECK(end->flush(c));
        }
    }
}

inline std::string text_of(const epcomm_fabric_event& event) {
    return epcomm_fabric_event_text(event.kind, event.code);
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 2 && std::string(arguments[1]) == "carrier") {
        return carrier::serve(carrier::kSocket);
    }
    const std::string self = arguments[0];
    const std::string executable = self.substr(0, self.rfind('/') + 1) + "epcomm-carrier";
    if (symlink(self.c_str(), executable.c_str()) != 0 && errno != EEXIST) return 1;
    return main_of_tests(count, arguments);
}
