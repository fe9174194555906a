// The transports this library has, by name.

#include "transport.h"

#include <map>
#include <stdexcept>

namespace epcomm::fabric {

namespace {

std::map<std::string, RegisterTransport::Make>& known() {
    static std::map<std::string, RegisterTransport::Make> transports;
    return transports;
}

}  // namespace

RegisterTransport::RegisterTransport(const char* name, Make make) { known()[name] = make; }

std::unique_ptr<Transport> make_transport(const std::string& name) {
    const auto found = known().find(name);
    if (found != known().end()) return found->second();
    throw std::runtime_error("there is no transport \"" + name + "\" in this library; it has " +
                             transport_names());
}

std::string transport_names() {
    std::string names;
    for (const auto& entry : known()) names += (names.empty() ? "" : " ") + entry.first;
    return names;
}

}  // namespace epcomm::fabric
