// The rank's side: start a carrier or take one that is idle, open and end sessions.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <mutex>

#include "carrier.h"
#include "wire.h"

extern char** environ;

namespace epcomm::carrier {

namespace {

constexpr int kReadyMs = 60'000, kDoneMs = 2'000;

struct Process {
    pid_t pid = -1;
    int socket = -1;
    std::string executable;
};

void kill_process(const Process& process) {
    close(process.socket);
    kill(process.pid, SIGKILL);
    // A process in an uninterruptible call of its driver is left to itself.
    for (int i = 0; i < 100 && waitpid(process.pid, nullptr, WNOHANG) == 0; ++i) usleep(1000);
}

/// Carriers without a session. They end with this process: their sockets do.
struct Idle {
    std::mutex lock;
    std::vector<Process> processes;
    pid_t owner = getpid();

    /// A forked child has the sockets, but not the right to use them.
    void drop_inherited() {
        if (owner == getpid()) return;
        for (const Process& process : processes) close(process.socket);
        processes.clear();
        owner = getpid();
    }
};

Idle& idle() {
    static Idle it;
    return it;
}

/// The executable in the folder of the library that this function is in.
std::string beside_library() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&beside_library), &info) == 0 || info.dli_fname == nullptr) {
        throw std::runtime_error("carrier: the library's own path is not known");
    }
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return (slash == std::string::npos ? std::string("./") : path.substr(0, slash + 1)) +
           "epcomm-carrier";
}

Process start(const std::string& executable) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) throw broken("socketpair");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    // dup2 onto itself would leave close-on-exec set.
    int end = pair[1];
    if (end == kSocket) end = fcntl(end, F_DUPFD_CLOEXEC, kSocket + 1);
    posix_spawn_file_actions_adddup2(&actions, end, kSocket);
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    // A group of its own: Ctrl-C is for the rank, which ends its carrier.
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setflags(
        &attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    char* arguments[] = {const_cast<char*>(executable.c_str()), const_cast<char*>("carrier"),
                         nullptr};
    Process process;
    errno =
        posix_spawn(&process.pid, executable.c_str(), &actions, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    const int error = errno;
    if (end != pair[1]) close(end);
    close(pair[1]);
    errno = error;
    if (errno != 0) {
        const std::runtime_error why = broken(("starting " + executable).c_str());
        close(pair[0]);
        throw why;
    }
    process.socket = pair[0];
    process.executable = executable;
    return process;
}

Process take(const std::string& executable) {
    Idle& kept = idle();
    {
        const std::lock_guard<std::mutex> guard(kept.lock);
        kept.drop_inherited();
        for (size_t i = 0; i < kept.processes.size(); ++i) {
            const Process process = kept.processes[i];
            if (process.executable != executable) continue;
            kept.processes.erase(kept.processes.begin() + ptrdiff_t(i));
            // One that has something to say without a session is ending.
            if (!wait_readable(process.socket, 0)) return process;
            kill_process(process);
            break;
        }
    }
    return start(executable);
}

}  // namespace

Carrier::Carrier(const std::string& job, const std::string& setup, const std::vector<int>& fds,
                 const std::string& executable)
    : executable_(executable.empty() ? beside_library() : executable) {
    const Process process = take(executable_);
    try {
        send_hello(process.socket, {uint32_t(job.size()), uint32_t(fds.size()), setup.size()}, fds);
        send_all(process.socket, job.data(), job.size());
        send_all(process.socket, setup.data(), setup.size());
        if (!wait_readable(process.socket, kReadyMs)) {
            throw std::runtime_error("carrier: its job is not ready after " +
                                     std::to_string(kReadyMs / 1000) + " s");
        }
        uint8_t word = 0;
        receive_all(process.socket, &word, 1);
        if (word != kReady) {
            uint32_t bytes = 0;
            receive_all(process.socket, &bytes, sizeof bytes);
            throw std::runtime_error(receive_text(process.socket, bytes));
        }
    } catch (...) {
        kill_process(process);
        throw;
    }
    pid_ = process.pid;
    socket_ = process.socket;
}

Carrier::~Carrier() {
    const Process process = {pid_, socket_, executable_};
    bool done = false;
    try {
        uint8_t word = 0;
        send_word(socket_, kEnd);
        if (wait_readable(socket_, kDoneMs)) receive_all(socket_, &word, 1);
        done = word == kDone;
    } catch (const std::runtime_error&) {
        // It is gone already.
    }
    if (!done) {
        kill_process(process);
        return;
    }
    Idle& kept = idle();
    const std::lock_guard<std::mutex> guard(kept.lock);
    kept.drop_inherited();
    kept.processes.push_back(process);
}

bool Carrier::gone() const { return wait_readable(socket_, 0); }

std::string Carrier::last_words() {
    if (!gone()) return "";
    try {
        uint8_t word = 0;
        receive_all(socket_, &word, 1);
        uint32_t bytes = 0;
        receive_all(socket_, &bytes, sizeof bytes);
        return receive_text(socket_, bytes);
    } catch (const std::runtime_error&) {
        return "the carrier's process is gone";
    }
}

}  // namespace epcomm::carrier
