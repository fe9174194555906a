// What the two ends of a connection tell each other, and what a rank's address is made of.
#pragma once

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace epcomm::fabric {

/// What one side's card and queue pair are called by the other.
struct Endpoint {
    uint32_t number;
    uint32_t first_psn;
    uint32_t mtu;  ///< ibv enumerator
    uint32_t max_reads;
    ibv::Gid gid;
    uint16_t lid;
    uint8_t ethernet;
    uint8_t nic;  ///< which of its rank's cards
};

/// Reads and atomics of one connection under way: more than this is of no use here.
constexpr int32_t kMaxReads = 16;

/// A queue pair's endpoint on a card; `index` tells queue pairs of the rank apart.
Endpoint make_endpoint(const Nic& nic, const VerbsOptions& options, uint32_t number,
                       uint32_t index);

/// How packets of a connection find the other card.
ibv::AddressAttr make_path(const Nic& nic, const VerbsOptions& options, const Endpoint& remote);

/// Throws std::runtime_error if the two cannot be connected; `peer` is the other's node.
void check_same_network(const Nic& nic, const Endpoint& remote, int32_t peer);

template <class Item>
void append_bytes(std::string* to, const Item& item) {
    to->append(reinterpret_cast<const char*>(&item), sizeof item);
}

/// Takes items out of an address in the order in which they were appended.
class AddressReader {
 public:
    AddressReader(const std::string& text, size_t node) : text_(text), node_(node) {}
    template <class Item>
    void read(Item* item) {
        if (text_.size() - at_ < sizeof *item) {
            throw std::runtime_error("node " + std::to_string(node_) +
                                     " sent an address of another version of this library");
        }
        memcpy(item, text_.data() + at_, sizeof *item);
        at_ += sizeof *item;
    }

 private:
    const std::string& text_;
    size_t node_;
    size_t at_ = 0;
};

}  // namespace epcomm::fabric
