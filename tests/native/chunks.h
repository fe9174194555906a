// Several writers that put chunks through shared queue pairs, each chunk followed by its signal,
// step by step in an order that a seed decides; and the receiver that trusts the signals.
#pragma once

#include "rig.h"
#include "wrong_writers.h"

namespace rig {

using writers::Mistake;
using writers::Phase;

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
            queues.back()->queue.doorbell_interval = ~0u;  // the writers ring
            Lane lane;
            lane.left = o.num_chunks;
            lanes.push_back(lane);
            for (uint32_t i = 0; i < o.num_writers; ++i) {
                actors.push_back({q, writers::Writer<Chunk>{&queues.back()->queue}});
            }
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
                move(&actors[draw / 3 % actors.size()]);
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
    /// A chunk of a queue pair.
    struct Chunk {
        const Chunks* all = nullptr;
        uint32_t queue = 0;
        uint32_t number = 0;

        /// Every other chunk is put in two parts, so that chunks do not always end at even
        /// positions.
        uint32_t num_writes() const { return 1 + number % 2; }
        uint32_t count() const { return num_writes() + 1; }
        Block request(uint32_t i, const Header& header) const {
            return i == num_writes() ? all->signal(*this, header) : all->data(*this, i, header);
        }
    };
    struct Actor {
        uint32_t queue;
        writers::Writer<Chunk> writer;
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

    Block data(const Chunk& chunk, uint32_t part, const Header& header) const {
        const uint64_t at = place(chunk.queue, chunk.number) + part;
        const uint32_t all = words(chunk.queue, chunk.number), parts = chunk.num_writes();
        const uint32_t count = part + 1 == parts ? all - part : 1;
        return mlx5::write_request(header, rig.remote(1, at), rig.local(0, at), count * 8);
    }

    Block signal(const Chunk& chunk, const Header& header) const {
        uint64_t word = chunk.queue;
        // Queue pair q signals what its neighbour's writers have just put.
        if (options.mistake == Mistake::kSignalElsewhere) word = (word + 1) % options.num_queues;
        return mlx5::fetch_add_request(header, rig.remote(1, word),
                                       rig.local(0, options.num_queues), 1);
    }

    /// One step of one writer.
    void move(Actor* actor) {
        Lane& lane = lanes[actor->queue];
        writers::Writer<Chunk>& writer = actor->writer;
        if (writer.phase == Phase::kIdle) {
            if (lane.left == 0) return;
            const Chunk chunk = {this, actor->queue, options.num_chunks - lane.left--};
            lane.order.push_back(chunk.number);
            // In the midst of good ones.
            const bool is_right = options.mistake == Mistake::kWrongIndex && chunk.number != 11;
            writer.mistake = is_right ? Mistake::kNone : options.mistake;
            const bool now = options.mistake == Mistake::kNone && chunk.number % 2 == 0;
            writer.when = now ? Ring::kNow : Ring::kWhenDue;
            return writer.reserve(chunk);
        }
        const bool ends = writer.phase == Phase::kPublished;
        writer.move([this] { rig.engine.step(); });
        lane.finished += ends;
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
                mlx5::ring(queue);
                while (!writers::is_flushed(*queue, options.mistake) && rig.engine.advance()) {
                    mlx5::poll(queue);
                }
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
    std::vector<Actor> actors;
};

}  // namespace rig
