// The transports over emulated NICs on a GPU as a whole: what ends them, and what they say then.

#include "gpu_ends.h"

TEST(killed_queue_pairs_end_the_fabric_with_the_reason) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport, "kill=2");
        CHECK(ends[0]->add({1, 2}, 5) && ends[0]->flush(2));
        CHECK(ends[1]->wait(5, 1));
        const int64_t start = fabric::now_ns();
        for (int i = 0; i < 8 && ends[0]->add({1, 2}, 5); ++i) {
        }
        CHECK(!ends[0]->flush(2));
        CHECK(fabric::now_ns() - start < 20 * kSecond);
        CHECK(ends[0]->check() == EPCOMM_FABRIC_TRANSPORT);
        CHECK_EQUAL(ends[0]->error().peer, 1);
        CHECK_EQUAL(ends[0]->error().channel, 2);
        CHECK(has(ends[0]->error().text, "flushed"));
    }
}

/// A doorbell without its record.
void ring_wrongly(mlx5::SendQueue* queue) {
    const auto next = uint16_t(queue->reserved + 1);
    mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(queue->number, next));
}

TEST(a_broken_rule_is_told_by_name) {
    const Ends ends = connected("emulated-cuda");
    CHECK(ends[0]->add({1, 2}, 5) && ends[0]->flush(2));
    ring_wrongly(ends[0]->queue({1, 2}));
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (!ends[0]->look({1, 2})) CHECK(fabric::now_ns() < until);
    CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_TRANSPORT);
    CHECK_EQUAL(ends[0]->error().peer, 1);
    CHECK(has(ends[0]->error().text, "; the emulated NIC found a broken rule: record behind"));
}

TEST(a_rule_that_is_broken_unnoticed_fails_the_fabric) {
    const Ends ends = connected("emulated-cuda", "planes=2");
    CHECK(ends[0]->add({1, 1}, 5) && ends[0]->flush(1));
    CHECK_EQUAL(ends[0]->check(), 0);
    ring_wrongly(ends[0]->queue({2, 3}));
    ring_wrongly(ends[0]->queue({1, 1}));
    // Nobody reads completions.
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (ends[0]->check() == 0) CHECK(fabric::now_ns() < until);
    const epcomm_fabric_error& error = ends[0]->error();
    CHECK_EQUAL(error.status, EPCOMM_FABRIC_TRANSPORT);
    CHECK(has(error.text, "the emulated NIC found a broken rule: record behind, at request "));
    const Lane lane = {error.peer, error.channel};
    CHECK((lane.peer == 1 && lane.channel == 1) || (lane.peer == 2 && lane.channel == 3));
    CHECK_EQUAL(error.queue_pair, ends[0]->queue(lane)->number);
    CHECK_EQUAL(error.position, ends[0]->queue(lane)->reserved);
    for (int32_t other = 1; other < kNodes; ++other) CHECK_EQUAL(ends[size_t(other)]->check(), 0);
}

TEST(broken_rules_and_failures_are_events) {
    const Ends ends = connected("emulated-cuda", "planes=2", 16);
    CHECK(ends[0]->keeps(16));
    CHECK(ends[0]->add({1, 3}, 5) && ends[0]->flush(3));
    ring_wrongly(ends[0]->queue({1, 3}));
    const auto events = ends[0]->events_of(2);
    CHECK_EQUAL(events.size(), 2);
    const char* const words[] = {"violation: record behind",
                                 "failed: local queue pair operation error: malformed request"};
    for (size_t i = 0; i < 2; ++i) {
        CHECK(text_of(events[i]) == words[i]);
        CHECK_EQUAL(events[i].kind, i == 0 ? EPCOMM_FABRIC_VIOLATION : EPCOMM_FABRIC_FAILED);
        CHECK_EQUAL(events[i].peer, 1);
        CHECK_EQUAL(events[i].channel, 3);
        CHECK_EQUAL(events[i].plane, 1);
        CHECK_EQUAL(events[i].position, ends[0]->queue({1, 3})->reserved);
        CHECK_EQUAL(events[i].amount_ps, 0);
    }
}

TEST(malformed_requests_are_told_by_name) {
    const Ends ends = connected("emulated-cuda");
    mlx5::SendQueue* queue = ends[0]->queue({1, 2});
    mlx5::Block block = mlx5::nop_request(mlx5::header_of(*queue, 0, true));
    block.unit[0].word[3] = 1;
    mlx5::store_request(queue, 0, block);
    queue->reserved = 1;
    mlx5::store_record(&queue->record[mlx5::kSendRecord], 1);
    mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(queue->number, 1));
    const int64_t until = fabric::now_ns() + 20 * kSecond;
    while (!ends[0]->look({1, 2})) CHECK(fabric::now_ns() < until);
    CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_TRANSPORT);
    CHECK(has(ends[0]->error().text,
              "malformed request; the emulated NIC found a broken rule: "
              "reserved bits"));
}

TEST(a_killed_carrier_ends_its_ranks_waits) {
    for (const char* transport : kTransports) {
        const Ends ends = connected(transport);
        exchange(ends, 1);
        ends[0]->kill_carrier();
        const int64_t start = fabric::now_ns();
        CHECK(!ends[0]->wait(60, 1));  // for something that nobody sends
        CHECK(fabric::now_ns() - start < 20 * kSecond);
        CHECK_EQUAL(ends[0]->check(), EPCOMM_FABRIC_STALLED);
        CHECK(has(ends[0]->error().text, "the process of this rank's emulated NICs, is gone"));
        // The others' NICs go on.
        CHECK(ends[1]->add({2, 1}, 61) && ends[2]->wait(61, 1));
    }
}
