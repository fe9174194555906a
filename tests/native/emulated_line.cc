// The line model, and the clock's honesty: a completion is the later of model and copier.

#include <algorithm>

#include "plain_line.h"

using namespace rig;

namespace {

/// From the doorbell of `count` writes of `bytes` on each of `writers` until all have completed.
Picoseconds time_of(Rig& r, std::vector<Writer*> writers, int count, uint32_t bytes,
                    uint32_t peer = 1) {
    const Picoseconds start = r.engine.now();
    for (int i = 0; i < count; ++i) {
        for (Writer* w : writers) {
            CHECK(r.post(
                      w,
                      [&](const Header& header) {
                          return mlx5::write_request(header, r.remote(peer, 0), r.local(w->nic, 0),
                                                     bytes);
                      },
                      i + 1 == count, Ring::kWhenDue) != 0);
        }
    }
    for (Writer* w : writers) mlx5::ring(&w->queue);
    for (Writer* w : writers) CHECK(r.flush(w));
    return r.engine.now() - start;
}

/// Until the last bytes of a long message, and so any flag in them, are there.
Picoseconds time_until_visible(Rig& r, Writer* w) {
    r.memory[0][9999] = 7;
    const Picoseconds start = r.engine.now();
    CHECK(r.write(w, 0, 2000, 80'000) != 0);
    while (r.memory[1][2000 + 9999] == 0) CHECK(r.engine.advance());
    return r.engine.now() - start;
}

}  // namespace

TEST(one_message_takes_latency_and_length) {
    Rig r(plain());
    Writer* w = r.pair();
    // 1000 ns there, 10'000 / 10 ns, 1000 ns back.
    CHECK_EQUAL(time_of(r, {w}, 1, 10'000), 3000 * kNanosecond);
    r.network.wire()->nic(0).line.fetch_ns = 250;
    CHECK_EQUAL(time_of(r, {w}, 1, 10'000), 3250 * kNanosecond);
    r.expect_clean();
}

TEST(nothing_is_visible_before_its_time) {
    Rig r(plain());
    Writer* w = r.pair();
    r.memory[0][0] = 1;
    const Picoseconds start = r.engine.now();
    CHECK(r.add_to(w, 100, 1) != 0);
    while (r.memory[1][100] == 0) CHECK(r.engine.advance());
    CHECK(r.engine.now() - start >= 1000 * kNanosecond);
    CHECK(time_until_visible(r, w) >= 9000 * kNanosecond);
    r.expect_clean();
}

TEST(messages_follow_each_other_without_a_gap) {
    Rig r(plain());
    Writer* w = r.pair();
    // Latency is paid once: 20 x 1000 ns on the line.
    CHECK_EQUAL(time_of(r, {w}, 20, 10'000), 22'000 * kNanosecond);
}

TEST(headers_take_room) {
    Options options = plain();
    options.line.header_bytes = 96;
    Rig r(options);
    Writer* w = r.pair();
    // Three packets of 4096, 4096 and 1808 bytes.
    CHECK_EQUAL(time_of(r, {w}, 1, 10'000), (2000'000 + (10'000 + 3 * 96) * 100));
}

TEST(the_message_rate_is_limited) {
    Options options = plain();
    options.line.message_ns = 500;
    Rig r(options);
    Writer *a = r.pair(), *b = r.pair();
    // 20 messages of one NIC, of whatever queue pair: the last starts after 19 x 500 ns.
    const Picoseconds took = time_of(r, {a, b}, 10, 10);
    CHECK_EQUAL(took, (19 * 500 + 2001) * kNanosecond);
}

TEST(two_queue_pairs_share_a_port) {
    Rig r(plain());
    Writer *a = r.pair(), *b = r.pair();
    CHECK_EQUAL(time_of(r, {a, b}, 10, 10'000), 22'000 * kNanosecond);
}

// A card gives its queue pairs turns that are shorter than a long message.
TEST(a_signal_does_not_wait_for_long_messages_of_others) {
    Rig r(plain());
    std::vector<Writer*> all;
    for (int i = 0; i < 4; ++i) all.push_back(r.pair());
    const Picoseconds start = r.engine.now();
    for (size_t i = 0; i < all.size(); ++i) {
        CHECK(r.write(all[i], 0, 2000, 80'000, false, Ring::kWhenDue) != 0);
        CHECK(r.post(
                  all[i],
                  [&](const Header& header) {
                      return mlx5::word_request(header, r.remote(1, 8 * i), 1);
                  },
                  false, Ring::kWhenDue) != 0);
        mlx5::ring(&all[i]->queue);
    }
    // Each 8000 ns on the line, and its word right behind it, in whatever order they come to the
    // port; two long ones take turns.
    std::vector<Picoseconds> seen(all.size(), 0);
    size_t words = 0;
    while (words < all.size()) {
        CHECK(r.engine.advance());
        for (size_t i = 0; i < all.size(); ++i) {
            if (seen[i] != 0 || r.memory[1][8 * i] == 0) continue;
            seen[i] = r.engine.now() - start;
            ++words;
        }
    }
    std::sort(seen.begin(), seen.end());
    for (size_t i = 0; i < seen.size(); ++i) {
        const Picoseconds due = (1000 + 8000 * (i + 1)) * kNanosecond;
        CHECK(seen[i] >= due && seen[i] <= due + 100 * kNanosecond);
    }
    CHECK_EQUAL(time_of(r, {all[0], all[1]}, 5, 80'000), (2000 + 10 * 8000) * kNanosecond);
}

// Who takes the sender's port first need not be the first at the receiver's.
TEST(the_order_of_schedules_leaves_no_gap) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        Options options = plain();
        options.engine.seed = seed;
        options.engine.shuffle = true;
        Rig r(options);
        std::vector<Writer*> all;
        for (int i = 0; i < 5; ++i) all.push_back(r.pair());
        CHECK_EQUAL(time_of(r, all, 10, 10'000), 52'000 * kNanosecond);
    }
}

TEST(two_planes_double_the_rate) {
    Options options = plain(4);
    Rig r(options);
    Writer *a = r.pair(0, 1), *b = r.pair(2, 3);
    const Picoseconds start = r.engine.now();
    for (int i = 0; i < 10; ++i) {
        for (Writer* w : {a, b}) {
            CHECK(r.post(
                      w,
                      [&](const Header& header) {
                          return mlx5::write_request(header, r.remote(w->nic + 1, 0),
                                                     r.local(w->nic, 0), 10'000);
                      },
                      false, Ring::kWhenDue) != 0);
        }
    }
    for (Writer* w : {a, b}) mlx5::ring(&w->queue);
    CHECK(r.flush(a) && r.flush(b));
    CHECK(r.engine.now() - start <= 14'000 * kNanosecond);
}

TEST(incast_divides_the_receivers_port) {
    Rig r(plain(4));
    Writer *a = r.pair(0, 3), *b = r.pair(1, 3), *c = r.pair(2, 3);
    // Three senders with a port each; the one receiver takes 3 x 10 x 1000 ns.
    const Picoseconds took = time_of(r, {a, b, c}, 10, 10'000, 3);
    CHECK(took >= 32'000 * kNanosecond && took <= 32'500 * kNanosecond);
}

TEST(both_directions_at_once) {
    Rig r(plain());
    Writer *there = r.pair(0, 1), *back = r.pair(1, 0);
    const Picoseconds start = r.engine.now();
    for (int i = 0; i < 10; ++i) {
        CHECK(r.write(there, 0, 0, 10'000, false, Ring::kWhenDue) != 0);
        CHECK(r.post(
                  back,
                  [&](const Header& header) {
                      return mlx5::write_request(header, r.remote(0, 50'000), r.local(1, 50'000),
                                                 10'000);
                  },
                  false, Ring::kWhenDue) != 0);
    }
    for (Writer* w : {there, back}) mlx5::ring(&w->queue);
    CHECK(r.flush(there) && r.flush(back));
    CHECK(r.engine.now() - start <= 14'000 * kNanosecond);
}

TEST(a_slow_rail_is_slow_for_itself_only) {
    Rig r(plain(4));
    r.network.wire()->nic(2).line.bytes_per_ns = 1;
    Writer *fast = r.pair(0, 1), *slow = r.pair(2, 1);
    CHECK_EQUAL(time_of(r, {fast}, 10, 10'000), 12'000 * kNanosecond);
    CHECK_EQUAL(time_of(r, {slow}, 10, 10'000), 102'000 * kNanosecond);
}

TEST(a_read_takes_the_way_back) {
    Rig r(plain());
    Writer* w = r.pair();
    const Picoseconds start = r.engine.now();
    CHECK(r.post(w, [&](const Header& header) {
        return mlx5::read_request(header, r.remote(1, 0), r.local(0, 0), 10'000);
    }) != 0);
    CHECK(r.flush(w));
    CHECK_EQUAL(r.engine.now() - start, 3000 * kNanosecond);
}

TEST(a_fast_copier_leaves_the_model_in_charge) {
    Options options = plain();
    options.engine.copy_bytes_per_ns = kCopierHasSpeed ? 20 : 0;
    Rig r(options);
    Writer* w = r.pair();
    CHECK_EQUAL(time_of(r, {w}, 20, 10'000), 22'000 * kNanosecond);
    CHECK(r.engine.traffic(0).model_was_the_limit());
    CHECK_EQUAL(r.engine.traffic(0).late_messages, 0);
    CHECK_EQUAL(r.engine.traffic(0).messages, 20);
    CHECK_EQUAL(r.engine.traffic(0).payload_bytes, 200'000);
    CHECK(strstr(r.engine.describe(0).c_str(), "limit: model") != nullptr);
    CHECK(strstr(r.engine.describe(0).c_str(), "modelled network") != nullptr);
}

TEST(nothing_is_visible_before_it_is_copied) {
    if (!kCopierHasSpeed) return;
    Options options = plain();
    options.engine.copy_bytes_per_ns = 5;
    Rig r(options);
    CHECK(time_until_visible(r, r.pair()) >= 16'000 * kNanosecond);  // the line alone: 9000
}

TEST(a_slow_copier_is_admitted) {
    if (!kCopierHasSpeed) return;
    Options options = plain();
    options.engine.copy_bytes_per_ns = 5;  // half the line
    Rig r(options);
    Writer* w = r.pair();
    const Picoseconds took = time_of(r, {w}, 20, 10'000);
    CHECK(took >= 40'000 * kNanosecond);  // the copier's time, not the line's
    CHECK(!r.engine.traffic(0).model_was_the_limit());
    CHECK_EQUAL(r.engine.traffic(0).late_copies, r.engine.traffic(0).late_messages);
    CHECK(r.engine.traffic(0).worst_late > 15'000 * kNanosecond);
    CHECK(strstr(r.engine.describe(0).c_str(), "limit: copier") != nullptr);
}
