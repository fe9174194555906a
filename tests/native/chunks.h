// Several writers that put chunks through shared queue pairs, each chunk followed by its signal,
// step by step in an order that a seed decides; and the receiver that trusts the signals.
#pragma once

#include "rig.h"

namespace rig {

/// What a writer does wrong, in one place each.
enum class Mistake {
    kNone,
    kWrongIndex,       ///< a request with the index of the next one
    kStoreBeforeRoom,  ///< stores its request, then waits for the slot
    kNoRoomCheck,      ///< does not wait for the slot
    kNoRecord,         ///< rings without a doorbell record
    kRecordAfterDoorbell,
    kRecordIsLast,       ///< the index of the last request, not of the next
    kReceiveRecord,      ///< writes the other word of the record
    kDoorbellElsewhere,  ///< rings with another queue pair's number
    kPublishOutOfOrder,  ///< does not wait for the positions before its own
    kPublishBeforeStore,
    kSignalElsewhere,     ///< data on one queue pair, signal on another
    kCompletionOffByOne,  ///< takes a completion for one request more than it covers
    kFlushOffByOne,       ///< takes all but the last request for all
};

struct ChunkOptions {
    Options rig;
    uint32_t num_queues = 2;
    uint32_t num_chunks = 30;  ///< of each queue pair
    uint32_t num_writers = 3;  ///< of each queue pair
    uint32_t max_words = 64;
    Mistake mistake = Mistake::kNone;
};

class Chunks {
 public:
    explicit Chunks(const ChunkOptions& o) : options(o), rig(grown(o)) {
        for (uint32_t q = 0; q < o.num_queues; ++q) {
            queues.push_back(rig.pair());
            queues.back()->queue.doorbell_interval = ~0u;  // `ring_wrongly` does it
            Lane lane;
            lane.left = o.num_chunks;
            lanes.push_back(lane);
            for (uint32_t i = 0; i < o.num_writers; ++i) writers.push_back({q});
        }
        rig.wait.budget = 50'000 / long(kSlowness);
        for (uint64_t i = signal_words(); i < rig.memory[0].size(); ++i) rig.memory[0][i] = ~i;
    }

    /// Until all is sent, or something is wrong. Whether all went well.
    bool run() {
        for (long turn = 0; turn < 400'000 / long(kSlowness); ++turn) {
            const uint64_t draw = mix(mix(options.rig.engine.seed, 7), uint64_t(turn));
            bool left = false;
            for (const Lane& lane : lanes) left = left || lane.finished != options.num_chunks;
            if (!left) return finish();
            if (draw % 3 == 0) {
                rig.engine.advance();
            } else {
                move(&writers[draw / 3 % writers.size()]);
            }
            observe();
            for (Writer* queue : queues) queue_failed |= !mlx5::works(queue->queue);
            if (torn || queue_failed) return false;
        }
        stuck = true;
        return false;
    }

    ChunkOptions options;
    Rig rig;
    std::vector<Writer*> queues;
    bool torn = false;          ///< a signal was seen whose bytes were not there
    bool queue_failed = false;  ///< the NIC said no
    bool stuck = false;
    bool flushed_early = false;  ///< bytes were missing after a flush

 private:
    enum class Phase { kIdle, kReserved, kHasRoom, kStored, kPublished };
    struct Actor {
        uint32_t queue;
        Phase phase = Phase::kIdle;
        uint64_t first = 0;
        uint32_t chunk = 0;
    };
    struct Lane {
        uint32_t left = 0;
        uint32_t finished = 0;
        std::vector<uint32_t> order = {};  ///< chunks in the order of their positions
        uint64_t seen = 0;
    };

    static Options grown(const ChunkOptions& o) {
        Options options = o.rig;
        options.memory_bytes = 8 * (o.num_queues + 1 + o.num_queues * o.num_chunks * o.max_words);
        return options;
    }
    uint64_t signal_words() const { return options.num_queues + 1; }  // and one landing word
    uint64_t place(uint32_t queue, uint32_t chunk) const {
        return signal_words() + (uint64_t(queue) * options.num_chunks + chunk) * options.max_words;
    }
    uint32_t words(uint32_t queue, uint32_t chunk) const {
        return 2 +
               uint32_t(mix(mix(options.rig.engine.seed, queue), chunk) % (options.max_words - 1));
    }
    bool is_there(uint32_t queue, uint32_t chunk) const {
        const uint64_t at = place(queue, chunk);
        return memcmp(&rig.memory[1][at], &rig.memory[0][at], words(queue, chunk) * 8) == 0;
    }

    /// Every other chunk is put in two parts, so that chunks do not always end at even positions.
    static uint32_t num_writes(uint32_t chunk) { return 1 + chunk % 2; }
    static uint64_t end_of(const Actor& actor) { return actor.first + num_writes(actor.chunk) + 1; }

    Block data(const Actor& actor, uint32_t part) {
        const uint64_t position = actor.first + part;
        SendQueue& queue = queues[actor.queue]->queue;
        Header header = mlx5::header_of(queue, position, false);
        if (options.mistake == Mistake::kWrongIndex && actor.chunk == 11) header.index += 1;
        const uint64_t at = place(actor.queue, actor.chunk) + part;
        const uint32_t all = words(actor.queue, actor.chunk), parts = num_writes(actor.chunk);
        const uint32_t count = part + 1 == parts ? all - part : 1;
        return mlx5::write_request(header, rig.remote(1, at), rig.local(0, at), count * 8);
    }

    Block signal(const Actor& actor, uint64_t position) {
        uint64_t word = actor.queue;
        // Queue pair q signals what its neighbour's writers have just put.
        if (options.mistake == Mistake::kSignalElsewhere) word = (word + 1) % options.num_queues;
        return mlx5::fetch_add_request(mlx5::header_of(queues[actor.queue]->queue, position, false),
                                       rig.remote(1, word), rig.local(0, options.num_queues), 1);
    }

    void store(const Actor& actor) {
        SendQueue* queue = &queues[actor.queue]->queue;
        const uint32_t parts = num_writes(actor.chunk);
        for (uint32_t part = 0; part < parts; ++part) {
            mlx5::store_request(queue, actor.first + part, data(actor, part));
        }
        mlx5::store_request(queue, actor.first + parts, signal(actor, actor.first + parts));
    }

    void ring_wrongly(Writer* writer) {
        SendQueue* queue = &writer->queue;
        const uint64_t next = queue->ready;
        if (queue->rung >= next) return;
        const uint32_t number = queue->number;
        const auto record = [&](int word, uint64_t value) {
            mlx5::store_record(&queue->record[word], uint16_t(value));
        };
        const auto doorbell = [&](uint32_t of) {
            mlx5::store_doorbell(queue->doorbell, mlx5::next_index_doorbell(of, uint16_t(next)));
        };
        switch (options.mistake) {
            case Mistake::kNoRecord: doorbell(number); break;
            case Mistake::kRecordAfterDoorbell:
                doorbell(number);
                rig.engine.step();
                record(mlx5::kSendRecord, next);
                break;
            case Mistake::kRecordIsLast:
                record(mlx5::kSendRecord, next - 1);
                doorbell(number);
                break;
            case Mistake::kReceiveRecord:
                record(mlx5::kSendRecord, next);
                record(mlx5::kReceiveRecord, next);
                doorbell(number);
                break;
            case Mistake::kDoorbellElsewhere:
                record(mlx5::kSendRecord, next);
                doorbell(number ^ 1);
                break;
            default: mlx5::ring(queue); return;
        }
        queue->rung = next;
    }

    void poll(SendQueue* queue) {
        const uint64_t before = queue->done;
        mlx5::poll(queue);
        if (options.mistake == Mistake::kCompletionOffByOne && queue->done != before) {
            queue->done += 1;
        }
    }

    /// One step of one writer.
    void move(Actor* actor) {
        Writer* writer = queues[actor->queue];
        SendQueue* queue = &writer->queue;
        Lane& lane = lanes[actor->queue];
        switch (actor->phase) {
            case Phase::kIdle:
                if (lane.left == 0) return;
                actor->chunk = options.num_chunks - lane.left--;
                actor->first = fabric::fetch_add(&queue->reserved, num_writes(actor->chunk) + 1);
                lane.order.push_back(actor->chunk);
                if (options.mistake == Mistake::kStoreBeforeRoom) store(*actor);
                actor->phase = Phase::kReserved;
                return;
            case Phase::kReserved:
                if (options.mistake != Mistake::kNoRoomCheck &&
                    !mlx5::has_room(*queue, end_of(*actor))) {
                    ring_wrongly(writer);
                    return poll(queue);
                }
                actor->phase = Phase::kHasRoom;
                return;
            case Phase::kHasRoom:
                if (options.mistake == Mistake::kPublishBeforeStore) {
                    if (!mlx5::try_turn(queue, actor->first)) return;
                    mlx5::end_turn(queue, actor->first, end_of(*actor), Ring::kWhenDue);
                } else if (options.mistake != Mistake::kStoreBeforeRoom) {
                    store(*actor);
                }
                actor->phase = Phase::kStored;
                return;
            case Phase::kStored:
                if (options.mistake == Mistake::kPublishBeforeStore) {
                    store(*actor);
                } else if (options.mistake == Mistake::kPublishOutOfOrder) {
                    mlx5::raise_to(&queue->ready, end_of(*actor));
                } else if (mlx5::try_turn(queue, actor->first)) {
                    const bool now = options.mistake == Mistake::kNone && actor->chunk % 2 == 0;
                    mlx5::end_turn(queue, actor->first, end_of(*actor),
                                   now ? Ring::kNow : Ring::kWhenDue);
                } else {
                    return;
                }
                actor->phase = Phase::kPublished;
                return;
            case Phase::kPublished:
                ring_wrongly(writer);
                lane.finished += 1;
                actor->phase = Phase::kIdle;
                return;
        }
    }

    /// What the receiver may conclude from the signals it sees.
    void observe() {
        for (uint32_t q = 0; q < options.num_queues; ++q) {
            Lane& lane = lanes[q];
            const uint64_t signal = fabric::load_acquire(&rig.memory[1][q]);
            for (; lane.seen < signal && !torn; ++lane.seen) {
                torn = lane.seen >= lane.order.size() || !is_there(q, lane.order[lane.seen]);
            }
        }
    }

    bool finish() {
        for (uint32_t q = 0; q < options.num_queues; ++q) {
            SendQueue* queue = &queues[q]->queue;
            if (options.mistake == Mistake::kFlushOffByOne) {
                ring_wrongly(queues[q]);
                while (queue->done + 3 < queue->reserved && rig.engine.advance()) poll(queue);
            } else if (!rig.flush(queues[q])) {
                queue_failed = true;
                return false;
            }
            for (uint32_t chunk = 0; chunk < options.num_chunks; ++chunk) {
                flushed_early = flushed_early || !is_there(q, chunk);
            }
            flushed_early = flushed_early || rig.memory[1][q] != options.num_chunks;
            observe();
        }
        rig.engine.settle();
        rig.engine.check_idle();
        return !torn && !flushed_early && rig.engine.violations() == 0;
    }

    std::vector<Lane> lanes;
    std::vector<Actor> writers;
};

}  // namespace rig
