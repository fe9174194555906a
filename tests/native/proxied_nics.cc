// Triggers, proxy threads and host-written queues before the GPU-resident engine, whose kernel runs
// on the host: all that the transport `emulated-cuda-proxy` is made of but CUDA and the carrier.

#include <thread>

#include "../../csrc/emulated/broken_rule.h"
#include "../../csrc/emulated/options.h"
#include "../../csrc/fabric/posting.h"
#include "rig.h"
#include "test_end.h"

using namespace rig;
using epcomm::fabric::Lane;

namespace {

constexpr int64_t kSeconds = 1'000'000'000;
constexpr int32_t kChannels = 4, kSignals = 64;
constexpr uint64_t kChunk = 9216;  // bytes: more than a slice
constexpr uint64_t kBehind = 256;

struct Sizes {
    int32_t nodes = 2;
    uint32_t depth = 64;
    uint64_t start = 0;  ///< of the queues' counters
};

/// What a node's proxy threads post with, and its memory.
struct Node {
    std::vector<SendQueue> queues;
    std::vector<epcomm_region_key> local, remote;
    std::vector<uint64_t> raised;  ///< kBehind more than there are counts
    alignas(64) uint64_t signals[kSignals + 2] = {};
    std::vector<mlx5::Unit> send, receive;
    epcomm_ibgda writers = {};
    std::unique_ptr<TestEnd> end;

    uint64_t signal(int32_t index) const { return fabric::load_acquire(&signals[index]); }
    const epcomm_fabric& fabric() const { return *end->fabric; }
};

/// Nodes whose NICs one engine serves; all send queues lie in one piece of host memory.
class World {
 public:
    explicit World(const std::string& text, Sizes sizes = {})
        : sizes_(sizes),
          options_(parse_options(text, uint32_t(sizes.nodes))),
          planes_(int32_t(options_.num_planes)),
          network_(uint32_t(sizes.nodes * planes_), options_.line),
          layout_(uint32_t(sizes.nodes * per_node()), sizes.depth),
          host_((layout_.bytes + 63) / 64),
          own_(size_t(2 * sizes.nodes * per_node()) * kOwnStep),
          nodes(size_t(sizes.nodes)) {
        EngineOptions engine;
        engine.virtual_clock = false;
        engine.seed = options_.seed;
        engine.rules = options_.rules;
        engine_ = std::make_unique<ResidentEngine>(network_.wire(), engine);
        for (int32_t n = 0; n < sizes.nodes; ++n) register_memory(n);
        for (int32_t n = 0; n < sizes.nodes; ++n) open(n);
        connect();
        HostBells bells{};
        bells.set_host(layout_, host_.data(), uint32_t(sizes.nodes * per_node()));
        bells.own_doorbells = own_doorbell(0);
        bells.own_records = own_record(0);
        engine_->set_bells(bells);
        engine_->start();
    }
    ~World() {
        for (Node& node : nodes) node.end.reset();
        engine_->stop();
    }

    void make_ends(EndOptions options = {});
    void kill(int32_t node) {
        for (int32_t p = 0; p < planes_; ++p) network_.kill_nic(uint32_t(node * planes_ + p));
    }
    /// After all ends have gone.
    ResidentEngine& finished_engine() {
        for (Node& node : nodes) node.end.reset();
        engine_->stop();
        return *engine_;
    }
    uint64_t* bell() { return at(layout_.bell); }
    int32_t num_nodes() const { return sizes_.nodes; }

 private:
    int32_t per_node() const { return sizes_.nodes * kChannels; }
    uint64_t* at(uint64_t offset) {
        return reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(host_.data()) + offset);
    }
    uint64_t* own_doorbell(int32_t index) { return &own_[size_t(index) * kOwnStep]; }
    uint64_t* own_record(int32_t index) {
        return own_doorbell(sizes_.nodes * per_node()) + size_t(index) * kOwnStep;
    }

    void register_memory(int32_t n) {
        Node& node = nodes[size_t(n)];
        const size_t units = size_t(sizes_.nodes * kChannels) * kChunk / 16;
        node.send.resize(units);
        node.receive.resize(units);
        for (int32_t p = 0; p < planes_; ++p) {
            const auto nic = uint32_t(n * planes_ + p);
            const auto key = [&](void* start, uint64_t bytes, uint32_t access) {
                node.local.push_back(
                    {uint64_t(start), bytes, network_.add_memory(nic, start, bytes, access)});
            };
            key(node.signals, sizeof node.signals, kRemoteWrite | kRemoteRead);
            key(node.send.data(), units * 16, 0);
            key(node.receive.data(), units * 16, kRemoteWrite);
            node.local.resize(size_t(p + 1) * EPCOMM_FABRIC_MAX_REGIONS);
        }
    }

    void open(int32_t n) {
        Node& node = nodes[size_t(n)];
        for (const Node& other : nodes) {
            node.remote.insert(node.remote.end(), other.local.begin(), other.local.end());
        }
        node.queues.resize(size_t(per_node()));
        node.raised.resize(fabric::raised_bytes(sizes_.nodes, kSignals) / sizeof(uint64_t) +
                           kBehind);
        epcomm_ibgda& writers = node.writers;
        writers.queues = node.queues.data();
        writers.local = node.local.data();
        writers.remote = node.remote.data();
        writers.raised = node.raised.data();
        writers.num_channels = kChannels;
        writers.num_nodes = sizes_.nodes;
        writers.num_planes = planes_;
        writers.num_signals = kSignals;
        writers.node = n;
        for (int32_t i = 0; i < per_node(); ++i) {
            if (i / kChannels == n) continue;
            const int32_t all = n * per_node() + i;
            SendQueue* queue = &node.queues[size_t(i)];
            layout_.place(host_.data(), uint32_t(all), queue);
            queue->record[mlx5::kSendRecord] = uint32_t(sizes_.start & 0xffff);
            *own_record(all) = *reinterpret_cast<uint64_t*>(queue->record);
            const QueueMemory memory = {
                queue->ring,       reinterpret_cast<mlx5::Be32*>(own_record(all)),
                own_doorbell(all), queue->completions,
                sizes_.depth,      sizes_.depth,
                sizes_.start};
            queue->number =
                engine_->add_queue(uint32_t(n * planes_ + i % kChannels % planes_), memory);
            mlx5::start_at(queue, sizes_.start);
        }
    }

    void connect() {
        for (int32_t a = 0; a < sizes_.nodes; ++a) {
            for (int32_t b = 0; b < sizes_.nodes; ++b) {
                for (int32_t c = 0; a != b && c < kChannels; ++c) {
                    engine_->connect(uint32_t(a * planes_ + c % planes_),
                                     nodes[size_t(a)].queues[size_t(b * kChannels + c)].number,
                                     uint32_t(b * planes_ + c % planes_),
                                     nodes[size_t(b)].queues[size_t(a * kChannels + c)].number);
                }
            }
        }
    }

    const Sizes sizes_;
    const TransportOptions options_;
    const int32_t planes_;
    Network network_;
    const HostQueues layout_;
    std::vector<mlx5::Completion> host_;
    std::vector<uint64_t> own_;
    std::unique_ptr<ResidentEngine> engine_;

 public:
    std::vector<Node> nodes;
};

World* world_of_ends = nullptr;

/// What is left of the transport without CUDA.
class Proxied : public fabric::Transport {
 public:
    void add_region(const fabric::Region&) override {}
    void open(const fabric::Plan& plan) override {
        World& world = *world_of_ends;
        posting_ = std::make_unique<fabric::Posting>(plan, world.nodes[size_t(plan.node)].writers,
                                                     world.bell());
    }
    std::string address(int32_t) override { return ""; }
    void connect(const std::vector<std::string>&) override {}
    size_t post(int32_t lane, const fabric::Operation* operations, size_t count) override {
        return posting_->post(lane, operations, count);
    }
    size_t poll(int32_t lane, fabric::Completion* completions, size_t capacity) override {
        return posting_->poll(lane, completions, capacity);
    }
    std::string error_text(const fabric::Completion& completion) const override {
        return describe_error(completion.vendor);
    }
    std::string describe() const override { return "proxied"; }
    void close() override {}

 private:
    std::unique_ptr<fabric::Posting> posting_;
};

const fabric::RegisterTransport kProxied("proxied", []() -> std::unique_ptr<fabric::Transport> {
    return std::make_unique<Proxied>();
});

void World::make_ends(EndOptions options) {
    world_of_ends = this;
    options.nodes = sizes_.nodes;
    options.channels = kChannels;
    options.rings = options.threads = 2;
    options.timeout_ns = 80 * kSeconds;
    for (int32_t n = 0; n < sizes_.nodes; ++n) {
        Node& node = nodes[size_t(n)];
        options.node = n;
        const auto region = [](int32_t id, void* start, uint64_t bytes) {
            return fabric::Region{id, start, bytes, fabric::Memory::kHost, -1, -1, 0};
        };
        node.end = std::make_unique<TestEnd>(
            "proxied", options,
            std::vector<fabric::Region>{region(0, node.signals, sizeof node.signals),
                                        region(1, node.send.data(), node.send.size() * 16),
                                        region(2, node.receive.data(), node.receive.size() * 16)});
    }
}

/// A chunk's units name the round, the sender and the place.
mlx5::Unit unit_of(int round, int32_t node, int32_t channel, uint64_t i) {
    return {{uint32_t(round), uint32_t(node * kChannels + channel), uint32_t(i), ~uint32_t(i)}};
}

bool wait_for(const Node& node, int32_t signal, uint64_t value) {
    const int64_t until = fabric::now_ns() + 80 * kSeconds;
    while (node.signal(signal) < value) {
        if (fabric::failed(node.fabric()) || fabric::now_ns() > until) return false;
        fabric::relax();
    }
    return true;
}

/// One node's part: chunks to every other node on every channel, checked when their signals come.
bool exchange_as(World& world, int32_t me, int rounds) {
    Node& node = world.nodes[size_t(me)];
    constexpr uint64_t kUnits = kChunk / 16;
    const auto place = [](int32_t other, int32_t channel) {
        return uint64_t(other * kChannels + channel) * kChunk;
    };
    const auto lanes = [&](const auto& use) {
        bool ok = true;
        for (int32_t peer = 0; peer < world.num_nodes(); ++peer) {
            for (int32_t channel = 0; peer != me && channel < kChannels; ++channel) {
                ok = ok && use(peer, channel);
            }
        }
        return ok;
    };
    bool ok = true;
    for (int round = 1; round <= rounds && ok; ++round) {
        ok = lanes([&](int32_t peer, int32_t channel) {
            const uint64_t at = place(peer, channel);
            for (uint64_t i = 0; i < kUnits; ++i) {
                node.send[at / 16 + i] = unit_of(round, me, channel, i);
            }
            return fabric::put_signal(node.fabric(), {peer, channel}, {2, 0, place(me, channel)},
                                      {1, 0, at}, kChunk, me * kChannels + channel) != 0;
        });
        ok = ok && lanes([&](int32_t peer, int32_t channel) {
                 if (!wait_for(node, peer * kChannels + channel, uint64_t(round))) return false;
                 const mlx5::Unit* got = &node.receive[place(peer, channel) / 16];
                 for (uint64_t i = 0; i < kUnits; ++i) {
                     const mlx5::Unit wanted = unit_of(round, peer, channel, i);
                     if (memcmp(&got[i], &wanted, sizeof wanted) != 0) return false;
                 }
                 // Its sender may go on: signals from 32 on say so.
                 return fabric::signal_add(node.fabric(), {peer, channel},
                                           32 + me * kChannels + channel, 1) != 0;
             });
        ok = ok && lanes([&](int32_t peer, int32_t channel) {
                 return wait_for(node, 32 + peer * kChannels + channel, uint64_t(round));
             });
    }
    for (int32_t channel = 0; channel < kChannels; ++channel) {
        ok = ok && fabric::flush(node.fabric(), channel, 80 * kSeconds);
    }
    return ok;
}

void exchange(World& world, int rounds) {
    std::vector<std::thread> threads;
    std::vector<char> good(world.nodes.size());
    for (int32_t me = 0; me < world.num_nodes(); ++me) {
        threads.emplace_back([&, me] { good[size_t(me)] = exchange_as(world, me, rounds); });
    }
    for (auto& thread : threads) thread.join();
    for (const char ok : good) CHECK(ok);
    ResidentEngine& engine = world.finished_engine();
    for (const Event& event : engine.events()) {
        if (event.kind == EventKind::kViolation) printf("%s\n", describe(event).c_str());
    }
    CHECK_EQUAL(engine.violations(), 0);
}

uint64_t count_faults(const ResidentEngine& engine) {
    uint64_t count = 0;
    for (const Event& event : engine.events()) count += event.kind == EventKind::kFault;
    return count;
}

}  // namespace

TEST(nodes_exchange_chunks_through_proxies) {
    // Counters that wrap, rings that are often full.
    World world("", {3, 8, 65500});
    world.make_ends();
    exchange(world, 100);
}

TEST(planes_carry_their_channels) {
    World world("planes=3 latency_ns=300 rate=25");
    world.make_ends();
    exchange(world, 10);
    for (uint32_t nic = 0; nic < 6; ++nic) {
        CHECK(world.finished_engine().traffic(nic).payload_bytes >= 10 * kChunk);
    }
}

TEST(harmless_faults_are_not_noticed) {
    World world("seed=3 delay=100 late_fetch=50 lost_doorbell=100 pieces=50 late_completion=100");
    world.make_ends();
    exchange(world, 10);
    CHECK(count_faults(world.finished_engine()) > 20);
}

TEST(requests_read_at_once_are_not_noticed) {
    World world("early_fetch=1");
    world.make_ends();
    exchange(world, 10);
    CHECK(count_faults(world.finished_engine()) > 20);
}

TEST(a_slow_plane_is_not_noticed) {
    // Late by its own amount, not by another delay.
    World world("planes=2 delay=20 slow_plane=1 slow_us=300");
    world.make_ends();
    exchange(world, 5);
    uint64_t slow = 0;
    for (const Event& event : world.finished_engine().events()) {
        if (event.kind != EventKind::kFault) continue;
        CHECK_EQUAL(event.code, kDelay);
        if (event.nic % 2 == 0) {
            CHECK(event.amount <= 20'000 * kNanosecond);
        } else {
            CHECK_EQUAL(event.amount, 300'000 * kNanosecond);
            slow += 1;
        }
    }
    // From two nodes, on two channels, in each round a chunk, its signal and its sender's leave.
    CHECK_EQUAL(slow, 2 * 2 * 5 * 3);
}

TEST(a_refused_key_is_an_error_that_names_the_peer) {
    World world("bad_key=2");
    world.make_ends();
    Node& node = world.nodes[0];
    for (int i = 0; i < 3; ++i) CHECK(fabric::signal_add(node.fabric(), {1, 2}, 5, 1) != 0);
    CHECK(!fabric::flush(node.fabric(), 2, 80 * kSeconds));
    const epcomm_fabric_error& error = node.end->error();
    CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 2);
    CHECK_EQUAL(error.vendor, mlx5::kRemoteAccess << 8 | kVendorRemoteAccess);
    CHECK(has(error.text, "remote access error"));
    CHECK_EQUAL(world.nodes[1].signal(5), 2);
}

TEST(a_signal_that_the_peer_lacks_is_counted_nowhere) {
    World world("");
    world.make_ends();
    Node& node = world.nodes[0];
    const int32_t unknown = 2 * kSignals + 20;
    CHECK(fabric::put_signal(node.fabric(), {1, 2}, {2, 0, 0}, {1, 0, 0}, 32, unknown) != 0);
    CHECK(!fabric::flush(node.fabric(), 2, 80 * kSeconds));
    CHECK_EQUAL(node.end->error().vendor, mlx5::kRemoteAccess << 8 | kVendorRemoteAccess);
    for (const uint64_t count : node.raised) CHECK_EQUAL(count, 0);
}

TEST(a_killed_nic_ends_its_ranks_waits_with_a_reason) {
    World world("kill=3");
    world.make_ends();
    Node& node = world.nodes[0];
    const auto put = [&] {
        return fabric::put_signal(node.fabric(), {1, 2}, {2, 0, 0}, {1, 0, 0}, 32, 5) != 0;
    };
    CHECK(put() && fabric::flush(node.fabric(), 2, 80 * kSeconds));
    CHECK(put());
    const int64_t start = fabric::now_ns();
    CHECK(!fabric::flush(node.fabric(), 2, 80 * kSeconds));
    CHECK(fabric::now_ns() - start < 20 * kSeconds);
    const epcomm_fabric_error& error = node.end->error();
    CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 2);
    CHECK_EQUAL(error.vendor >> 8, mlx5::kFlushed);
    CHECK_EQUAL(error.queue_pair, node.queues[kChannels + 2].number);
    CHECK(std::string(error.text).find("flushed") != std::string::npos);
    CHECK_EQUAL(world.nodes[1].signal(5), 1);
    CHECK(fabric::signal_add(node.fabric(), {1, 0}, 6, 1) == 0);
}

TEST(a_dead_peer_is_an_error_after_the_retries) {
    World world("retry_us=20000");
    world.make_ends();
    world.kill(1);
    Node& node = world.nodes[0];
    const int64_t start = fabric::now_ns();
    CHECK(fabric::put_signal(node.fabric(), {1, 0}, {2, 0, 0}, {1, 0, 0}, 32, 5) != 0);
    CHECK(!fabric::flush(node.fabric(), 0, 80 * kSeconds));
    CHECK(fabric::now_ns() - start < 20 * kSeconds);
    CHECK_EQUAL(node.end->error().vendor, mlx5::kRetryExceeded << 8 | kVendorRetry);
}

TEST(a_dead_plane_is_an_error_of_its_channels) {
    World world("planes=2 dead_plane=1 dead_from=2 retry_us=20000");
    world.make_ends();
    Node& node = world.nodes[0];
    for (int i = 0; i < 8; ++i) CHECK(fabric::signal_add(node.fabric(), {1, 0}, 5, 1) != 0);
    CHECK(fabric::flush(node.fabric(), 0, 80 * kSeconds));
    CHECK_EQUAL(world.nodes[1].signal(5), 8);
    for (int i = 0; i < 3; ++i) CHECK(fabric::signal_add(node.fabric(), {1, 1}, 6, 1) != 0);
    CHECK(!fabric::flush(node.fabric(), 1, 80 * kSeconds));
    CHECK_EQUAL(node.end->error().channel, 1);
    CHECK_EQUAL(node.end->error().vendor >> 8, mlx5::kRetryExceeded);
    CHECK_EQUAL(world.nodes[1].signal(6), 2);
}

TEST(one_thread_looks_at_the_bell) {
    World world("", {3});
    world.make_ends();
    exchange(world, 3);
    CHECK_EQUAL(world.finished_engine().bell_lookers().size(), 1);
}

TEST(host_memory_is_read_after_the_bell_only) {
    // No ends: this thread is the writer.
    World world("");
    Node& node = world.nodes[0];
    SendQueue* queue = &node.queues[kChannels];
    struct Wait {
        bool again() const { return false; }
    } wait;
    node.send[0] = unit_of(1, 0, 0, 0);
    const fabric::Command command = fabric::put_signal_command({1, 0}, {2, 0, 0}, {1, 0, 0}, 16, 5);
    const fabric::Requests requests = fabric::requests_of(node.writers, {1, 0}, command, true);
    CHECK(fabric::post(queue, requests, Ring::kNow, wait) != 0);
    // The doorbell has rung in the queue's own word; the bell has not.
    CHECK(*queue->doorbell != 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    CHECK_EQUAL(world.nodes[1].signal(5), 0);
    __atomic_fetch_add(world.bell(), 1, __ATOMIC_RELEASE);
    const int64_t until = fabric::now_ns() + 80 * kSeconds;
    while (world.nodes[1].signal(5) == 0) CHECK(fabric::now_ns() < until);
    CHECK(memcmp(&world.nodes[1].receive[0], &node.send[0], 16) == 0);
    CHECK_EQUAL(world.finished_engine().violations(), 0);
}
