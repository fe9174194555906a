// Every step of the set-up fails in turn: its name and its remedy are in the error, and all that
// was made before it is given back. Then what is no failure: the ways around.

#include <errno.h>
#include <unistd.h>

#include "../../csrc/fabric/mlx5/step.h"
#include "check.h"
#include "fake_mlx5.h"

using namespace fake;
using epcomm::fabric::devx::Step;

namespace {

void expect_text(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts) {
        if (has(text, part)) continue;
        fprintf(stderr, "\"%s\" is not in: %s\n", part.c_str(), text.c_str());
        CHECK(false);
    }
}

void expect_nothing_left(const World& world) {
    if (!world.live().empty()) fprintf(stderr, "left: %s\n", world.live().c_str());
    CHECK(world.live().empty());
}

struct Case {
    const char* call;  ///< of the fake that fails
    int nth;
    Step step;
    bool on_gpu = true;
    const char* options = "";
    Network network = kRoceV2;
};

/// A rank with two cards, a peer with two; the first error of anybody.
std::string first_error(World* world, const Case& one) {
    const std::string options = one.options;
    Rank a(0, 2, 4, "nic=mlx5_0+mlx5_1 " + options, one.on_gpu);
    Rank b(1, 2, 4, "nic=mlx5_2+mlx5_3 " + options, one.on_gpu);
    world->fail(one.call, EIO, one.nth);
    return connect_all({&a, &b});
}

void check(const Case& one) {
    CardOptions card;
    card.network = one.network;
    World world({4, card});
    const std::string error = first_error(&world, one);
    expect_text(error, {"ibgda: " + std::string(name_of(one.step)) + " failed on ",
                        "; " + std::string(remedy_of(one.step))});
    expect_nothing_left(world);
}

/// In the first call, and in the last one of a world that works.
void check_first_and_last(const Case& one) {
    CardOptions card;
    card.network = one.network;
    int count = 0;
    {
        World world({4, card});
        const std::string error =
            first_error(&world, {"nothing", 1, one.step, one.on_gpu, one.options, one.network});
        CHECK(error.empty());
        count = int(world.calls(one.call).size());
        expect_nothing_left(world);
    }
    CHECK(count > 0);
    Case nth = one;
    for (const int n : {1, count}) {
        nth.nth = n;
        check(nth);
    }
}

}  // namespace

TEST(opening_fails) { check_first_and_last({"open_device", 1, Step::kDevice}); }
TEST(capabilities_fail) { check_first_and_last({"query_hca_cap", 1, Step::kCapabilities}); }
TEST(number_of_the_domain_fails) { check({"init_obj", 1, Step::kDomain}); }
TEST(event_queue_fails) { check_first_and_last({"query_eqn", 1, Step::kEventQueue}); }
TEST(registration_of_host_memory_fails) {
    check_first_and_last({"reg_mr", 1, Step::kRegions, false});
}
TEST(registers_fail) { check({"alloc_uar", 0, Step::kRegister}); }
TEST(mapping_fails_where_nothing_else_will_do) {
    check_first_and_last({"host_register", 1, Step::kMapping, true, "doorbell=gpu"});
    check({"host_pointer", 1, Step::kMapping, true, "doorbell=gpu"});
}
TEST(queue_memory_fails_in_the_gpu_and_the_host) {
    check({"umem_reg", 0, Step::kQueueMemory, false});
    check({"cuMemAlloc", 0, Step::kQueueMemory, true, "queues=gpu"});
    check({"umem_reg", 0, Step::kQueueMemory, true, "queues=host"});
    check({"cuMemHostAlloc", 0, Step::kQueueMemory, true, "queues=host"});
}
TEST(tables_fail) {
    check_first_and_last({"cuMemAlloc", 1, Step::kProducerMemory, true, "queues=host"});
}
TEST(words_of_doorbells_fail) {
    check({"cuMemHostAlloc", 1, Step::kProducerMemory, true, "doorbell=cpu"});
}
TEST(completion_queues_fail) { check_first_and_last({"create_cq", 1, Step::kCompletionQueue}); }
TEST(queue_pairs_fail) { check_first_and_last({"create_qp", 1, Step::kQueuePair}); }
TEST(init_fails) { check_first_and_last({"rst2init", 1, Step::kInit}); }
TEST(addresses_fail) { check_first_and_last({"create_ah", 1, Step::kPath}); }
TEST(receiving_fails) {
    check_first_and_last({"init2rtr", 1, Step::kReachPeer});
    check_first_and_last({"init2rtr", 1, Step::kReachPeer, false, "", kInfiniband});
}
TEST(sending_fails) { check_first_and_last({"rtr2rts", 1, Step::kSend}); }

TEST(a_failed_command_says_what_the_card_said) {
    World world(std::vector<CardOptions>(2));
    Rank rank(0, 2, 1, "nic=mlx5_0", false);
    world.fail("create_qp", EREMOTEIO, 1);
    expect_text(rank.open(), {"queue pair failed on mlx5_0 for node 1, channel 0",
                              "Remote I/O error (status 0x3, syndrome 0x123456)"});
}

TEST(unfit_cards_are_named_with_the_reason) {
    const struct {
        void (*spoil)(CardOptions*);
        const char* reason;
    } cases[] = {
        {[](CardOptions* c) { c->overrun_ignore = false; }, "cannot ignore that they overrun"},
        {[](CardOptions* c) { c->log_max_msg = 24; }, "2^24 bytes, and 2^30 are needed"},
        {[](CardOptions* c) { c->active = false; }, "mlx5_0 port 1 is not active"},
        {[](CardOptions* c) { c->mlx5 = false; }, "no device \"mlx5_0\" here"},
    };
    for (const auto& one : cases) {
        std::vector<CardOptions> cards(2);
        one.spoil(&cards[0]);
        World world(cards);
        {
            Rank rank(0, 2, 1, "nic=mlx5_0", false);
            expect_text(rank.open(), {one.reason});
        }
        expect_nothing_left(world);
    }
}

TEST(without_a_connectx_the_other_cards_are_named) {
    CardOptions other;
    other.mlx5 = false;
    World world({other, other});
    Rank rank(0, 2, 1, "", false);
    expect_text(rank.open(), {"no mlx5 network card (ConnectX) here, only mlx5_0, mlx5_1"});
}

TEST(cards_of_two_networks_are_not_connected) {
    CardOptions ethernet;
    ethernet.network = kRoceV2;
    World world({CardOptions(), ethernet});
    Rank one(0, 2, 1, "nic=mlx5_0", false), other(1, 2, 1, "nic=mlx5_1", false);
    expect_text(connect_all({&one, &other}), {"different networks, InfiniBand and Ethernet"});
}

TEST(ranks_with_another_number_of_cards_or_channels_are_refused) {
    World world(std::vector<CardOptions>(4));
    {
        Rank one(0, 2, 2, "nic=mlx5_0", false), other(1, 2, 2, "nic=mlx5_1+mlx5_2", false);
        expect_text(connect_all({&one, &other}),
                    {"node 1 has 2 network cards a rank and this one has 1"});
    }
    Rank one(0, 2, 2, "nic=mlx5_0", false), other(1, 2, 3, "nic=mlx5_1", false);
    expect_text(connect_all({&one, &other}), {"another number of channels"});
}

TEST(options_are_checked) {
    const char* const bad[] = {"depth=8",     "depth=x",       "registers=0", "doorbell=nic",
                               "queues=disk", "signal=atomic", "inline=64",   "registration=bounce",
                               "color=1",     "nic="};
    for (const char* option : bad) {
        World world(std::vector<CardOptions>(2));
        {
            Rank rank(0, 2, 1, option, false);
            const std::string name = std::string(option).substr(0, std::string(option).find('='));
            expect_text(rank.open(), {"option", name, "expected"});
        }
        expect_nothing_left(world);
    }
}

TEST(queues_fall_from_dmabuf_to_peermem_to_the_host) {
    const auto describe = [](const char* refused, int error) {
        World world(std::vector<CardOptions>(2));
        if (refused != nullptr) world.fail(refused, error);
        if (std::string(refused != nullptr ? refused : "") == "umem_reg_ex+umem_reg") {
            world.fail("umem_reg_ex", EFAULT);
            world.fail("umem_reg", EFAULT, 1);
        }
        std::string text;
        {
            Rank rank(0, 2, 1, "nic=mlx5_0", true);
            const std::string why = rank.open();
            CHECK(why.empty());
            text = rank.describe();
        }
        expect_nothing_left(world);
        return text;
    };
    expect_text(describe(nullptr, 0), {"in dmabuf, "});
    expect_text(describe("umem_reg_ex", EFAULT), {"in peermem (no dmabuf: Bad address)"});
    expect_text(describe("umem_reg_ex+umem_reg", 0),
                {"in host (no dmabuf: Bad address; no peermem: Bad address)"});
    World world(std::vector<CardOptions>(2));
    world.has_umem_reg_ex = false;
    Rank rank(0, 2, 1, "nic=mlx5_0", true);
    CHECK(rank.open().empty());
    expect_text(rank.describe(), {"in peermem (no dmabuf: libmlx5 lacks mlx5dv_devx_umem_reg_ex)"});
}

TEST(regions_fall_from_dmabuf_to_peermem_and_never_to_a_copy) {
    {
        World world(std::vector<CardOptions>(2));
        world.fail("export", 801);
        Rank rank(0, 2, 1, "nic=mlx5_0", true);
        CHECK(rank.open().empty());
        expect_text(rank.describe(),
                    {"regions: peermem (no dmabuf: cuMemGetHandleForAddressRange failed (CUresult "
                     "801))"});
    }
    World world(std::vector<CardOptions>(2));
    world.fail("export", 801);
    world.fail("reg_mr", EFAULT);
    {
        Rank rank(0, 2, 1, "nic=mlx5_0", true);
        const std::string error = rank.open();
        expect_text(error, {"registering regions failed on mlx5_0", "no peermem: Bad address"});
        CHECK(!has(error, "bounce"));
    }
    expect_nothing_left(world);
}

TEST(a_refused_mapping_lets_a_processor_ring) {
    World world(std::vector<CardOptions>(2));
    world.fail("host_register", 800);
    Rank rank(0, 2, 1, "nic=mlx5_0", true);
    CHECK(rank.open().empty());
    expect_text(rank.describe(), {"doorbells by cpu (cuMemHostRegister failed (CUresult 800)",
                                  "PeerMappingOverride=1"});
}

TEST(without_events_the_fabric_works_and_says_so) {
    World world(std::vector<CardOptions>(2));
    world.fail("create_event_channel", EOPNOTSUPP);
    {
        Rank one(0, 2, 1, "nic=mlx5_0", false), other(1, 2, 1, "nic=mlx5_1", false);
        CHECK(connect_all({&one, &other}).empty());
        expect_text(one.describe(), {"no events (Operation not supported)"});
        CHECK_EQUAL(epcomm_fabric_check(one.end(), 0), 0);
    }
    expect_nothing_left(world);
}

TEST(an_event_of_a_queue_pair_fails_the_fabric) {
    World world(std::vector<CardOptions>(2));
    Rank one(0, 2, 3, "nic=mlx5_0", false), other(1, 2, 3, "nic=mlx5_1", false);
    CHECK(connect_all({&one, &other}).empty());
    CHECK_EQUAL(epcomm_fabric_check(one.end(), 0), 0);
    const uint32_t number = 0x102;  // the third of its card: channel 2
    world.set_state(number, 6);
    world.tell(number, 0x05);
    CHECK_EQUAL(epcomm_fabric_check(one.end(), 0), EPCOMM_FABRIC_TRANSPORT);
    const epcomm_fabric_error& error = one.state().error;
    CHECK_EQUAL(error.peer, 1);
    CHECK_EQUAL(error.channel, 2);
    CHECK_EQUAL(error.queue_pair, number);
    expect_text(error.text, {"mlx5_0 for node 1, channel 2", "fatal error of the queue pair",
                             "state error", "kernel's log"});
}

TEST(with_failover_producers_deal_with_a_queue_pair_in_error) {
    World world(std::vector<CardOptions>(2));
    Rank one(0, 2, 3, "nic=mlx5_0 failover=1", false), other(1, 2, 3, "nic=mlx5_1", false);
    CHECK(connect_all({&one, &other}).empty());
    CHECK_EQUAL(one.ibgda().failover, 1);
    CHECK_EQUAL(other.ibgda().failover, 0);
    world.tell(0x102, 0x05);
    CHECK_EQUAL(epcomm_fabric_check(one.end(), 0), 0);
    world.tell(0x102, 0x11);  // a peer's request that it refuses is another matter
    CHECK_EQUAL(epcomm_fabric_check(one.end(), 0), EPCOMM_FABRIC_TRANSPORT);
}

TEST(a_card_that_hangs_does_not_keep_the_end) {
    World world(std::vector<CardOptions>(2));
    Rank one(0, 2, 1, "nic=mlx5_0", false), other(1, 2, 1, "nic=mlx5_1", false);
    CHECK(connect_all({&one, &other}).empty());
    world.hang("destroy_qp");
    CHECK(one.close() < 8);
    CHECK(has(world.live(), "queue pair"));
    world.release();
    other.close();
    for (int i = 0; i < 1000 && !world.live().empty(); ++i) usleep(10'000);
    expect_nothing_left(world);
}
