// Tables go to the device before the kernel starts. After that only asynchronous copies from and to
// pinned memory are made, on a stream of their own: any other call might wait for the kernel.

#include <cuda_runtime.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "server.h"

namespace epcomm::emulated {

namespace {

constexpr int64_t kCopyNs = 2'000'000'000;  ///< a copy of a few bytes takes no longer
constexpr int64_t kEndNs = 2'000'000'000;

void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("emulated NIC: ") + what + ": " +
                             cudaGetErrorString(error));
}

/// Device memory that is cut into parts. The first pass only measures.
class Arena {
 public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { cudaFree(start_); }

    void allocate() {
        require(cudaMalloc(&start_, next_), "cudaMalloc");
        require(cudaMemset(start_, 0, next_), "cudaMemset");
        next_ = 0;
    }
    template <typename T>
    T* take(uint64_t count) {
        auto* part = reinterpret_cast<T*>(static_cast<uint8_t*>(start_) + next_);
        next_ += (count * sizeof(T) + 255) / 256 * 256;
        return part;
    }
    /// The memory stays, with a kernel that would not end.
    void leave() { start_ = nullptr; }

 private:
    void* start_ = nullptr;
    uint64_t next_ = 0;
};

template <typename T>
void upload(const T* to, const std::vector<T>& from) {
    if (from.empty()) return;
    require(cudaMemcpy(const_cast<T*>(to), from.data(), from.size() * sizeof(T),
                       cudaMemcpyHostToDevice),
            "uploading tables");
}

}  // namespace

struct Server::Parts {
    Arena memory;
    Resident resident = {};
    cudaStream_t kernel = nullptr, copies = nullptr;
    void* pinned = nullptr;  ///< what copies go through
    uint64_t pinned_bytes = 0;
    uint64_t signs = 0, countings = 0;
    uint64_t first_passage = 0, first_event = 0;  ///< that are not forgotten
    std::vector<Nic*> nics;
    bool runs = false;

    ~Parts() {
        if (copies != nullptr) cudaStreamDestroy(copies);
        if (kernel != nullptr) cudaStreamDestroy(kernel);
        cudaFreeHost(pinned);
    }

    void place(uint64_t num_queues, const ServedWire& wire, const ServerOptions& options,
               uint64_t total_blocks) {
        resident.wire.nics = memory.take<Nic*>(wire.nics.size());
        resident.wire.shifts =
            wire.shifts.empty() ? nullptr : memory.take<int64_t>(wire.shifts.size());
        resident.faults.rules = memory.take<FaultRule>(options.rules.size());
        resident.journal = memory.take<Journal>(1);
        resident.queues = memory.take<ResidentQueue>(num_queues);
        resident.first = memory.take<uint32_t>(options.num_blocks + 1);
        resident.mailbox = memory.take<Mailbox>(1);
        resident.status = memory.take<BlockStatus>(options.num_blocks);
        resident.traffic = memory.take<Traffic>(resident_traffic_cells(resident));
        resident.offers =
            reinterpret_cast<Offer*>(memory.take<uint8_t>(resident_offer_bytes(resident)));
        events = memory.take<Event>(options.journal_capacity);
        if (options.max_passages != 0) {
            resident.passages = memory.take<PassageRing>(1);
            passages = memory.take<Passage>(options.max_passages);
            marks = memory.take<uint64_t>(options.max_passages);
        }
        if (options.max_events != 0) {
            newest = memory.take<EventRing>(1);
            newest_events = memory.take<Event>(options.max_events);
            event_marks = memory.take<uint64_t>(options.max_events);
        }
        flights = memory.take<Flight>(total_blocks);
        shadows = memory.take<mlx5::Block>(total_blocks);
    }

    /// Through pinned memory, in bounded time.
    void finish_copies(const char* what) {
        const int64_t until = fabric::now_ns() + kCopyNs;
        while (true) {
            const cudaError_t state = cudaStreamQuery(copies);
            if (state == cudaSuccess) return;
            if (state != cudaErrorNotReady) require(state, what);
            if (fabric::now_ns() > until) {
                throw std::runtime_error(std::string("emulated NIC: ") + what +
                                         ": the copy does not end");
            }
            usleep(20);
        }
    }

    void write_mailbox(const void* to, uint64_t value, size_t bytes) {
        // Earlier ones have ended: finish_copies.
        memcpy(pinned, &value, sizeof value);
        require(
            cudaMemcpyAsync(const_cast<void*>(to), pinned, bytes, cudaMemcpyHostToDevice, copies),
            "writing to the kernel");
        finish_copies("writing to the kernel");
    }

    template <typename T>
    void read(const T* from, uint64_t count, T* into) {
        const uint64_t most = pinned_bytes / sizeof(T);
        for (uint64_t done = 0; done < count; done += most) {
            const uint64_t part = std::min(most, count - done);
            require(cudaMemcpyAsync(pinned, from + done, part * sizeof(T), cudaMemcpyDeviceToHost,
                                    copies),
                    "reading what the kernel says");
            finish_copies("reading what the kernel says");
            memcpy(static_cast<void*>(into + done), pinned, part * sizeof(T));
        }
    }

    /// Of a ring, or of none, those from number `first` on.
    template <typename Note>
    std::vector<Note> read_notes(const NoteRing<Note>* ring, uint64_t first, uint64_t* total) {
        *total = 0;
        if (ring == nullptr) return {};
        const auto copy = [this](const auto* from, uint64_t count, auto* into) {
            read(from, count, into);
        };
        uint64_t end = 0;
        const std::vector<Note> all = read_ring(ring, first, copy, &end);
        *total = end - first;
        return all;
    }

    template <typename Note>
    uint64_t count_notes(const NoteRing<Note>* from) {
        NoteRing<Note> ring = {};
        if (from != nullptr) read(from, 1, &ring);
        return ring.count;
    }

    Event* events = nullptr;
    EventRing* newest = nullptr;
    Event* newest_events = nullptr;
    uint64_t* event_marks = nullptr;
    Passage* passages = nullptr;
    uint64_t* marks = nullptr;
    Flight* flights = nullptr;
    mlx5::Block* shadows = nullptr;
};

Server::Server(const ServedWire& wire, const std::vector<ServedQueue>& queues,
               const ServerOptions& options)
    : parts_(std::make_unique<Parts>()) {
    Parts& parts = *parts_;
    Resident& resident = parts.resident;
    resident.num_blocks = options.num_blocks;
    resident.num_planes = options.num_planes;
    resident.strict = options.strict;
    resident.tolerance_ns = options.tolerance_ns;
    resident.patience_ns = options.patience_ns;
    resident.bells = options.bells;
    uint64_t total_blocks = 0;
    for (const ServedQueue& queue : queues) total_blocks += queue.memory.num_blocks;
    parts.place(queues.size(), wire, options, total_blocks);
    parts.memory.allocate();
    parts.place(queues.size(), wire, options, total_blocks);
    resident.wire.epoch_ns = options.epoch_ns;
    parts.nics = wire.nics;
    resident.wire.num_nics = uint32_t(wire.nics.size());
    resident.faults.num_rules = uint32_t(options.rules.size());
    resident.faults.seed = options.seed;

    std::vector<ResidentQueue> rows;
    std::vector<uint32_t> first = {0};
    Flight* flights = parts.flights;
    mlx5::Block* shadow = parts.shadows;
    for (uint32_t block = 0; block < options.num_blocks; ++block) {
        for (const ServedQueue& queue : queues) {
            if (queue.block % options.num_blocks != block) continue;
            // An address only: the entry is device memory.
            QueueEntry* entry = &wire.nics[queue.nic]->queues[queue.number - kFirstQueue];
            rows.push_back({queue_pair(queue.memory, queue.number, entry, flights, shadow),
                            queue.nic, queue.plane});
            flights += queue.memory.num_blocks;
            shadow += queue.memory.num_blocks;
        }
        resident.max_queues = std::max(resident.max_queues, uint32_t(rows.size()) - first.back());
        first.push_back(uint32_t(rows.size()));
    }
    resident.near_flights = 1;
    if (load_resident(resident_shared_bytes(resident)) != cudaSuccess) {
        cudaGetLastError();  // it does not fit
        resident.near_flights = 0;
        require(cudaError_t(load_resident(resident_shared_bytes(resident))),
                "loading the kernel (fewer queue pairs or more blocks need less shared memory)");
    }
    upload(resident.wire.nics, wire.nics);
    upload(resident.wire.shifts, wire.shifts);
    upload(resident.faults.rules, options.rules);
    upload(resident.queues, rows);
    upload(resident.first, first);
    upload(resident.journal,
           std::vector<Journal>{{parts.events, options.journal_capacity, 0, 0, parts.newest}});
    if (parts.newest != nullptr) {
        upload(parts.newest, std::vector<EventRing>{
                                 {parts.newest_events, parts.event_marks, options.max_events, 0}});
    }
    if (resident.passages != nullptr) {
        upload(resident.passages,
               std::vector<PassageRing>{{parts.passages, parts.marks, options.max_passages, 0}});
    }
    parts.pinned_bytes = std::max<uint64_t>(65536, sizeof(Event));
    require(cudaHostAlloc(&parts.pinned, parts.pinned_bytes, cudaHostAllocDefault),
            "cudaHostAlloc");
    require(cudaStreamCreateWithFlags(&parts.kernel, cudaStreamNonBlocking), "cudaStreamCreate");
    require(cudaStreamCreateWithFlags(&parts.copies, cudaStreamNonBlocking), "cudaStreamCreate");
    // Copies from pageable memory may end after their calls have.
    require(cudaDeviceSynchronize(), "uploading tables");
    // A first use of these copies might load code.
    sign_of_life();
    look();
}

Server::~Server() {
    bool ended = !parts_->runs;
    try {
        ended = stop(kStop, kEndNs);
    } catch (const std::runtime_error&) {
        // The context is broken, and the kernel has ended with it or never will.
    }
    if (!ended) parts_->memory.leave();
}

void Server::start() {
    require(cudaError_t(launch_resident(parts_->resident, parts_->kernel)), "launching the kernel");
    parts_->runs = true;
}

void Server::sign_of_life() {
    parts_->write_mailbox(&parts_->resident.mailbox->alive, ++parts_->signs, sizeof(uint64_t));
}

bool Server::has_ended() {
    if (!parts_->runs) return true;
    const cudaError_t state = cudaStreamQuery(parts_->kernel);
    if (state == cudaErrorNotReady) return false;
    parts_->runs = false;
    require(state, "the kernel");
    return true;
}

bool Server::stop(ResidentOrder order, int64_t timeout_ns) {
    if (has_ended()) return true;
    parts_->write_mailbox(&parts_->resident.mailbox->order, order, sizeof(uint32_t));
    const int64_t until = fabric::now_ns() + timeout_ns;
    while (!has_ended()) {
        if (fabric::now_ns() > until) return false;
        usleep(50);
    }
    return true;
}

int64_t device_ahead_ns() {
    constexpr int64_t kShownNs = 300'000;
    struct Shown {
        cudaStream_t stream = nullptr;
        void* place = nullptr;
        ~Shown() {
            if (stream != nullptr) cudaStreamDestroy(stream);
            cudaFreeHost(place);
        }
    } shown;
    require(cudaStreamCreateWithFlags(&shown.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    require(cudaHostAlloc(&shown.place, sizeof(uint64_t), cudaHostAllocDefault), "cudaHostAlloc");
    auto* word = static_cast<uint64_t*>(shown.place);
    *word = 0;
    require(cudaError_t(show_timer(word, kShownNs, shown.stream)), "reading the device's timer");
    // What is seen was written before: the best look is the one that says most.
    int64_t ahead = INT64_MIN;
    for (cudaError_t state = cudaErrorNotReady; state == cudaErrorNotReady;) {
        state = cudaStreamQuery(shown.stream);
        for (int i = 0; i < 64; ++i) {
            const auto seen = int64_t(fabric::load_acquire(word));
            if (seen != 0) ahead = std::max(ahead, seen - fabric::now_ns());
        }
        if (state != cudaErrorNotReady) require(state, "reading the device's timer");
    }
    return ahead;
}

ServerReport Server::look() {
    Parts& parts = *parts_;
    const Resident& resident = parts.resident;
    ServerReport report = {};
    std::vector<BlockStatus> status(resident.num_blocks);
    parts.read(resident.status, status.size(), status.data());
    report.serving = true;
    report.heartbeat = ~uint64_t(0);
    for (const BlockStatus& block : status) {
        report.serving = report.serving && block.state == kServing;
        report.abandoned = report.abandoned || block.state == kAbandoned;
        report.heartbeat = std::min(report.heartbeat, block.heartbeat);
        report.granularity_ns = std::max(report.granularity_ns, block.granularity);
    }
    Journal journal;
    parts.read(resident.journal, 1, &journal);
    // A copy has no order within. What another one brings is as old as this one's flag at least.
    if (journal.violation_is_whole != 0) parts.read(resident.journal, 1, &journal);
    report.broken_rules = journal.broken_rules();
    report.num_events = journal.count;
    std::vector<Traffic> cells(resident_traffic_cells(resident));
    parts.read(resident.traffic, cells.size(), cells.data());
    report.traffic.resize(resident.num_planes);
    for (size_t i = 0; i < cells.size(); ++i) {
        // Before the first publication they are zeros.
        if (cells[i].messages != 0) report.traffic[i / 32 % resident.num_planes].add(cells[i]);
    }
    return report;
}

void Server::forget_counts() {
    parts_->write_mailbox(&parts_->resident.mailbox->counting, ++parts_->countings,
                          sizeof(uint32_t));
}

void Server::kill_nic(uint32_t nic) {
    parts_->write_mailbox(&parts_->nics[nic]->dead, 1, sizeof(uint32_t));
}

std::vector<Event> Server::events() {
    Journal journal;
    parts_->read(parts_->resident.journal, 1, &journal);
    std::vector<Event> events(std::min(journal.count, journal.capacity));
    parts_->read(parts_->events, events.size(), events.data());
    return events;
}

std::vector<Passage> Server::passages(uint64_t* total) {
    return parts_->read_notes(parts_->resident.passages, parts_->first_passage, total);
}

std::vector<Event> Server::newest_events(uint64_t* total) {
    return parts_->read_notes(parts_->newest, parts_->first_event, total);
}

void Server::forget() {
    parts_->first_passage = parts_->count_notes(parts_->resident.passages);
    parts_->first_event = parts_->count_notes(parts_->newest);
}

}  // namespace epcomm::emulated
