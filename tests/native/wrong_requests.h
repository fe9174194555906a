// Requests that an NIC must refuse, and what it answers: posted by the host, or by kernels.
#pragma once

#include "../../csrc/emulated/journal.h"
#include "../../csrc/emulated/queue_pair.h"
#include "../../csrc/mlx5/post.h"
#include "check.h"

namespace requests {

using namespace epcomm;
using namespace epcomm::emulated;
using mlx5::Block;
using mlx5::Header;
using mlx5::LocalPlace;
using mlx5::RemotePlace;
using mlx5::SendQueue;

enum class Wrong : uint32_t {
    kNone,
    // Of the peer's memory:
    kUnknownKey,
    kBeforeMemory,
    kBehindMemory,
    kAcrossTheEnd,
    kAroundTheAddressSpace,
    kNotWritable,
    kNotReadable,
    kNotAddable,
    kForeignMemory,  ///< of another protection domain
    // Of the own memory:
    kForeignLocalMemory,
    kAcrossTheLocalEnd,
    kNoLanding,        ///< for an atomic's old value
    kReadOnlyLanding,  ///<
    kMisalignedAtomic,
    // Malformed:
    kNextIndex,
    kLastIndex,
    kOtherQueuePair,
    kUnitTooMuch,
    kUnitTooFew,
    kUnknown,
    kWriteWithImmediate,
    kModifier,
    kImmediate,
    kStream,
    kSignature,
    kUnknownFlag,
    kReservedWord,
    kZeroBytes,
    kInlineTooLong,
    kInlineZeroBytes,
};
constexpr uint32_t kNumWrong = uint32_t(Wrong::kInlineZeroBytes) + 1;

/// What a completion says. `violation`: what the NIC records of it.
struct Answer {
    uint8_t syndrome, vendor;
    Violation violation;
};

inline Answer answer_to(Wrong what) {
    const auto malformed = [](Violation violation) {
        return Answer{mlx5::kLocalOperation, kVendorMalformed, violation};
    };
    switch (what) {
        case Wrong::kNone: break;
        case Wrong::kUnknownKey:
        case Wrong::kBeforeMemory:
        case Wrong::kBehindMemory:
        case Wrong::kAcrossTheEnd:
        case Wrong::kAroundTheAddressSpace:
        case Wrong::kNotWritable:
        case Wrong::kNotReadable:
        case Wrong::kNotAddable:
        case Wrong::kForeignMemory: return {mlx5::kRemoteAccess, kVendorRemoteAccess, kNoViolation};
        case Wrong::kForeignLocalMemory:
        case Wrong::kAcrossTheLocalEnd:
        case Wrong::kNoLanding:
        case Wrong::kReadOnlyLanding: return {mlx5::kLocalProtection, 0, kNoViolation};
        case Wrong::kMisalignedAtomic: return {mlx5::kRemoteInvalid, 0, kNoViolation};
        case Wrong::kNextIndex:
        case Wrong::kLastIndex: return malformed(kWrongIndex);
        case Wrong::kOtherQueuePair: return malformed(kWrongQueueNumber);
        case Wrong::kUnitTooMuch:
        case Wrong::kUnitTooFew: return malformed(kWrongUnits);
        case Wrong::kUnknown:
        case Wrong::kWriteWithImmediate: return malformed(kUnknownOpcode);
        case Wrong::kModifier:
        case Wrong::kImmediate:
        case Wrong::kStream:
        case Wrong::kSignature:
        case Wrong::kUnknownFlag:
        case Wrong::kReservedWord: return malformed(kReservedBits);
        case Wrong::kZeroBytes:
        case Wrong::kInlineZeroBytes: return malformed(kNoBytes);
        case Wrong::kInlineTooLong: return malformed(emulated::kInlineTooLong);
    }
    return {0, 0, kNoViolation};
}

/// The same of a fault that makes a right request fail.
inline Answer answer_to(Fault fault) {
    switch (fault) {
        case kRetryExceeded: return {mlx5::kRetryExceeded, kVendorRetry, kNoViolation};
        case kBadKey: return {mlx5::kRemoteAccess, kVendorRemoteAccess, kNoViolation};
        case kKillQueue: return {mlx5::kFlushed, kVendorFlushed, kNoViolation};
        default: return {0, 0, kNoViolation};
    }
}

/// Memory of both ends, and keys of some of it that allow less.
struct Places {
    RemotePlace to;                                ///< kPlaceWords, zeros
    LocalPlace from;                               ///< two words, which are not 0
    RemotePlace word;                              ///< one that atomics may change
    uint64_t remote_begin, remote_end, local_end;  ///< of the memory around `to` and `from`
    RemotePlace unwritable, unreadable, unaddable, foreign;
    LocalPlace foreign_local, read_only;
};
/// Where the request before a wrong one writes a word, the wrong one itself, and the one behind it.
enum PlaceWord : uint32_t { kBefore = 0, kWrong = 1, kBehind = 2, kPlaceWords = 4 };

EPCOMM_HD inline Block write_word(const Header& header, const Places& places, PlaceWord which) {
    const uint64_t from = which == kBehind ? 8 : 0;
    return mlx5::write_request(header, {places.to.address + which * 8, places.to.key},
                               {places.from.address + from, places.from.key}, 8);
}

/// Change what a right request says of itself.
EPCOMM_HD inline void spoil(Wrong what, Block* block) {
    auto* control = reinterpret_cast<mlx5::Control*>(block);
    uint32_t* bytes = &block->unit[2].word[0];
    switch (what) {
        case Wrong::kNextIndex: control->operation = control->operation + 0x100; break;
        case Wrong::kLastIndex: control->operation = control->operation - 0x100; break;
        case Wrong::kOtherQueuePair: control->queue_pair = control->queue_pair + 0x100; break;
        case Wrong::kUnitTooMuch: control->queue_pair = control->queue_pair + 1; break;
        case Wrong::kUnitTooFew: control->queue_pair = control->queue_pair - 1; break;
        case Wrong::kUnknown: control->operation = (control->operation & ~0xffu) | 0x22; break;
        case Wrong::kWriteWithImmediate: control->operation = control->operation | 1; break;
        case Wrong::kModifier: control->operation = control->operation | 1u << 24; break;
        case Wrong::kImmediate: control->immediate = 1; break;
        case Wrong::kStream: control->stream[1] = 1; break;
        case Wrong::kSignature: control->signature = 1; break;
        case Wrong::kUnknownFlag: control->flags |= 1; break;
        case Wrong::kReservedWord: block->unit[1].word[3] = 1; break;
        case Wrong::kZeroBytes: *bytes = 0; break;
        case Wrong::kInlineTooLong: *bytes = mlx5::Be32(mlx5::kInline | 13).raw; break;
        case Wrong::kInlineZeroBytes: *bytes = mlx5::Be32(mlx5::kInline).raw; break;
        default: break;
    }
}

EPCOMM_HD inline Block make(Wrong what, const Header& header, const Places& places) {
    const LocalPlace from = places.from;
    const auto write_to = [&](const RemotePlace& to) {
        return mlx5::write_request(header, to, from, 8);
    };
    const auto add = [&](const RemotePlace& to, const LocalPlace& landing) {
        return mlx5::fetch_add_request(header, to, landing, 1);
    };
    const auto at = [&](uint64_t address) { return RemotePlace{address, places.to.key}; };
    switch (what) {
        case Wrong::kUnknownKey: return write_to({places.to.address, 0x77});
        case Wrong::kBeforeMemory: return write_to(at(places.remote_begin - 8));
        case Wrong::kBehindMemory: return write_to(at(places.remote_end));
        case Wrong::kAcrossTheEnd: return write_to(at(places.remote_end - 7));
        case Wrong::kAroundTheAddressSpace: return write_to(at(~uint64_t(0) - 3));
        case Wrong::kNotWritable: return write_to(places.unwritable);
        case Wrong::kNotReadable: return mlx5::read_request(header, places.unreadable, from, 8);
        case Wrong::kNotAddable: return add(places.unaddable, from);
        case Wrong::kForeignMemory: return write_to(places.foreign);
        case Wrong::kForeignLocalMemory:
            return mlx5::write_request(header, places.to, places.foreign_local, 8);
        case Wrong::kAcrossTheLocalEnd:
            return mlx5::write_request(header, places.to, {places.local_end - 7, from.key}, 8);
        case Wrong::kNoLanding: return add(places.word, {0, 0});
        case Wrong::kReadOnlyLanding: return add(places.word, places.read_only);
        case Wrong::kMisalignedAtomic: return add({places.word.address + 4, places.word.key}, from);
        default: break;
    }
    Block block = write_word(header, places, kWrong);
    spoil(what, &block);
    return block;
}

/// Post it between two good ones, of which the first asks for a completion, and wait for all of
/// them. Whether they went well.
template <class Wait>
EPCOMM_HD inline bool post_between(SendQueue* queue, Wrong what, const Places& places, bool asks,
                                   Wait& wait) {
    const auto block = [&](uint32_t i, uint64_t position) {
        const bool completion = i == 0 || (i == 1 && asks);
        const Header header = mlx5::header_of(*queue, position, completion);
        if (i == 1) return make(what, header, places);
        return write_word(header, places, i == 0 ? kBefore : kBehind);
    };
    return mlx5::post(mlx5::OneThread(), queue, 3, mlx5::Ring::kNow, block, wait) != 0 &&
           mlx5::flush(queue, wait);
}

/// What a queue, used for nothing else, looks like afterwards, from `first` on: a completion, the
/// error, and an entry for each request behind it, which all are flushed.
inline void expect_refused(const SendQueue& queue, const mlx5::Completion* completions,
                           uint64_t first, const Answer& answer) {
    CHECK_EQUAL(queue.failed, mlx5::kQueueError);
    CHECK_EQUAL(queue.error.syndrome, answer.syndrome);
    CHECK_EQUAL(queue.error.vendor_syndrome, answer.vendor);
    CHECK_EQUAL(queue.error_position, first + 1);
    CHECK_EQUAL(uint32_t(queue.error.queue_pair) & 0xffffff, queue.number);
    CHECK(queue.reserved >= first + 3);
    const auto* entry = reinterpret_cast<const mlx5::ErrorCompletion*>(completions);
    CHECK_EQUAL(mlx5::opcode_of(entry[0].opcode_owner), mlx5::kCompleted);
    CHECK_EQUAL(mlx5::opcode_of(entry[1].opcode_owner), mlx5::kRequestError);
    for (uint64_t i = first + 2; i < queue.reserved; ++i) {
        CHECK_EQUAL(entry[i - first].syndrome, mlx5::kFlushed);
        CHECK_EQUAL(entry[i - first].vendor_syndrome, kVendorFlushed);
        CHECK_EQUAL(entry[i - first].index, uint16_t(i));
    }
}

/// ... and the peer's memory. `word`: that the requests before and behind bring.
inline void expect_words(const uint64_t* received, const uint64_t* sent, bool failed) {
    CHECK_EQUAL(received[kBefore], sent[0]);
    CHECK_EQUAL(received[kWrong], failed ? 0 : sent[0]);
    CHECK_EQUAL(received[kBehind], failed ? 0 : sent[1]);
}

}  // namespace requests
