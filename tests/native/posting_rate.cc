// Writers whose posting rate is measured (csrc/fabric/posting_rate.h), and their floor, by threads.
// Over both kinds of fabric: gpu_nics.cc.

#include "../../csrc/fabric/posting_rate.h"

#include <memory>
#include <thread>

#include "fabric_world.h"

using namespace rig;
using fabric::PostingSpan;

namespace {

constexpr int32_t kSend = 1, kReceive = 2, kFirstSignal = 7;

/// Writers of node 0, to node 1.
epcomm_posting_probe probe_of(int32_t channels, int32_t warps, int32_t puts) {
    epcomm_posting_probe probe{};
    probe.local = {kSend, 0, 1024};
    probe.remote = {kReceive, 0, 2048};
    probe.bytes = 64;
    probe.timeout_ns = 80 * kSeconds;
    probe.kind = EPCOMM_FABRIC_KIND_IBGDA;
    probe.peer = 1;
    probe.num_channels = channels;
    probe.num_warps = warps;
    probe.puts = puts;
    probe.num_places = 4;
    probe.first_signal = kFirstSignal;
    return probe;
}

Options real_time() {
    Options options;
    options.engine.virtual_clock = false;
    options.line = {0, 4096, 30, 0, 0, 1, 5'000'000, 0};
    return options;
}

}  // namespace

TEST(every_put_and_signal_arrives_in_its_place) {
    constexpr int32_t kChannels = 2, kWarps = 3, kPuts = 40;
    World world(2, kChannels, 1, real_time());
    Node &from = world.nodes[0], &to = world.nodes[1];
    for (size_t i = 0; i < from.regions[kSend].size(); ++i) from.regions[kSend][i] = i + 1;
    const epcomm_posting_probe probe = probe_of(kChannels, kWarps, kPuts);
    PostingSpan spans[kChannels * kWarps] = {};
    char good[kChannels * kWarps] = {};
    std::vector<std::thread> threads;
    for (int32_t warp = 0; warp < kChannels * kWarps; ++warp) {
        threads.emplace_back(
            [&, warp] { good[warp] = fabric::post_puts(from.fabric, probe, warp, &spans[warp]); });
    }
    for (auto& thread : threads) thread.join();
    for (const char ok : good) CHECK(ok);
    for (const PostingSpan& span : spans) {
        CHECK(span.begin < span.posted && span.posted <= span.completed);
    }
    for (int32_t c = 0; c < kChannels; ++c) {
        CHECK_EQUAL(to.signal(kFirstSignal + c), kWarps * kPuts);
    }
    // Places of all warps, next to each other, and nothing else.
    const uint64_t first = 2048 / 8, words = kChannels * kWarps * 4 * 64 / 8;
    for (uint64_t i = 0; i < to.regions[kReceive].size(); ++i) {
        const bool inside = i >= first && i < first + words;
        CHECK_EQUAL(to.regions[kReceive][i], inside ? 1024 / 8 + i - first + 1 : 0);
    }
    CHECK_EQUAL(world.rig.engine.violations(), 0);
}

TEST(times_are_of_each_put_until_it_has_completed) {
    Options options = real_time();
    options.line.latency_ns = 1'000'000;
    World world(2, 1, 1, options);
    epcomm_posting_probe probe = probe_of(1, 1, 5);
    uint64_t times[6] = {};
    probe.times = times;
    PostingSpan span{};
    CHECK(fabric::post_puts(world.nodes[0].fabric, probe, 0, &span));
    uint64_t sum = 0;
    for (int i = 0; i < 5; ++i) {
        CHECK(times[i] >= 2'000'000);  // there and back
        sum += times[i];
    }
    CHECK_EQUAL(times[5], 0);
    CHECK(sum <= uint64_t(span.posted - span.begin));
}

TEST(a_put_that_fails_is_told) {
    World world(2, 1, 1, real_time());
    world.rig.network.kill_nic(1);
    PostingSpan span{};
    CHECK(!fabric::post_puts(world.nodes[0].fabric, probe_of(1, 1, 3), 0, &span));
    CHECK_EQUAL(span.completed, 0);
}

TEST(floor_writes_the_requests_of_a_put_and_rings) {
    World world(2, 1, 1, real_time());
    const epcomm_posting_probe probe = probe_of(1, 1, 3);
    PostingSpan span{};
    CHECK(fabric::post_puts(world.nodes[0].fabric, probe, 0, &span));
    const SendQueue& posted = world.nodes[0].queues[1];
    const auto unread = std::make_unique<fabric::UnreadQueue>();
    PostingSpan floor{};
    fabric::write_unread(probe, 0, unread.get(), &floor);
    CHECK(floor.begin < floor.posted);
    CHECK_EQUAL(floor.completed, 0);
    const auto field = [](const Block& block, size_t unit, size_t at) {
        return reinterpret_cast<const uint8_t*>(&block.unit[unit])[at];
    };
    for (size_t i = 0; i < 6; ++i) {
        const Block &mine = unread->ring[i], &theirs = posted.ring[i];
        // Index, opcode and flags; the size of the data, or of the signal. Not who and where.
        for (const size_t at : {0u, 1u, 2u, 3u, 7u, 11u}) {
            CHECK_EQUAL(field(mine, 0, at), field(theirs, 0, at));
        }
        for (size_t at = 0; at < 4; ++at) CHECK_EQUAL(field(mine, 2, at), field(theirs, 2, at));
    }
    CHECK_EQUAL(unread->record[mlx5::kSendRecord], 6);
    mlx5::Doorbell doorbell;
    memcpy(&doorbell, &unread->doorbell, sizeof doorbell);
    const mlx5::Doorbell expected = mlx5::next_index_doorbell(0, 6);
    CHECK(memcmp(&doorbell, &expected, sizeof doorbell) == 0);
}

TEST(floor_writes_the_trigger_of_a_put) {
    epcomm_posting_probe probe = probe_of(1, 1, 3);
    probe.num_warps = 2;
    const auto unread = std::make_unique<fabric::UnreadRing>();
    PostingSpan floor{};
    fabric::write_unread(probe, 1, unread.get(), &floor);
    const epcomm_ring ring = {unread->slots, nullptr, nullptr, fabric::UnreadRing::kSlots};
    fabric::Command seen;
    for (uint64_t i = 0; i < 3; ++i) {
        CHECK(fabric::take(ring, i, &seen));
        CHECK_EQUAL(seen.op, EPCOMM_FABRIC_PUT_SIGNAL);
        CHECK_EQUAL(seen.bytes, 64);
        CHECK_EQUAL(seen.peer, 1);
        CHECK_EQUAL(seen.signal, kFirstSignal);
        CHECK_EQUAL(seen.remote.offset, 2048 + (4 + i) * 64);
        CHECK_EQUAL(seen.local.offset, 1024 + (4 + i) * 64);
    }
    CHECK(!fabric::take(ring, 3, &seen));
}
