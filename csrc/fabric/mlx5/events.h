// What the card tells about queues of its own accord: errors that no completion reports.
#pragma once

#include <string>

#include "card.h"

namespace epcomm::fabric::devx {

/// A channel on which a card's objects tell events. Works without one: then `problem` says why.
class Events {
 public:
    explicit Events(const Card& card);
    ~Events();
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;

    /// Listen for the errors of a queue pair and of its completion queue; events carry `cookie`.
    void watch(Object* queue_pair, Object* completion_queue, uint64_t cookie);

    struct Entry {
        uint64_t cookie;
        uint8_t type;
    };
    /// The next event, if there is one. Never waits.
    bool next(Entry* entry);

    /// Why events are not told; empty if they are.
    const std::string& problem() const { return problem_; }

 private:
    EventChannel* channel_ = nullptr;
    std::string problem_;
};

/// The type of the event of a queue pair that has gone to the error state.
constexpr uint8_t kQueuePairFatal = 0x05;

/// English for the type of an event.
const char* describe_event(uint8_t type);

}  // namespace epcomm::fabric::devx
