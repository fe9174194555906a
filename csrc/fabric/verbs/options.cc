// Reads the verbs transport's options.

#include "options.h"

#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>

namespace epcomm::fabric {

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& value,
                         const std::string& expected) {
    throw std::runtime_error("option " + name + ": expected " + expected + ", got \"" + value +
                             "\"");
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

using Reader = std::function<void(VerbsOptions*, const std::string& name, const std::string&)>;

Reader integer(int32_t VerbsOptions::* field, int32_t low, int32_t high) {
    return [=](VerbsOptions* options, const std::string& name, const std::string& value) {
        size_t end = 0;
        long number = 0;
        try {
            number = std::stol(value, &end);
        } catch (const std::logic_error&) {
        }
        if (end == 0 || end != value.size() || number < low || number > high) {
            refuse(name, value,
                   "an integer from " + std::to_string(low) + " to " + std::to_string(high));
        }
        options->*field = int32_t(number);
    };
}

template <class Choice>
Reader choice(Choice VerbsOptions::* field, const std::map<std::string, Choice>& choices) {
    return [=](VerbsOptions* options, const std::string& name, const std::string& value) {
        const auto found = choices.find(value);
        if (found == choices.end()) {
            std::string names;
            for (const auto& entry : choices) names += (names.empty() ? "" : ", ") + entry.first;
            refuse(name, value, "one of " + names);
        }
        options->*field = found->second;
    };
}

Reader list(std::vector<std::string> VerbsOptions::* field, char separator) {
    return [=](VerbsOptions* options, const std::string& name, const std::string& value) {
        options->*field = split(value, separator);
        if (value.empty()) refuse(name, value, "names of devices");
        for (const std::string& part : options->*field) {
            if (part.empty()) refuse(name, value, "names of devices");
        }
    };
}

const std::map<std::string, Reader>& readers() {
    using O = VerbsOptions;
    static const std::map<std::string, Reader> all = {
        {"nic", list(&O::nics, '+')},
        {"nic_map", list(&O::nic_map, ',')},
        {"nics_per_rank", integer(&O::nics_per_rank, 1, 64)},
        {"local_rank", integer(&O::local_rank, 0, 1 << 20)},
        {"pci", [](O* o, const std::string&, const std::string& value) { o->pci = value; }},
        {"gid", integer(&O::gid, -1, 255)},
        {"sl", integer(&O::service_level, 0, 15)},
        {"tc", integer(&O::traffic_class, 0, 255)},
        {"pkey", integer(&O::pkey_index, 0, 65535)},
        {"mtu", integer(&O::mtu, 256, 4096)},
        {"timeout", integer(&O::timeout, 1, 31)},
        {"retries", integer(&O::retries, 0, 7)},
        {"rnr_retries", integer(&O::rnr_retries, 0, 7)},
        {"depth", integer(&O::depth, 1, 4096)},
        {"inline", integer(&O::inline_bytes, 0, 512)},
        {"signal", choice<SignalBy>(&O::signal, {{"auto", SignalBy::kAuto},
                                                 {"atomic", SignalBy::kAtomic},
                                                 {"immediate", SignalBy::kImmediate}})},
        {"registration",
         choice<Registration>(&O::registration, {{"auto", Registration::kAuto},
                                                 {"dmabuf", Registration::kDmabuf},
                                                 {"peermem", Registration::kPeermem},
                                                 {"bounce", Registration::kBounce}})},
    };
    return all;
}

}  // namespace

VerbsOptions parse_verbs_options(const std::string& text) {
    VerbsOptions options;
    std::istringstream stream(text);
    for (std::string item; stream >> item;) {
        const size_t equals = item.find('=');
        const std::string name = item.substr(0, equals);
        const auto reader = readers().find(name);
        if (equals == std::string::npos || reader == readers().end()) {
            std::string names;
            for (const auto& entry : readers()) names += (names.empty() ? "" : ", ") + entry.first;
            throw std::runtime_error("option \"" + item + "\": expected name=value with one of " +
                                     names);
        }
        reader->second(&options, name, item.substr(equals + 1));
    }
    return options;
}

}  // namespace epcomm::fabric
