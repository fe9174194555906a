// Counters in shared memory: release adds, acquire waits that sleep on a futex.

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "epcomm.h"

namespace {

// The futex word is the low half of the value; 2^32 adds cannot pass between a load of the value
// and the system call that compares it.
uint32_t* futex_word(epcomm_counter* counter) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half must come first");
    return reinterpret_cast<uint32_t*>(&counter->value);
}

long futex(uint32_t* word, int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, nullptr, 0);
}

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// A sleeper wakes this often to look at the peer's process and at the abort counter, neither of
// which can wake it.
constexpr int64_t kWatchNs = 20'000'000;

// Gone, or dead and not yet collected by its parent, when kill() would still find it.
bool process_is_gone(int32_t pid) {
    if (pid <= 0) return false;
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT;
    const ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0) return size < 0 && errno == ESRCH;
    text[size] = 0;
    // "pid (name) state ...": the name may hold anything, so the last parenthesis counts.
    const char* state = strrchr(text, ')');
    return state != nullptr && (state[2] == 'Z' || state[2] == 'X');
}

}  // namespace

extern "C" {

void epcomm_counter_add(epcomm_counter* counter, uint64_t amount) {
    // Sequentially consistent on both sides (the sleeper announces itself, then reads the value;
    // the writer adds, then reads `sleepers`): one of the two must see the other.
    __atomic_fetch_add(&counter->value, amount, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&counter->sleepers, __ATOMIC_SEQ_CST) != 0) {
        futex(futex_word(counter), FUTEX_WAKE, INT32_MAX, nullptr);
    }
}

uint64_t epcomm_counter_read(const epcomm_counter* counter) {
    return __atomic_load_n(&counter->value, __ATOMIC_ACQUIRE);
}

int epcomm_counter_wait(epcomm_counter* counter, uint64_t expected, const epcomm_wait* how) {
    for (int32_t i = 0; i < how->spin; ++i) {
        if (epcomm_counter_read(counter) >= expected) return EPCOMM_WAIT_OK;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    const int64_t deadline = now_ns() + how->timeout_ns;
    while (true) {
        __atomic_fetch_add(&counter->sleepers, 1, __ATOMIC_SEQ_CST);
        const uint64_t seen = __atomic_load_n(&counter->value, __ATOMIC_SEQ_CST);
        if (seen < expected) {
            const timespec slice = {0, kWatchNs};
            futex(futex_word(counter), FUTEX_WAIT, uint32_t(seen), &slice);
        }
        __atomic_fetch_sub(&counter->sleepers, 1, __ATOMIC_SEQ_CST);
        if (epcomm_counter_read(counter) >= expected) return EPCOMM_WAIT_OK;
        if (how->abort != nullptr && epcomm_counter_read(how->abort) != 0) {
            return EPCOMM_WAIT_ABORTED;
        }
        if (process_is_gone(how->peer_pid)) {
            // It may have signalled just before it ended.
            return epcomm_counter_read(counter) >= expected ? EPCOMM_WAIT_OK
                                                            : EPCOMM_WAIT_PEER_GONE;
        }
        if (now_ns() >= deadline) return EPCOMM_WAIT_TIMEOUT;
    }
}

}  // extern "C"
