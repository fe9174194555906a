// The fabric API (csrc/fabric/ibgda.h) over emulated NICs: the threads of several nodes, as kernels
// would do it.

#include <thread>

#include "fabric_world.h"

using namespace rig;

namespace {

Options quick(uint64_t start) {
    Options options;
    options.start = start;
    options.num_blocks = options.num_completions = 16;
    options.engine.virtual_clock = false;
    options.line = {0, 4096, 30, 0, 0, 1, 5'000'000, 0};
    options.memory_bytes = 64;
    return options;
}

constexpr uint64_t kChunk = 512;  // bytes

/// One node's part of an exchange; receivers check what a signal promises.
template <class Fabric>
bool exchange_as(const World& world, Node& node, int32_t me, int chunks, const Fabric& fabric) {
    const int32_t nodes = world.num_nodes, channels = world.num_channels;
    const int64_t until = fabric::now_ns() + 80 * kSeconds;
    bool ok = true;
    uint32_t turn = 0;
    // A place of its own for each (peer, channel) at the receiver and here.
    const auto place = [&](int32_t node_number, int32_t channel) {
        return uint64_t(node_number * channels + channel) * kChunk;
    };
    // As kernels wait: look at the queues, too.
    const auto wait_for = [&](int32_t signal, int value) {
        while (ok && node.signal(signal) < uint64_t(value)) {
            fabric::relax();
            look_around(node.fabric, turn++);
            ok = fabric::now_ns() < until && !fabric::failed(fabric);
        }
    };
    for (int i = 1; i <= chunks && ok; ++i) {
        for (int32_t peer = 0; peer < nodes; ++peer) {
            for (int32_t channel = 0; peer != me && channel < channels; ++channel) {
                const uint64_t at = place(peer, channel);
                for (uint64_t k = 0; k < kChunk / 8; ++k) {
                    node.regions[1][at / 8 + k] = uint64_t(i) << 32 | uint64_t(me) << 16 | k;
                }
                const Ticket ticket =
                    fabric::put_signal(fabric, {peer, channel}, {2, 0, place(me, channel)},
                                       {1, 0, at}, kChunk, me * channels + channel);
                ok = ok && ticket != 0;
            }
        }
        for (int32_t peer = 0; peer < nodes; ++peer) {
            for (int32_t channel = 0; peer != me && channel < channels; ++channel) {
                wait_for(peer * channels + channel, i);  // the chunk of this round from `peer`
                const uint64_t* bytes = &node.regions[2][place(peer, channel) / 8];
                for (uint64_t k = 0; k < kChunk / 8; ++k) {
                    ok = ok && bytes[k] == (uint64_t(i) << 32 | uint64_t(peer) << 16 | k);
                }
                // Its sender may go on: signals 32.. say so.
                ok = ok && fabric::signal_add(fabric, {peer, channel}, 32 + me * channels + channel,
                                              1) != 0;
            }
        }
        for (int32_t peer = 0; peer < nodes; ++peer) {
            for (int32_t channel = 0; peer != me && channel < channels; ++channel) {
                wait_for(32 + peer * channels + channel, i);
            }
        }
    }
    for (int32_t channel = 0; channel < channels; ++channel) {
        ok = ok && fabric::flush(fabric, channel, 80 * kSeconds);
    }
    return ok;
}

/// Every node sends chunks to every other on every channel.
void exchange(World& world, int chunks) {
    std::vector<std::thread> threads;
    std::vector<char> good(world.nodes.size());
    for (int32_t me = 0; me < world.num_nodes; ++me) {
        threads.emplace_back([&, me] {
            Node& node = world.nodes[size_t(me)];
            good[size_t(me)] = with_fabric(node.fabric, [&](const auto& fabric) {
                return exchange_as(world, node, me, chunks, fabric);
            });
        });
    }
    for (auto& thread : threads) thread.join();
    for (const char ok : good) CHECK(ok);
    CHECK_EQUAL(world.rig.engine.violations(), 0);
}

}  // namespace

TEST(nodes_exchange_chunks) {
    World world(3, 2, 1, quick(65500));
    exchange(world, 100);
}

TEST(planes_need_no_order_among_themselves) {
    Options options = quick(0);
    options.engine.rules = {everywhere(kDelay, 20'000 * kNanosecond, 16384)};
    for (int32_t planes : {2, 4}) {
        World world(2, 4, planes, options);
        // One plane is slow.
        world.rig.network.wire()->nic(world.nic(0, 1)).line.latency_ns = 50'000;
        exchange(world, 50);
    }
}

TEST(a_plane_dies_while_nodes_exchange_chunks) {
    for (const Fault fault : {kRetryExceeded, kKillQueue}) {
        Options options = quick(65500);
        options.engine.rules = {everywhere(kLateCompletion, 20'000 * kNanosecond, 16384)};
        for (int32_t node = 0; node < 3; ++node) {
            options.engine.rules.push_back(
                {fault, 2 * node + 1, kAny, 65500 + 60, ~uint64_t(0), kAlways, 1, 0});
        }
        World world(3, 4, 2, options);
        for (Node& node : world.nodes) node.fabric.failover = 1;
        exchange(world, 50);
        for (const Node& node : world.nodes) {
            CHECK_EQUAL(node.state.num_losses, 2);
            for (int i = 0; i < 2; ++i) CHECK_EQUAL(node.state.losses[i].plane, 1);
        }
    }
}

TEST(tickets_say_when_an_operation_is_done) {
    World world(3, 2, 1, quick(0));
    Node& node = world.nodes[0];
    node.regions[1][0] = 11;
    for (int32_t peer : {1, 2}) {
        const Ticket ticket = fabric::put(node.fabric, {peer, 1}, {2, 0, 64}, {1, 0, 0}, 16);
        CHECK(ticket != 0);
        const int64_t until = fabric::now_ns() + 80 * kSeconds;
        while (!fabric::done(node.fabric, 1, ticket)) CHECK(fabric::now_ns() < until);
        CHECK_EQUAL(world.nodes[size_t(peer)].regions[2][8], 11);
    }
    CHECK_EQUAL(world.rig.engine.violations(), 0);
}

TEST(empty_operations) {
    World world(2, 1, 1, quick(0));
    Node& node = world.nodes[0];
    CHECK(fabric::flush(node.fabric, 0, kSeconds));  // nothing was ever sent
    const Ticket nothing = fabric::put(node.fabric, {1, 0}, {2, 0, 0}, {1, 0, 0}, 0);
    CHECK(nothing != 0 && fabric::done(node.fabric, 0, nothing));
    const Ticket none = fabric::put_signal(node.fabric, {1, 0}, {2, 0, 0}, {1, 0, 0}, 0, 5);
    CHECK(none != 0);
    CHECK(fabric::flush(node.fabric, 0, 80 * kSeconds));
    CHECK_EQUAL(world.nodes[1].signal(5), 1);
    CHECK(fabric::signal_add(node.fabric, {1, 0}, 5, uint64_t(1) << 62) != 0);
    CHECK(fabric::flush(node.fabric, 0, 80 * kSeconds));
    CHECK_EQUAL(world.nodes[1].signal(5), (uint64_t(1) << 62) + 1);
}

TEST(an_error_is_reported_with_its_queue_pair) {
    World world(2, 2, 1, quick(0));
    Node& node = world.nodes[0];
    CHECK(fabric::signal_add(node.fabric, {1, 1}, 3, 1) != 0);
    // Beyond the peer's region.
    CHECK(fabric::put_signal(node.fabric, {1, 1}, {2, 0, 65536 - 8 + 16}, {1, 0, 0}, 16, 4) != 0);
    CHECK(!fabric::flush(node.fabric, 1, 80 * kSeconds));
    CHECK_EQUAL(node.state.failed, EPCOMM_FABRIC_TRANSPORT);
    const epcomm_fabric_error& error = node.state.error;
    CHECK_EQUAL(error.vendor, mlx5::kRemoteAccess << 8 | kVendorRemoteAccess);
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 1);
    CHECK_EQUAL(error.queue_pair, fabric::queue_of(node.fabric, {1, 1})->number);
    CHECK_EQUAL(error.position, 1);
    CHECK_EQUAL(world.nodes[1].signal(3), 1);
    CHECK_EQUAL(world.nodes[1].signal(4), 0);
    // Everything ends at once after that, on other channels too.
    CHECK(fabric::put(node.fabric, {1, 0}, {2, 0, 0}, {1, 0, 0}, 16) == 0);
    CHECK(!fabric::flush(node.fabric, 0, 80 * kSeconds));
}

TEST(a_dead_peer_is_an_error) {
    World world(2, 1, 1, quick(0));
    Node& node = world.nodes[0];
    world.rig.network.kill_nic(1);
    CHECK(fabric::put_signal(node.fabric, {1, 0}, {2, 0, 0}, {1, 0, 0}, 16, 0) != 0);
    CHECK(!fabric::flush(node.fabric, 0, 80 * kSeconds));
    CHECK_EQUAL(node.state.error.vendor, mlx5::kRetryExceeded << 8 | kVendorRetry);
}

TEST(an_own_dead_nic_ends_in_the_deadline) {
    World world(2, 1, 1, quick(0));
    Node& node = world.nodes[0];
    world.rig.network.kill_nic(0);
    node.fabric.timeout_ns = 50'000'000;
    // A flush whose time is over has lost nothing, so the fabric goes on.
    CHECK(fabric::put_signal(node.fabric, {1, 0}, {2, 0, 0}, {1, 0, 0}, 16, 0) != 0);
    CHECK(!fabric::flush(node.fabric, 0, 20'000'000));
    CHECK_EQUAL(node.state.failed, 0);
    // A producer that finds no room within its time ends the fabric.
    Ticket ticket = 1;
    for (int i = 0; i < 20 && ticket != 0; ++i) {
        ticket = fabric::signal_add(node.fabric, {1, 0}, 1, 1);
    }
    CHECK_EQUAL(ticket, 0);
    CHECK_EQUAL(node.state.failed, EPCOMM_FABRIC_RING_FULL);
}

TEST(bad_commands_are_refused_before_they_are_posted) {
    const struct {
        Lane lane;
        epcomm_fabric_place remote;
        int32_t signal;
    } all[] = {{{2, 0}, {2, 0, 0}, 0},  {{-1, 0}, {2, 0, 0}, 0}, {{0, 0}, {2, 0, 0}, 0},
               {{1, 1}, {2, 0, 0}, 0},  {{1, -1}, {2, 0, 0}, 0}, {{1, 0}, {8, 0, 0}, 0},
               {{1, 0}, {-1, 0, 0}, 0}, {{1, 0}, {2, 0, 0}, -1}, {{1, 0}, {2, 0, 0}, kSignals}};
    for (const auto& one : all) {
        World world(2, 1, 1, quick(0));
        Node& node = world.nodes[0];
        CHECK(fabric::put_signal(node.fabric, one.lane, one.remote, {1, 0, 0}, 16, one.signal) ==
              0);
        CHECK_EQUAL(node.state.failed, EPCOMM_FABRIC_BAD_TRIGGER);
        CHECK_EQUAL(fabric::queue_at(node.fabric, 1)->reserved, 0);
    }
}

TEST(local_places_out_of_range_are_refused_before_they_are_posted) {
    const struct {
        epcomm_fabric_place local;
        uint64_t bytes;
        bool is_good;
    } all[] = {{{1, 0, 0}, 0, true},
               {{1, 0, 64}, 16, true},
               {{7, 0, 0}, 16, false},  // no such region
               {{1, 0, uint64_t(1) << 40}, 16, false},
               {{1, 0, 16}, ~uint64_t(15), false}};
    for (const auto& one : all) {
        World world(2, 1, 1, quick(0));
        Node& node = world.nodes[0];
        const auto ticket =
            fabric::put_signal(node.fabric, {1, 0}, {2, 0, 0}, one.local, one.bytes, 0);
        CHECK_EQUAL(ticket != 0, one.is_good);
        if (one.is_good) continue;
        CHECK_EQUAL(node.state.failed, EPCOMM_FABRIC_BAD_TRIGGER);
        CHECK_EQUAL(fabric::queue_at(node.fabric, 1)->reserved, 0);
        // The ticket of a failed call names no queue.
        CHECK(!fabric::done(node.fabric, 0, ticket));
    }
}
