// Faults: what goes wrong, decided by the request alone.
//
// A rule applies to a request or not by a hash of (seed, rule, NIC, queue pair, position): never by
// time or by the order in which an engine looks. So the same requests meet the same faults in every
// run with that seed. What was injected is recorded as events; turned into rules with one position
// each they replay it without a seed.
#pragma once

#include "wire.h"

namespace epcomm::emulated {

enum Fault : uint8_t {
    kDelay = 1,        ///< arrives later: reorders queue pairs and planes
    kEarlyFetch,       ///< requests are read the moment their doorbell is seen, all at once
    kLateFetch,        ///< a request is read only some time after its doorbell
    kLostDoorbell,     ///< a doorbell has no effect; the doorbell record is read some time later
    kPieces,           ///< bytes land in pieces in any order, the last of them late
    kRelaxed,          ///< atomics and short writes pass earlier writes whose last piece is late
    kLateCompletion,   ///< acknowledged, but the completion is written later
    kRetryExceeded,    ///< the peer does not answer this request
    kBadKey,           ///< the peer refuses the remote key
    kKillQueue,        ///< the queue pair goes to the error state at this request
    kEarlyCompletion,  ///< the completion is written before the bytes: breaks the contract, to
                       ///< prove that a test can see it
    kNumFaults,
};

inline const char* name(Fault fault) {
    static const char* const names[kNumFaults] = {
        "none",           "delay",   "early fetch", "late fetch",
        "lost doorbell",  "pieces",  "relaxed",     "late completion",
        "retry exceeded", "bad key", "kill queue",  "early completion",
    };
    return names[fault];
}

constexpr uint32_t kAlways = 65536;
constexpr int32_t kAny = -1;

/// When a fault happens: to one request in `kAlways / chance` of those the rule covers.
struct FaultRule {
    Fault kind;
    int32_t nic;     ///< or kAny
    int64_t queue;   ///< queue pair number, or kAny
    uint64_t first;  ///< positions [first, last]
    uint64_t last;
    uint32_t chance;
    uint32_t exact;      ///< 1: `amount` as it is, 0: uniform from 0 to `amount`
    Picoseconds amount;  ///< how late
};

/// A well mixed function of its arguments (SplitMix64's finaliser, chained).
EPCOMM_HD inline uint64_t mix(uint64_t state, uint64_t value) {
    uint64_t z = state + 0x9e3779b97f4a7c15u * (value + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/// A request, as rules see it.
struct Subject {
    uint32_t nic;
    uint32_t queue;
    uint64_t position;
};

struct FaultPlan {
    const FaultRule* rules;
    uint32_t num_rules;
    uint32_t reserved;
    uint64_t seed;

    /// Whether a fault happens to a request, and how late it makes it.
    EPCOMM_HD bool hits(Fault kind, const Subject& subject, Picoseconds* amount) const {
        for (uint32_t i = 0; i < num_rules; ++i) {
            const FaultRule& rule = rules[i];
            if (rule.kind != kind || subject.position < rule.first ||
                subject.position > rule.last ||
                (rule.nic != kAny && uint32_t(rule.nic) != subject.nic) ||
                (rule.queue != kAny && uint64_t(rule.queue) != subject.queue)) {
                continue;
            }
            const uint64_t draw =
                mix(mix(mix(mix(seed, i), subject.nic), subject.queue), subject.position);
            if (draw % kAlways >= rule.chance) continue;
            *amount = rule.exact ? rule.amount : mix(draw, 1) % (rule.amount + 1);
            return true;
        }
        return false;
    }
};

}  // namespace epcomm::emulated
