// Opens a card and asks what it can do.

#include "card.h"

#include <errno.h>
#include <string.h>

#include <algorithm>

#include "../../mlx5/mlx5.h"
#include "../verbs/endpoint.h"
#include "step.h"

namespace epcomm::fabric::devx {

namespace {

/// fabric/ibgda.h writes this much at once.
constexpr uint32_t kLogNeededMessage = 30;

ibv::Context* open_devx(ibv::Device* device) {
    ContextAttr attributes{kContextDevx, 0};
    ibv::Context* context = library().open_device(device, &attributes);
    if (context == nullptr) {
        fail(Step::kDevice, ibv::library().get_device_name(device), strerror(errno));
    }
    return context;
}

Message query(const Card& card, capabilities::Modifier which) {
    Message in(capabilities::kInBytes, kQueryCapabilities), out(capabilities::kOutBytes);
    in.set(head::modifier, which);
    const int error =
        library().devx_general_cmd(card.nic.context, in.data(), in.size(), out.data(), out.size());
    if (error != 0) fail(Step::kCapabilities, card.name(), describe_failure(error, out));
    return out;
}

void find_limits(Card* card) {
    namespace c = capabilities;
    const Message general = query(*card, c::kGeneral);
    const auto value = [&general](Field field) { return uint32_t(general.get(field)); };
    const auto of = [&value](Field field) { return value(at(c::body, field)); };
    if (of(c::cq_oi) == 0) {
        fail(Step::kCapabilities, card->name(),
             "completion queues cannot ignore that they overrun");
    }
    if (of(c::log_max_msg) < kLogNeededMessage) {
        fail(Step::kCapabilities, card->name(),
             "the largest message is 2^" + std::to_string(of(c::log_max_msg)) +
                 " bytes, and 2^30 are needed");
    }
    Limits& limits = card->limits;
    const uint32_t log_depth = std::min(of(c::log_max_qp_sz), of(c::log_max_cq_sz));
    limits.max_depth = std::min(mlx5::kMaxBlocks, 1u << std::min(log_depth, 31u));
    limits.log_max_message = of(c::log_max_msg);
    // Not more than the card can keep: what it replays after a loss would be wrong.
    const auto log_of = [](int reads) {
        return floor_log2(uint32_t(std::clamp(reads, 1, kMaxReads)));
    };
    limits.log_max_reads = log_of(card->nic.device.max_qp_init_rd_atom);
    limits.log_max_answers = log_of(card->nic.device.max_qp_rd_atom);
    limits.register_bytes = 1u << of(c::log_bf_reg_size);
    // Cards whose clock is set to real time take no queue pair of the other format.
    const bool formats = of(c::roce) != 0
                             ? query(*card, c::kRoce).get(at(c::body, c::roce_qp_ts_format)) != 0
                             : of(c::sq_ts_format) != 0;
    limits.timestamp_format = formats ? 1 : 0;
}

void find_numbers(Card* card) {
    ProtectionDomain domain{};
    Handles handles{};
    handles.pd = {card->nic.pd, &domain};
    if (const int error = library().init_obj(&handles, kHandlePd); error != 0) {
        fail(Step::kDomain, card->name(), strerror(error));
    }
    card->domain = domain.pdn;
    constexpr uint32_t kAnyVector = 0;  // nobody waits for an interrupt
    const int error = library().devx_query_eqn(card->nic.context, kAnyVector, &card->event_queue);
    if (error != 0) fail(Step::kEventQueue, card->name(), strerror(error));
}

}  // namespace

std::vector<std::string> list_mlx5_devices() {
    const ibv::Library& verbs = ibv::library();
    int count = 0;
    ibv::Device** list = verbs.get_device_list(&count);
    std::vector<std::string> names;
    std::string others;
    for (int i = 0; list != nullptr && i < count; ++i) {
        const char* name = verbs.get_device_name(list[i]);
        if (library().is_supported(list[i]))
            names.emplace_back(name);
        else
            others += (others.empty() ? "" : ", ") + std::string(name);
    }
    if (list != nullptr) verbs.free_device_list(list);
    if (names.empty()) {
        throw std::runtime_error("ibgda: there is no mlx5 network card (ConnectX) here" +
                                 (others.empty() ? "" : ", only " + others));
    }
    return names;
}

uint32_t floor_log2(uint32_t value) {
    uint32_t log = 0;
    while (value >>= 1) ++log;
    return log;
}

Card open_card(const NicName& name, const VerbsOptions& options) {
    Card card;
    card.nic = open_nic(name, options, open_devx);
    try {
        find_limits(&card);
        find_numbers(&card);
    } catch (...) {
        close_card(&card);
        throw;
    }
    return card;
}

void close_card(Card* card) { close_nic(&card->nic); }

}  // namespace epcomm::fabric::devx
