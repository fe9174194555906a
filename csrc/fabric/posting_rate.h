// What a writer does whose posting rate is measured, the same on host and device and over either
// kind of fabric; and the same stores with nobody to read them, which is as fast as posting can be.
#pragma once

#include "ibgda.h"

namespace epcomm::fabric {

/// When a writer began, had posted everything, and knew that it had completed.
struct PostingSpan {
    int64_t begin, posted, completed;
};

/// The i-th put of a warp, a signal with it.
EPCOMM_HD inline Command posting_command(const epcomm_posting_probe& probe, int32_t warp,
                                         int32_t i) {
    const Lane lane{probe.peer, warp / probe.num_warps};
    epcomm_fabric_place remote = probe.remote, local = probe.local;
    const uint64_t number =
        uint64_t(warp) * uint64_t(probe.num_places) + uint64_t(i % probe.num_places);
    remote.offset += number * probe.bytes;
    local.offset += number * probe.bytes;
    return put_signal_command(lane, remote, local, probe.bytes, probe.first_signal + lane.channel);
}

/// All puts of a warp, by one thread. False: one of them, or a wait, failed.
template <class Fabric>
EPCOMM_HD inline bool post_puts(const Fabric& fabric, const epcomm_posting_probe& probe,
                                int32_t warp, PostingSpan* span) {
    const int32_t channel = warp / probe.num_warps;
    span->begin = now_ns();
    for (int32_t i = 0; i < probe.puts; ++i) {
        const int64_t start = probe.times == nullptr ? 0 : now_ns();
        const Command put = posting_command(probe, warp, i);
        if (put_signal(fabric, {put.peer, put.channel}, put.remote, put.local, put.bytes,
                       put.signal) == 0) {
            return false;
        }
        if (probe.times == nullptr) continue;
        if (!flush(fabric, channel, probe.timeout_ns)) return false;
        probe.times[i] = uint64_t(now_ns() - start);
    }
    span->posted = now_ns();
    if (!flush(fabric, channel, probe.timeout_ns)) return false;
    span->completed = now_ns();
    return true;
}

/// A send queue that nobody reads, of one writer.
struct UnreadQueue {
    static constexpr uint32_t kBlocks = 1024;
    alignas(64) mlx5::Block ring[kBlocks];
    alignas(64) mlx5::Be32 record[mlx5::kRecordWords];
    alignas(64) uint64_t doorbell;

    /// A put's two requests; then what tells an NIC of them, behind the fences without which it
    /// could see the record before the requests, or the doorbell before the record.
    EPCOMM_HD void write(const Command& put, int32_t i) {
        mlx5::SendQueue queue{};
        queue.ring = ring;
        queue.num_blocks = kBlocks;
        mlx5::start_at(&queue, 0);
        const uint64_t first = 2 * uint64_t(i), end = first + 2;
        mlx5::store_request(
            &queue, first,
            mlx5::write_request(mlx5::header_of(queue, first, false), {put.remote.offset, 0},
                                {put.local.offset, 0}, uint32_t(put.bytes)));
        mlx5::store_request(&queue, first + 1,
                            mlx5::word_request(mlx5::header_of(queue, first + 1, true),
                                               {uint64_t(put.signal) * 8, 0}, uint64_t(i) + 1));
        mlx5::fence<mlx5::Scope::kSystem>();
        mlx5::store_record(&record[mlx5::kSendRecord], uint16_t(end));
        mlx5::fence<mlx5::Scope::kSystem>();
        mlx5::store_doorbell(&doorbell, mlx5::next_index_doorbell(queue.number, uint16_t(end)));
    }
};

/// A ring of triggers that nobody reads, of one writer.
struct UnreadRing {
    static constexpr uint64_t kSlots = 1024;
    alignas(128) epcomm_trigger slots[kSlots];

    EPCOMM_HD void write(const Command& put, int32_t i) {
        publish({slots, nullptr, nullptr, kSlots}, uint64_t(i), put);
    }
};

/// The puts of a warp, written where nobody looks.
template <class Unread>
EPCOMM_HD inline void write_unread(const epcomm_posting_probe& probe, int32_t warp, Unread* unread,
                                   PostingSpan* span) {
    span->begin = now_ns();
    for (int32_t i = 0; i < probe.puts; ++i) unread->write(posting_command(probe, warp, i), i);
    span->posted = now_ns();
}

}  // namespace epcomm::fabric
