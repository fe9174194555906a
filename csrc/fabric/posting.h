// Proxy threads' side of mlx5 send queues: operations become requests, completions come back.
//
// The requests are those of fabric/ibgda.h, which kernels write, too. A lane's thread is the only
// one that touches its queues; nothing here waits.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "ibgda.h"
#include "transport.h"

namespace epcomm::fabric {

class Posting {
 public:
    /// @param plan of the transport: which lane serves which channel.
    /// @param fabric queues and keys; all that it points to outlives this.
    /// @param bell raised after doorbells, where whoever looks at those looks at nothing else all
    ///     the time (emulated/host_queues.h); null: nobody needs it.
    Posting(const Plan& plan, const Ibgda& fabric, uint64_t* bell);

    /// As Transport::post and Transport::poll.
    size_t post(int32_t lane, const Operation* operations, size_t count);
    size_t poll(int32_t lane, Completion* completions, size_t capacity);

 private:
    /// What is under way on a queue, in order.
    struct UnderWay {
        uint64_t token;
        uint64_t end;
    };

    bool post_one(const Operation& operation);

    const Ibgda fabric_;
    uint64_t unknown_signal_ = 0;
    uint64_t* const bell_;
    std::vector<std::vector<int32_t>> queues_of_;  ///< lanes' queues: their channels', to all peers
    std::vector<std::deque<UnderWay>> under_way_;  ///< by queue
};

}  // namespace epcomm::fabric
