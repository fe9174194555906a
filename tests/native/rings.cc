// The rings: what a consumer may take for a trigger, and when a producer may write one.

#include <atomic>
#include <thread>
#include <vector>

#include "../../csrc/fabric/ring.h"
#include "check.h"

using namespace epcomm::fabric;

namespace {

struct Ring {
    explicit Ring(uint64_t num_slots)
        : slots(num_slots), ring{slots.data(), &producer, &consumer, num_slots} {}

    bool push(const Command& command, int64_t timeout_ns = 0) {
        const uint64_t position = fetch_add(&producer.head, 1);
        if (!wait_for_slot(ring, position, &failed, timeout_ns)) return false;
        publish(ring, position, command);
        return true;
    }

    bool pop(Command* command) {
        if (!take(ring, next, command)) return false;
        store_release(&consumer.tail, ++next);
        return true;
    }

    std::vector<epcomm_trigger> slots;
    epcomm_ring_producer producer{};
    epcomm_ring_consumer consumer{};
    uint32_t failed = 0;
    uint64_t next = 0;
    epcomm_ring ring;
};

Command value(uint64_t v) {
    Command command{};
    command.op = EPCOMM_FABRIC_SIGNAL_ADD;
    command.value = v;
    return command;
}

bool same(const Command& a, const Command& b) {
    return a.op == b.op && a.peer == b.peer && a.channel == b.channel && a.signal == b.signal &&
           a.local.region == b.local.region && a.local.offset == b.local.offset &&
           a.remote.region == b.remote.region && a.remote.offset == b.remote.offset &&
           a.bytes == b.bytes && a.value == b.value;
}

}  // namespace

TEST(every_field_at_its_limits) {
    const int64_t unit = EPCOMM_FABRIC_UNIT;
    const Command most{
        EPCOMM_FABRIC_PUT_SIGNAL,
        EPCOMM_FABRIC_MAX_NODES - 1,
        EPCOMM_FABRIC_MAX_CHANNELS - 1,
        EPCOMM_FABRIC_MAX_SIGNALS - 1,
        {EPCOMM_FABRIC_MAX_REGIONS - 1, 0, uint64_t(EPCOMM_FABRIC_MAX_LOCAL - unit)},
        {EPCOMM_FABRIC_MAX_REGIONS - 1, 0, uint64_t(EPCOMM_FABRIC_MAX_REMOTE - unit)},
        EPCOMM_FABRIC_MAX_BYTES,
        0};
    for (const uint64_t parity : {uint64_t(0), kParity}) {
        CHECK(fits(most));
        CHECK(same(decode(encode(most, parity)), most));
        // One field at a time: no field may reach into another.
        for (int field = 0; field < 8; ++field) {
            Command one{};
            one.op = field == 0 ? most.op : EPCOMM_FABRIC_PUT;
            if (field == 1) one.peer = most.peer;
            if (field == 2) one.channel = most.channel;
            if (field == 3) one.signal = most.signal;
            if (field == 4) one.local.region = most.local.region;
            if (field == 5) one.local.offset = most.local.offset;
            if (field == 6) one.remote = most.remote;
            if (field == 7) one.bytes = most.bytes;
            CHECK(same(decode(encode(one, parity)), one));
            CHECK((encode(one, parity).word[0] & kParity) == parity);
            CHECK((encode(one, parity).word[1] & kParity) == parity);
        }
        const Command add = value(~kParity);
        CHECK(same(decode(encode(add, parity)), add));
    }
}

TEST(what_does_not_fit_is_refused) {
    Command command{};
    command.op = EPCOMM_FABRIC_PUT;
    CHECK(fits(command));
    const auto refused = [&](auto change) {
        Command bad = command;
        change(bad);
        return !fits(bad);
    };
    CHECK(refused([](Command& c) { c.peer = EPCOMM_FABRIC_MAX_NODES; }));
    CHECK(refused([](Command& c) { c.peer = -1; }));
    CHECK(refused([](Command& c) { c.channel = EPCOMM_FABRIC_MAX_CHANNELS; }));
    CHECK(refused([](Command& c) { c.signal = EPCOMM_FABRIC_MAX_SIGNALS; }));
    CHECK(refused([](Command& c) { c.local.region = EPCOMM_FABRIC_MAX_REGIONS; }));
    CHECK(refused([](Command& c) { c.local.offset = EPCOMM_FABRIC_MAX_LOCAL; }));
    CHECK(refused([](Command& c) { c.remote.offset = EPCOMM_FABRIC_MAX_REMOTE; }));
    CHECK(refused([](Command& c) { c.bytes = EPCOMM_FABRIC_MAX_BYTES + 16; }));
    CHECK(refused([](Command& c) { c.bytes = 24; }));
    CHECK(refused([](Command& c) { c.local.offset = 8; }));
    CHECK(!fits(value(kParity)));
}

TEST(zero_payloads_are_triggers) {
    Ring ring(8);
    Command got;
    CHECK(!ring.pop(&got));
    for (int i = 0; i < 40; ++i) {
        CHECK(ring.push(Command{}));
        CHECK(ring.pop(&got));
        CHECK(same(got, Command{}));
        CHECK(!ring.pop(&got));
    }
}

TEST(wrap_at_lap_boundary) {
    for (const uint64_t size : {1, 2, 8}) {
        Ring ring(size);
        uint64_t sent = 0, received = 0;
        Command got;
        for (int lap = 0; lap < 7; ++lap) {
            while (sent - received < size) CHECK(ring.push(value(sent++)));
            while (received < sent) {
                CHECK(ring.pop(&got));
                CHECK(got.value == received++);
            }
            CHECK(!ring.pop(&got));  // what is left of laps before must not count
        }
    }
}

TEST(full_ring_waits_until_its_deadline) {
    Ring ring(4);
    for (int i = 0; i < 4; ++i) CHECK(ring.push(value(uint64_t(i))));
    const int64_t start = now_ns();
    CHECK(!ring.push(value(9), 50'000'000));
    CHECK(now_ns() - start >= 50'000'000);
    CHECK(now_ns() - start < 5'000'000'000);
    Command got;
    for (int i = 0; i < 4; ++i) {
        CHECK(ring.pop(&got));
        CHECK(got.value == uint64_t(i));  // nothing was overwritten
    }
    CHECK(!ring.pop(&got));  // the place that was given up stays empty
}

TEST(full_ring_waits_for_the_consumer) {
    Ring ring(4);
    for (int i = 0; i < 4; ++i) CHECK(ring.push(value(uint64_t(i))));
    std::thread producer([&] { CHECK(ring.push(value(4), 10'000'000'000)); });
    Command got;
    CHECK(ring.pop(&got));
    producer.join();
    for (int i = 1; i < 5; ++i) {
        CHECK(ring.pop(&got));
        CHECK(got.value == uint64_t(i));
    }
}

TEST(full_ring_ends_when_the_fabric_fails) {
    Ring ring(1);
    CHECK(ring.push(value(0)));
    std::thread producer([&] { CHECK(!ring.push(value(1), 60'000'000'000)); });
    store_release(&ring.failed, 1);
    producer.join();
}

TEST(torn_writes_are_rejected) {
    // In every lap, either word alone is not a trigger, whatever the lap before left.
    for (int first = 0; first < 2; ++first) {
        Ring ring(2);
        Command got;
        for (uint64_t position = 0; position < 12; ++position) {
            const Command command = value(position * 77 + 1);
            const epcomm_trigger trigger = encode(command, parity_of(position, 2));
            epcomm_trigger& slot = ring.slots[position % 2];
            CHECK(!take(ring.ring, position, &got));
            slot.word[first] = trigger.word[first];
            CHECK(!take(ring.ring, position, &got));
            slot.word[1 - first] = trigger.word[1 - first];
            CHECK(take(ring.ring, position, &got));
            CHECK(got.value == command.value);
        }
    }
}

TEST(several_producers) {
    // Every trigger once, and each producer's in its order.
    constexpr uint64_t kEach = 20000, kProducers = 4;
    Ring ring(16);
    std::vector<std::thread> threads;
    for (uint64_t p = 0; p < kProducers; ++p) {
        threads.emplace_back([&, p] {
            for (uint64_t i = 0; i < kEach; ++i) {
                CHECK(ring.push(value(p << 32 | i), 60'000'000'000));
            }
        });
    }
    std::vector<uint64_t> next(kProducers, 0);
    Command got;
    for (uint64_t received = 0; received < kEach * kProducers;) {
        if (!ring.pop(&got)) {
            sched_yield();
            continue;
        }
        CHECK((got.value & 0xffffffffu) == next[got.value >> 32]++);
        ++received;
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(!ring.pop(&got));
}
