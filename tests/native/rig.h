// Two or more emulated NICs with queue pairs between them, and the writers' side of those.
//
// The engine is the host's; or, where EPCOMM_DEVICE_EMULATION is defined, that of the GPU, its
// kernel run on the host.
#pragma once

#include <deque>

#ifdef EPCOMM_DEVICE_EMULATION
#include "resident_engine.h"
#endif

#include "../../csrc/emulated/engine.h"
#include "../../csrc/mlx5/post.h"
#include "check.h"

namespace rig {

using namespace epcomm;
using namespace epcomm::emulated;
using mlx5::Block;
using mlx5::Header;
using mlx5::OneThread;
using mlx5::Ring;
using mlx5::SendQueue;

#ifdef EPCOMM_DEVICE_EMULATION
using TestEngine = ResidentEngine;
constexpr uint64_t kSlowness = 20;       ///< tests of many runs make so many times fewer
constexpr bool kCopierHasSpeed = false;  ///< EngineOptions::copy_bytes_per_ns
#else
using TestEngine = Engine;
constexpr uint64_t kSlowness = 1;
constexpr bool kCopierHasSpeed = true;
#endif

constexpr LineModel kLine = {50, 4096, 30, 5, 300, 2000, 500'000, 0};

/// One queue pair as its writers have it, with the memory the NIC reads and writes.
struct Writer {
    std::vector<Block> ring;
    std::vector<mlx5::Completion> completions;
    mlx5::Be32 record[mlx5::kRecordWords] = {};
    uint64_t doorbell = 0;
    SendQueue queue = {};
    uint32_t nic = 0;

    Writer(uint32_t num_blocks, uint32_t num_completions)
        : ring(num_blocks), completions(num_completions) {
        memset(completions.data(), 0xff, completions.size() * sizeof completions[0]);
        // As hardware wants it: opcode invalid, owner bit 0.
        for (auto& entry : completions) entry.opcode_owner = mlx5::kInvalid << 4;
        queue.ring = ring.data();
        queue.completions = completions.data();
        queue.record = record;
        queue.doorbell = &doorbell;
        queue.num_blocks = num_blocks;
        queue.num_completions = num_completions;
    }

    uint32_t record_word(int word) const { return record[word]; }
};

/// Waits let the NICs work: one thread, and the same run for the same seed.
template <class AnyEngine>
struct SteppingOf {
    AnyEngine& engine;
    long budget = 2'000'000;
    bool again() { return engine.advance(), --budget > 0; }
};
using Stepping = SteppingOf<TestEngine>;

struct Options {
    uint32_t num_nics = 2;
    uint32_t num_blocks = 16;
    uint32_t num_completions = 16;
    uint64_t start = 0;
    uint32_t max_responses = kMaxResponses;
    LineModel line = kLine;
    uint64_t memory_bytes = 1 << 16;
    EngineOptions engine;
};

template <class AnyEngine>
struct RigOf {
    Options options;
    Network network;
    AnyEngine engine;
    std::deque<Writer> writers;
    std::vector<std::vector<uint64_t>> memory;  ///< of each NIC, all of it registered
    std::vector<uint32_t> keys;
    SteppingOf<AnyEngine> wait;

    explicit RigOf(Options o = {})
        : options(o),
          network(o.num_nics, o.line),
          engine(network.wire(), o.engine),
          memory(o.num_nics, std::vector<uint64_t>(o.memory_bytes / 8)),
          wait{engine} {
        for (uint32_t nic = 0; nic < o.num_nics; ++nic) {
            keys.push_back(
                network.add_memory(nic, memory[nic].data(), o.memory_bytes,
                                   kLocalWrite | kRemoteWrite | kRemoteRead | kRemoteAtomic));
        }
    }

    Writer* add(uint32_t nic, uint32_t domain = 1) {
        Writer* writer = &writers.emplace_back(options.num_blocks, options.num_completions);
        const QueueMemory memory{writer->ring.data(),  writer->record,
                                 &writer->doorbell,    writer->completions.data(),
                                 options.num_blocks,   options.num_completions,
                                 options.start,        domain,
                                 options.max_responses};
        writer->nic = nic;
        writer->queue.number = engine.add_queue(nic, memory);
        mlx5::start_at(&writer->queue, options.start);
        writer->record[mlx5::kSendRecord] = uint32_t(options.start & 0xffff);
        return writer;
    }

    /// A queue pair from `nic` to `peer`; the other end has one too, of which nothing is used.
    Writer* pair(uint32_t nic = 0, uint32_t peer = 1) {
        Writer* one = add(nic);
        Writer* other = add(peer);
        engine.connect(nic, one->queue.number, peer, other->queue.number);
        engine.connect(peer, other->queue.number, nic, one->queue.number);
        return one;
    }

    uint64_t address(uint32_t nic, uint64_t word) const { return uint64_t(&memory[nic][word]); }
    mlx5::RemotePlace remote(uint32_t nic, uint64_t word) const {
        return {address(nic, word), keys[nic]};
    }
    mlx5::LocalPlace local(uint32_t nic, uint64_t word) const {
        return {address(nic, word), keys[nic]};
    }

    /// Post one request made by `make(header)`, asking for a completion or not. 0: failed.
    template <class Make>
    uint64_t post(Writer* writer, Make make, bool completion = true, Ring when = Ring::kNow) {
        const auto block = [&](uint32_t, uint64_t position) {
            return make(mlx5::header_of(writer->queue, position, completion));
        };
        const uint64_t end = mlx5::post(OneThread(), &writer->queue, 1, when, block, wait);
        if (completion && end != 0) mlx5::raise_to(&writer->queue.asked, end);
        return end;
    }

    uint64_t write(Writer* writer, uint64_t from, uint64_t to, uint32_t bytes,
                   bool completion = true, Ring when = Ring::kNow) {
        return post(
            writer,
            [&](const Header& header) {
                return mlx5::write_request(header, remote(1, to), local(writer->nic, from), bytes);
            },
            completion, when);
    }

    uint64_t add_to(Writer* writer, uint64_t word, uint64_t amount, uint64_t landing = 0,
                    bool completion = true, Ring when = Ring::kNow) {
        return post(
            writer,
            [&](const Header& header) {
                return mlx5::fetch_add_request(header, remote(1, word), local(writer->nic, landing),
                                               amount);
            },
            completion, when);
    }

    bool flush(Writer* writer) { return mlx5::flush(&writer->queue, wait); }

    size_t count(EventKind kind, int code = -1) const {
        size_t found = 0;
        for (const Event& event : engine.events()) {
            found += event.kind == kind && (code < 0 || event.code == code);
        }
        return found;
    }

    /// All is well at the end: nobody broke a rule, record and doorbell agree.
    void expect_clean() {
        engine.settle();
        engine.check_idle();
        for (const Event& event : engine.events()) {
            if (event.kind != EventKind::kFault) printf("%s\n", describe(event).c_str());
        }
        CHECK_EQUAL(engine.violations(), 0);
    }
};

using Rig = RigOf<TestEngine>;

/// A rule that hits every request of everything, or `chance` / 65536 of them.
inline FaultRule everywhere(Fault kind, Picoseconds amount, uint32_t chance = kAlways) {
    return {kind, kAny, kAny, 0, ~uint64_t(0), chance, 0, amount};
}

/// A rule for one request.
inline FaultRule once(Fault kind, uint64_t position, Picoseconds amount = 0) {
    return {kind, 0, kAny, position, position, kAlways, 1, amount};
}

}  // namespace rig
