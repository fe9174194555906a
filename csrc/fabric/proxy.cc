// Proxy threads: take triggers out of rings, post them, collect completions, nap when idle.

#include "proxy.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <exception>

#include "report.h"

namespace epcomm::fabric {

namespace {

constexpr size_t kBatch = 64;
constexpr int kRingShift = 56;  // a token is ring << 56 | position
constexpr int64_t kShortestNapNs = 20'000;
constexpr int64_t kLongIdleNs = 1'000'000'000;

size_t power_of_two(size_t at_least) {
    size_t size = 1;
    while (size < at_least) size *= 2;
    return size;
}

int64_t thread_time_ns() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

epcomm_fabric_error operation_error(epcomm_fabric_status status, const Command& command,
                                    uint64_t position, const std::string& text) {
    epcomm_fabric_error error = plain_error(status, text);
    error.peer = command.peer;
    error.channel = command.channel;
    error.op = command.op;
    error.bytes = command.bytes;
    error.position = position;
    return error;
}

}  // namespace

/// What the threads share; outlives a thread that does not come back.
struct Proxy::Shared {
    epcomm_fabric fabric;
    Plan plan;
    Patience patience;
    std::vector<Region> regions;  // by id; pointer null where there is none
    std::shared_ptr<Transport> transport;
    std::atomic<int64_t> drain_until{0};  // nonzero: stopping
};

/// One thread's rings and what it has under way.
struct Proxy::Lane {
    struct Served {
        int32_t index;
        epcomm_ring ring;
        CompletedPrefix positions;
        std::vector<Command> commands;  // of the positions under way, for error messages
    };

    Lane(Shared& shared, int32_t number);
    bool pick_up();
    bool pick_up(Served& served);
    bool post();
    bool collect();
    bool idle() const { return waiting.size() == next && under_way == 0; }
    bool more() const;
    void nap(int64_t idle_ns);
    std::string problem(const Command& command, int32_t ring) const;
    Served& served_by(uint64_t token) { return rings[by_index[token >> kRingShift]]; }

    Shared& shared;
    const int32_t number;
    epcomm_fabric_state* const state;
    epcomm_proxy_thread& self;
    std::vector<Served> rings;
    size_t by_index[EPCOMM_FABRIC_MAX_RINGS] = {};
    std::vector<Operation> waiting;  // taken out, from `next` on not accepted by the transport yet
    size_t next = 0;
    int32_t under_way = 0;
    Completion completions[kBatch];
};

Proxy::Lane::Lane(Shared& all, int32_t lane)
    : shared(all), number(lane), state(all.fabric.state), self(all.fabric.state->threads[lane]) {
    const size_t capacity = power_of_two(size_t(all.plan.max_in_flight) + kBatch);
    for (int32_t r = lane; r < all.plan.num_rings; r += all.plan.num_lanes) {
        by_index[r] = rings.size();
        rings.push_back(
            {r, all.fabric.rings[r], CompletedPrefix(capacity), std::vector<Command>(capacity)});
    }
}

/// Why a trigger cannot be carried out; empty if it can.
std::string Proxy::Lane::problem(const Command& command, int32_t ring) const {
    const Plan& plan = shared.plan;
    if (command.peer >= plan.num_nodes || command.peer == plan.node) {
        return "peer " + std::to_string(command.peer) + " is not another node of " +
               std::to_string(plan.num_nodes);
    }
    if (command.channel >= plan.num_channels || command.channel % plan.num_rings != ring) {
        return "channel " + std::to_string(command.channel) + " does not belong to ring " +
               std::to_string(ring);
    }
    if (command.op == EPCOMM_FABRIC_SIGNAL_ADD || command.bytes == 0) return "";
    const Region& local = shared.regions[size_t(command.local.region)];
    if (local.pointer == nullptr) {
        return "local region " + std::to_string(command.local.region) + " is not registered";
    }
    if (command.local.offset + command.bytes > local.bytes) {
        return "bytes " + std::to_string(command.local.offset) + " to " +
               std::to_string(command.local.offset + command.bytes) + " of local region " +
               std::to_string(command.local.region) + ", which has " + std::to_string(local.bytes);
    }
    return "";
}

bool Proxy::Lane::pick_up(Served& served) {
    size_t taken = 0;
    while (taken < kBatch && !served.positions.full()) {
        Command command;
        if (!take(served.ring, served.positions.taken(), &command)) break;
        const uint64_t position = served.positions.take();
        ++taken;
        if (command.op == EPCOMM_FABRIC_NOOP) {
            served.positions.finish(position);
            continue;
        }
        const std::string wrong = problem(command, served.index);
        if (!wrong.empty()) {
            report(state, operation_error(EPCOMM_FABRIC_BAD_TRIGGER, command, position, wrong));
            return true;
        }
        served.commands[position & (served.commands.size() - 1)] = command;
        waiting.push_back({command, uint64_t(served.index) << kRingShift | position});
    }
    if (taken == 0) return false;
    // Release: the slots have been read before producers write them again.
    store_release(&served.ring.consumer->tail, served.positions.taken());
    store_release(&served.ring.consumer->completed, served.positions.prefix());
    self.triggers += taken;
    return true;
}

bool Proxy::Lane::pick_up() {
    // What the transport has not accepted keeps its place before anything newer.
    if (next != waiting.size()) return false;
    waiting.clear();
    next = 0;
    bool any = false;
    for (Served& served : rings) any = pick_up(served) || any;
    return any;
}

bool Proxy::Lane::post() {
    const size_t room = size_t(shared.plan.max_in_flight - under_way);
    const size_t count = std::min(waiting.size() - next, room);
    if (count == 0) return false;
    const size_t accepted = shared.transport->post(number, waiting.data() + next, count);
    next += accepted;
    under_way += int32_t(accepted);
    return accepted != 0;
}

bool Proxy::Lane::collect() {
    const size_t count = shared.transport->poll(number, completions, kBatch);
    for (size_t i = 0; i < count; ++i) {
        const Completion& completion = completions[i];
        Served& served = served_by(completion.token);
        const uint64_t position = completion.token & ((uint64_t(1) << kRingShift) - 1);
        if (!completion.ok) {
            const Command& command = served.commands[position & (served.commands.size() - 1)];
            epcomm_fabric_error error = operation_error(EPCOMM_FABRIC_TRANSPORT, command, position,
                                                        shared.transport->error_text(completion));
            error.vendor = completion.vendor;
            error.queue_pair = completion.queue_pair;
            report(state, error);
            return true;
        }
        --under_way;
        served.positions.finish(position);
    }
    if (count == 0) return false;
    for (Served& served : rings) {
        store_release(&served.ring.consumer->completed, served.positions.prefix());
    }
    return true;
}

/// Whether a trigger waits in a ring that has room for it among those under way.
bool Proxy::Lane::more() const {
    Command command;
    for (const Served& served : rings) {
        if (take(served.ring, served.positions.taken(), &command)) return true;
    }
    return false;
}

/// Sleep for a part of the time that nothing has happened, so that a nap never adds more than that
/// part to a latency. A host producer ends it; a kernel cannot, so where kernels fill the rings it
/// is short.
void Proxy::Lane::nap(int64_t idle_ns) {
    int64_t longest = std::min(shared.patience.longest_nap_ns, shared.transport->longest_nap_ns());
    if (under_way != 0) longest = std::min<int64_t>(longest, 200'000);
    if (shared.patience.device_fills != 0 && idle_ns > kLongIdleNs) longest *= 5;
    int64_t length = std::clamp(idle_ns / 8, kShortestNapNs, std::max(longest, kShortestNapNs));
    const bool woken = shared.patience.device_fills == 0 && under_way == 0;
    if (woken) length = std::max(longest, kShortestNapNs);
    self.busy_ns = uint64_t(thread_time_ns());
    // This thread says that it sleeps, then looks at its rings; a producer publishes, then looks
    // whether the thread sleeps. All four in one order: one of the two sees the other.
    __atomic_store_n(&self.asleep, 1u, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!more() && shared.drain_until.load() == 0) {
        const timespec duration = {length / 1'000'000'000, length % 1'000'000'000};
        syscall(SYS_futex, &self.asleep, FUTEX_WAIT_PRIVATE, 1, &duration, nullptr, 0);
    }
    __atomic_store_n(&self.asleep, 0u, __ATOMIC_SEQ_CST);
}

void Proxy::run(std::shared_ptr<Shared> shared, int32_t number) {
    epcomm_fabric_state* state = shared->fabric.state;
    epcomm_proxy_thread& self = state->threads[number];
    // By default the kernel lets a nap take 50 us longer, which is longer than most naps.
    prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
    try {
        Lane lane(*shared, number);
        int64_t last_work = now_ns();
        int32_t empty_rounds = 0;
        while (load_acquire(&state->failed) == 0) {
            __atomic_store_n(&self.heartbeat, self.heartbeat + 1, __ATOMIC_RELAXED);
            bool worked = lane.pick_up();
            worked = lane.post() || worked;
            worked = lane.collect() || worked;
            if (worked) {
                empty_rounds = 0;
                continue;
            }
            const int64_t until = shared->drain_until.load(std::memory_order_relaxed);
            if (until != 0 && (now_ns() > until || (lane.idle() && !lane.more()))) break;
            if (empty_rounds == 0) last_work = now_ns();
            ++empty_rounds;
            if (empty_rounds <= shared->patience.spin) continue;
            if (empty_rounds <= shared->patience.spin + 4) {
                sched_yield();
            } else {
                lane.nap(now_ns() - last_work);
            }
        }
    } catch (const std::exception& error) {
        report(state, plain_error(EPCOMM_FABRIC_STALLED, "proxy thread " + std::to_string(number) +
                                                             " ended: " + error.what()));
    }
    self.busy_ns = uint64_t(thread_time_ns());
    __atomic_store_n(&self.running, 0, __ATOMIC_RELEASE);
}

Proxy::Proxy(const epcomm_fabric& fabric, const Plan& plan, const Patience& patience,
             std::vector<Region> regions, std::shared_ptr<Transport> transport)
    : shared_(std::make_shared<Shared>()), watches_(size_t(plan.num_lanes)) {
    shared_->fabric = fabric;
    shared_->plan = plan;
    shared_->patience = patience;
    shared_->regions.resize(EPCOMM_FABRIC_MAX_REGIONS);
    for (const Region& region : regions) shared_->regions[size_t(region.id)] = region;
    shared_->transport = std::move(transport);
}

void Proxy::start() {
    pid_ = getpid();
    // Signals such as Ctrl-C are for the program's own threads. The affinity stays the process's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t lane = 0; lane < shared_->plan.num_lanes; ++lane) {
        shared_->fabric.state->threads[lane].running = 1;
        watches_[size_t(lane)] = {0, now_ns()};
        threads_.emplace_back(run, shared_, lane);
        pthread_setname_np(threads_.back().native_handle(), "epcomm-proxy");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

bool Proxy::stop(int64_t timeout_ns) {
    constexpr int64_t kReturnNs = 2'000'000'000;
    if (threads_.empty()) return true;
    epcomm_fabric_state* state = shared_->fabric.state;
    const int64_t drained = now_ns() + timeout_ns;
    shared_->drain_until.store(drained);
    bool all = true;
    // A forked child has the object but not the threads.
    const bool mine = getpid() == pid_;
    for (size_t i = 0; i < threads_.size(); ++i) {
        epcomm_proxy_thread& thread = state->threads[i];
        while (mine && __atomic_load_n(&thread.running, __ATOMIC_ACQUIRE) != 0 &&
               now_ns() < drained + kReturnNs) {
            __atomic_store_n(&thread.asleep, 0u, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, &thread.asleep, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
            usleep(100);
        }
        if (mine && __atomic_load_n(&thread.running, __ATOMIC_ACQUIRE) == 0) {
            threads_[i].join();
        } else {
            threads_[i].detach();
            all = all && !mine;
        }
    }
    threads_.clear();
    report(state, plain_error(EPCOMM_FABRIC_STOPPED, "the fabric was stopped"));
    return all;
}

void Proxy::check(int64_t stall_ns) {
    const std::lock_guard<std::mutex> lock(checking_);
    epcomm_fabric_state* state = shared_->fabric.state;
    for (size_t i = 0; i < threads_.size(); ++i) {
        const epcomm_proxy_thread& thread = state->threads[i];
        if (__atomic_load_n(&thread.running, __ATOMIC_ACQUIRE) == 0) {
            report(state, plain_error(EPCOMM_FABRIC_STALLED,
                                      "proxy thread " + std::to_string(i) + " ended"));
            return;
        }
        const uint64_t heartbeat = __atomic_load_n(&thread.heartbeat, __ATOMIC_RELAXED);
        const int64_t now = now_ns();
        if (heartbeat != watches_[i].heartbeat) {
            watches_[i] = {heartbeat, now};
        } else if (now - watches_[i].since > stall_ns) {
            report(state,
                   plain_error(EPCOMM_FABRIC_STALLED,
                               "proxy thread " + std::to_string(i) + " gives no sign of life for " +
                                   std::to_string((now - watches_[i].since) / 1'000'000) + " ms"));
            return;
        }
    }
}

}  // namespace epcomm::fabric

extern "C" void epcomm_fabric_wake(const epcomm_fabric* fabric, int32_t channel) {
    const int32_t ring = channel % fabric->num_rings;
    epcomm_proxy_thread& thread = fabric->state->threads[ring % fabric->num_threads];
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&thread.asleep, __ATOMIC_SEQ_CST) == 0) return;
    __atomic_store_n(&thread.asleep, 0u, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &thread.asleep, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}
