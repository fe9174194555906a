// Texts of completion errors.

#include "failure.h"

#include <math.h>
#include <stdio.h>

namespace epcomm::fabric {

std::string advice(ibv::Status status, const VerbsOptions& options) {
    switch (status) {
        case ibv::kRetriesExceeded: {
            char seconds[32];
            snprintf(seconds, sizeof seconds, "%.2g",
                     4.096e-6 * pow(2.0, options.timeout) * (options.retries + 1));
            return "no answer in at least " + std::string(seconds) +
                   " s: the peer's process or link is gone, or the path does not work (GID index, "
                   "MTU, firewall for UDP port 4791, priority flow control); timeout= and retries= "
                   "set the patience";
        }
        case ibv::kRnrRetriesExceeded:
            return "the peer's proxy did not take its messages in time; rnr_retries=7 waits "
                   "without "
                   "end";
        case ibv::kRemoteAccess:
        case ibv::kRemoteInvalidRequest:
            return "the place is outside of what the peer registered, or the peer made its fabric "
                   "anew";
        case ibv::kLocalProtection:
        case ibv::kLocalAccess:
        case ibv::kLocalLength: return "the local bytes are outside of the registered region";
        case ibv::kFlushed:
            return "an earlier operation of this queue pair failed, or it was closed";
        case ibv::kFatal:
        case ibv::kGeneral:
            return "the network card or its driver failed: look at the kernel's log";
        default:
            return "look at the card's counters in /sys/class/infiniband/*/ports/*/hw_counters";
    }
}

namespace {

std::string what(const Failure& failure) {
    const Command& command = failure.command;
    if (command.op == EPCOMM_FABRIC_SIGNAL_ADD || failure.of_signal) {
        return "raising signal " + std::to_string(command.signal);
    }
    return "writing " + std::to_string(command.bytes) + " bytes to region " +
           std::to_string(command.remote.region) + " at " + std::to_string(command.remote.offset);
}

}  // namespace

const char* status_name(ibv::Status status) {
    switch (status) {
        case ibv::kSuccess: return "success";
        case ibv::kLocalLength: return "local length error";
        case ibv::kLocalQpOperation: return "local queue pair operation error";
        case ibv::kLocalProtection: return "local protection error";
        case ibv::kFlushed: return "work request flushed";
        case ibv::kBadResponse: return "bad response";
        case ibv::kLocalAccess: return "local access error";
        case ibv::kRemoteInvalidRequest: return "remote invalid request";
        case ibv::kRemoteAccess: return "remote access error";
        case ibv::kRemoteOperation: return "remote operation error";
        case ibv::kRetriesExceeded: return "transport retries exceeded";
        case ibv::kRnrRetriesExceeded: return "receiver-not-ready retries exceeded";
        case ibv::kRemoteAborted: return "remote aborted";
        case ibv::kFatal: return "fatal error";
        case ibv::kResponseTimeout: return "response timeout";
        case ibv::kGeneral: return "general error";
    }
    return "unknown status";
}

std::string describe(const Failure& failure, const VerbsOptions& options) {
    char vendor[16];
    snprintf(vendor, sizeof vendor, "0x%x", failure.vendor);
    const std::string where =
        failure.sent ? "queue pair " + std::to_string(failure.queue_pair) + " of " + failure.nic
                     : "refused before sending";
    return "verbs: " + what(failure) + " at node " + std::to_string(failure.command.peer) +
           " over channel " + std::to_string(failure.command.channel) + " (" + where +
           ") failed: " + status_name(failure.status) + " (status " +
           std::to_string(uint32_t(failure.status)) + ", vendor code " + vendor + "); " +
           advice(failure.status, options);
}

}  // namespace epcomm::fabric
