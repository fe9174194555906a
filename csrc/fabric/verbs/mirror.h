// A region's copy in pinned host memory, for network cards that cannot reach the region itself.
//
// The sender's proxy copies bytes into its mirror before it posts them; the receiver's copies what
// arrived out of its mirror before it raises the signal. Offsets are those of the region.
#pragma once

#include <stdint.h>

#include <memory>

#include "../transport.h"

namespace epcomm::fabric {

class Mirror {
 public:
    virtual ~Mirror() = default;

    /// Memory as long as the region.
    virtual uint8_t* data() = 0;

    /// Bring bytes of the region into the mirror; done on return. False: the copy failed.
    virtual bool fetch(uint64_t offset, uint64_t bytes) = 0;

    /// Bring bytes of the mirror into the region, where they are visible on return.
    virtual bool store(uint64_t offset, uint64_t bytes) = 0;

    /// Set a 64-bit word of the region, after all earlier stores.
    virtual bool store_word(uint64_t offset, uint64_t value) = 0;
};

/// Throws std::runtime_error when there is no memory for it.
std::unique_ptr<Mirror> make_mirror(const Region& region);

}  // namespace epcomm::fabric
