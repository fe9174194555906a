// One of a rank's cards with all that lies on it: registers, queue memory, queue pairs, events.
#pragma once

#include "../../mlx5/queue.h"
#include "events.h"
#include "options.h"
#include "queue_pair.h"

namespace epcomm::fabric::devx {

/// The queue pair of a (peer, channel), and what its producers are to know.
struct Connection {
    int32_t peer;
    int32_t channel;
    uint32_t slot;  ///< in its plane's layout
    std::unique_ptr<QueuePair> pair;
    uint64_t* doorbell;  ///< where its producers store
};

class Plane {
 public:
    /// Opens the card. Throws std::runtime_error naming the step, as every function here.
    Plane(const NicName& name, const Options& options);
    /// Ends the queues and closes the card.
    ~Plane();
    Plane(const Plane&) = delete;
    Plane& operator=(const Plane&) = delete;

    const Card& card() const { return card_; }
    const QueueLayout& layout() const { return layout_; }
    Arena& memory() const { return queues_->memory(); }
    std::vector<Connection>& connections() { return connections_; }
    Events& events() { return *events_; }

    /// Memory and registers for these connections, whose producers run on `device` or the host.
    /// Doorbells that a processor has to carry get words of `ringer`.
    void make_room(int32_t device, std::vector<Connection> connections, Ringer* ringer);
    /// A queue pair for each connection, in the state INIT; `first_index` tells planes apart.
    void make_queue_pairs(uint32_t first_index);

    /// End queue pairs, then what they used: after that the card touches nothing of this rank's.
    void end_queues();

    /// The send queue of a connection, as its producers have it at the start.
    mlx5::SendQueue send_queue(const Connection& connection) const;

    std::string describe() const;

 private:
    uint64_t* doorbell_of(Register* target, int32_t device, Ringer* ringer);

    const Options& options_;
    Card card_;
    std::vector<std::unique_ptr<Register>> registers_;
    QueueLayout layout_{};
    std::unique_ptr<QueueMemory> queues_;
    std::vector<Connection> connections_;
    std::unique_ptr<Events> events_;
    std::string doorbells_;  ///< who rings, and why not the GPU
};

}  // namespace epcomm::fabric::devx
