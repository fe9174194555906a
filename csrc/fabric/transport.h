// What carries a fabric's operations: the interface behind the proxy threads.
//
// Life of a transport, every step on the thread that opens the fabric:
//
//     add_region for each region -> open -> address(peer) for each peer
//         -> (the caller exchanges addresses) -> connect -> post / poll ... -> close
//
// These steps throw std::runtime_error, with a text for the user, when they fail.
//
// LANES. post and poll are called by proxy threads, each with the lane number it was given (0 ..
// num_lanes - 1), concurrently for different lanes and never for the same one. A channel's
// operations always come through lane `channel % num_rings % num_lanes`; so what a transport keeps
// per (peer, channel), and a completion queue per lane, needs no lock.
//
// ORDER. Operations of one (peer, channel) are posted in their order and must take effect at the
// peer in it, in this sense only: when a signal has grown, all bytes put before it on the same
// (peer, channel) can be read there by whoever reads the signal with an acquire. Until then they
// may land in any order and more than once; bytes put later may land early.
//
// ONCE. A signal is applied exactly once, and bytes never land again after a signal behind them was
// applied: their place may have been used again by then. On RC the NICs see to both: a repeated
// packet is recognised by its sequence number, an atomic is answered from the responder's record. A
// transport whose network cannot promise it must number what it sends and drop what it has seen.
//
// COMPLETION. An operation is complete when its bytes and its signal have taken effect at the peer
// (for RC: it has been acknowledged) and its local bytes will not be read again. Every posted
// operation gets one Completion, in any order.
//
// DIRECT. A transport whose producers post by themselves is told so by `direct()`. It has no proxy
// threads: post and poll are never called, and `drain` is called instead.
//
// FAILURE. post and poll don't throw. An operation that fails gets a Completion with `ok` false;
// then the proxy stops and nothing more is posted. The other operations under way need no
// completion after that.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "trigger.h"

namespace epcomm::fabric {

enum class Memory { kHost, kCuda };

/// Memory that operations may read or write. Its id means the same on every rank; region
/// EPCOMM_FABRIC_SIGNALS is an array of uint64_t that peers' signals raise.
struct Region {
    int32_t id;
    void* pointer;
    uint64_t bytes;
    Memory memory;
    int32_t device;  ///< CUDA device; -1 for host memory
    int32_t fd;      ///< host memory: memfd it is a mapping of, from `fd_offset`; -1 = none
    uint64_t fd_offset;
};

/// Who this rank is and how its channels are served.
struct Plan {
    int32_t node;
    int32_t num_nodes;
    int32_t num_channels;
    int32_t num_rings;
    int32_t num_lanes;
    /// Operations that a lane may have under way: the depth of its completion queue.
    int32_t max_in_flight;
    /// Transport's own options, "name=value" separated by spaces, such as "nic=mlx5_0 tc=106".
    std::string options;
    /// For transports that are direct: what their producers are given.
    epcomm_fabric_state* state;
    int64_t timeout_ns;
    /// For NICs on a GPU: messages that keep_messages may ask for.
    int32_t max_messages;

    int32_t lane_of(int32_t channel) const { return channel % num_rings % num_lanes; }
};

/// One operation, checked: peer is another node, regions are registered here, offsets in range of
/// the local region. Whether the remote range is valid is for the transport to check where it
/// knows it (`local`) or for the peer's NIC (`verbs`).
struct Operation {
    Command command;
    uint64_t token;  ///< comes back in the completion
};

struct Completion {
    uint64_t token;
    bool ok;
    int32_t vendor;       ///< error: the transport's code, such as ibv_wc_status
    uint32_t queue_pair;  ///< error: number on this side, 0 if none
};

/// Vendor codes of transports that copy by themselves: the numbers of verbs' work completions, so
/// that all transports say the same.
enum CopyFailure : int32_t {
    kOutOfRange = 10,   ///< remote access error
    kPeerGone = 12,     ///< retries exceeded
    kCarrierGone = 21,  ///< general error
};

class Transport {
 public:
    virtual ~Transport() = default;

    /// Register memory. Peers learn about it through `address`.
    virtual void add_region(const Region& region) = 0;

    /// Make the endpoints. All regions are known.
    virtual void open(const Plan& plan) = 0;

    /// What the rank on node `peer` needs to reach this one: endpoints and keys, any bytes.
    virtual std::string address(int32_t peer) = 0;

    /// Connect to every peer; `addresses[n]` is what node n's rank made for this one, empty for the
    /// own node. Every rank may call it before any has returned from it: it must not wait for one.
    virtual void connect(const std::vector<std::string>& addresses) = 0;

    /// Start operations, in order; returns how many were accepted, possibly none: the caller polls
    /// and offers the rest again. Never waits.
    virtual size_t post(int32_t lane, const Operation* operations, size_t count) = 0;

    /// Collect completions, at most `capacity`. Called regularly, also with nothing under way: a
    /// transport that has to act on what it receives does it here. Never waits.
    virtual size_t poll(int32_t lane, Completion* completions, size_t capacity) = 0;

    /// What producers take that post by themselves, from `connect` on; null for a transport of
    /// proxy threads. It points to memory of the transport's, valid until `close`.
    virtual const epcomm_ibgda* direct() { return nullptr; }

    /// Direct: whether its NICs add to words of this rank for peers, from `open` on.
    virtual bool has_atomics() const { return false; }

    /// Direct: wait until what producers have posted has completed, at most so long; none of them
    /// posts any more.
    virtual void drain(int64_t /*timeout_ns*/) {}

    /// Look for errors that no producer or poll meets and report them (report.h). Called now and
    /// then between `connect` and `close`. Never waits.
    virtual void look_after() {}

    /// A modelled network: what this rank's NICs sent since the last call with `restart`; else
    /// false. Nothing is under way. Not at the same time as `close`.
    virtual bool count(epcomm_fabric_traffic* /*into*/, bool /*restart*/) { return false; }

    /// A modelled network: keep the last `capacity` messages, and as many events, from now on;
    /// false: it cannot.
    virtual bool keep_messages(uint64_t /*capacity*/) { return false; }

    /// Those kept, oldest first; `total`: all since `keep_messages`.
    virtual std::vector<epcomm_fabric_message> messages(uint64_t* total) {
        *total = 0;
        return {};
    }

    /// Likewise what its NICs did on purpose, or found.
    virtual std::vector<epcomm_fabric_event> events(uint64_t* total) {
        *total = 0;
        return {};
    }

    /// Whether the peer's process is known to be gone; false where only a failing operation tells.
    virtual bool peer_gone(int32_t /*peer*/) { return false; }

    /// How long a lane without operations under way may go without a poll.
    virtual int64_t longest_nap_ns() const { return 20'000'000; }

    /// The completion's error in words, ending with what the user can do about it.
    virtual std::string error_text(const Completion& completion) const = 0;

    /// One line: what was chosen, such as the NIC and GID or the copy engines.
    virtual std::string describe() const = 0;

    /// Bytes of queues and the like, beside regions and rings, that it takes for so many nodes,
    /// channels and signals; 0: nothing to speak of, or not this process's.
    virtual int64_t memory_bytes(int32_t /*num_nodes*/, int32_t /*num_channels*/,
                                 int32_t /*num_signals*/) const {
        return 0;
    }

    /// Let go of everything. No thread posts or polls any more. Peers may be gone or still be
    /// sending to this rank's regions, which stay mapped by them. Bounded time.
    virtual void close() = 0;
};

/// Make a transport by name, such as "local"; throws for a name that this library lacks, with the
/// names it has.
std::unique_ptr<Transport> make_transport(const std::string& name);

/// Names of the transports this library has, separated by spaces.
std::string transport_names();

/// Makes a transport known under a name; a static object of each transport's file.
struct RegisterTransport {
    using Make = std::unique_ptr<Transport> (*)();
    RegisterTransport(const char* name, Make make);
};

}  // namespace epcomm::fabric
