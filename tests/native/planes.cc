// Planes that are slow or die: with failover every byte and counter is right, without it the error
// names who and why. Over thousands of schedules; compiled with EPCOMM_EMULATED.

#include <algorithm>

#include "fabric_world.h"
#include "fibers.h"

using namespace rig;

namespace {

constexpr uint64_t kWords = 24;
constexpr Picoseconds kMicrosecond = 1000 * kNanosecond;

struct Setting {
    int32_t nodes = 2;
    int32_t planes = 2;
    int32_t channels = 4;
    int32_t rounds = 5;
    bool failover = true;
    uint64_t seed = 0;
    std::vector<FaultRule> rules;
};

Options options_of(const Setting& setting) {
    Options options;
    options.num_blocks = options.num_completions = 4u << setting.seed % 3;
    options.start = setting.seed % 4 == 0 ? 0 : 65536 - setting.seed % 13;
    options.memory_bytes = 64;
    // Long enough for what only is late.
    options.line.retry_ns = 200'000;
    options.engine.seed = setting.seed;
    options.engine.shuffle = true;
    options.engine.rules = setting.rules;
    options.engine.journal_capacity = 1 << 14;
    return options;
}

/// Every node puts a chunk to every other on every channel, round by round, into places that change
/// channels with every round; who has read a round's chunks says so, and only then are source and
/// destination written again. So a request that lands again too late spoils another channel's
/// chunk.
class Exchange {
 public:
    explicit Exchange(const Setting& s)
        : setting(s), world(s.nodes, s.channels, s.planes, options_of(s)), fibers_(s.seed) {
        for (Node& node : world.nodes) node.fabric.failover = s.failover;
        seen_.resize(size_t(s.nodes), std::vector<uint64_t>(kSignals));
    }

    /// Whether all went well.
    bool run() {
        for (int32_t node = 0; node < setting.nodes; ++node) {
            for (int32_t half = 0; half < 2; ++half) {
                fibers_.add([this, node, half] { produce(node, half); });
            }
            fibers_.add([this, node] { receive(node); });
        }
        const bool ended = fibers_.run([this] { watch(); }, 3'000'000);
        world.rig.engine.settle();
        watch();
        return ended && !torn && !shrank && !failed;
    }

    /// What every counter must be in the end.
    bool counters_are_right() const {
        for (int32_t me = 0; me < setting.nodes; ++me) {
            for (int32_t peer = 0; peer < setting.nodes; ++peer) {
                for (int32_t c = 0; peer != me && c < setting.channels; ++c) {
                    const uint64_t chunks = world.nodes[size_t(me)].signal(chunk_signal(peer, c));
                    const uint64_t reads = world.nodes[size_t(me)].signal(read_signal(peer, c));
                    if (chunks != uint64_t(setting.rounds) || reads != uint64_t(setting.rounds)) {
                        return false;
                    }
                }
            }
        }
        return true;
    }

    uint32_t losses() const {
        uint32_t all = 0;
        for (const Node& node : world.nodes) all += node.state.num_losses;
        return all;
    }

    Setting setting;
    World world;
    bool torn = false;    ///< a signal was seen whose bytes were not there
    bool shrank = false;  ///< a counter got smaller
    bool failed = false;  ///< a call returned failure

 private:
    int32_t chunk_signal(int32_t source, int32_t c) const { return source * setting.channels + c; }
    int32_t read_signal(int32_t source, int32_t c) const { return 32 + chunk_signal(source, c); }
    /// Word of a chunk's place for a node; round and channel give one of as many as there are
    /// channels.
    uint64_t place(int32_t node, int32_t channel, int32_t round) const {
        return uint64_t(node * setting.channels + (channel + round) % setting.channels) * kWords;
    }
    static uint64_t word_of(int32_t source, int32_t channel, int32_t round, uint64_t k) {
        return uint64_t(round) << 32 | uint64_t(source) << 24 | uint64_t(channel) << 16 | k;
    }

    /// As kernels wait: look at the queues, too.
    bool wait_for(int32_t me, int32_t signal, int32_t round) {
        return with_fabric(world.nodes[size_t(me)].fabric, [&](const auto& fabric) {
            uint32_t turn = uint32_t(me);
            while (world.nodes[size_t(me)].signal(signal) < uint64_t(round)) {
                Fibers::pause();
                look_around(world.nodes[size_t(me)].fabric, turn++);
                if (failed || torn || fabric::failed(fabric)) return false;
            }
            return true;
        });
    }

    static bool send(const Node& node, Lane lane, uint64_t to, uint64_t from, int32_t signal) {
        return with_fabric(node.fabric, [&](const auto& fabric) {
            return fabric::put_signal(fabric, lane, {2, 0, to * 8}, {1, 0, from * 8}, kWords * 8,
                                      signal) != 0;
        });
    }
    static bool flush(const Node& node, int32_t channel) {
        return with_fabric(node.fabric, [&](const auto& fabric) {
            return fabric::flush(fabric, channel, 80 * kSeconds);
        });
    }

    /// Half of the channels.
    void produce(int32_t me, int32_t half) {
        Node& node = world.nodes[size_t(me)];
        for (int32_t round = 1; round <= setting.rounds; ++round) {
            for (int32_t peer = 0; peer < setting.nodes; ++peer) {
                for (int32_t c = half; peer != me && c < setting.channels; c += 2) {
                    // All chunks of the round before have been read: this one's place is another's.
                    for (int32_t o = 0; o < setting.channels; ++o) {
                        if (!wait_for(me, read_signal(peer, o), round - 1)) return fail();
                    }
                    const uint64_t at = place(peer, c, round);
                    for (uint64_t k = 0; k < kWords; ++k) {
                        node.regions[1][at + k] = word_of(me, c, round, k);
                    }
                    if (!send(node, {peer, c}, place(me, c, round), at, chunk_signal(me, c))) {
                        return fail();
                    }
                }
            }
        }
        for (int32_t c = half; c < setting.channels; c += 2) {
            if (!flush(node, c)) return fail();
        }
    }

    void receive(int32_t me) {
        Node& node = world.nodes[size_t(me)];
        for (int32_t round = 1; round <= setting.rounds; ++round) {
            for (int32_t peer = 0; peer < setting.nodes; ++peer) {
                for (int32_t c = 0; peer != me && c < setting.channels; ++c) {
                    if (!wait_for(me, chunk_signal(peer, c), round)) return fail();
                    const uint64_t* words = &node.regions[2][place(peer, c, round)];
                    for (uint64_t k = 0; k < kWords; ++k) {
                        torn = torn || words[k] != word_of(peer, c, round, k);
                        if (k % 8 == 0) Fibers::pause();
                    }
                    if (torn) return;
                    const bool told = with_fabric(node.fabric, [&](const auto& fabric) {
                        return fabric::signal_add(fabric, {peer, c}, read_signal(me, c), 1) != 0;
                    });
                    if (!told) return fail();
                }
            }
        }
        for (int32_t c = 0; c < setting.channels; ++c) {
            if (!flush(node, c)) return fail();
        }
    }

    void fail() { failed = true; }

    void watch() {
        world.rig.engine.advance();
        for (size_t n = 0; n < world.nodes.size(); ++n) {
            for (int32_t s = 0; s < kSignals; ++s) {
                const uint64_t now = world.nodes[n].signal(s);
                shrank = shrank || now < seen_[n][size_t(s)];
                seen_[n][size_t(s)] = now;
            }
        }
    }

    Fibers fibers_;
    std::vector<std::vector<uint64_t>> seen_;
};

void expect_good(Exchange& exchange) {
    const bool good = exchange.run() && exchange.counters_are_right() &&
                      exchange.world.rig.engine.violations() == 0;
    if (good) return;
    printf("seed %llu: torn %d, shrank %d, failed %d\n", (unsigned long long)exchange.setting.seed,
           exchange.torn, exchange.shrank, exchange.failed);
    for (size_t n = 0; n < exchange.world.nodes.size(); ++n) {
        const epcomm_fabric_error& e = exchange.world.nodes[n].state.error;
        printf("node %zu: status %d, vendor 0x%x, peer %d, channel %d\n", n, e.status, e.vendor,
               e.peer, e.channel);
    }
    for (const Event& event : exchange.world.rig.engine.events()) {
        if (event.kind != EventKind::kFault) printf("%s\n", describe(event).c_str());
    }
    exit(1);
}

/// Faults that a right program does not notice; they make more be under way.
std::vector<FaultRule> harmless(uint64_t seed) {
    const FaultRule all[] = {
        everywhere(kDelay, 30 * kMicrosecond, 16384),
        everywhere(kLateFetch, 20 * kMicrosecond, 16384),
        everywhere(kPieces, 20 * kMicrosecond, 32768),
        everywhere(kLateCompletion, 60 * kMicrosecond, 32768),
        everywhere(kLateCompletion, 150 * kMicrosecond, 49152),
    };
    std::vector<FaultRule> rules;
    for (int i = 0; i < 5; ++i) {
        if ((seed >> i & 1) != 0) rules.push_back(all[i]);
    }
    return rules;
}

/// From request `first` of each queue pair on nothing of a plane's gets through, at all nodes.
void kill_plane(Setting* setting, Fault fault, int32_t plane, uint64_t first) {
    const uint64_t start = options_of(*setting).start;
    for (int32_t node = 0; node < setting->nodes; ++node) {
        setting->rules.push_back({fault, node * setting->planes + plane, kAny, start + first,
                                  ~uint64_t(0), kAlways, 1, 0});
    }
}

Setting drawn(uint64_t seed) {
    Setting setting;
    setting.seed = seed;
    setting.nodes = seed % 5 == 4 ? 3 : 2;
    setting.planes = seed % 2 == 0 ? 2 : 4;
    setting.rules = harmless(seed / 7);
    return setting;
}

}  // namespace

TEST(a_slow_plane_is_not_noticed) {
    for (uint64_t seed = 0; seed < 300; ++seed) {
        Exchange exchange(drawn(seed));
        World& world = exchange.world;
        const auto plane = int32_t(seed / 2 % uint64_t(world.num_planes));
        for (int32_t node = 0; node < world.num_nodes; ++node) {
            world.rig.network.wire()->nic(world.nic(node, plane)).line.latency_ns = 40'000;
        }
        expect_good(exchange);
        CHECK_EQUAL(exchange.losses(), 0);
    }
}

TEST(a_plane_that_dies_loses_nothing) {
    for (uint64_t seed = 0; seed < 1500; ++seed) {
        for (const Fault fault : {kRetryExceeded, kKillQueue}) {
            Setting setting = drawn(seed);
            const auto plane = int32_t(seed / 3 % uint64_t(setting.planes));
            // From the start, or after some requests.
            kill_plane(&setting, fault, plane, seed % 3 == 0 ? 0 : mix(seed, 1) % 14);
            Exchange exchange(setting);
            expect_good(exchange);
            CHECK(exchange.losses() > 0);
            for (const Node& node : exchange.world.nodes) {
                for (uint32_t i = 0; i < node.state.num_losses; ++i) {
                    CHECK_EQUAL(node.state.losses[i].plane, plane);
                }
            }
        }
    }
}

TEST(planes_die_one_after_the_other) {
    // Also a plane that has just taken over from another.
    for (uint64_t seed = 0; seed < 800; ++seed) {
        Setting setting = drawn(seed);
        setting.planes = 4;
        int32_t order[] = {0, 1, 2, 3};
        std::shuffle(order, order + 4, std::mt19937(uint32_t(seed)));
        for (uint64_t i = 0; i < 3; ++i) {
            const Fault fault = mix(seed, i) % 2 == 0 ? kRetryExceeded : kKillQueue;
            kill_plane(&setting, fault, order[i], mix(seed, 10 + i) % 10);
        }
        Exchange exchange(setting);
        expect_good(exchange);
        CHECK(exchange.losses() >= 3);
    }
}

TEST(a_queue_pair_killed_at_one_peer) {
    for (uint64_t seed = 0; seed < 500; ++seed) {
        Setting setting = drawn(seed);
        setting.nodes = 3;
        setting.planes = 2;
        const uint64_t start = options_of(setting).start;
        setting.rules.push_back(
            {kKillQueue, 0, kFirstQueue, start + mix(seed, 3) % 12, ~uint64_t(0), kAlways, 1, 0});
        Exchange exchange(setting);
        expect_good(exchange);
        // The first queue pair of node 0's first NIC: to node 1, channel 0. Node 1 finds that it
        // does not answer.
        for (int32_t node = 0; node < 3; ++node) {
            const epcomm_fabric_state& state = exchange.world.nodes[size_t(node)].state;
            CHECK(state.num_losses <= (node == 2 ? 0 : 1));
            if (state.num_losses == 0) continue;
            CHECK_EQUAL(state.losses[0].peer, 1 - node);
            CHECK_EQUAL(state.losses[0].plane, 0);
            CHECK_EQUAL(state.losses[0].channel, 0);
        }
        const epcomm_fabric_state& first = exchange.world.nodes[0].state;
        CHECK_EQUAL(first.num_losses, 1);
        CHECK_EQUAL(first.losses[0].queue_pair, kFirstQueue);
        CHECK_EQUAL(first.losses[0].vendor, mlx5::kFlushed << 8 | kVendorFlushed);
    }
}

TEST(without_failover_a_dead_plane_is_an_error_that_names_it) {
    for (uint64_t seed = 0; seed < 300; ++seed) {
        Setting setting = drawn(seed);
        setting.failover = false;
        const auto plane = int32_t(seed / 3 % uint64_t(setting.planes));
        const uint64_t start = options_of(setting).start;
        setting.rules.push_back(
            {kRetryExceeded, plane, kAny, start + mix(seed, 1) % 10, ~uint64_t(0), kAlways, 1, 0});
        Exchange exchange(setting);
        CHECK(!exchange.run());
        CHECK(!exchange.torn && !exchange.shrank && exchange.failed);
        // Node 0, or a peer of it that found no answer, if that was first.
        int32_t errors = 0;
        for (int32_t n = 0; n < setting.nodes; ++n) {
            const Node& node = exchange.world.nodes[size_t(n)];
            const epcomm_fabric_error& error = node.state.error;
            CHECK_EQUAL(node.state.num_losses, 0);
            if (node.state.failed == 0) continue;
            ++errors;
            CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
            CHECK_EQUAL(error.vendor, mlx5::kRetryExceeded << 8 | kVendorRetry);
            CHECK_EQUAL(error.channel % setting.planes, plane);
            CHECK(n == 0 ? error.peer > 0 && error.peer < setting.nodes : error.peer == 0);
            CHECK_EQUAL(error.queue_pair,
                        fabric::queue_of(node.fabric, {error.peer, error.channel})->number);
        }
        CHECK(errors > 0);
    }
}

TEST(no_plane_left_is_an_error_that_names_the_first) {
    for (uint64_t seed = 0; seed < 300; ++seed) {
        Setting setting = drawn(seed);
        for (int32_t plane = 0; plane < setting.planes; ++plane) {
            const uint64_t start = options_of(setting).start;
            setting.rules.push_back({kKillQueue, plane, kAny,
                                     start + mix(seed, uint64_t(plane)) % 9, ~uint64_t(0), kAlways,
                                     1, 0});
        }
        Exchange exchange(setting);
        CHECK(!exchange.run());
        CHECK(!exchange.torn && !exchange.shrank && exchange.failed);
        const Node& node = *std::find_if(exchange.world.nodes.begin(), exchange.world.nodes.end(),
                                         [](const Node& n) { return n.state.failed != 0; });
        const epcomm_fabric_state& state = node.state;
        CHECK_EQUAL(state.error.status, EPCOMM_FABRIC_TRANSPORT);
        // The first that was lost to this peer.
        uint32_t i = 0;
        while (i < state.num_losses && state.losses[i].peer != state.error.peer) ++i;
        CHECK(i < state.num_losses);
        CHECK_EQUAL(state.error.channel, state.losses[i].channel);
        CHECK_EQUAL(state.error.queue_pair, state.losses[i].queue_pair);
        CHECK_EQUAL(state.error.vendor, state.losses[i].vendor);
        int32_t lost = 0;
        for (i = 0; i < state.num_losses; ++i) lost += state.losses[i].peer == state.error.peer;
        // Others may have failed at the same time, and not been dealt with.
        CHECK(lost <= setting.planes);
        const int32_t peer = state.error.peer;
        for (int32_t plane = 0; plane < setting.planes; ++plane) {
            CHECK(fabric::is_dead(node.fabric, peer, plane));
        }
    }
}

TEST(what_is_wrong_with_a_request_is_no_planes_fault) {
    for (uint64_t seed = 0; seed < 200; ++seed) {
        Setting setting = drawn(seed);
        const uint64_t start = options_of(setting).start;
        setting.rules.push_back(
            {kBadKey, 1, kAny, start + mix(seed, 1) % 10, ~uint64_t(0), kAlways, 1, 0});
        Exchange exchange(setting);
        CHECK(!exchange.run());
        CHECK(!exchange.torn && !exchange.shrank && exchange.failed);
        const epcomm_fabric_state& state = exchange.world.nodes[0].state;
        CHECK_EQUAL(state.error.vendor, mlx5::kRemoteAccess << 8 | kVendorRemoteAccess);
        CHECK_EQUAL(state.num_losses, 0);
    }
}

namespace {

uint64_t chunk_word(uint64_t chunk, uint64_t k) { return chunk << 32 | 1u << 20 | k; }

/// Producers of one node that put chunks into each other's lanes without waiting for the peer.
class Streams {
 public:
    static constexpr uint64_t kChunks = 10;
    static constexpr int32_t kProducers = 4, kChannels = 4;

    explicit Streams(const Setting& s)
        : world(2, kChannels, s.planes, options_of(s)), fibers_(s.seed) {
        world.nodes[0].fabric.failover = 1;
    }

    /// `after(producer, lane, ticket, chunk)` is called behind each put. Two producers share a
    /// channel; the channel's number is its counter's.
    template <class After>
    void run(const After& after) {
        for (int32_t p = 0; p < kProducers; ++p) {
            fibers_.add([this, p, &after] {
                Node& node = world.nodes[0];
                const fabric::Planes fabric(node.fabric);
                for (uint64_t i = 0; i < kChunks; ++i) {
                    const Lane lane = {1, p / 2};
                    const uint64_t chunk = uint64_t(p) * kChunks + i, at = chunk * kWords;
                    for (uint64_t k = 0; k < kWords; ++k) {
                        node.regions[1][at + k] = chunk_word(chunk, k);
                    }
                    const Ticket ticket =
                        i % 3 == 2
                            ? fabric::put(fabric, lane, {2, 0, at * 8}, {1, 0, at * 8}, kWords * 8)
                            : fabric::put_signal(fabric, lane, {2, 0, at * 8}, {1, 0, at * 8},
                                                 kWords * 8, lane.channel);
                    good = good && ticket != 0;
                    if (i % 6 == 2) {
                        good = good && fabric::signal_add(fabric, lane, lane.channel, 0) != 0;
                    }
                    after(lane, ticket, chunk);
                    if (!good) return;
                }
                good = fabric::flush(fabric, p / 2, 80 * kSeconds) && good;
            });
        }
        good = fibers_.run([this] { watch(); }, 2'000'000) && good;
        world.rig.engine.settle();
        watch();
    }

    bool is_there(uint64_t chunk) const {
        for (uint64_t k = 0; k < kWords; ++k) {
            if (world.nodes[1].regions[2][chunk * kWords + k] != chunk_word(chunk, k)) return false;
        }
        return true;
    }

    World world;
    bool good = true;

 private:
    /// A counter never shrinks and never runs ahead of the chunks of its channel.
    void watch() {
        world.rig.engine.advance();
        for (int32_t c = 0; c < kProducers / 2; ++c) {
            const uint64_t now = world.nodes[1].signal(c);
            good = good && now >= seen_[c];
            if (now == seen_[c]) continue;
            seen_[c] = now;
            uint64_t here = 0;
            for (uint64_t i = 0; i < 2 * kChunks; ++i) {
                if (i % kChunks % 3 != 2) here += is_there(uint64_t(c) * 2 * kChunks + i);
            }
            good = good && here >= now;
        }
    }

    Fibers fibers_;
    uint64_t seen_[kProducers / 2] = {};
};

Setting dying(uint64_t seed) {
    Setting setting = drawn(seed);
    setting.nodes = 2;
    kill_plane(&setting, seed % 2 == 0 ? kRetryExceeded : kKillQueue, int32_t(seed / 2 % 2),
               mix(seed, 5) % 20);
    return setting;
}

}  // namespace

TEST(producers_of_a_lane_move_together) {
    for (uint64_t seed = 0; seed < 2000; ++seed) {
        Streams streams(dying(seed));
        streams.run([](Lane, Ticket, uint64_t) {});
        if (!streams.good) printf("seed %llu\n", (unsigned long long)seed);
        CHECK(streams.good);
        for (uint64_t chunk = 0; chunk < 4 * Streams::kChunks; ++chunk) {
            CHECK(streams.is_there(chunk));
        }
        for (int32_t c = 0; c < 2; ++c) CHECK_EQUAL(streams.world.nodes[1].signal(c), 14);
        CHECK_EQUAL(streams.world.rig.engine.violations(), 0);
    }
}

TEST(tickets_of_a_lane_that_moved) {
    for (uint64_t seed = 0; seed < 1000; ++seed) {
        Streams streams(dying(seed));
        const fabric::Planes fabric(streams.world.nodes[0].fabric);
        streams.run([&](Lane lane, Ticket ticket, uint64_t chunk) {
            if (mix(seed, chunk) % 3 != 0) return;
            // Now, or after other calls of this lane.
            for (uint64_t i = mix(seed, chunk) % 40; i > 0; --i) Fibers::pause();
            while (streams.good && !fabric::done(fabric, lane.channel, ticket)) {
                Fibers::pause();
                streams.good = streams.good && !fabric::failed(fabric);
            }
            streams.good = streams.good && streams.is_there(chunk);
        });
        if (!streams.good) printf("seed %llu\n", (unsigned long long)seed);
        CHECK(streams.good);
    }
}
