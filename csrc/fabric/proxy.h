// Proxy threads: from rings to a transport and back.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "completions.h"
#include "fabric.h"
#include "transport.h"

namespace epcomm::fabric {

/// How threads wait for work.
struct Patience {
    int32_t spin;          ///< empty rounds before the first nap
    int32_t device_fills;  ///< kernels fill the rings: nobody can wake a thread
    int64_t longest_nap_ns;
};

/// The threads of one rank's fabric. They serve rings by `ring % num_threads` and carry on until
/// told to stop or until something fails; either way every producer and waiter is let go.
class Proxy {
 public:
    Proxy(const epcomm_fabric& fabric, const Plan& plan, const Patience& patience,
          std::vector<Region> regions, std::shared_ptr<Transport> transport);

    void start();

    /// End the threads: first what is in the rings and under way, for at most `timeout_ns`, then
    /// at once. Returns whether all came back; one that is stuck inside the transport is left to
    /// itself, and keeps the transport and must keep the fabric's memory.
    bool stop(int64_t timeout_ns);

    /// Notice a thread that ended or has given no sign of life for `stall_ns`; report it.
    void check(int64_t stall_ns);

 private:
    struct Lane;
    struct Shared;

    static void run(std::shared_ptr<Shared> shared, int32_t lane);

    struct Watch {
        uint64_t heartbeat = 0;
        int64_t since = 0;
    };

    std::shared_ptr<Shared> shared_;
    std::vector<std::thread> threads_;
    std::vector<Watch> watches_;
    std::mutex checking_;
    pid_t pid_ = 0;
};

}  // namespace epcomm::fabric
