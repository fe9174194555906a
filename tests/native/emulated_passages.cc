// What the host engine keeps of every message, for a timeline.

#include "../../csrc/emulated/options.h"
#include "plain_line.h"

using namespace rig;

TEST(a_passage_has_the_models_times_and_the_engines) {
    Rig r(plain());
    r.engine.keep_passages(16);
    Writer* w = r.pair();
    const Picoseconds start = r.engine.now();
    CHECK(r.write(w, 0, 0, 10'000) != 0);
    CHECK(r.add_to(w, 2000, 1) != 0);
    CHECK(r.flush(w));
    const std::vector<Passage> seen = r.engine.passages().in_order();
    CHECK_EQUAL(seen.size(), size_t(2));
    const Passage& bytes = seen[0];
    CHECK_EQUAL(bytes.bytes, 10'000u);
    CHECK_EQUAL(seen[1].bytes, 8u);
    CHECK_EQUAL(bytes.position, 0u);
    CHECK_EQUAL(seen[1].position, 1u);
    CHECK_EQUAL(bytes.queue, w->queue.number);
    CHECK_EQUAL(bytes.rung, start);
    CHECK_EQUAL(bytes.depart, start);
    // 10'000 / 10 ns and 1000 ns there; as much time back.
    CHECK_EQUAL(bytes.arrive, start + 2000 * kNanosecond);
    CHECK(bytes.landed >= bytes.arrive);
    CHECK(bytes.completed >= bytes.landed + 1000 * kNanosecond);
    CHECK(seen[1].landed >= bytes.landed);
    r.expect_clean();
}

TEST(the_oldest_are_written_over_and_all_are_counted) {
    Rig r(plain());
    r.engine.keep_passages(4);
    Writer* w = r.pair();
    // More than there are slots, so that every slot's moments are used again.
    write_in_turn(r, w, 150);
    CHECK_EQUAL(r.engine.passages().count, 150u);
    const std::vector<Passage> seen = r.engine.passages().in_order();
    CHECK_EQUAL(seen.size(), size_t(4));
    for (size_t i = 0; i < seen.size(); ++i) {
        CHECK_EQUAL(seen[i].position, 146 + i);
        CHECK(seen[i].rung <= seen[i].depart);
        CHECK(seen[i].depart < seen[i].landed);
        CHECK(i == 0 || seen[i - 1].completed <= seen[i].rung);
    }
    r.engine.keep_passages(4);
    CHECK_EQUAL(r.engine.passages().in_order().size(), size_t(0));
}

TEST(what_was_under_way_before_has_none) {
    Rig r(plain());
    Writer* w = r.pair();
    CHECK(r.write(w, 0, 0, 800) != 0);
    CHECK(r.engine.step());
    r.engine.keep_passages(4);
    write_in_turn(r, w);
    CHECK_EQUAL(r.engine.passages().count, 1u);
    CHECK_EQUAL(r.engine.passages().in_order()[0].position, 1u);
}

TEST(none_are_kept_unless_asked_for) {
    Rig r(plain());
    Writer* w = r.pair();
    write_in_turn(r, w);
    CHECK(!r.engine.passages().wanted());
    CHECK_EQUAL(r.engine.passages().count, 0u);
}

/// Every request meets a fault, and the journal has room for three.
Options all_late() {
    Options options = plain();
    options.engine.rules.push_back(anywhere(kDelay, kAlways, 1));
    options.engine.journal_capacity = 3;
    return options;
}

TEST(the_newest_events_are_kept_and_all_are_counted) {
    Rig r(all_late());
    Writer* w = r.pair();
    write_in_turn(r, w, 10);
    uint64_t total = 0;
    CHECK(r.engine.newest_events(&total).empty() && total == 0);  // nobody asked
    r.engine.keep_events(4);
    write_in_turn(r, w, 20);
    const std::vector<Event> seen = r.engine.newest_events(&total);
    CHECK_EQUAL(total, 20u);
    CHECK_EQUAL(seen.size(), size_t(4));
    for (size_t i = 0; i < seen.size(); ++i) {
        CHECK_EQUAL(seen[i].position, 26 + i);
        CHECK_EQUAL(seen[i].code, kDelay);
        CHECK(i == 0 || seen[i - 1].time <= seen[i].time);
    }
    // The journal has the first ones.
    CHECK_EQUAL(r.engine.events().size(), size_t(3));
    CHECK_EQUAL(r.engine.events()[2].position, 2u);
    r.engine.keep_events(0);
    write_in_turn(r, w, 1);
    CHECK(r.engine.newest_events(&total).empty() && total == 0);
}

TEST(the_first_broken_rule_is_kept_behind_faults) {
    Rig r(all_late());
    Writer* w = r.pair();
    write_in_turn(r, w, 10);
    CHECK_EQUAL(r.engine.broken_rules().count, 0u);
    mlx5::store_doorbell(&w->doorbell, mlx5::next_index_doorbell(w->queue.number, 11));
    r.engine.settle();
    CHECK_EQUAL(r.engine.broken_rules().count, 1u);
    CHECK_EQUAL(r.engine.broken_rules().first.code, kRecordBehind);
    CHECK_EQUAL(r.engine.broken_rules().first.position, 10u);
}

TEST(flushed_requests_have_no_passage) {
    Options options = plain();
    options.num_blocks = options.num_completions = 8;
    options.engine.rules.push_back(once(kKillQueue, 12));
    Rig r(options);
    r.engine.keep_passages(32);
    Writer* w = r.pair();
    // Every slot has been used once, so that what is left in it looks like a message.
    write_in_turn(r, w, 12);
    for (int i = 0; i < 3; ++i) CHECK(r.write(w, 0, 0, 800) != 0);
    r.engine.settle();
    CHECK_EQUAL(r.count(EventKind::kFailed), size_t(1));
    CHECK_EQUAL(r.engine.passages().count, 12u);
}
