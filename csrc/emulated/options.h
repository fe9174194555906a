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

/// What all of them understand. `delay`, `late_fetch`, `lost_doorbell`, `pieces` and
/// `late_completion` are the most that this harmless fault makes a request late, in microseconds; a
/// quarter of the requests meet each that is named. `kill` is the position at which every queue
/// pair fails, `dead_plane` an NIC of every rank that reaches nobody, from `dead_from` on. With
/// `failover` 1 its lanes move to other planes.
struct TransportOptions {
    LineModel line = {50, 4096, 80, 5, 300, 2000, 2'000'000'000, 0};
    uint64_t seed = 0;
    std::vector<FaultRule> rules;
    uint32_t num_planes = 1;
    uint32_t num_blocks = 2;  ///< SMs of a rank's NICs on a GPU
    int32_t failover = 0;
};

inline TransportOptions parse_options(const std::string& text, uint32_t num_nodes) {
    const std::pair<const char*, Fault> faults[] = {
        {"delay", kDelay},   {"late_fetch", kLateFetch},           {"lost_doorbell", kLostDoorbell},
        {"pieces", kPieces}, {"late_completion", kLateCompletion},
    };
    const char* names =
        "rate=, latency_ns=, retry_us=, planes=, blocks=, seed=, delay=, late_fetch=, "
        "lost_doorbell=, pieces=, late_completion=, kill=, dead_plane=, dead_from=, failover=";
    TransportOptions options;
    uint64_t dead_plane = ~uint64_t(0), dead_from = 0;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
        const size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        char* end = nullptr;
        const char* digits = equals == std::string::npos ? "" : word.c_str() + equals + 1;
        const uint64_t value = strtoull(digits, &end, 10);
        bool known = *digits != 0 && *end == 0;
        if (name == "rate") {
            options.line.bytes_per_ns = uint32_t(value);
        } else if (name == "latency_ns") {
            options.line.latency_ns = uint32_t(value);
        } else if (name == "retry_us") {
            options.line.retry_ns = uint32_t(value * 1000);
        } else if (name == "planes") {
            options.num_planes = uint32_t(value);
        } else if (name == "blocks") {
            options.num_blocks = uint32_t(value);
        } else if (name == "seed") {
            options.seed = value;
        } else if (name == "kill") {
            options.rules.push_back({kKillQueue, kAny, kAny, value, value, kAlways, 1, 0});
        } else if (name == "dead_plane") {
            dead_plane = value;
        } else if (name == "dead_from") {
            dead_from = value;
        } else if (name == "failover" && value <= 1) {
            options.failover = int32_t(value);
        } else {
            bool found = false;
            for (const auto& fault : faults) {
                if (name != fault.first) continue;
                found = true;
                options.rules.push_back({fault.second, kAny, kAny, 0, ~uint64_t(0), kAlways / 4, 0,
                                         value * 1000 * kNanosecond});
            }
            known = known && found;
        }
        if (!known) {
            throw std::runtime_error("transport emulated: \"" + word + "\" is not one of " + names +
                                     " with a whole number");
        }
    }
    for (uint32_t n = 0; dead_plane < options.num_planes && n < num_nodes; ++n) {
        options.rules.push_back({kRetryExceeded, int32_t(n * options.num_planes + dead_plane), kAny,
                                 dead_from, ~uint64_t(0), kAlways, 1, 0});
    }
    return options;
}

}  // namespace epcomm::emulated
