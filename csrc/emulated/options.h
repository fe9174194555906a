// The options of the transports over emulated NICs: "name=value" separated by spaces.
#pragma once

#include <stdlib.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fault.h"
#include "wire.h"

namespace epcomm::emulated {

constexpr uint64_t kNotGiven = ~uint64_t(0);

/// What all of them understand. `delay`, `late_fetch`, `lost_doorbell`, `pieces` and
/// `late_completion` are the most that this harmless fault makes a request late, in microseconds; a
/// quarter of the requests meet each that is named. With `early_fetch` 1, harmless too, all
/// requests are read the moment their doorbell is seen. `kill` is the position at which every queue
/// pair fails, `bad_key` the one at which every peer refuses the remote key. `dead_plane` is an NIC
/// of every rank that reaches nobody, from `dead_from` on, and all messages of `slow_plane` are
/// late by exactly `slow_us`, whatever `delay` says. With `failover` 1 lanes move off planes that
/// are lost.
///
/// `relaxed` breaks the contract, to prove that a test sees it: all atomics and short writes, so
/// the signals, pass what is late before them. That shows behind late bytes only, so a quarter of
/// the longer writes come in pieces, the last of them at most so many microseconds late.
struct TransportOptions {
    LineModel line = {50, 4096, 80, 5, 300, 2000, 2'000'000'000, 0};
    uint64_t seed = 0;
    std::vector<FaultRule> rules;
    uint32_t num_planes = 1;
    uint32_t num_blocks = 2;  ///< SMs of a rank's NICs on a GPU
    int32_t failover = 0;
    uint64_t dead_plane = kNotGiven, dead_from = 0;
    uint64_t slow_plane = kNotGiven, slow_us = kNotGiven;
};

/// Whether there is a number with this name; then it is set.
inline bool set_number(TransportOptions* options, const std::string& name, uint64_t value) {
    if (name == "rate") {
        options->line.bytes_per_ns = uint32_t(value);
    } else if (name == "latency_ns") {
        options->line.latency_ns = uint32_t(value);
    } else if (name == "retry_us") {
        options->line.retry_ns = uint32_t(value * 1000);
    } else if (name == "planes") {
        options->num_planes = uint32_t(value);
    } else if (name == "blocks") {
        options->num_blocks = uint32_t(value);
    } else if (name == "seed") {
        options->seed = value;
    } else if (name == "dead_plane") {
        options->dead_plane = value;
    } else if (name == "dead_from") {
        options->dead_from = value;
    } else if (name == "slow_plane") {
        options->slow_plane = value;
    } else if (name == "slow_us") {
        options->slow_us = value;
    } else if (name == "failover" && value <= 1) {
        options->failover = int32_t(value);
    } else {
        return false;
    }
    return true;
}

/// A fault of any request of any NIC; an amount is drawn up to so many microseconds.
inline FaultRule anywhere(Fault kind, uint32_t chance, uint64_t most_us) {
    return {kind, kAny, kAny, 0, ~uint64_t(0), chance, 0, most_us * 1000 * kNanosecond};
}

/// Whether there is a fault with this name; then it has its rules.
inline bool add_fault(std::vector<FaultRule>* rules, const std::string& name, uint64_t value) {
    const std::pair<const char*, Fault> late[] = {
        {"delay", kDelay},   {"late_fetch", kLateFetch},           {"lost_doorbell", kLostDoorbell},
        {"pieces", kPieces}, {"late_completion", kLateCompletion},
    };
    for (const auto& fault : late) {
        if (name != fault.first) continue;
        rules->push_back(anywhere(fault.second, kAlways / 4, value));
        return true;
    }
    if (name == "kill") {
        rules->push_back({kKillQueue, kAny, kAny, value, value, kAlways, 1, 0});
    } else if (name == "bad_key") {
        rules->push_back({kBadKey, kAny, kAny, value, value, kAlways, 1, 0});
    } else if (name == "relaxed") {
        rules->push_back(anywhere(kPieces, kAlways / 4, value));
        rules->push_back(anywhere(kRelaxed, kAlways, 0));
    } else if (name == "early_fetch" && value <= 1) {
        if (value == 1) rules->push_back(anywhere(kEarlyFetch, kAlways, 0));
    } else {
        return false;
    }
    return true;
}

/// One rule for the NIC of this plane of every rank.
inline std::vector<FaultRule> rules_of_plane(const TransportOptions& options, uint32_t num_nodes,
                                             const char* name, uint64_t plane, FaultRule rule) {
    if (plane == kNotGiven) return {};
    if (plane >= options.num_planes) {
        throw std::runtime_error(
            std::string("transport emulated: ") + name + ": expected less than planes=" +
            std::to_string(options.num_planes) + ", got " + std::to_string(plane));
    }
    std::vector<FaultRule> rules;
    for (uint32_t n = 0; n < num_nodes; ++n) {
        rule.nic = int32_t(n * options.num_planes + plane);
        rules.push_back(rule);
    }
    return rules;
}

inline void add_plane_faults(TransportOptions* options, uint32_t num_nodes) {
    if (options->slow_us != kNotGiven && options->slow_plane == kNotGiven) {
        throw std::runtime_error("transport emulated: slow_us needs slow_plane=");
    }
    const uint64_t slow_us = options->slow_us == kNotGiven ? 50 : options->slow_us;
    const Picoseconds late = slow_us * 1000 * kNanosecond;
    const auto slow = rules_of_plane(*options, num_nodes, "slow_plane", options->slow_plane,
                                     {kDelay, kAny, kAny, 0, ~uint64_t(0), kAlways, 1, late});
    const auto dead = rules_of_plane(
        *options, num_nodes, "dead_plane", options->dead_plane,
        {kRetryExceeded, kAny, kAny, options->dead_from, ~uint64_t(0), kAlways, 1, 0});
    // Of two rules of a kind the first one that hits counts.
    options->rules.insert(options->rules.begin(), slow.begin(), slow.end());
    options->rules.insert(options->rules.end(), dead.begin(), dead.end());
}

inline TransportOptions parse_options(const std::string& text, uint32_t num_nodes) {
    const char* names =
        "rate=, latency_ns=, retry_us=, planes=, blocks=, seed=, delay=, late_fetch=, "
        "lost_doorbell=, pieces=, late_completion=, early_fetch=, relaxed=, kill=, bad_key=, "
        "dead_plane=, dead_from=, slow_plane=, slow_us=, failover=";
    TransportOptions options;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
        const size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        char* end = nullptr;
        const char* digits = equals == std::string::npos ? "" : word.c_str() + equals + 1;
        const uint64_t value = strtoull(digits, &end, 10);
        const bool is_number = *digits != 0 && *end == 0;
        if (!is_number ||
            (!set_number(&options, name, value) && !add_fault(&options.rules, name, value))) {
            throw std::runtime_error("transport emulated: \"" + word + "\" is not one of " + names +
                                     " with a whole number");
        }
    }
    add_plane_faults(&options, num_nodes);
    return options;
}

}  // namespace epcomm::emulated
