// Two ranks over the transport `emulated` whose proxy threads write requests wrongly: what users
// are told. This file stands in for csrc/fabric/posting.cc.

#include <sys/mman.h>
#include <unistd.h>

#include <iterator>

#include "../../csrc/fabric/posting.h"
#include "check.h"

using namespace epcomm;
using mlx5::SendQueue;

namespace {

constexpr int64_t kSecond = 1'000'000'000;
/// Long enough to write to a request's slot between its fetch and its completion.
const char* const kOptions = "latency_ns=20000000";

/// How the threads write: when `post` is called the first request is in the ring, not rung for.
struct Mistake {
    const char* name;  ///< of the rule
    void (*post)(SendQueue*);
    void (*later)(SendQueue*);  ///< after the NIC has looked, before the request completes
};

Mistake mistake;
bool threads_look = true;  ///< at completions

void ring_for(SendQueue* queue, uint16_t record, uint16_t doorbell, uint32_t number) {
    mlx5::store_record(&queue->record[mlx5::kSendRecord], record);
    mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(number, doorbell));
}

void ring_rightly(SendQueue* queue) { ring_for(queue, 1, 1, queue->number); }

const Mistake kMistakes[] = {
    {"record behind", [](SendQueue* queue) { ring_for(queue, 0, 1, queue->number); }, nullptr},
    {"doorbell queue", [](SendQueue* queue) { ring_for(queue, 1, 1, queue->number + 1); }, nullptr},
    {"queue overflow", [](SendQueue* queue) { ring_for(queue, 999, 999, queue->number); }, nullptr},
    {"reserved bits",
     [](SendQueue* queue) {
         queue->ring[0].unit[1].word[3] = 1;
         ring_rightly(queue);
     },
     nullptr},
    {"slot reused", ring_rightly, [](SendQueue* queue) { queue->ring[0].unit[0].word[2] ^= 1; }},
};

/// Memory that peers can map.
class Shared {
 public:
    explicit Shared(int32_t id) {
        region_.id = id;
        region_.device = -1;
        region_.bytes = 4096;
        region_.fd = memfd_create("test", MFD_CLOEXEC);
        CHECK(region_.fd >= 0 && ftruncate(region_.fd, 4096) == 0);
        region_.pointer = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, region_.fd, 0);
        CHECK(region_.pointer != MAP_FAILED);
    }
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    ~Shared() {
        munmap(region_.pointer, 4096);
        close(region_.fd);
    }
    const epcomm_fabric_region* region() const { return &region_; }

 private:
    epcomm_fabric_region region_{};
};

class Rank {
 public:
    explicit Rank(int32_t node) {
        host_.resize(size_t(epcomm_fabric_host_bytes(64, 1)) / sizeof(Line) + 1);
        epcomm_fabric_config config{};
        config.node = node;
        config.num_nodes = 2;
        config.num_channels = 2;
        config.num_rings = config.num_threads = 1;
        config.num_slots = 64;
        config.max_in_flight = 32;
        config.timeout_ns = 20 * kSecond;
        config.longest_nap_ns = 1'000'000;
        config.host_memory = host_.data();
        config.producer_memory = &producer_;
        end_ = epcomm_fabric_create(&config, "emulated", kOptions);
        CHECK(end_ != nullptr);
        CHECK_EQUAL(epcomm_fabric_add_region(end_, signals_.region()), 0);
        CHECK_EQUAL(epcomm_fabric_open(end_), 0);
    }
    Rank(const Rank&) = delete;
    Rank& operator=(const Rank&) = delete;
    ~Rank() {
        CHECK_EQUAL(epcomm_fabric_stop(end_, 1'000'000), 0);
        epcomm_fabric_destroy(end_);
    }

    std::string address(int32_t peer) {
        std::string bytes(size_t(epcomm_fabric_address(end_, peer, nullptr, 0)), 0);
        epcomm_fabric_address(end_, peer, bytes.data(), int64_t(bytes.size()));
        return bytes;
    }
    void connect(int32_t peer, const std::string& bytes) {
        const void* addresses[2] = {"", ""};
        int64_t sizes[2] = {};
        addresses[peer] = bytes.data();
        sizes[peer] = int64_t(bytes.size());
        CHECK_EQUAL(epcomm_fabric_connect(end_, addresses, sizes), 0);
    }
    const epcomm_fabric& fabric() const { return *epcomm_fabric_of(end_); }
    const epcomm_fabric_error& error() const { return fabric().state->error; }
    int check() const { return epcomm_fabric_check(end_, 10 * kSecond); }
    uint64_t signal() const {
        return fabric::load_acquire(static_cast<const uint64_t*>(signals_.region()->pointer));
    }

 private:
    struct alignas(128) Line {
        uint8_t bytes[128];
    };

    std::vector<Line> host_;
    alignas(128) epcomm_ring_producer producer_{};
    Shared signals_{0};
    epcomm_fabric_end* end_ = nullptr;
};

struct World {
    Rank one{0}, other{1};

    World() {
        const std::string first = one.address(1), second = other.address(0);
        one.connect(1, second);
        other.connect(0, first);
    }
};

}  // namespace

namespace epcomm::fabric {

Posting::Posting(const Plan&, const Ibgda& fabric, uint64_t* bell) : fabric_(fabric), bell_(bell) {
    under_way_.resize(1);
}

size_t Posting::post(int32_t, const Operation* operations, size_t) {
    const Command& command = operations->command;
    SendQueue* queue = queue_of(fabric_, {command.peer, command.channel});
    const RegionKey& signals = keys_on(fabric_, fabric_.remote, command.peer, 0)[0];
    mlx5::store_request(
        queue, 0,
        mlx5::word_request(mlx5::header_of(*queue, 0, true), {signals.address, signals.key}, 1));
    mistake.post(queue);
    under_way_[0].push_back({operations->token, 1});
    return 1;
}

/// All that is under way is on channel 1 to node 1.
size_t Posting::poll(int32_t, Completion* completions, size_t) {
    if (under_way_[0].empty()) return 0;
    SendQueue* queue = queue_of(fabric_, {1, 1});
    if (mistake.later != nullptr) mistake.later(queue);
    mistake.later = nullptr;
    if (!threads_look || mlx5::poll(queue)) return 0;
    completions[0] = {under_way_[0].front().token, false, vendor_of(*queue), queue->number};
    under_way_[0].clear();
    return 1;
}

}  // namespace epcomm::fabric

/// A world in which node 0 has posted wrongly to node 1, on channel 1.
struct WrongWorld : World {
    explicit WrongWorld(const Mistake& one, bool looks) {
        mistake = one;
        threads_look = looks;
        CHECK(fabric::signal_add(this->one.fabric(), {1, 1}, 5, 1) != 0);
    }
    void expect_error(const std::string& words) const {
        const epcomm_fabric_error& error = one.error();
        CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
        CHECK_EQUAL(error.peer, 1);
        CHECK_EQUAL(error.channel, 1);
        CHECK(error.queue_pair != 0);
        CHECK(has(error.text, words));
    }
};

TEST(the_error_names_the_broken_rule) {
    for (const Mistake& one : kMistakes) {
        const WrongWorld world(one, true);
        CHECK(!fabric::flush(world.one.fabric(), 1, 20 * kSecond));
        world.expect_error("local queue pair operation error");
        world.expect_error(std::string("; the emulated NIC found a broken rule: ") + one.name);
    }
}

TEST(a_rule_that_is_broken_unnoticed_fails_the_fabric) {
    int32_t vendors[std::size(kMistakes)];
    for (size_t i = 0; i < std::size(kMistakes); ++i) {
        const WrongWorld noticed(kMistakes[i], true);
        CHECK(!fabric::flush(noticed.one.fabric(), 1, 20 * kSecond));
        vendors[i] = noticed.one.error().vendor;
    }
    for (size_t i = 0; i < std::size(kMistakes); ++i) {
        const WrongWorld world(kMistakes[i], false);
        const int64_t until = fabric::now_ns() + 20 * kSecond;
        while (world.one.check() == 0) CHECK(fabric::now_ns() < until);
        world.expect_error(std::string("the emulated NIC found a broken rule: ") +
                           kMistakes[i].name + ", at request 0; a bug of who writes the requests");
        CHECK_EQUAL(world.one.error().vendor, vendors[i]);
        // The rule was broken by one rank, and is one rank's to report.
        CHECK_EQUAL(world.other.check(), 0);
    }
}

TEST(who_keeps_the_rules_hears_nothing) {
    const WrongWorld world({"", ring_rightly, nullptr}, false);
    while (world.other.signal() == 0) CHECK_EQUAL(world.one.check(), 0);
    for (int i = 0; i < 100; ++i) CHECK_EQUAL(world.one.check(), 0);
}
