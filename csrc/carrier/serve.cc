// The carrier's side: one session after the other, until the rank is gone.
#include <unordered_map>

#include "carrier.h"
#include "epcomm.h"
#include "wire.h"

namespace epcomm::carrier {

namespace {

std::unordered_map<std::string, Run>& jobs() {
    static std::unordered_map<std::string, Run> all;
    return all;
}

void say_failed(int socket, const std::string& text) {
    const auto bytes = uint32_t(text.size());
    send_word(socket, kFailed);
    send_all(socket, &bytes, sizeof bytes);
    send_all(socket, text.data(), text.size());
}

}  // namespace

RegisterJob::RegisterJob(const char* name, Run run) { jobs()[name] = run; }

Session::Session(int socket) : socket_(socket), parent_(getppid()) {}

void Session::ready() { send_word(socket_, kReady); }

bool Session::ended() {
    if (ended_) return true;
    // A process that the rank forked may hold the socket open.
    if (getppid() != parent_) return ended_ = orphaned_ = true;
    if (!wait_readable(socket_, 0)) return false;
    uint8_t word = 0;
    ended_ = true;
    orphaned_ = recv(socket_, &word, 1, 0) != 1 || word != kEnd;
    return true;
}

int serve(int socket) {
    try {
        Hello hello;
        std::vector<int> fds;
        while (receive_hello(socket, &hello, &fds)) {
            const std::string job = receive_text(socket, hello.job_bytes);
            const std::string setup = receive_text(socket, hello.setup_bytes);
            Session session(socket);
            try {
                const auto found = jobs().find(job);
                if (found == jobs().end()) {
                    throw std::runtime_error("carrier: no job \"" + job + "\" in this build");
                }
                found->second(setup, fds, session);
            } catch (const std::exception& error) {
                // What is left of it is unknown, so nothing is built on it.
                say_failed(socket, error.what());
                return 1;
            }
            for (const int fd : fds) close(fd);
            fds.clear();
            while (!session.ended()) usleep(1000);
            if (session.orphaned()) return 0;
            send_word(socket, kDone);
        }
    } catch (const std::runtime_error&) {
        // The rank is gone.
    }
    return 0;
}

}  // namespace epcomm::carrier

extern "C" EPCOMM_API int epcomm_carrier_main() {
    return epcomm::carrier::serve(epcomm::carrier::kSocket);
}
