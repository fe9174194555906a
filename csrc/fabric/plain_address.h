// Addresses that are plain data: those of transports that stay on one machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace epcomm::fabric {

template <class Plain>
std::string bytes_of(const Plain& data) {
    static_assert(std::is_trivially_copyable<Plain>::value, "it goes as bytes");
    return std::string(reinterpret_cast<const char*>(&data), sizeof data);
}

/// What node `node` sent. Throws std::runtime_error for what cannot be this transport's.
template <class Address>
Address address_of(const std::string& bytes, const char* transport, int32_t node) {
    static_assert(std::is_trivially_copyable<Address>::value, "it goes as bytes");
    Address address;
    if (bytes.size() != sizeof address) {
        throw std::runtime_error("transport " + std::string(transport) + ": node " +
                                 std::to_string(node) + " uses another transport or version");
    }
    memcpy(&address, bytes.data(), sizeof address);
    return address;
}

}  // namespace epcomm::fabric
