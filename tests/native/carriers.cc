// A rank and its carrier: sessions, failures, ends. The program is its own carrier.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <stdexcept>
#include <vector>

#include "../../csrc/carrier/carrier.h"
#include "../../csrc/carrier/wire.h"

using epcomm::carrier::Carrier;
using epcomm::carrier::RegisterJob;
using epcomm::carrier::Session;

namespace {

/// What a session's two sides share.
struct Shared {
    int pid;
    int sessions;
    int ended;
};

Shared* map(int fd) {
    void* start = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return static_cast<Shared*>(start);
}

/// The job: notes that it is here; then does what the setup says.
void work(const std::string& setup, const std::vector<int>& fds, Session& session) {
    if (setup == "fail at start") throw std::runtime_error("no such GPU");
    Shared* shared = map(fds.at(0));
    shared->pid = getpid();
    shared->sessions += 1;
    if (setup == "never ready") {
        while (!session.ended()) usleep(1000);
        return;
    }
    session.ready();
    if (setup == "fail later") throw std::runtime_error("the GPU is gone");
    if (setup == "die") _exit(3);
    while (setup == "deaf") pause();
    while (!session.ended()) usleep(100);
    shared->ended += 1;
}

const RegisterJob kJob("work", work);

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Memory {
    int fd = memfd_create("carriers", MFD_CLOEXEC);
    Shared* shared = nullptr;
    Memory() {
        if (ftruncate(fd, sizeof(Shared)) != 0) abort();
        shared = map(fd);
    }
};

std::string this_program() {
    char path[4096];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
    return std::string(path, size_t(length));
}

bool runs(int pid) { return kill(pid, 0) == 0; }

template <class Condition>
bool soon(Condition condition) {
    const double until = seconds() + 5;
    while (!condition() && seconds() < until) usleep(1000);
    return condition();
}

}  // namespace

// The program is run with the word "carrier" by the code under test.
#define main main_of_tests
#include "check.h"
#undef main

TEST(sessions_follow_each_other_in_one_process) {
    Memory memory;
    int first = 0;
    for (int i = 1; i <= 3; ++i) {
        const Carrier carrier("work", "", {memory.fd}, this_program());
        CHECK(!carrier.gone());
        CHECK_EQUAL(memory.shared->sessions, i);
        if (i == 1) first = memory.shared->pid;
        CHECK_EQUAL(memory.shared->pid, first);
        CHECK(memory.shared->pid != getpid());
    }
    CHECK_EQUAL(memory.shared->ended, 3);
}

TEST(two_sessions_at_once_have_two_processes) {
    Memory one, other;
    const Carrier first("work", "", {one.fd}, this_program());
    const Carrier second("work", std::string(1 << 20, 'x'), {other.fd}, this_program());
    CHECK(one.shared->pid != other.shared->pid);
}

TEST(a_job_that_fails_at_start_says_why) {
    Memory memory;
    std::string text;
    try {
        const Carrier carrier("work", "fail at start", {memory.fd}, this_program());
    } catch (const std::runtime_error& error) {
        text = error.what();
    }
    CHECK(text == "no such GPU");
    try {
        const Carrier carrier("play", "", {}, this_program());
    } catch (const std::runtime_error& error) {
        text = error.what();
    }
    CHECK(text.find("no job \"play\"") != std::string::npos);
    const Carrier works("work", "", {memory.fd}, this_program());
}

TEST(a_job_that_fails_later_is_noticed_and_not_used_again) {
    Memory memory;
    int pid = 0;
    {
        Carrier carrier("work", "fail later", {memory.fd}, this_program());
        pid = memory.shared->pid;
        CHECK(soon([&] { return carrier.gone(); }));
        CHECK(carrier.last_words() == "the GPU is gone");
    }
    const Carrier works("work", "", {memory.fd}, this_program());
    CHECK(memory.shared->pid != pid);
}

TEST(a_carrier_that_dies_is_noticed) {
    Memory memory;
    Carrier carrier("work", "die", {memory.fd}, this_program());
    CHECK(soon([&] { return carrier.gone(); }));
    CHECK(carrier.last_words() == "the carrier's process is gone");
}

TEST(a_deaf_carrier_is_killed_in_bounded_time) {
    Memory memory;
    const double begin = seconds();
    {
        const Carrier carrier("work", "deaf", {memory.fd}, this_program());
    }
    CHECK(seconds() - begin < 5);
    CHECK(soon([&] { return !runs(memory.shared->pid); }));
}

TEST(a_missing_executable_is_named) {
    std::string text;
    try {
        const Carrier carrier("work", "", {}, "/nowhere/epcomm-carrier");
    } catch (const std::runtime_error& error) {
        text = error.what();
    }
    CHECK(text.find("/nowhere/epcomm-carrier") != std::string::npos);
}

// A killed rank's carrier ends by itself, also where a process that the rank forked lives on and
// holds the socket open.
TEST(a_killed_rank_takes_its_carrier_along) {
    Memory memory;
    const pid_t rank = fork();
    if (rank == 0) {
        const Carrier carrier("work", "", {memory.fd}, this_program());
        if (fork() == 0) {
            sleep(20);
            _exit(0);
        }
        kill(getpid(), SIGKILL);
    }
    waitpid(rank, nullptr, 0);
    const int pid = memory.shared->pid;
    CHECK(pid != 0);
    CHECK(soon([&] { return !runs(pid); }));
}

TEST(a_forked_child_does_not_use_its_parents_carriers) {
    Memory memory;
    {
        const Carrier carrier("work", "", {memory.fd}, this_program());
    }
    const int parents = memory.shared->pid;
    const pid_t child = fork();
    if (child == 0) {
        const Carrier carrier("work", "", {memory.fd}, this_program());
        _exit(memory.shared->pid == parents ? 1 : 0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK_EQUAL(status, 0);
    const Carrier again("work", "", {memory.fd}, this_program());
    CHECK_EQUAL(memory.shared->pid, parents);
}

int main(int count, char** arguments) {
    if (count > 1 && std::string(arguments[1]) == "carrier") {
        return epcomm::carrier::serve(epcomm::carrier::kSocket);
    }
    return main_of_tests(count, arguments);
}
