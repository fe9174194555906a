// Every command that the transport `mlx5` sends, bit by bit. The expected offsets and values are
// written here as numbers, apart from the library's definitions; all other bits must be 0.

#include <errno.h>

#include "../../csrc/fabric/ibgda.h"
#include "check.h"
#include "fake_mlx5.h"

using namespace fake;

namespace {

struct Expected {
    uint32_t offset, width;
    uint64_t value;
};

constexpr uint32_t kQpc = 0xc0, kPath = kQpc + 0xc0, kCqc = 0x80;

void expect(const Command& command, size_t bytes, const std::vector<Expected>& fields) {
    CHECK_EQUAL(command.in.size(), bytes);
    std::vector<uint8_t> expected(bytes);
    for (const Expected& field : fields) {
        CHECK(field.width == 64 || field.value >> field.width == 0);
        set_bits(&expected, field.offset, field.width, field.value);
        const uint64_t seen = bits(command.in, field.offset, field.width);
        if (seen == field.value) continue;
        fprintf(stderr, "command 0x%x: %u bits at 0x%x are 0x%llx, not 0x%llx\n", command.opcode,
                field.width, field.offset, (unsigned long long)seen,
                (unsigned long long)field.value);
        CHECK(false);
    }
    for (uint32_t i = 0; i < bytes * 8; ++i) {
        if (bits(command.in, i, 1) == bits(expected, i, 1)) continue;
        fprintf(stderr, "command 0x%x: bit 0x%x is set and should not be\n", command.opcode, i);
        CHECK(false);
    }
}

Command only(const World& world, uint16_t opcode, const std::string& card = "mlx5_0") {
    std::vector<Command> of_card;
    for (const Command& command : world.commands(opcode)) {
        if (command.card == card) of_card.push_back(command);
    }
    CHECK_EQUAL(of_card.size(), 1);
    return of_card[0];
}

/// Two nodes, each with a card of its own, one channel.
struct Pair {
    World world;
    Rank one, other;

    Pair(const std::vector<CardOptions>& cards, const std::string& options, bool on_gpu)
        : world(cards),
          one(0, 2, 1, "nic=mlx5_0 " + options, on_gpu),
          other(1, 2, 1, "nic=mlx5_1 " + options, on_gpu) {}

    void connect() {
        const std::string why = connect_all({&one, &other});
        if (!why.empty()) fprintf(stderr, "%s\n", why.c_str());
        CHECK(why.empty());
    }
};

CardOptions card_on(Network network) {
    CardOptions options;
    options.network = network;
    return options;
}

std::vector<CardOptions> two(const CardOptions& options) { return {options, options}; }

void expect_queues(Pair& pair, uint32_t log_depth) {
    const uint64_t ring = (64ull << log_depth) < 4096 ? 4096 : 64ull << log_depth;
    const Command cq = only(pair.world, 0x400), qp = only(pair.world, 0x500);
    const uint64_t umem = bits(cq.in, 0x2c0, 32), page = bits(cq.in, kCqc + 0x68, 24);
    CHECK(umem != 0 && page != 0);
    CHECK_EQUAL(cq.out_bytes, 16);
    expect(cq, 0x110,
           {{0, 16, 0x400},
            {kCqc + 0x06, 1, 1},          // dbr_umem_valid
            {kCqc + 0x0e, 1, 1},          // oi
            {kCqc + 0x20, 32, umem},      // dbr_umem_id
            {kCqc + 0x63, 5, log_depth},  // log_cq_size
            {kCqc + 0x68, 24, page},      // uar_page
            {kCqc + 0xb8, 8, 0x1f},       // c_eqn
            {kCqc + 0x1c0, 64, 2 * ring + 64},
            {0x280, 64, ring},  // cq_umem_offset
            {0x2c0, 32, umem},
            {0x2e0, 1, 1}});
    const uint64_t completions = bits(qp.in, kQpc + 0x3e8, 24);
    CHECK_EQUAL(qp.out_bytes, 16);
    expect(qp, 0x110,
           {{0, 16, 0x500},
            {kQpc + 0x08, 8, 0},              // st: RC
            {kQpc + 0x13, 2, 3},              // pm_state: migrated
            {kQpc + 0x28, 24, 0x700},         // pd
            {kQpc + 0x51, 4, log_depth},      // log_sq_size
            {kQpc + 0x58, 2, 1},              // ts_format: default
            {kQpc + 0x68, 24, page},          // uar_page
            {kQpc + 0x3e8, 24, completions},  // cqn_snd
            {kQpc + 0x4e8, 24, completions},  // cqn_rcv
            {kQpc + 0x500, 64, 2 * ring},     // dbr_addr
            {kQpc + 0x565, 3, 3},             // rq_type: none
            {kQpc + 0x683, 1, 1},             // dbr_umem_valid
            {kQpc + 0x720, 32, umem},         // dbr_umem_id
            {0x800, 64, 0},                   // wq_umem_offset
            {0x840, 32, umem},
            {0x860, 1, 1}});
    expect(only(pair.world, 0x502), 0x110,
           {{0, 16, 0x502},
            {0x48, 24, 0x100},      // qpn
            {kQpc + 0x13, 2, 3},    // pm_state
            {kPath + 0x10, 16, 2},  // pkey_index
            {kPath + 0x128, 8, 1},  // port
            {kQpc + 0x48c, 4, 1},   // atomic_mode: IB_SPEC
            {kQpc + 0x490, 1, 1},   // rre
            {kQpc + 0x491, 1, 1},   // rwe
            {kQpc + 0x492, 1, 1}});
}

const char* const kOptions = "depth=100 sl=3 tc=106 pkey=2 timeout=17 retries=5 rnr_retries=6";

/// All of both ends' sequence numbers meet.
void expect_sequence_numbers(Pair& pair) {
    for (const char* const* names :
         {(const char* const[]){"mlx5_0", "mlx5_1"}, (const char* const[]){"mlx5_1", "mlx5_0"}}) {
        CHECK_EQUAL(bits(only(pair.world, 0x503, names[0]).in, kQpc + 0x4a8, 24),
                    bits(only(pair.world, 0x504, names[1]).in, kQpc + 0x3c8, 24));
    }
}

std::vector<Expected> receive_fields(const Command& command, uint32_t mtu) {
    return {{0, 16, 0x503},
            {0x48, 24, 0x100},
            {kQpc + 0x40, 3, mtu},
            {kQpc + 0x43, 5, 30},      // log_msg_max
            {kQpc + 0xa8, 24, 0x100},  // remote_qpn
            {kQpc + 0x488, 3, 4},      // log_rra_max
            {kQpc + 0x4a3, 5, 12},     // min_rnr_nak
            {kQpc + 0x4a8, 24, bits(command.in, kQpc + 0x4a8, 24)},
            {kPath + 0x10, 16, 2},
            {kPath + 0x128, 8, 1}};
}

void expect_send(Pair& pair) {
    const Command send = only(pair.world, 0x504);
    expect(send, 0x110,
           {{0, 16, 0x504},
            {0x48, 24, 0x100},
            {kQpc + 0x388, 3, 4},  // log_sra_max
            {kQpc + 0x38d, 3, 5},  // retry_count
            {kQpc + 0x390, 3, 6},  // rnr_retry
            {kQpc + 0x3c8, 24, bits(send.in, kQpc + 0x3c8, 24)},
            {kPath + 0x40, 5, 17},  // ack_timeout
            {kPath + 0x128, 8, 1}});
}

void add(std::vector<Expected>* fields, const std::vector<Expected>& more) {
    fields->insert(fields->end(), more.begin(), more.end());
}

void check_infiniband(bool on_gpu) {
    Pair pair(two(card_on(kInfiniband)), kOptions, on_gpu);
    pair.connect();
    expect_queues(pair, 7);
    const Command receive = only(pair.world, 0x503);
    std::vector<Expected> fields = receive_fields(receive, 5);
    add(&fields, {{kPath + 0x30, 16, 0x22},  // rlid
                  {kPath + 0x124, 4, 3}});   // sl
    expect(receive, 0x110, fields);
    expect_send(pair);
    expect_sequence_numbers(pair);
    CHECK(pair.world.calls("create_ah").empty());
}

/// RoCE: `type` 2 is over UDP.
void check_roce(Network network, bool on_gpu) {
    Pair pair(two(card_on(network)), kOptions, on_gpu);
    pair.connect();
    expect_queues(pair, 7);
    const Command receive = only(pair.world, 0x503);
    std::vector<Expected> fields = receive_fields(receive, 5);
    add(&fields, {{kPath + 0x48, 8, 3},                    // src_addr_index
                  {kPath + 0x58, 8, 64},                   // hop_limit
                  {kPath + 0x64, 8, 106},                  // tclass
                  {kPath + 0x80, 64, 0},                   // rgid
                  {kPath + 0xc0, 64, 0x0000ffff0a000008},  //
                  {kPath + 0x121, 3, 3},                   // eth_prio
                  {kPath + 0x130, 16, 0xb83f},             // rmac
                  {kPath + 0x140, 32, 0xd2010211}});
    if (network == kRoceV2) {
        const uint64_t port = bits(receive.in, kPath + 0x110, 16);
        CHECK(port >= 0xc000);
        add(&fields, {{kPath + 0x10a, 6, 106 >> 2}, {kPath + 0x110, 16, port}});
    }
    expect(receive, 0x110, fields);
    expect_send(pair);
    expect_sequence_numbers(pair);
    const auto handles = pair.world.calls("create_ah");
    CHECK_EQUAL(handles.size(), 2);
    CHECK(handles[0].a == 1 && handles[0].b == 3);
}

}  // namespace

TEST(infiniband_from_host_memory) { check_infiniband(false); }
TEST(infiniband_from_gpu_memory) { check_infiniband(true); }
TEST(roce_v2_from_host_memory) { check_roce(kRoceV2, false); }
TEST(roce_v2_from_gpu_memory) { check_roce(kRoceV2, true); }
TEST(roce_v1_has_no_udp_port) { check_roce(kRoceV1, false); }

TEST(capabilities_are_asked_for_what_is_in_force) {
    Pair pair(two(card_on(kRoceV2)), kOptions, false);
    pair.connect();
    std::vector<Command> asked;
    for (const Command& command : pair.world.commands(0x100)) {
        if (command.card == "mlx5_0") asked.push_back(command);
    }
    CHECK_EQUAL(asked.size(), 2);
    expect(asked[0], 0x10, {{0, 16, 0x100}, {0x30, 16, 1}});
    expect(asked[1], 0x10, {{0, 16, 0x100}, {0x30, 16, 9}});
    CHECK_EQUAL(asked[0].out_bytes, 0x1010);
    const auto opened = pair.world.calls("open_device");
    CHECK(opened[0].a == 1 && opened[0].b == 0);  // DEVX
}

TEST(a_card_without_timestamp_formats_is_named_none) {
    for (const Network network : {kInfiniband, kRoceV2}) {
        CardOptions options = card_on(network);
        options.timestamp_formats = 0;
        Pair pair(two(options), kOptions, false);
        pair.connect();
        CHECK_EQUAL(bits(only(pair.world, 0x500).in, kQpc + 0x58, 2), 0);
    }
}

TEST(infiniband_across_subnets_or_where_asked_carries_global_addresses) {
    CardOptions options = card_on(kInfiniband);
    options.needs_global = true;
    Pair pair(two(options), kOptions, false);
    pair.connect();
    const Command receive = only(pair.world, 0x503);
    std::vector<Expected> fields = receive_fields(receive, 5);
    add(&fields, {{kPath + 0x28, 1, 1},  // grh
                  {kPath + 0x30, 16, 0x22},
                  {kPath + 0x58, 8, 64},
                  {kPath + 0x64, 8, 106},
                  {kPath + 0x80, 64, 0xfe80000000000000},
                  {kPath + 0xc0, 64, 8},
                  {kPath + 0x124, 4, 3}});
    expect(receive, 0x110, fields);
}

TEST(reads_and_atomics_are_clamped_to_whole_powers_of_what_both_cards_keep) {
    // As responder, as requester; then of this end: answers, and requests to the other end.
    const struct {
        int mine_in, mine_out, theirs_in;
        uint64_t answers, requests;
    } cases[] = {{16, 16, 16, 4, 4}, {20, 64, 20, 4, 4}, {12, 12, 12, 3, 3},   {16, 16, 5, 4, 2},
                 {16, 3, 16, 4, 1},  {1, 1, 1, 0, 0},    {128, 128, 128, 4, 4}};
    for (const auto& one : cases) {
        CardOptions mine = card_on(kInfiniband), theirs = mine;
        mine.max_qp_rd_atom = one.mine_in;
        mine.max_qp_init_rd_atom = one.mine_out;
        theirs.max_qp_rd_atom = one.theirs_in;
        Pair pair({mine, theirs}, kOptions, false);
        pair.connect();
        CHECK_EQUAL(bits(only(pair.world, 0x503).in, kQpc + 0x488, 3), one.answers);
        CHECK_EQUAL(bits(only(pair.world, 0x504).in, kQpc + 0x388, 3), one.requests);
    }
}

TEST(depth_is_a_power_of_two_that_queue_and_completions_can_have) {
    const struct {
        const char* option;
        uint32_t log_qp, log_cq, expected;
    } cases[] = {{"depth=512", 15, 22, 9},   {"depth=513", 15, 22, 10},
                 {"depth=16", 15, 22, 4},    {"depth=4096", 10, 22, 10},
                 {"depth=4096", 15, 11, 11}, {"depth=32768", 20, 22, 15}};
    for (const auto& one : cases) {
        CardOptions options = card_on(kInfiniband);
        options.log_max_qp_sz = one.log_qp;
        options.log_max_cq_sz = one.log_cq;
        Pair pair(two(options), one.option, false);
        pair.connect();
        CHECK_EQUAL(bits(only(pair.world, 0x500).in, kQpc + 0x51, 4), one.expected);
        CHECK_EQUAL(bits(only(pair.world, 0x400).in, kCqc + 0x63, 5), one.expected);
        CHECK_EQUAL(
            static_cast<const epcomm::mlx5::SendQueue*>(pair.one.ibgda().queues)[1].num_blocks,
            1u << one.expected);
    }
}

TEST(mtu_is_the_smaller_of_both_and_the_option) {
    CardOptions small = card_on(kInfiniband);
    small.active_mtu = 3;
    {
        Pair pair({card_on(kInfiniband), small}, kOptions, false);
        pair.connect();
        CHECK_EQUAL(bits(only(pair.world, 0x503).in, kQpc + 0x40, 3), 3);
    }
    Pair pair(two(card_on(kInfiniband)), "mtu=2048", false);
    pair.connect();
    CHECK_EQUAL(bits(only(pair.world, 0x503).in, kQpc + 0x40, 3), 4);
}

TEST(regions_are_registered_for_writes_and_atomics_and_without_relaxed_ordering) {
    // 3 regions of either side.
    for (const bool on_gpu : {false, true}) {
        Pair pair(two(card_on(kInfiniband)), kOptions, on_gpu);
        pair.connect();
        const auto by_pointer = pair.world.calls("reg_mr");
        const auto by_file = pair.world.calls("reg_dmabuf_mr");
        CHECK_EQUAL(by_pointer.size(), on_gpu ? 0 : 6);
        CHECK_EQUAL(by_file.size(), on_gpu ? 6 : 0);
        for (const Call& call : by_pointer) CHECK_EQUAL(call.c, 0xf);
        for (const Call& call : by_file) CHECK_EQUAL(call.c, 0xf);
    }
}

TEST(a_card_without_atomics_is_not_asked_for_any) {
    for (const bool atomics : {false, true}) {
        CardOptions options = card_on(kInfiniband);
        options.atomics = atomics;
        Pair pair(two(options), kOptions, false);
        pair.connect();
        CHECK_EQUAL(epcomm_fabric_has_atomics(pair.one.end()), atomics);
        const std::vector<uint8_t> in = only(pair.world, 0x502).in;
        CHECK_EQUAL(bits(in, kQpc + 0x48c, 4), atomics);  // atomic_mode
        CHECK_EQUAL(bits(in, kQpc + 0x492, 1), atomics);  // rae
        CHECK_EQUAL(bits(in, kQpc + 0x491, 1), 1);        // rwe
        for (const Call& call : pair.world.calls("reg_mr")) CHECK_EQUAL(call.c, atomics ? 0xf : 7);
    }
}

TEST(queues_in_gpu_memory_are_whole_pages_of_it) {
    Pair pair(two(card_on(kInfiniband)), kOptions, true);
    pair.connect();
    const auto made = pair.world.calls("umem_reg_ex");
    CHECK_EQUAL(made.size(), 2);
    for (const Call& call : made) {
        CHECK_EQUAL(call.a, 0);          // offset in the dma-buf
        CHECK_EQUAL(call.b % 65536, 0);  // bytes
        CHECK_EQUAL(call.c, 1);          // as a dma-buf
    }
    for (const Call& call : pair.world.calls("export")) CHECK_EQUAL(call.c, 1);
    for (const Call& call : pair.world.calls("set_attribute")) CHECK_EQUAL(call.a, 6);
    CHECK(pair.one.describe().find("in dmabuf, doorbells by gpu") != std::string::npos);
    // The registers are mapped as memory of a device: portable, mapped, IO.
    for (const Call& call : pair.world.calls("host_register")) {
        CHECK_EQUAL(call.b, 8);
        CHECK_EQUAL(call.c, 7);
        CHECK_EQUAL(call.a % 4096, 0x800);
    }
}

TEST(older_libraries_give_one_register_for_all_queue_pairs) {
    CardOptions options = card_on(kInfiniband);
    options.dedicated_registers = false;
    World world(two(options));
    Rank one(0, 2, 4, "nic=mlx5_0", true), other(1, 2, 4, "nic=mlx5_1", true);
    CHECK(connect_all({&one, &other}).empty());
    std::set<uint64_t> pages;
    for (const Command& command : world.commands(0x500)) {
        if (command.card == "mlx5_0") pages.insert(bits(command.in, kQpc + 0x68, 24));
    }
    CHECK_EQUAL(pages.size(), 1);
    // Mapped once: twice is an error of CUDA.
    CHECK_EQUAL(world.calls("host_register").size(), 2);
}

TEST(registers_are_shared_when_the_card_has_no_more) {
    World world(two(card_on(kInfiniband)));
    Rank one(0, 2, 6, "nic=mlx5_0 registers=4", false), other(1, 2, 6, "nic=mlx5_1", false);
    CHECK(one.open().empty());
    std::map<uint64_t, int> pages;
    for (const Command& command : world.commands(0x500)) {
        ++pages[bits(command.in, kQpc + 0x68, 24)];
    }
    CHECK_EQUAL(pages.size(), 4);
    for (const auto& page : pages) CHECK(page.second <= 2);
    world.fail("alloc_uar", ENOSPC);
    CHECK(other.open().find("doorbell register (UAR) failed") != std::string::npos);
}

TEST(a_write_combining_register_is_mapped_whole) {
    World world(two(card_on(kInfiniband)));
    Rank one(0, 2, 1, "nic=mlx5_0", true);
    world.fail_first("alloc_uar", EOPNOTSUPP, 2);
    CHECK(one.open().empty());
    const auto tried = world.calls("alloc_uar");
    CHECK_EQUAL(tried.size(), 3);
    CHECK_EQUAL(tried[0].a, 1u << 31);
    CHECK_EQUAL(tried[1].a, 1);
    CHECK_EQUAL(tried[2].a, 0);
    CHECK_EQUAL(world.calls("host_register")[0].b, 512);
}

TEST(several_cards_take_channels_in_turn) {
    World world({4, card_on(kInfiniband)});
    Rank one(0, 2, 4, "nic=mlx5_0+mlx5_1", false), other(1, 2, 4, "nic=mlx5_2+mlx5_3", false);
    CHECK(connect_all({&one, &other}).empty());
    CHECK_EQUAL(one.ibgda().num_planes, 2);
    std::map<std::string, int> made;
    for (const Command& command : world.commands(0x500)) ++made[command.card];
    CHECK_EQUAL(made.size(), 4);
    for (const auto& card : made) CHECK_EQUAL(card.second, 2);
    // A queue pair for each (peer, channel), on the card of the channel's plane.
    for (const Command& command : world.commands(0x503)) {
        const bool even = command.card == "mlx5_0" || command.card == "mlx5_2";
        const uint64_t lid = bits(command.in, kPath + 0x30, 16);
        CHECK_EQUAL((lid - 0x21) % 2, even ? 0 : 1);
    }
}

TEST(an_end_stops_its_queue_pairs_before_it_ends_them) {
    Pair pair(two(card_on(kInfiniband)), kOptions, false);
    pair.connect();
    pair.one.close();
    const Command stopped = only(pair.world, 0x507);
    expect(stopped, 0x10, {{0, 16, 0x507}, {0x48, 24, 0x100}});
    pair.other.close();
    CHECK(pair.world.live().empty());
}
