// What the fake's tables share.
#pragma once

#include <errno.h>

#include <condition_variable>
#include <deque>

#include "fake_mlx5.h"

namespace fake {

namespace ibv = epcomm::fabric::ibv;
namespace devx = epcomm::fabric::devx;

struct World::Card {
    CardOptions options;
    std::string name;
    uint32_t nic;
    ibv::Gid gid{};
    uint8_t mac[6];
    devx::Uar* one_for_all = nullptr;
};

struct Context {
    ibv::Context verbs{};
    World::Card* card;
};

struct Umem {
    devx::Umem out;
    uint8_t* start;
    uint64_t bytes;
};

struct Uar {
    devx::Uar out;
    bool shared;
};

struct Object {
    World::Card* card;
    bool is_queue_pair;
    uint32_t number;
    // Of a completion queue:
    uint8_t* completions;
    uint32_t log_size;
};

struct Ah {
    World::Card* card;
    devx::AddressVector vector{};
};

struct Channel {
    devx::EventChannel out;
    std::deque<devx::Event> events;
};

struct World::State {
    World* world;
    std::vector<std::unique_ptr<Card>> cards;
    std::string sysfs;
    mutable std::mutex mutex;
    std::condition_variable released;
    bool let_go = false;
    std::vector<Command> commands;
    std::vector<Call> calls;
    std::map<std::string, int> live;
    struct Failure {
        int error;
        int nth;  ///< 0: all; negative: so many from the first
        int count = 0;
    };
    std::map<std::string, Failure> failures;
    std::set<std::string> hanging;
    std::map<uint32_t, std::unique_ptr<Umem>> umems;
    std::map<uint32_t, uint8_t*> registers;  ///< by page
    std::map<uint32_t, uint8_t*> completions;
    std::map<uint32_t, uint32_t> log_sizes;
    struct Pair {
        Card* card;
        uint32_t state = 3;
        uint64_t cookie = 0;
        Channel* channel = nullptr;
        uint32_t remote = 0;
        Card* peer = nullptr;
    };
    std::map<std::pair<Card*, uint32_t>, Pair> pairs;
    uint32_t next_number = 0x40;
    uint64_t exported = 0;  ///< start of the memory that was exported last

    /// 0, or the error that this call is to end with.
    int enter(const std::string& name, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
        std::unique_lock<std::mutex> lock(mutex);
        calls.push_back({name, a, b, c});
        if (hanging.count(name) != 0) released.wait(lock, [this] { return let_go; });
        const auto found = failures.find(name);
        if (found == failures.end()) return 0;
        Failure& failure = found->second;
        ++failure.count;
        const bool fails =
            failure.nth == 0 || failure.nth == failure.count || failure.count <= -failure.nth;
        return fails ? failure.error : 0;
    }
    void change(const std::string& kind, int by) {
        const std::lock_guard<std::mutex> lock(mutex);
        live[kind] += by;
    }
    Pair* find(uint32_t number) {
        for (auto& entry : pairs) {
            if (entry.first.second == number) return &entry.second;
        }
        return nullptr;
    }
};

/// The one that exists.
extern World* world;

inline World::State& now() { return world->state(); }
inline World::Card* card_of(ibv::Context* context) {
    return reinterpret_cast<Context*>(context)->card;
}

template <class T>
T* refuse(int error) {
    errno = error;
    return nullptr;
}

}  // namespace fake
