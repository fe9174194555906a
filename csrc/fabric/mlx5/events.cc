// Subscribes to events and reads them.

#include "events.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

namespace epcomm::fabric::devx {

namespace {

/// Types of events, as the card numbers them.
enum EventType : uint8_t {
    kCompletionQueueError = 0x04,
    kInvalidRequest = 0x10,
    kAccessError = 0x11,
};

}  // namespace

Events::Events(const Card& card) {
    constexpr int kWithEntries = 0;
    channel_ = library().devx_create_event_channel(card.nic.context, kWithEntries);
    if (channel_ == nullptr) problem_ = strerror(errno);
}

Events::~Events() {
    if (channel_ != nullptr) library().devx_destroy_event_channel(channel_);
}

void Events::watch(Object* queue_pair, Object* completion_queue, uint64_t cookie) {
    if (channel_ == nullptr) return;
    uint16_t of_pair[] = {kQueuePairFatal, kInvalidRequest, kAccessError};
    uint16_t of_completions[] = {kCompletionQueueError};
    int error =
        library().devx_subscribe_devx_event(channel_, queue_pair, sizeof of_pair, of_pair, cookie);
    if (error == 0) {
        error = library().devx_subscribe_devx_event(channel_, completion_queue,
                                                    sizeof of_completions, of_completions, cookie);
    }
    if (error != 0) problem_ = strerror(error);
}

bool Events::next(Entry* entry) {
    if (channel_ == nullptr) return false;
    pollfd ready = {channel_->fd, POLLIN, 0};
    if (poll(&ready, 1, 0) != 1) return false;
    Event event{};
    if (library().devx_get_event(channel_, &event, sizeof event) < ssize_t(sizeof event.cookie)) {
        return false;
    }
    *entry = {event.cookie, event.entry[1]};
    return true;
}

const char* describe_event(uint8_t type) {
    switch (type) {
        case kCompletionQueueError: return "completion queue error";
        case kQueuePairFatal: return "fatal error of the queue pair";
        case kInvalidRequest: return "invalid request to the queue pair";
        case kAccessError: return "access error of the queue pair";
        default: return "unknown event";
    }
}

}  // namespace epcomm::fabric::devx
