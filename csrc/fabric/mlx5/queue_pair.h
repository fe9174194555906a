// A reliable connection that producers fill: a completion queue, a queue pair, its changes of
// state.
#pragma once

#include "../verbs/endpoint.h"
#include "card.h"
#include "step.h"

namespace epcomm::fabric::devx {

/// Where the queues of a card's queue pairs lie in their memory: a ring of requests and one of
/// completions for each, on pages of their own; behind them all, the records.
struct QueueLayout {
    uint32_t depth;  ///< blocks, and completions; a power of two
    uint32_t count;  ///< of queue pairs

    uint64_t ring(uint32_t i) const;
    uint64_t completions(uint32_t i) const;
    uint64_t record(uint32_t i) const;
    /// Written by nobody: no interrupt is asked for, and the ring cannot overrun.
    uint64_t completion_record(uint32_t i) const;
    uint64_t bytes() const;
};

struct QueuePlan {
    QueueLayout layout;
    uint32_t slot;   ///< in the layout
    uint32_t index;  ///< tells queue pairs of the rank apart
    uint32_t umem;
    uint32_t register_page;
    std::string where;  ///< for errors: card and peer
};

class QueuePair {
 public:
    /// Makes it and brings it to the state INIT.
    /// Throws std::runtime_error naming the step; then nothing is left.
    QueuePair(const Card& card, const VerbsOptions& options, const QueuePlan& plan);
    ~QueuePair();
    QueuePair(const QueuePair&) = delete;
    QueuePair& operator=(const QueuePair&) = delete;

    uint32_t number() const { return endpoint_.number; }
    const Endpoint& endpoint() const { return endpoint_; }
    const std::string& where() const { return plan_.where; }
    Object* object() const { return queue_pair_; }
    Object* completions() const { return completion_queue_; }

    /// Throws std::runtime_error naming the step.
    void connect(const Endpoint& remote, int32_t peer);

    /// Flush what is under way; the card then answers no peer over it.
    void stop();

    /// queue_pair::State, asked of the card; -1 if it does not say.
    int32_t state() const;

 private:
    void make_completion_queue();
    void make_queue_pair();
    void modify(const Message& in, Step step) const;
    Message change(CommandOpcode opcode) const;
    void set_path(Message* in, const Endpoint& remote) const;
    uint64_t find_next_hop(ibv::AddressAttr path) const;

    const Card& card_;
    const VerbsOptions& options_;
    QueuePlan plan_;
    Object* completion_queue_ = nullptr;
    Object* queue_pair_ = nullptr;
    uint32_t completion_number_ = 0;
    Endpoint endpoint_{};
};

}  // namespace epcomm::fabric::devx
