// The transports over emulated NICs on a GPU as a whole, rank and carriers as processes of their
// own, on a device that the host stands for (fake_device). The program is its own carrier.

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
        std::vector<epcomm_fabric_message> all(1 << 12);
        const int64_t count = epcomm_fabric_messages(end_, all.data(), int64_t(all.size()), total);
        CHECK(count >= 0);
        all.resize(size_t(count));
        return all;
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
        std::vector<epcomm_fabric_event> all(1 << 12);
        const int64_t count = epcomm_fabric_events(end_, all.data(), int64_t(all.size()), total);
        CHECK(count >= 0);
        all.resize(size_t(count));
        return all;
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

}  // namespace

TEST(ranks_exchange_chunks) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport);
        exchange(ends, 20);
        CHECK(has(ends[0]->describe(), "1 x 50 GB/s and 2000 ns, served by 2 SMs by process "));
        // Chunks and their signals. Counts come out of the kernel now and then.
        const uint64_t expected = 20 * 2 * (kNodes - 1) * kChannels;
        const int64_t until = fabric::now_ns() + 20 * kSecond;
        while (ends[0]->count().messages < expected) CHECK(fabric::now_ns() < until);
        CHECK_EQUAL(ends[0]->count().messages, expected);
        CHECK_EQUAL(ends[0]->count().num_nics, 1);
    }
}

TEST(puts_whose_rate_is_measured_arrive) {
    constexpr int32_t kPuts = 100;
    epcomm_posting_probe probe{};
    probe.local = {1, 0, 0};
    probe.remote = {2, 0, 0};
    probe.bytes = 4096;
    probe.timeout_ns = 80 * kSecond;
    probe.peer = 2;
    probe.num_channels = kChannels;
    probe.num_warps = 1;
    probe.puts = kPuts;
    probe.num_places = 2;
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport);
        memset(ends[0]->send(), 5, kRegion);
        for (int32_t c = 0; c < kChannels; ++c) {
            fabric::PostingSpan span{};
            CHECK(ends[0]->with(
                [&](const auto& fabric) { return fabric::post_puts(fabric, probe, c, &span); }));
            CHECK(span.begin < span.posted && span.posted <= span.completed);
            CHECK(ends[2]->wait(c, kPuts));
        }
        const uint64_t used = kChannels * 2 * 4096;
        for (uint64_t i = 0; i < kRegion; ++i) {
            CHECK_EQUAL(ends[2]->receive()[i], i < used ? 5 : 0);
        }
    }
}

TEST(messages_are_told_by_lane_and_plane) {
    constexpr int32_t kPlanes = 2, kRounds = 3;
    constexpr uint64_t kAll = 2 * (kNodes - 1) * kChannels;  // of a round: chunks and signals
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, "planes=2", 1 << 10);
        for (const auto& end : ends) CHECK(end->keeps(1 << 10));
        const int64_t begin = fabric::now_ns();
        exchange(ends, kRounds);
        for (const auto& end : ends) {
            const std::vector<epcomm_fabric_message> seen = end->messages_of(kRounds * kAll);
            CHECK_EQUAL(seen.size(), kRounds * kAll);
            const int64_t now = fabric::now_ns();
            std::map<std::pair<int32_t, int32_t>, uint64_t> next;  // by lane
            std::map<std::pair<int32_t, uint32_t>, std::pair<int32_t, int32_t>> lanes;
            for (const epcomm_fabric_message& message : seen) {
                const std::pair<int32_t, int32_t> lane{message.peer, message.channel};
                CHECK(message.peer >= 0 && message.peer < kNodes);
                CHECK(message.peer != &end - ends.data());
                CHECK(message.channel >= 0 && message.channel < kChannels);
                CHECK_EQUAL(message.plane, message.channel % kPlanes);
                CHECK(lanes.insert({{message.plane, message.queue_pair}, lane}).first->second ==
                      lane);
                CHECK_EQUAL(message.position, next[lane]);
                CHECK_EQUAL(message.bytes, next[lane] % 2 == 0 ? kChunk : 8);
                CHECK(message.depart_ns >= begin && message.arrive_ns > message.depart_ns);
                CHECK(message.landed_ns >= message.arrive_ns && message.landed_ns <= now);
                CHECK_EQUAL(message.rung_ns, 0);
                CHECK_EQUAL(message.completed_ns, 0);
                next[lane] += 1;
            }
            CHECK_EQUAL(next.size(), (kNodes - 1) * kChannels);
            CHECK_EQUAL(lanes.size(), next.size());
        }
        // Forgotten; then more than are to be kept.
        CHECK(ends[0]->keeps(4));
        CHECK_EQUAL(ends[0]->messages_of(0).size(), 0);
        exchange(ends, 1, kRounds);
        const std::vector<epcomm_fabric_message> last = ends[0]->messages_of(kAll);
        CHECK_EQUAL(last.size(), 4);
        for (const auto& message : last) CHECK(message.position >= 2 * kRounds);
        CHECK(!ends[0]->keeps((1 << 10) + 1));
        CHECK(!connected(transport)[0]->keeps(1));
    }
}

TEST(messages_of_a_slow_plane_are_late_and_no_others) {
    constexpr int64_t kSlow = 3'000'000;
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, "planes=2 slow_plane=1 slow_us=3000", 1 << 10);
        for (const auto& end : ends) CHECK(end->keeps(1 << 10));
        exchange(ends, 1);
        for (const auto& message : ends[0]->messages_of(2 * (kNodes - 1) * kChannels)) {
            const int64_t took = message.arrive_ns - message.depart_ns;
            CHECK_EQUAL(took >= kSlow, message.plane == 1);
            CHECK(message.landed_ns >= message.arrive_ns);
        }
    }
}

std::string text_of(const epcomm_fabric_event& event) {
    return epcomm_fabric_event_text(event.kind, event.code);
}

/// Whether the options make this message late, and by how much.
bool is_delayed(const emulated::TransportOptions& options, uint32_t nic,
                const epcomm_fabric_message& message, uint64_t* amount) {
    const emulated::FaultPlan plan{options.rules.data(), uint32_t(options.rules.size()), 0,
                                   options.seed};
    return plan.hits(emulated::kDelay, {nic, message.queue_pair, message.position}, amount);
}

TEST(faults_are_events_by_lane_and_plane) {
    constexpr int32_t kPlanes = 2, kRounds = 3;
    constexpr uint64_t kAll = 2 * (kNodes - 1) * kChannels;
    const std::string text = "planes=2 seed=4 delay=20";
    const emulated::TransportOptions options = emulated::parse_options(text, kNodes);
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, text, 1 << 10);
        for (const auto& end : ends) CHECK(end->keeps(1 << 10));
        const int64_t begin = fabric::now_ns();
        exchange(ends, kRounds);
        for (size_t node = 0; node < ends.size(); ++node) {
            const auto messages = ends[node]->messages_of(kRounds * kAll);
            const int64_t now = fabric::now_ns();
            uint64_t total = 0;
            const auto events = ends[node]->events(&total);
            size_t found = 0;
            for (const epcomm_fabric_message& message : messages) {
                const auto nic = uint32_t(int32_t(node) * kPlanes + message.plane);
                uint64_t amount = 0;
                if (!is_delayed(options, nic, message, &amount)) continue;
                found += 1;
                const auto event = std::find_if(events.begin(), events.end(), [&](const auto& one) {
                    return one.queue_pair == message.queue_pair && one.plane == message.plane &&
                           one.position == message.position;
                });
                CHECK(event != events.end());
                CHECK(text_of(*event) == "fault: delay");
                CHECK_EQUAL(event->amount_ps, amount);
                CHECK_EQUAL(event->peer, message.peer);
                CHECK_EQUAL(event->channel, message.channel);
                // When it was scheduled.
                CHECK(event->time_ns >= begin && event->time_ns <= now);
                CHECK(event->time_ns <= message.landed_ns);
            }
            CHECK(found > 0 && found < messages.size());
            CHECK_EQUAL(events.size(), found);
            CHECK_EQUAL(total, found);
        }
        // Forgotten; then more than are to be kept.
        CHECK(ends[0]->keeps(2));
        uint64_t total = 0;
        CHECK(ends[0]->events(&total).empty() && total == 0);
        exchange(ends, kRounds, kRounds);
        CHECK_EQUAL(ends[0]->events(&total).size(), 2);
        CHECK(total > 2);
        CHECK(connected(transport, text)[0]->events(&total).empty() && total == 0);
    }
}

// Ports are shared by engines on several devices, each with a timer of its own.
TEST(timers_of_several_devices_are_one_clock) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, "", 1 << 10, true);
        for (const auto& end : ends) CHECK(end->keeps(1 << 10));
        exchange(ends, 3);
        for (const auto& end : ends) {
            for (const auto& message : end->messages_of(3 * 2 * (kNodes - 1) * kChannels)) {
                CHECK(message.arrive_ns - message.depart_ns < 10 * kSecond);
                CHECK(message.landed_ns - message.arrive_ns < 10 * kSecond);
            }
            epcomm_fabric_traffic traffic = end->count();
            const int64_t until = fabric::now_ns() + 20 * kSecond;
            for (; traffic.data_placed_ns == 0; traffic = end->count()) {
                CHECK(fabric::now_ns() < until);
            }
            const int64_t now = fabric::now_ns();
            CHECK(traffic.data_depart_ns > now - 100 * kSecond && traffic.data_placed_ns < now);
        }
    }
}

TEST(options_reach_the_engine) {
    for (const char* transport : kTransports) {
        exchange(connected(transport, "planes=3 blocks=3 rate=25 latency_ns=500"), 5);
        exchange(connected(transport,
                           "seed=2 delay=50 late_fetch=50 lost_doorbell=50 pieces=50 "
                           "late_completion=50"),
                 5);
        exchange(connected(transport, "planes=2 early_fetch=1 slow_plane=1 slow_us=100"), 5);
    }
}

TEST(bad_options_are_refused) {
    for (const char* transport : kTransports) {
        const auto refused = [&](const char* options, const char* words) {
            CHECK(has(refusal([&] { End(transport, options, 0); }), words));
        };
        refused("planes=9", "planes: expected 1 to 8, got 9");
        refused("planes=0", "planes: expected 1 to 8, got 0");
        refused("blocks=65", "blocks: expected 1 to 64, got 65");
        refused("color=1", "\"color=1\" is not one of rate=");
        refused("rate=fast", "\"rate=fast\"");
        refused("early_fetch=2", "\"early_fetch=2\" is not one of rate=");
        refused("bad_key=", "\"bad_key=\" is not one of rate=");
        refused("slow_us=20", "slow_us needs slow_plane=");
        refused("planes=2 slow_plane=2", "slow_plane: expected less than planes=2, got 2");
        refused("dead_plane=1", "dead_plane: expected less than planes=1, got 1");
        const std::string failover = refusal([&] { End(transport, "failover=1", 0); });
        CHECK_EQUAL(has(failover, "failover: expected 0, got 1"),
                    std::string(transport) == "emulated-cuda-proxy");
    }
}

TEST(ends_of_different_transports_refuse_each_other) {
    End kernels("emulated-cuda", "", 0), proxies("emulated-cuda-proxy", "", 1);
    const std::string own = kernels.address(1), theirs = proxies.address(0);
    CHECK(
        has(refusal([&] { kernels.connect({"", theirs, own}); }), "node 1 uses another transport"));
    CHECK(has(refusal([&] { proxies.connect({own, "", own}); }), "node 0 uses another transport"));
}

TEST(killed_queue_pairs_end_the_fabric_with_the_reason) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, "kill=2");
        CHECK(ends[0]->add({1, 2}, 5) && ends[0]->flush(2));
        CHECK(ends[1]->wait(5, 1));
        const int64_t start = fabric::now_ns();
        for (int i = 0; i < 8 && ends[0]->add({1, 2}, 5); ++i) {
        }
        CHECK(!ends[0]->flush(2));
        CHECK(fabric::now_ns() - start < 20 * kSecond);
        CHECK(ends[0]->check() == EPCOMM_FABRIC_TRANSPORT);
        CHECK_EQUAL(ends[0]->error().peer, 1);
        CHECK_EQUAL(ends[0]->error().channel, 2);
        CHECK(has(ends[0]->error().text, "flushed"));
    }
}

/// A doorbell without its record.
void ring_wrongly(mlx5::SendQueue* queue) {
    const auto next = uint16_t(queue->reserved + 1);
    mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(queue->number, next));
}

TEST(a_broken_rule_is_told_by_name) {
    const Ends ends = connected("emulated-cuda");
    CHECK(ends[0]->add({1, 2}, 5) && ends[0]->flush(2));
    ring_wrongly(ends[0]->queue({1, 2}));
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (!ends[0]->look({1, 2})) CHECK(fabric::now_ns() < until);
    CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(ends[0]->error().peer, 1);
    CHECK(has(ends[0]->error().text, "; the emulated NIC found a broken rule: record behind"));
}

TEST(a_rule_that_is_broken_unnoticed_fails_the_fabric) {
    const Ends ends = connected("emulated-cuda", "planes=2");
    CHECK(ends[0]->add({1, 1}, 5) && ends[0]->flush(1));
    CHECK_EQUAL(ends[0]->check(), 0);
    ring_wrongly(ends[0]->queue({2, 3}));
    ring_wrongly(ends[0]->queue({1, 1}));
    // Nobody reads completions.
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (ends[0]->check() == 0) CHECK(fabric::now_ns() < until);
    const epcomm_fabric_error& error = ends[0]->error();
    CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
    CHECK(has(error.text, "the emulated NIC found a broken rule: record behind, at request "));
    const Lane lane = {error.peer, error.channel};
    CHECK((lane.peer == 1 && lane.channel == 1) || (lane.peer == 2 && lane.channel == 3));
    CHECK_EQUAL(error.queue_pair, ends[0]->queue(lane)->number);
    CHECK_EQUAL(error.position, ends[0]->queue(lane)->reserved);
    for (int32_t other = 1; other < kNodes; ++other) CHECK_EQUAL(ends[size_t(other)]->check(), 0);
}

TEST(broken_rules_and_failures_are_events) {
    const Ends ends = connected("emulated-cuda", "planes=2", 16);
    CHECK(ends[0]->keeps(16));
    CHECK(ends[0]->add({1, 3}, 5) && ends[0]->flush(3));
    ring_wrongly(ends[0]->queue({1, 3}));
    const auto events = ends[0]->events_of(2);
    CHECK_EQUAL(events.size(), 2);
    const char* const words[] = {"violation: record behind",
                                 "failed: local queue pair operation error: malformed request"};
    for (size_t i = 0; i < 2; ++i) {
        CHECK(text_of(events[i]) == words[i]);
        CHECK_EQUAL(events[i].kind, i == 0 ? EPCOMM_FABRIC_VIOLATION : EPCOMM_FABRIC_FAILED);
        CHECK_EQUAL(events[i].peer, 1);
        CHECK_EQUAL(events[i].channel, 3);
        CHECK_EQUAL(events[i].plane, 1);
        CHECK_EQUAL(events[i].position, ends[0]->queue({1, 3})->reserved);
        CHECK_EQUAL(events[i].amount_ps, 0);
    }
}

TEST(malformed_requests_are_told_by_name) {
    const Ends ends = connected("emulated-cuda");
    mlx5::SendQueue* queue = ends[0]->queue({1, 2});
    mlx5::Block block = mlx5::nop_request(mlx5::header_of(*queue, 0, true));
    block.unit[0].word[3] = 1;
    mlx5::store_request(queue, 0, block);
    queue->reserved = 1;
    mlx5::store_record(&queue->record[mlx5::kSendRecord], 1);
    mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(queue->number, 1));
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (!ends[0]->look({1, 2})) CHECK(fabric::now_ns() < until);
    CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_TRANSPORT);
    CHECK(has(ends[0]->error().text,
              "malformed request; the emulated NIC found a broken rule: "
              "reserved bits"));
}

TEST(a_killed_carrier_ends_its_ranks_waits) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport);
        exchange(ends, 1);
        ends[0]->kill_carrier();
        const int64_t start = fabric::now_ns();
        CHECK(!ends[0]->wait(60, 1));  // for something that nobody sends
        CHECK(fabric::now_ns() - start < 20 * kSecond);
        CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_STALLED);
        CHECK(has(ends[0]->error().text, "the process of this rank's emulated NICs, is gone"));
        // The others' NICs go on.
        CHECK(ends[1]->add({2, 1}, 61) && ends[2]->wait(61, 1));
    }
}

TEST(carriers_are_used_again) {
    for (int i = 0; i < 3; ++i) {
        for (const char* transport : kTransports) exchange(connected(transport), 1);
    }
}

TEST(memory_of_queues_is_reported) {
    const auto bytes = [](const char* transport) {
        return epcomm_fabric_transport_bytes(transport, kNodes, kChannels, kSignals);
    };
    // A ring of 1024 requests and 1024 completions for each peer and channel.
    for (const char* transport : kTransports) {
        CHECK(bytes(transport) > kNodes * kChannels * 1024 * 128);
        CHECK(bytes(transport) < 2 * kNodes * kChannels * 1024 * 128);
    }
}

int main(int count, char** arguments) {
    if (count == 2 && std::string(arguments[1]) == "carrier") {
        return carrier::serve(carrier::kSocket);
    }
    const std::string self = arguments[0];
    const std::string executable = self.substr(0, self.rfind('/') + 1) + "epcomm-carrier";
    if (symlink(self.c_str(), executable.c_str()) != 0 && errno != EEXIST) return 1;
    return main_of_tests(count, arguments);
}
