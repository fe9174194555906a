// Bytes between ranks over what the transport `mlx5` has set up: requests are written through
// fabric/ibgda.h by the threads of several ranks, as kernels would do it, and the emulated NICs
// that stand behind the fake's cards carry them out.

#include <thread>

#include "../../csrc/fabric/ibgda_probe.h"
#include "../../csrc/fabric/planes.h"
#include "check.h"
#include "fake_mlx5.h"

using namespace fake;
namespace fabric = epcomm::fabric;
namespace mlx5 = epcomm::mlx5;
using fabric::Ticket;

namespace {

constexpr int64_t kSeconds = 1'000'000'000;
constexpr uint64_t kChunk = 512;  // bytes

struct Nodes {
    World world;
    std::vector<std::unique_ptr<Rank>> ranks;

    Nodes(int32_t num_nodes, int32_t channels, int32_t planes, const std::string& options,
          bool on_gpu, Network network = kRoceV2, bool atomics = true)
        : world(cards(num_nodes * planes, network, atomics)) {
        std::vector<Rank*> all;
        for (int32_t node = 0; node < num_nodes; ++node) {
            std::string nics = "nic=";
            for (int32_t plane = 0; plane < planes; ++plane) {
                nics += (plane > 0 ? "+mlx5_" : "mlx5_") + std::to_string(node * planes + plane);
            }
            ranks.push_back(
                std::make_unique<Rank>(node, num_nodes, channels, nics + " " + options, on_gpu));
            all.push_back(ranks.back().get());
        }
        const std::string why = connect_all(all);
        if (!why.empty()) fprintf(stderr, "%s\n", why.c_str());
        CHECK(why.empty());
        world.start();
    }

    static std::vector<CardOptions> cards(int32_t count, Network network, bool atomics) {
        CardOptions card;
        card.network = network;
        card.atomics = atomics;
        return std::vector<CardOptions>(size_t(count), card);
    }

    mlx5::SendQueue& queue(int32_t node, int32_t peer, int32_t channel) {
        return *fabric::queue_of(ranks[size_t(node)]->ibgda(), {peer, channel});
    }
    uint64_t signal(int32_t node, int32_t index) {
        return fabric::load_acquire(&ranks[size_t(node)]->region(0)[size_t(index)]);
    }
    bool await(int32_t node, int32_t index, uint64_t value) {
        const int64_t until = fabric::now_ns() + 80 * kSeconds;
        while (signal(node, index) < value) {
            if (fabric::now_ns() > until) return false;
            if (fabric::failed(ranks[size_t(node)]->ibgda())) return false;
            fabric::relax();
        }
        return true;
    }
    void expect_clean() {
        world.stop();
        world.engine().check_idle();
        for (const auto& event : world.engine().events()) {
            printf("%s\n", epcomm::emulated::describe(event).c_str());
        }
        CHECK_EQUAL(world.engine().violations(), 0);
    }
};

/// Everybody sends chunks to everybody on every channel, and looks into those that come.
void exchange(Nodes& nodes, int32_t channels, int chunks) {
    const auto count = int32_t(nodes.ranks.size());
    std::vector<std::thread> threads;
    std::vector<char> good(size_t(count), 1);
    const auto word = [](int i, int32_t from, int32_t channel, uint64_t k) {
        return uint64_t(i) << 40 | uint64_t(from) << 32 | uint64_t(channel) << 16 | k;
    };
    for (int32_t me = 0; me < count; ++me) {
        threads.emplace_back([&, me] {
            Rank& rank = *nodes.ranks[size_t(me)];
            const epcomm_ibgda& ibgda = rank.ibgda();
            bool ok = true;
            const auto place = [&](int32_t node, int32_t channel) {
                return uint64_t(node * channels + channel) * kChunk;
            };
            const auto each = [&](const auto& body) {
                for (int32_t peer = 0; peer < count; ++peer) {
                    for (int32_t channel = 0; peer != me && channel < channels; ++channel) {
                        ok = ok && body(peer, channel);
                    }
                }
            };
            for (int i = 1; i <= chunks && ok; ++i) {
                each([&](int32_t peer, int32_t channel) {
                    uint64_t* out = &rank.region(1)[place(peer, channel) / 8];
                    for (uint64_t k = 0; k < kChunk / 8; ++k) out[k] = word(i, me, channel, k);
                    return fabric::put_signal(ibgda, {peer, channel}, {2, 0, place(me, channel)},
                                              {1, 0, place(peer, channel)}, kChunk,
                                              me * channels + channel) != 0;
                });
                each([&](int32_t peer, int32_t channel) {
                    if (!nodes.await(me, peer * channels + channel, uint64_t(i))) return false;
                    const uint64_t* in = &rank.region(2)[place(peer, channel) / 8];
                    for (uint64_t k = 0; k < kChunk / 8; ++k) {
                        if (in[k] != word(i, peer, channel, k)) return false;
                    }
                    // The sender may go on.
                    return fabric::signal_add(ibgda, {peer, channel}, 64 + me * channels + channel,
                                              1) != 0;
                });
                each([&](int32_t peer, int32_t channel) {
                    return nodes.await(me, 64 + peer * channels + channel, uint64_t(i));
                });
            }
            for (int32_t channel = 0; channel < channels; ++channel) {
                ok = ok && fabric::flush(ibgda, channel, 80 * kSeconds);
            }
            good[size_t(me)] = ok;
        });
    }
    for (auto& thread : threads) thread.join();
    for (const char ok : good) CHECK(ok);
    nodes.expect_clean();
}

}  // namespace

TEST(host_threads_over_infiniband) {
    Nodes nodes(2, 2, 1, "depth=16", false, kInfiniband);
    exchange(nodes, 2, 200);
}

TEST(host_threads_over_roce_among_three) {
    Nodes nodes(3, 2, 1, "depth=16", false);
    exchange(nodes, 2, 60);
}

TEST(gpu_memory_with_mapped_doorbells_and_two_planes) {
    Nodes nodes(2, 4, 2, "depth=32", true);
    CHECK(nodes.ranks[0]->describe().find("doorbells by gpu") != std::string::npos);
    exchange(nodes, 4, 100);
}

TEST(gpu_memory_with_doorbells_that_a_processor_carries) {
    Nodes nodes(2, 2, 1, "depth=16 doorbell=cpu", true);
    CHECK(nodes.ranks[0]->describe().find("doorbells by cpu") != std::string::npos);
    // The same code rings; only the word is another. The register is no place of the kernels'.
    for (const Call& call : nodes.world.calls("host_register")) CHECK_EQUAL(call.a, 0);
    exchange(nodes, 2, 200);
}

TEST(queues_of_a_gpu_in_host_memory) {
    Nodes nodes(2, 2, 1, "depth=16 queues=host", true);
    CHECK(nodes.ranks[0]->describe().find("in host, ") != std::string::npos);
    exchange(nodes, 2, 100);
}

TEST(lanes_leave_a_card_that_does_not_answer) {
    for (const bool on_gpu : {false, true}) {
        Nodes nodes(2, 4, 2, "depth=16 failover=1", on_gpu);
        nodes.world.network().wire()->nic(1).line.retry_ns = 1'000'000;
        nodes.world.network().kill_nic(3);  // node 1's second one
        Rank& rank = *nodes.ranks[0];
        const fabric::Planes planes(rank.ibgda());
        for (uint64_t i = 0; i < 80; ++i) {
            const auto channel = int32_t(i % 4);
            rank.region(1)[8 * i] = 1000 + i;
            CHECK(fabric::put_signal(planes, {1, channel}, {2, 0, 64 * i}, {1, 0, 64 * i}, 64,
                                     channel) != 0);
        }
        for (int32_t channel = 0; channel < 4; ++channel) {
            CHECK(fabric::flush(planes, channel, 80 * kSeconds));
            CHECK_EQUAL(nodes.signal(1, channel), 20);
        }
        for (uint64_t i = 0; i < 80; ++i) {
            CHECK_EQUAL(nodes.ranks[1]->region(2)[8 * i], 1000 + i);
        }
        CHECK_EQUAL(epcomm_fabric_check(rank.end(), 0), 0);
        CHECK_EQUAL(epcomm_fabric_num_losses(rank.end()), 1);
        int32_t peer = -1;
        const std::string text = epcomm_fabric_loss_text(rank.end(), 0, &peer);
        CHECK_EQUAL(peer, 1);
        CHECK(text.find("plane 1 is dead: mlx5: transport retries exceeded") == 0);
    }
}

TEST(a_wrong_place_at_the_peer_is_reported_in_words) {
    Nodes nodes(2, 2, 1, "depth=16", false);
    Rank& rank = *nodes.ranks[0];
    CHECK(fabric::put_signal(rank.ibgda(), {1, 1}, {2, 0, 65536 - 16}, {1, 0, 0}, 64, 3) != 0);
    CHECK(!fabric::flush(rank.ibgda(), 1, 80 * kSeconds));
    CHECK_EQUAL(epcomm_fabric_check(rank.end(), 0), EPCOMM_FABRIC_TRANSPORT);
    const epcomm_fabric_error& error = rank.state().error;
    CHECK_EQUAL(error.vendor >> 8, mlx5::kRemoteAccess);
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 1);
    CHECK(strstr(error.text, "remote access error") != nullptr);
    CHECK(strstr(error.text, "outside of what the peer registered") != nullptr);
    CHECK_EQUAL(nodes.signal(1, 3), 0);
}

TEST(a_region_that_the_peer_lacks_is_an_error_too) {
    Nodes nodes(2, 1, 1, "depth=16", true);
    Rank& rank = *nodes.ranks[0];
    CHECK(fabric::put_signal(rank.ibgda(), {1, 0}, {7, 0, 0}, {1, 0, 0}, 64, 3) != 0);
    CHECK(!fabric::flush(rank.ibgda(), 0, 80 * kSeconds));
    CHECK_EQUAL(rank.state().error.vendor >> 8, mlx5::kRemoteAccess);
}

/// Node 0's producer, which sends to node 1.
epcomm_ibgda_probe probe_of(Nodes& nodes, uint64_t* result) {
    epcomm_ibgda_probe probe{};
    probe.ibgda = nodes.ranks[0]->ibgda();
    probe.result = result;
    probe.local = {1, 0, 0};
    probe.remote = {2, 0, 4096};
    probe.counter = {EPCOMM_FABRIC_SIGNALS, 0, 8 * 13};
    probe.answers = {2, 0, 64};
    probe.bytes = 4096;
    probe.timeout_ns = 80 * kSeconds;
    probe.peer = 1;
    probe.channel = 1;
    probe.signal = 5;
    probe.other_signal = 9;
    probe.rounds = 20;
    probe.adds = 1;
    return probe;
}

TEST(a_producer_times_its_requests) {
    for (const bool on_gpu : {false, true}) {
        Nodes nodes(2, 2, 1, "depth=16", on_gpu);
        Rank& rank = *nodes.ranks[0];
        for (uint64_t k = 0; k < 512; ++k) rank.region(1)[k] = 7 * k;
        uint64_t result[7] = {};
        epcomm_ibgda_probe probe = probe_of(nodes, result);
        epcomm_fabric_measure_ibgda(&probe);
        CHECK_EQUAL(result[0], 0);
        for (int i = 1; i < 7; ++i) CHECK(result[i] > 0 && result[i] < 80 * kSeconds);
        CHECK_EQUAL(nodes.signal(1, 5), 20);
        CHECK_EQUAL(nodes.signal(1, 9), 20);
        CHECK_EQUAL(nodes.signal(1, 13), 20);
        for (uint64_t i = 0; i < 20; ++i) CHECK_EQUAL(rank.region(2)[8 + i], i);
        for (uint64_t k = 0; k < 512; ++k) {
            CHECK_EQUAL(nodes.ranks[1]->region(2)[512 + k], 7 * k);
        }
        // Beyond the peer's region every round fails, and no time is told.
        probe.remote = {2, 0, 65536 - 16};
        epcomm_fabric_measure_ibgda(&probe);
        CHECK_EQUAL(result[0], 20);
        for (int i = 1; i < 7; ++i) CHECK_EQUAL(result[i], ~uint64_t(0));
    }
}

TEST(a_producer_adds_to_nothing_on_cards_without_atomics) {
    Nodes nodes(2, 2, 1, "depth=16", false, kRoceV2, false);
    uint64_t result[7] = {};
    epcomm_ibgda_probe probe = probe_of(nodes, result);
    probe.adds = epcomm_fabric_has_atomics(nodes.ranks[0]->end());
    epcomm_fabric_measure_ibgda(&probe);
    CHECK_EQUAL(result[0], 0);
    CHECK_EQUAL(result[6], ~uint64_t(0));
    CHECK_EQUAL(nodes.signal(1, 9), 20);
    CHECK_EQUAL(nodes.signal(1, 13), 0);
    // They would refuse it.
    probe.adds = 1;
    epcomm_fabric_measure_ibgda(&probe);
    CHECK_EQUAL(result[0], 20);
    CHECK_EQUAL(nodes.ranks[0]->state().error.vendor >> 8, mlx5::kRemoteAccess);
}

TEST(an_addition_to_a_wrong_place_at_the_peer_is_reported) {
    Nodes nodes(2, 2, 1, "depth=16", false);
    uint64_t result[7] = {};
    epcomm_ibgda_probe probe = probe_of(nodes, result);
    probe.counter = {EPCOMM_FABRIC_SIGNALS, 0, 65536};
    epcomm_fabric_measure_ibgda(&probe);
    CHECK_EQUAL(result[0], 20);
    const epcomm_fabric_error& error = nodes.ranks[0]->state().error;
    CHECK_EQUAL(error.vendor >> 8, mlx5::kRemoteAccess);
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 1);
}

TEST(an_addition_in_a_region_that_cannot_be_is_no_request) {
    Nodes nodes(2, 1, 1, "depth=16", false);
    const Rank& rank = *nodes.ranks[0];
    CHECK_EQUAL(fabric::fetch_add_at(rank.ibgda(), {1, 0}, {8, 0, 0}, {2, 0, 0}, 1), 0);
    CHECK_EQUAL(rank.state().error.status, EPCOMM_FABRIC_BAD_TRIGGER);
    CHECK_EQUAL(nodes.queue(0, 1, 0).reserved, 0);
}

TEST(time_to_completion_begins_when_the_doorbell_has_been_rung) {
    constexpr uint64_t kSlow = 30'000'000;
    Nodes nodes(2, 1, 1, "depth=16", false);
    uint64_t result[7] = {};
    epcomm_ibgda_probe probe = probe_of(nodes, result);
    probe.channel = 0;
    const auto slowly = [&] {
        const int64_t until = fabric::now_ns() + int64_t(kSlow);
        while (fabric::now_ns() < until) {
        }
        return fabric::signal_add(probe.ibgda, {1, 0}, 9, 1);
    };
    fabric::ProbeTimes slow_call;
    for (int i = 0; i < 5; ++i) CHECK(fabric::time_of(probe, slowly, &slow_call));
    CHECK(slow_call.call >= kSlow);
    CHECK(slow_call.completion < kSlow);
    // And a slow line is seen there.
    nodes.world.network().wire()->nic(0).line.latency_ns = kSlow;
    probe.rounds = 1;
    epcomm_fabric_measure_ibgda(&probe);
    CHECK_EQUAL(result[0], 0);
    for (const int completion : {2, 4, 6}) CHECK(result[completion] > kSlow / 2);
}

TEST(closing_waits_for_what_was_asked_for) {
    for (const bool on_gpu : {false, true}) {
        Nodes nodes(2, 1, 1, "depth=16", on_gpu);
        // A slow line: half a second until a signal is acknowledged.
        nodes.world.network().wire()->nic(0).line.latency_ns = 250'000'000;
        const Ticket ticket = fabric::signal_add(nodes.ranks[0]->ibgda(), {1, 0}, 5, 1);
        CHECK(ticket != 0);
        const double seconds = nodes.ranks[0]->close();
        CHECK(seconds > 0.2 && seconds < 5);
        CHECK_EQUAL(nodes.signal(1, 5), 1);
    }
}

TEST(closing_does_not_wait_for_a_peer_that_is_gone) {
    Nodes nodes(2, 1, 1, "depth=16", false);
    nodes.world.network().kill_nic(0);
    CHECK(fabric::signal_add(nodes.ranks[0]->ibgda(), {1, 0}, 5, 1) != 0);
    const double seconds = nodes.ranks[0]->close();
    CHECK(seconds > 0.9 && seconds < 5);  // the second that it was given
}
