// Three writers of one queue pair in an order in which every mistake shows, however fast the NIC
// is: so also beside one that nobody steps.
//
//     chunk   positions   by
//       0       0 1       a right writer   asks for a completion, which is there before the rest
//       1       2 3       a right writer   is at the peer before the rest: its requests were read
//       2       4 5       a }
//       3       6 7       b } reserve one after the other, then: a has room. b goes on as far as it
//       4     8 9 10      c } can. a stores. b goes on as far as it can. a, b, c go on to their
//       ends.
//
// The ring has 8 slots, so c must wait: with the first completion read it has 10 of the 11 it
// needs, and the next completion, of chunk 3, takes a round trip of a long line. None of a, b and c
// can be late for the mistakes that show before that one.
//
// Meanwhile a writer of another queue pair has stored a chunk, and rings once all this is over.
#pragma once

#include <vector>

#include "../../csrc/emulated/journal.h"
#include "../../csrc/emulated/queue_pair.h"
#include "check.h"
#include "wrong_writers.h"

namespace writers {

using emulated::Violation;

constexpr uint32_t kSlots = 8;
constexpr uint32_t kLatencyNs = 20'000'000;
constexpr uint32_t kFirstWrong = 2;            ///< the chunks of a, b and c
constexpr uint32_t kNumChunks = 5;             ///< of the queue pair
constexpr uint32_t kOthersChunk = kNumChunks;  ///< the other queue pair's
constexpr uint32_t kChunkWords = 64;           ///< more than an NIC keeps for a message's end
constexpr uint32_t kAllWords = (kNumChunks + 1) * kChunkWords;
enum SignalWord : uint32_t { kSignal = 0, kOthersSignal = 1, kNumSignals = 2 };

/// Never 0.
EPCOMM_HD inline uint64_t word_of(uint32_t chunk, uint32_t word) {
    return (uint64_t(chunk) + 1) << 32 | (word * 0x9e3779b9u >> 8) << 8 | 1;
}

struct Script {
    SendQueue* queue;           ///< of kSlots, new
    SendQueue* other;           ///< another one to the same peer, new
    mlx5::LocalPlace from;      ///< kAllWords
    mlx5::RemotePlace to;       ///< kAllWords zeros; this address is the receiver's, too
    mlx5::RemotePlace signals;  ///< kNumSignals zeros, likewise
    Mistake mistake;
};

struct Outcome {
    uint32_t failed;  ///< the queue has; then:
    uint8_t syndrome, vendor;
    uint64_t position;
    uint32_t torn;           ///< a signal was seen whose bytes were not there
    uint32_t flushed_early;  ///< bytes were missing after a flush
    uint32_t stuck;          ///< a wait came to its end
};

/// A signal is the number of chunks so far. The last chunk is put in two parts.
struct ScriptChunk {
    const Script* script = nullptr;
    uint32_t number = 0;
    bool signals_elsewhere = false;

    EPCOMM_HD uint32_t count() const { return number == kNumChunks - 1 ? 3 : 2; }
    EPCOMM_HD mlx5::Block request(uint32_t i, Header header) const {
        const uint32_t parts = count() - 1, words = kChunkWords / parts;
        if (i == parts) {
            const bool is_other = number == kOthersChunk;
            const bool asks = number == 0 || number == 3 || is_other;
            header.flags = asks ? mlx5::kCompletion : 0;
            const uint32_t word = is_other || signals_elsewhere ? kOthersSignal : kSignal;
            return mlx5::word_request(header,
                                      {script->signals.address + word * 8, script->signals.key},
                                      is_other ? 1 : number + 1);
        }
        const uint64_t at = (uint64_t(number) * kChunkWords + i * words) * 8;
        return mlx5::write_request(header, {script->to.address + at, script->to.key},
                                   {script->from.address + at, script->from.key}, words * 8);
    }
};

template <class Wait>
class Play {
 public:
    EPCOMM_HD Play(const Script& script, Wait& wait) : script_(script), wait_(wait) {}

    EPCOMM_HD Outcome run() {
        SendQueue *queue = script_.queue, *other = script_.other;
        for (SendQueue* one : {queue, other}) {
            // Requests ask for completions, and writers ring, as the script says.
            one->completion_interval = 1u << 31;
            one->doorbell_interval = ~0u;
        }
        auto* from = reinterpret_cast<uint64_t*>(script_.from.address);
        for (uint32_t i = 0; i < kAllWords; ++i)
            from[i] = word_of(i / kChunkWords, i % kChunkWords);
        Actor elsewhere{other};
        elsewhere.reserve({&script_, kOthersChunk, false});
        while (elsewhere.phase != Phase::kPublished) elsewhere.move(answer());
        begin();
        go_wrong();
        const bool all = flush();
        outcome_.flushed_early = all && !is_there(kNumChunks - 1);
        outcome_.torn = is_torn(elsewhere.phase != Phase::kPublished);
        finish(&elsewhere);
        until([&] { return is_there(kOthersChunk) && signal(kOthersSignal) == 1; });
        if (!mlx5::flush(other, wait_)) outcome_.stuck = 1;
        outcome_.failed = !mlx5::works(*queue);
        if (outcome_.failed) {
            outcome_.syndrome = queue->error.syndrome;
            outcome_.vendor = queue->error.vendor_syndrome;
            outcome_.position = queue->error_position;
        }
        return outcome_;
    }

 private:
    using Actor = Writer<ScriptChunk>;

    template <class Condition>
    EPCOMM_HD void until(const Condition& condition) {
        while (!condition()) {
            if (wait_.again()) continue;
            outcome_.stuck = 1;
            return;
        }
    }
    EPCOMM_HD uint64_t word(uint64_t address, uint32_t i) const {
        return fabric::load_acquire(reinterpret_cast<const uint64_t*>(address) + i);
    }
    EPCOMM_HD uint64_t signal(SignalWord which) const {
        return word(script_.signals.address, which);
    }
    /// From the end on, which comes last.
    EPCOMM_HD bool is_there(uint32_t chunk) const {
        for (uint32_t i = kChunkWords; i-- > 0;) {
            if (word(script_.to.address, chunk * kChunkWords + i) != word_of(chunk, i))
                return false;
        }
        return true;
    }
    EPCOMM_HD bool is_torn(bool others_rang) const {
        bool torn = signal(kOthersSignal) != 0 && !others_rang;
        for (uint32_t chunk = 0; chunk < signal(kSignal); ++chunk) torn = torn || !is_there(chunk);
        return torn;
    }

    /// Let the NIC find what is wrong.
    EPCOMM_HD auto answer() {
        return [this] { until([this] { return !mlx5::poll(script_.queue); }); };
    }

    EPCOMM_HD ScriptChunk chunk(uint32_t number) const {
        const bool is_wrong = number >= kFirstWrong && number < kNumChunks;
        return {&script_, number, is_wrong && script_.mistake == Mistake::kSignalElsewhere};
    }

    EPCOMM_HD void begin() {
        Actor writer{script_.queue};
        for (uint32_t number = 0; number < kFirstWrong; ++number) {
            writer.reserve(chunk(number));
            finish(&writer);
        }
        // Nobody reads the completion yet: c is to.
        until([this] {
            mlx5::Tail tail;
            return mlx5::load_good(*script_.queue, 0, &tail) && is_there(kFirstWrong - 1);
        });
    }

    EPCOMM_HD void go_wrong() {
        Actor a{script_.queue, script_.mistake}, b = a, c = a;
        a.reserve(chunk(2));
        b.reserve(chunk(3));
        c.reserve(chunk(4));
        for (int i = 0; i < 2; ++i) {
            a.move(answer());
            for (int k = 0; k < 4; ++k) b.move(answer());
            if (b.phase == Phase::kIdle) answer()();  // before a was
        }
        finish(&a);
        finish(&b);
        finish(&c);
    }

    /// Who is not kept from its next step does not wait.
    EPCOMM_HD void finish(Actor* actor) {
        while (actor->phase != Phase::kIdle && mlx5::works(*actor->queue) && outcome_.stuck == 0) {
            const Phase before = actor->phase;
            const uint64_t done = fabric::load_relaxed(&actor->queue->done);
            actor->move(answer());
            if (actor->phase != before || done != fabric::load_relaxed(&actor->queue->done))
                continue;
            if (!wait_.again()) outcome_.stuck = 1;
        }
    }

    EPCOMM_HD bool flush() {
        SendQueue* queue = script_.queue;
        if (script_.mistake != Mistake::kFlushOffByOne) return mlx5::flush(queue, wait_);
        until([&] { return !mlx5::poll(queue) || is_flushed(*queue, script_.mistake); });
        return mlx5::works(*queue);
    }

    const Script& script_;
    Wait& wait_;
    Outcome outcome_ = {};
};

/// What becomes of the script with a mistake.
struct Expected {
    Violation violation;   ///< that the NIC records; kNoViolation: it is the receiver who sees it
    uint32_t num_there;    ///< so many chunks arrive
    uint32_t num_touched;  ///< so many may have begun to
};

inline Expected expected_of(Mistake mistake) {
    using namespace emulated;
    switch (mistake) {
        case Mistake::kWrongIndex:
        case Mistake::kPublishOutOfOrder:
        case Mistake::kPublishBeforeStore: return {kWrongIndex, 2, 2};
        // Found when chunk 3's completion, which would allow it, is to be written.
        case Mistake::kStoreBeforeRoom: return {kSlotReused, 4, 4};
        case Mistake::kNoRoomCheck:
        case Mistake::kCompletionOffByOne: return {kQueueOverflow, 2, 4};
        case Mistake::kNoRecord:
        case Mistake::kRecordAfterDoorbell:
        case Mistake::kRecordIsLast: return {kRecordBehind, 2, 2};
        case Mistake::kReceiveRecord: return {kReceiveRecord, 2, 2};
        case Mistake::kDoorbellElsewhere: return {kDoorbellQueueNumber, 2, 2};
        case Mistake::kNone:
        case Mistake::kSignalElsewhere:
        case Mistake::kFlushOffByOne: break;
    }
    return {kNoViolation, kNumChunks, kNumChunks};
}

/// What was seen of a script once the NIC has ended.
struct Evidence {
    Outcome outcome;
    std::vector<uint64_t> received;  ///< [kAllWords]
    std::vector<emulated::Event> events;
    uint64_t start;  ///< position that the counters began at
};

/// Whether an engine that looks between record and doorbell says so of the same mistake: the record
/// is beyond what can be posted, the doorbell seen is the one before.
inline bool is_seen_early(Violation expected, uint8_t code) {
    return expected == emulated::kQueueOverflow && code == emulated::kRecordWrong;
}

inline void expect_caught(Mistake mistake, const Evidence& seen) {
    const Expected expected = expected_of(mistake);
    const Outcome& outcome = seen.outcome;
    CHECK_EQUAL(outcome.stuck, 0);
    CHECK_EQUAL(outcome.torn, mistake == Mistake::kSignalElsewhere);
    Violation found = emulated::kNoViolation;
    for (const emulated::Event& event : seen.events) {
        if (event.kind != emulated::EventKind::kViolation) continue;
        if (found == emulated::kNoViolation) found = Violation(event.code);
        CHECK(event.code == expected.violation || is_seen_early(expected.violation, event.code));
    }
    CHECK_EQUAL(found != 0, expected.violation != emulated::kNoViolation);
    CHECK_EQUAL(outcome.failed, found != 0);
    if (outcome.failed != 0) {
        const bool is_request = expected.violation < emulated::kDoorbellQueueNumber;
        CHECK_EQUAL(outcome.syndrome, mlx5::kLocalOperation);
        CHECK_EQUAL(outcome.vendor, is_request ? uint8_t(emulated::kVendorMalformed)
                                               : emulated::kVendorViolation + found);
        // A request that is wrong is named; of broken rules the first one that has not completed.
        // Who counted completions wrong misplaces it.
        const uint64_t at = outcome.position - seen.start;
        if (is_request) CHECK_EQUAL(at, 4);
        if (mistake != Mistake::kCompletionOffByOne) CHECK(at >= 2 && at < kSlots);
    }
    CHECK_EQUAL(outcome.flushed_early, mistake == Mistake::kFlushOffByOne);
    for (uint32_t i = 0; i < kNumChunks * kChunkWords; ++i) {
        const uint32_t chunk = i / kChunkWords;
        const uint64_t right = word_of(chunk, i % kChunkWords), word = seen.received[i];
        if (chunk < expected.num_there) CHECK_EQUAL(word, right);
        if (chunk >= expected.num_there && word != 0) CHECK_EQUAL(word, right);
        if (chunk >= expected.num_touched) CHECK_EQUAL(word, 0);
    }
}

}  // namespace writers
