// The verbs transport's options, from the text "name=value name=value".
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace epcomm::fabric {

/// How a counter at the peer is raised.
enum class SignalBy {
    kAuto,       ///< by atomics where both network cards have them and every region is direct
    kAtomic,     ///< 8-byte fetch-add: nobody at the peer takes part
    kImmediate,  ///< write-with-immediate, or a small message; the peer's proxy raises it
};

/// How a network card reaches a region, best first.
enum class Registration {
    kAuto,
    kDmabuf,   ///< device memory exported as a dma-buf
    kPeermem,  ///< a device pointer registered as if it were the host's (nvidia_peermem)
    kBounce,   ///< through pinned host memory, copied by the proxies of both sides
};

struct VerbsOptions {
    /// nic=A or nic=A+B: devices of this rank; channels are dealt over them. A device may be
    /// followed by its port: mlx5_0:1.
    std::vector<std::string> nics;
    /// nic_map=A,B+C,...: the same for every rank of a node, by local rank.
    std::vector<std::string> nic_map;
    int32_t nics_per_rank = 1;  ///< how many the choice by distance takes
    int32_t local_rank = 0;
    std::string pci;  ///< address of the rank's GPU, such as 0000:1b:00.0
    int32_t gid = -1;
    int32_t service_level = 0;  ///< sl: InfiniBand's service level, RoCE's priority
    int32_t traffic_class = 0;  ///< tc
    int32_t pkey_index = 0;     ///< pkey
    int32_t mtu = 0;            ///< bytes; 0 = what both ends can do
    /// timeout: a packet without an answer is sent again after 4.096 us * 2^timeout, at most
    /// `retries` times. 18 and 7: an unreachable peer is an error after 8 to 34 seconds, as cards
    /// may wait up to four times longer.
    int32_t timeout = 18;
    int32_t retries = 7;
    int32_t rnr_retries = 7;  ///< 7 = without end: the peer lives, its proxy is late
    int32_t depth = 128;      ///< operations under way per queue pair
    int32_t inline_bytes = 64;
    SignalBy signal = SignalBy::kAuto;
    Registration registration = Registration::kAuto;
};

/// Throws std::runtime_error naming the option, what came, and what was expected.
VerbsOptions parse_verbs_options(const std::string& text);

}  // namespace epcomm::fabric
