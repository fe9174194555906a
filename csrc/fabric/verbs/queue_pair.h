// One reliable connection: a (peer, channel) on one network card.
//
// Operations go out in order as work requests: bytes as an RDMA write, then the signal. How a
// signal travels is a property of the connection, the same in both directions:
//
//   atomic   an 8-byte fetch-add on the peer's counter. The cards do it alone. One connection's
//            requests execute in order, so the counter grows after the bytes are placed.
//   notices  for cards without atomics, and for regions that have a mirror. A signal is the
//            immediate value of the write, or a small message (Notice) that also says which bytes
//            arrived; the peer's proxy, polling, copies them out of the mirror if there is one, and
//            raises the counter. Its receives complete in the order of the requests.
//
// Completions are counted: only the last request of a batch asks for one, and it stands for all
// before it, because a connection's requests complete in order.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "endpoint.h"
#include "failure.h"
#include "memory.h"

namespace epcomm::fabric {

/// A region of the peer as this connection sees it.
struct RemoteRegion {
    uint64_t address;  ///< as the peer's card knows it
    uint64_t bytes;
    uint32_t key;
    uint8_t known;
    uint8_t mirrored;
    uint8_t reserved[2];
};

/// Tells a peer's proxy about bytes that arrived and a signal.
struct Notice {
    uint64_t value;  ///< the signal grows by it; 0 = no signal
    uint64_t offset;
    uint64_t bytes;  ///< to copy out of the mirror; 0 = none
    uint32_t signal;
    uint32_t region;
};

/// Memory that the cards need beside the regions: where fetch-adds leave the old value, notices to
/// send, notices received.
struct QueueMemory {
    uint8_t* start;
    ibv::Mr* key;
};

struct QueuePairPlan {
    int32_t peer;
    int32_t channel;
    uint32_t index;  ///< comes back in completions
    uint32_t nic;    ///< which of this rank's cards
    int32_t depth;   ///< operations under way
};

/// What applies arrived signals.
class Receiver {
 public:
    virtual ~Receiver() = default;
    virtual void arrived(const Notice& notice) = 0;
};

class QueuePair {
 public:
    static uint64_t memory_bytes(int32_t depth);

    QueuePair(const Nic& nic, ibv::Cq* queue, QueueMemory memory, const QueuePairPlan& plan,
              const VerbsOptions& options);
    ~QueuePair();
    QueuePair(const QueuePair&) = delete;
    QueuePair& operator=(const QueuePair&) = delete;

    const Endpoint& endpoint() const { return endpoint_; }
    void connect(const Endpoint& remote, std::vector<RemoteRegion> regions, bool notices);

    bool full() const { return posted_ - completed_ >= uint64_t(plan_.depth); }
    /// Add an operation to the batch; not when full. False: it was refused, see `failure`.
    bool append(const Operation& operation, const RegisteredRegion* local, Failure* failure);
    /// Post the batch. False: `failure` and `token` say what the driver refused.
    bool send(Failure* failure, uint64_t* token);

    /// A completion of this queue pair's: hand over the tokens it stands for. False: the last of
    /// them failed.
    bool finish(const ibv::Wc& completion, std::vector<uint64_t>* tokens, Failure* failure);
    void receive(const ibv::Wc& completion, Receiver* receiver);

    static bool is_receive(const ibv::Wc& completion) { return (completion.wr_id >> 63) != 0; }
    static uint32_t index_of(const ibv::Wc& completion) {
        return uint32_t(completion.wr_id >> 32) & 0x3fffffff;
    }

 private:
    ibv::SendWr* add_request(ibv::Opcode opcode, uint64_t address, uint32_t bytes, uint32_t key);
    void add_write(const Command& command, const RegisteredRegion* local,
                   const RemoteRegion& remote);
    void add_fetch_add(uint32_t signal, uint64_t value);
    void add_notice(const Notice& notice);
    bool refuse(const Operation& operation, ibv::Status status, Failure* failure) const;
    bool check(const Operation& operation, const RegisteredRegion* local, Failure* failure) const;
    Failure failure_of(const Command& command, const ibv::Wc& completion) const;
    void post_receive(uint32_t slot);
    void modify(ibv::QpAttr* attributes, int mask, const char* step);

    /// The operation a request belongs to. Its id has the number's low half; far fewer than 2^31
    /// are under way.
    uint64_t number_of(uint64_t request) const {
        return completed_ + uint64_t(int64_t(int32_t(uint32_t(request) - uint32_t(completed_))));
    }
    Operation& operation_of(uint64_t number) { return under_way_[number % under_way_.size()]; }
    uint64_t request_id(bool of_signal) const {
        return uint64_t(of_signal) << 62 | uint64_t(plan_.index) << 32 | uint32_t(posted_);
    }
    uint8_t* sink() const { return memory_.start; }
    Notice* outgoing() const { return reinterpret_cast<Notice*>(memory_.start + 64); }
    Notice* incoming() const { return outgoing() + plan_.depth; }
    int32_t num_receives() const;

    const Nic& nic_;
    const VerbsOptions& options_;
    QueueMemory memory_;
    QueuePairPlan plan_;
    Endpoint endpoint_{};
    ibv::Qp* queue_pair_ = nullptr;
    uint32_t inline_bytes_ = 0;
    bool notices_ = false;
    std::vector<RemoteRegion> regions_;

    std::vector<Operation> under_way_;  ///< ring, by operation number modulo depth
    uint64_t posted_ = 0;
    uint64_t completed_ = 0;
    uint64_t notices_sent_ = 0;
    std::vector<ibv::SendWr> batch_;
    std::vector<ibv::Sge> places_;
};

}  // namespace epcomm::fabric
