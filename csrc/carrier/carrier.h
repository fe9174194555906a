// A rank's carrier: a process of its own that works on GPU memory for the rank.
//
// WHY A PROCESS. While a rank's kernel waits for bytes from another node, somebody must make CUDA
// calls or keep a kernel running to bring them. Inside the rank's process that can wait for the
// very kernel that waits for it: a copy to pageable memory, cudaMalloc, cudaFree and the loading of
// a kernel hold a lock of the CUDA context until earlier work has ended, and a kernel that never
// ends would keep cudaDeviceSynchronize from returning. The carrier has a context of its own; it
// reaches the rank's memory by CUDA IPC, as peers do.
//
// A carrier serves one session at a time. A job, known by name, is what it does in a session.
//
//     rank:     Carrier(job, setup, fds) ...................... ~Carrier
//     carrier:       run(setup, fds, session): ready() ... until ended()
//
// What they share during a session lies in memory of the file descriptors. Ended carriers are kept
// and used again, because a CUDA context takes long to make. Whatever kills the rank ends its
// carrier: it sees the end of the socket, or that it has another parent.
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include <string>
#include <vector>

namespace epcomm::carrier {

/// The rank's side of a session.
class Carrier {
 public:
    /// Start a session and wait until its job is ready, 60 s at most.
    ///
    /// @param job of a name that is registered.
    /// @param setup bytes that the job understands.
    /// @param fds file descriptors to pass on; they stay the caller's.
    /// @param executable to start where no carrier is at hand; empty: the one beside the library.
    /// @throws std::runtime_error with the job's text, or that of the step that failed.
    Carrier(const std::string& job, const std::string& setup, const std::vector<int>& fds,
            const std::string& executable = "");
    Carrier(const Carrier&) = delete;
    Carrier& operator=(const Carrier&) = delete;

    /// End the session. A carrier that does not answer within 2 s is killed.
    ~Carrier();

    /// Whether the job or its process has ended by itself.
    bool gone() const;

    /// The job's last words where it ended by itself; empty if it said nothing.
    std::string last_words();

    pid_t pid() const { return pid_; }

 private:
    std::string executable_;
    pid_t pid_ = -1;
    int socket_ = -1;
};

/// The carrier's side.
class Session {
 public:
    explicit Session(int socket);

    /// Let the rank go on.
    void ready();

    /// Whether the rank asks for the end of the session, or is gone. Costs a system call.
    bool ended();

    /// The rank is gone: there will be no further session.
    bool orphaned() const { return orphaned_; }

 private:
    int socket_;
    pid_t parent_;
    bool ended_ = false;
    bool orphaned_ = false;
};

/// A job: works until `session.ended()`; throws std::runtime_error with a text for the rank, after
/// which the carrier's process ends too. The descriptors are closed after it.
using Run = void (*)(const std::string& setup, const std::vector<int>& fds, Session& session);

/// Makes a job known under a name; a static object of each job's file.
struct RegisterJob {
    RegisterJob(const char* name, Run run);
};

/// The life of a carrier's process, on the socket that its rank gave it. Returns its exit status.
int serve(int socket);

}  // namespace epcomm::carrier
