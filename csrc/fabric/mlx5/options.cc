// Takes the options of queues out of the text and leaves the rest to the cards'.

#include "options.h"

#include <stdlib.h>

#include <map>
#include <sstream>
#include <stdexcept>

namespace epcomm::fabric::devx {

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& expected,
                         const std::string& value) {
    throw std::runtime_error("option " + name + ": expected " + expected + ", got \"" + value +
                             "\"");
}

int32_t integer(const std::string& name, const std::string& value, int32_t low, int32_t high) {
    char* end = nullptr;
    const long number = strtol(value.c_str(), &end, 10);
    if (value.empty() || *end != 0 || number < low || number > high) {
        refuse(name, "an integer from " + std::to_string(low) + " to " + std::to_string(high),
               value);
    }
    return int32_t(number);
}

template <class Choice>
Choice choice(const std::string& name, const std::string& value,
              const std::map<std::string, Choice>& choices) {
    const auto found = choices.find(value);
    if (found != choices.end()) return found->second;
    std::string names;
    for (const auto& entry : choices) names += (names.empty() ? "" : ", ") + entry.first;
    refuse(name, "one of " + names, value);
}

/// Whether the option is one of this transport's own.
bool take(Options* options, const std::string& name, const std::string& value) {
    if (name == "depth") {
        options->depth = integer(name, value, 16, 32768);
    } else if (name == "registers") {
        options->registers = integer(name, value, 1, 256);
    } else if (name == "doorbell") {
        options->doorbell = choice<DoorbellBy>(
            name, value,
            {{"auto", DoorbellBy::kAuto}, {"gpu", DoorbellBy::kGpu}, {"cpu", DoorbellBy::kCpu}});
    } else if (name == "queues") {
        options->queues = choice<QueuesIn>(
            name, value,
            {{"auto", QueuesIn::kAuto}, {"gpu", QueuesIn::kGpu}, {"host", QueuesIn::kHost}});
    } else if (name == "failover") {
        options->failover = integer(name, value, 0, 1);
    } else if (name == "signal" || name == "inline") {
        refuse(name, "no such option where kernels send", value);
    } else {
        return false;
    }
    return true;
}

}  // namespace

Options parse_options(const std::string& text) {
    Options options;
    std::istringstream stream(text);
    std::string rest;
    for (std::string item; stream >> item;) {
        const size_t equals = item.find('=');
        const bool taken = equals != std::string::npos &&
                           take(&options, item.substr(0, equals), item.substr(equals + 1));
        if (!taken) rest += (rest.empty() ? "" : " ") + item;
    }
    options.card = parse_verbs_options(rest);
    if (options.card.registration == Registration::kBounce) {
        refuse("registration", "auto, dmabuf or peermem: no proxy copies here", "bounce");
    }
    return options;
}

}  // namespace epcomm::fabric::devx
