// The transports over emulated NICs on a GPU as a whole: what they bring, count and tell.

#include "gpu_ends.h"

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
