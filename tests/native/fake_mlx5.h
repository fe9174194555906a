// ConnectX cards, libibverbs, libmlx5 and a GPU's driver that are not there: tables of functions
// that record what is asked of them, count what is not given back, and fail where they are told to.
//
// A card is an emulated NIC (csrc/emulated): queue pairs that the transport makes on it by commands
// really move bytes. A GPU's memory is the host's, so that host threads can stand for its kernels.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/emulated/engine.h"
#include "../../csrc/fabric/mlx5/library.h"
#include "../../csrc/fabric/verbs/device.h"
#include "../../csrc/include/epcomm_fabric.h"

namespace fake {

/// Bits of a command, counted from its start. Written apart from the library's own definitions.
uint64_t bits(const std::vector<uint8_t>& bytes, uint32_t offset, uint32_t width);
void set_bits(std::vector<uint8_t>* bytes, uint32_t offset, uint32_t width, uint64_t value);

enum Network { kInfiniband, kRoceV1, kRoceV2 };

struct CardOptions {
    Network network = kInfiniband;
    bool mlx5 = true;
    bool active = true;
    bool dedicated_registers = true;  ///< the newest kind can be had
    bool needs_global = false;
    uint16_t lid = 0x21;
    int max_qp_rd_atom = 16;       ///< as responder
    int max_qp_init_rd_atom = 16;  ///< as requester
    bool atomics = true;
    uint32_t log_max_qp_sz = 15, log_max_cq_sz = 22, log_max_msg = 30, log_bf_reg_size = 9;
    bool overrun_ignore = true;
    uint32_t timestamp_formats = 1;
    uint32_t active_mtu = 5;
};

/// A command as it came.
struct Command {
    std::string card;
    uint16_t opcode;
    std::vector<uint8_t> in;
    size_t out_bytes;
};

/// Anything else that was asked for.
struct Call {
    std::string name;
    uint64_t a = 0, b = 0, c = 0;
};

class World {
 public:
    explicit World(const std::vector<CardOptions>& cards);
    ~World();
    World(const World&) = delete;
    World& operator=(const World&) = delete;

    /// The `nth` call of this name (from 1; 0: every one) fails with `error`. Commands are called
    /// by what they do: create_cq, create_qp, rst2init, init2rtr, rtr2rts, query_hca_cap, ...
    void fail(const std::string& name, int error, int nth = 0);
    void fail_first(const std::string& name, int error, int count);
    /// Calls of this name do not return before `release`.
    void hang(const std::string& name);
    void release();

    /// What was made and not ended, in words; empty: nothing.
    std::string live() const;
    std::vector<Command> commands(uint16_t opcode) const;
    std::vector<Call> calls(const std::string& name) const;
    /// An event of a queue pair's type, told on its card's channel.
    void tell(uint32_t queue_pair, uint8_t type);
    void set_state(uint32_t queue_pair, uint32_t state);

    /// Let the cards work, in a thread of their own, and stop them.
    void start();
    void stop();
    /// Change something about the cards while they do nothing.
    template <class Change>
    auto pause(const Change& change) {
        const std::lock_guard<std::mutex> lock(engine_mutex_);
        if (runs_) engine_->stop();
        const auto result = change();
        if (runs_) engine_->start();
        return result;
    }

    epcomm::emulated::Engine& engine() { return *engine_; }
    epcomm::emulated::Network& network() { return network_; }
    bool has_gpu = true;
    bool has_umem_reg_ex = true;

    struct Card;
    struct State;
    State& state() { return *state_; }

 private:
    epcomm::emulated::Network network_;
    std::unique_ptr<epcomm::emulated::Engine> engine_;
    std::mutex engine_mutex_;
    bool runs_ = false;
    std::unique_ptr<State> state_;
};

/// One rank of a fabric over the transport `mlx5`: region 0 signals, 1 to send from, 2 to receive.
class Rank {
 public:
    Rank(int32_t node, int32_t num_nodes, int32_t channels, const std::string& options,
         bool on_gpu);
    ~Rank();
    Rank(const Rank&) = delete;
    Rank& operator=(const Rank&) = delete;

    /// Empty, or why not.
    std::string open();
    std::string address(int32_t peer);
    std::string connect(const std::vector<std::string>& addresses);
    /// Seconds that it took.
    double close();

    const epcomm_ibgda& ibgda() const { return *epcomm_fabric_ibgda_of(end_); }
    std::string describe() { return epcomm_fabric_describe(end_); }
    epcomm_fabric_end* end() { return end_; }
    const epcomm_fabric_state& state() const { return *epcomm_fabric_of(end_)->state; }
    std::vector<uint64_t>& region(int32_t id) { return regions_[size_t(id)]; }

 private:
    std::vector<std::vector<uint64_t>> regions_;
    std::vector<uint64_t> host_, producers_;
    epcomm_fabric_end* end_ = nullptr;
    int32_t device_;
};

/// Open all and connect each with each; empty, or the first reason why not.
std::string connect_all(const std::vector<Rank*>& ranks);

}  // namespace fake
