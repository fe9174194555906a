// The job `nic`: opens the memory of the rail, runs the kernel of the rank's emulated NICs, watches.

#include <string.h>
#include <unistd.h>

#include <stdexcept>

#include "../fabric/peer_process.h"
#include "carrier.h"
#include "nic.h"
#include "shared_memory.h"

namespace epcomm::carrier {

namespace {

using emulated::FaultRule;
using emulated::Nic;
using emulated::Resident;
using emulated::ResidentQueue;
using emulated::Traffic;

constexpr useconds_t kLookUs = 1000;
constexpr int kLooksPerSign = 100;
/// Without a sign of this process for so long, the kernel ends by itself.
constexpr uint64_t kPatienceNs = 20'000'000'000;
constexpr int64_t kEndNs = 1'500'000'000;
constexpr uint64_t kJournal = 4096;

/// Device memory of this process, all of which ends with the job.
class Device {
 public:
    Device() = default;
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device() {
        for (void* block : blocks_) cudaFree(block);
    }

    template <typename T>
    T* zeroed(uint64_t count) {
        void* block = nullptr;
        const uint64_t bytes = (count == 0 ? 1 : count) * sizeof(T);
        require(cudaMalloc(&block, bytes), "memory of the emulated NICs");
        blocks_.push_back(block);
        require(cudaMemset(block, 0, bytes), "memory of the emulated NICs");
        return static_cast<T*>(block);
    }

    template <typename T>
    T* copy(const std::vector<T>& values) {
        T* block = zeroed<T>(values.size());
        require(cudaMemcpy(block, values.data(), values.size() * sizeof(T),
                           cudaMemcpyHostToDevice),
                "memory of the emulated NICs");
        return block;
    }

 private:
    std::vector<void*> blocks_;
};

/// The setup in parts.
struct Parts {
    NicSetup setup;
    std::vector<FaultRule> rules;
    std::vector<NicAddress> addresses;  ///< by node

    explicit Parts(const std::string& bytes) {
        const char* at = bytes.data();
        const auto take = [&at](void* into, size_t size) {
            memcpy(into, at, size);
            at += size;
        };
        take(&setup, sizeof setup);
        rules.resize(size_t(setup.num_rules));
        take(rules.data(), rules.size() * sizeof(FaultRule));
        addresses.resize(size_t(setup.shape.num_nodes));
        take(addresses.data(), addresses.size() * sizeof(NicAddress));
    }
};

class Nics {
 public:
    Nics(const Parts& parts, NicReport* report)
        : shape_(parts.setup.shape), places_(shape_), report_(report) {
        require(cudaSetDevice(parts.setup.device), "cudaSetDevice");
        require(cudaStreamCreateWithFlags(&kernel_, cudaStreamNonBlocking), "cudaStreamCreate");
        require(cudaStreamCreateWithFlags(&talk_, cudaStreamNonBlocking), "cudaStreamCreate");
        for (const NicAddress& address : parts.addresses) open(address);
        fill(parts);
        require(cudaDeviceSynchronize(), "setting up the emulated NICs");
        const uint64_t shared = emulated::resident_shared_bytes(resident_);
        require(cudaError_t(emulated::load_resident(shared)), "loading the emulated NICs' kernel");
        warm_up();
        require(cudaError_t(emulated::launch_resident(resident_, kernel_)),
                "starting the emulated NICs' kernel");
    }

    ~Nics() {
        order(emulated::kStop);
        const int64_t until = fabric::now_ns() + kEndNs;
        while (cudaStreamQuery(kernel_) == cudaErrorNotReady && fabric::now_ns() < until) {
            usleep(kLookUs);
        }
        cudaFreeHost(host_);
        cudaStreamDestroy(talk_);
        cudaStreamDestroy(kernel_);
    }

    /// Throws once the kernel has ended without being told.
    void look(int turn) {
        const cudaError_t state = cudaStreamQuery(kernel_);
        if (state != cudaErrorNotReady) {
            throw std::runtime_error(std::string("the emulated NICs' kernel ended: ") +
                                     cudaGetErrorString(state));
        }
        if (fabric::load_acquire(&report_->asked) != report_->answered) answer();
        if (turn % kLooksPerSign != 0) return;
        host_->alive += 1;
        send(&resident_.mailbox->alive, &host_->alive, sizeof host_->alive);
        fetch(host_->status, resident_.status, sizeof(emulated::BlockStatus) * num_blocks());
        uint64_t oldest = ~uint64_t(0);
        for (uint32_t b = 0; b < num_blocks(); ++b) {
            if (host_->status[b].heartbeat < oldest) oldest = host_->status[b].heartbeat;
        }
        fabric::store_release(&report_->heartbeat_ns, oldest);
        for (int32_t n = 0; n < shape_.num_nodes; ++n) {
            if (n != shape_.node && peers_[size_t(n)].gone()) kill(n);
        }
    }

 private:
    static constexpr uint32_t kMostBlocks = 64;
    /// Pinned: what goes to the device and comes from it while the kernel runs.
    struct Host {
        uint64_t alive;
        uint32_t order;
        uint32_t one;
        uint32_t counting;
        emulated::BlockStatus status[kMostBlocks];
        emulated::Journal journal;
        Traffic cells[1];  ///< more behind it
    };

    uint32_t num_blocks() const { return resident_.num_blocks; }

    void open(const NicAddress& address) {
        arenas_.push_back(memory_.open(address.arena));
        peers_.emplace_back();
        if (address.node != shape_.node) peers_.back().watch(address.pid);
        auto* nics = reinterpret_cast<Nic*>(arenas_.back() + places_.nics);
        for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
            nics_.push_back(nics + plane);
            std::vector<int64_t> shifts(emulated::kMaxKeys);
            for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
                const uint32_t key = address.keys[plane][id].key;
                const uint8_t* here = memory_.open(address.regions[id]);
                if (here == nullptr) continue;
                shifts[key - emulated::kFirstKey] =
                    int64_t(reinterpret_cast<uint64_t>(here) - address.region_addresses[id]);
            }
            shifts_.insert(shifts_.end(), shifts.begin(), shifts.end());
        }
    }

    void fill(const Parts& parts) {
        resident_.wire = {parts.setup.epoch_ns, uint32_t(nics_.size()), device_.copy(nics_),
                          device_.copy(shifts_)};
        resident_.faults = {device_.copy(parts.rules), uint32_t(parts.rules.size()), 0,
                            parts.setup.seed};
        const emulated::Journal journal{device_.zeroed<emulated::Event>(kJournal), kJournal, 0, 0};
        resident_.journal = device_.copy(std::vector<emulated::Journal>{journal});
        deal_queues(uint32_t(parts.setup.num_blocks));
        resident_.mailbox = device_.zeroed<emulated::Mailbox>(1);
        resident_.status = device_.zeroed<emulated::BlockStatus>(num_blocks());
        resident_.num_planes = uint32_t(shape_.num_planes);
        resident_.strict = 1;
        resident_.tolerance_ns = emulated::kToleranceNs;
        resident_.patience_ns = kPatienceNs;
        const uint64_t cells = emulated::resident_traffic_cells(resident_);
        resident_.traffic = device_.zeroed<Traffic>(cells);
        require(cudaHostAlloc(reinterpret_cast<void**>(&host_),
                              sizeof(Host) + cells * sizeof(Traffic), cudaHostAllocDefault),
                "cudaHostAlloc");
        memset(static_cast<void*>(host_), 0, sizeof(Host));
        host_->one = 1;
    }

    /// Queue pairs go to blocks by their channel, so that one chunk after the other keeps all busy.
    void deal_queues(uint32_t blocks) {
        uint8_t* arena = arenas_[size_t(shape_.node)];
        std::vector<std::vector<ResidentQueue>> dealt(blocks);
        for_each_queue(shape_, [&](int32_t index, int32_t, int32_t channel, int32_t plane,
                                   uint32_t number) {
            const uint32_t nic = shape_.nic(shape_.node, plane);
            emulated::QueueMemory memory{};
            memory.ring = reinterpret_cast<mlx5::Block*>(arena + places_.ring(index));
            memory.record = reinterpret_cast<mlx5::Be32*>(arena + places_.record(index));
            memory.doorbell = reinterpret_cast<uint64_t*>(arena + places_.doorbell(index));
            memory.completions =
                reinterpret_cast<mlx5::Completion*>(arena + places_.completion(index));
            memory.num_blocks = memory.num_completions = kQueueDepth;
            emulated::QueueEntry* entry = &nics_[nic]->queues[number - emulated::kFirstQueue];
            const emulated::QueuePair queue = emulated::queue_pair(
                memory, number, entry, device_.zeroed<emulated::Flight>(kQueueDepth),
                device_.zeroed<mlx5::Block>(kQueueDepth));
            dealt[uint32_t(channel) % blocks].push_back({queue, nic, uint32_t(plane)});
        });
        std::vector<ResidentQueue> queues;
        std::vector<uint32_t> first = {0};
        resident_.max_queues = 0;
        for (const auto& share : dealt) {
            queues.insert(queues.end(), share.begin(), share.end());
            first.push_back(uint32_t(queues.size()));
            if (share.size() > resident_.max_queues) resident_.max_queues = uint32_t(share.size());
        }
        resident_.queues = device_.copy(queues);
        resident_.first = device_.copy(first);
        resident_.num_blocks = blocks;
    }

    /// Use the second stream for all that it will do: a first use may load code, which would wait
    /// for the kernel.
    void warm_up() {
        send(&resident_.mailbox->alive, &host_->alive, sizeof host_->alive);
        fetch(host_->status, resident_.status, sizeof(emulated::BlockStatus) * num_blocks());
        send(&nics_[shape_.nic(shape_.node, 0)]->dead, &host_->order, sizeof host_->order);
    }

    void send(void* to, const void* from, uint64_t bytes) {
        require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, talk_), "telling the NICs");
        require(cudaStreamSynchronize(talk_), "telling the NICs");
    }

    void fetch(void* to, const void* from, uint64_t bytes) {
        require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, talk_),
                "asking the NICs");
        require(cudaStreamSynchronize(talk_), "asking the NICs");
    }

    void order(uint32_t what) {
        host_->order = what;
        cudaMemcpyAsync(&resident_.mailbox->order, &host_->order, sizeof host_->order,
                        cudaMemcpyHostToDevice, talk_);
        cudaStreamSynchronize(talk_);
    }

    /// A process that has ended does not answer; its memory would.
    void kill(int32_t node) {
        for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
            send(&nics_[shape_.nic(node, plane)]->dead, &host_->one, sizeof host_->one);
        }
    }

    void answer() {
        const uint64_t asked = fabric::load_acquire(&report_->asked);
        // Counts are brought to global memory now and then; twice that is long enough.
        usleep(2 * kLookUs);
        const uint64_t cells = emulated::resident_traffic_cells(resident_);
        fetch(host_->cells, resident_.traffic, cells * sizeof(Traffic));
        fetch(&host_->journal, resident_.journal, sizeof host_->journal);
        Traffic all;
        for (uint64_t i = 0; i < cells; ++i) all.add(host_->cells[i]);
        report_->traffic = all;
        report_->violations = host_->journal.violations;
        if (report_->restart != 0) {
            host_->counting += 1;
            send(&resident_.mailbox->counting, &host_->counting, sizeof host_->counting);
            usleep(2 * kLookUs);
        }
        fabric::store_release(&report_->answered, asked);
    }

    NicShape shape_;
    NicArena places_;
    NicReport* report_;
    IpcMappings memory_;
    Device device_;
    std::vector<uint8_t*> arenas_;  ///< by node, as the following two
    std::vector<fabric::PeerProcess> peers_;
    std::vector<Nic*> nics_;
    std::vector<int64_t> shifts_;
    Resident resident_{};
    Host* host_ = nullptr;
    cudaStream_t kernel_ = nullptr, talk_ = nullptr;
};

void run(const std::string& bytes, const std::vector<int>& fds, Session& session) {
    const SharedMapping mapping(fds.at(0), sizeof(NicReport));
    Nics nics(Parts(bytes), static_cast<NicReport*>(mapping.start()));
    session.ready();
    for (int turn = 0; !session.ended(); ++turn) {
        nics.look(turn);
        usleep(kLookUs);
    }
}

const RegisterJob kJob("nic", run);

}  // namespace

}  // namespace epcomm::carrier
