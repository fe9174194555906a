// The receive protocol under thousands of schedules of a chaotic network.
//
// N ranks of a rail exchange chunks for a number of epochs, as dispatch does:
//
//   announce   counts of this epoch to every peer: slot [source] of the epoch's parity, then a
//   signal wait       for every peer's announcement: counter (source, announcements) >= epoch send
//   chunk k to its fixed slot on channel k mod C, one put and signal each receive    chunk k once
//   counter (source, channel) covers it, over all epochs so far
//
// Slots are used again in every epoch with no other permission than the peer's announcement. Each
// rank is a state machine; a seed decides which rank or delivery goes next. Every word received is
// compared with what was sent. The protocol broken in one point, or a network that breaks its
// contract, must be caught; else the test would prove nothing.

#include <thread>
#include <vector>

#include "chaos.h"
#include "check.h"
#include "test_end.h"

using namespace chaos;

namespace {

/// How a rank departs from the protocol.
enum class Break {
    kNone,
    kSharedCounter,    ///< one counter for all channels of a source
    kClearedCounters,  ///< counters set to zero at the end of an epoch
    kNoAnnouncement,   ///< sends without the peer's announcement of the epoch
    kOneAnnouncement,  ///< one announcement slot instead of two by parity
    kEarlyReturn,      ///< announces the next epoch before all chunks were read
};

constexpr int kNodes = 3, kData = 2, kChannels = kData + 1, kAnnounce = kData;
constexpr int kEpochs = 5, kMaxChunks = 5, kWords = 6;  // words of a chunk: three units
enum { kOut = 1, kIn = 2, kInbox = 3, kNote = 4 };

struct Note {  // an announcement
    uint64_t epoch;
    uint64_t chunks;
};

uint64_t word_of(int source, int target, int epoch, int chunk, int word) {
    return (((uint64_t(source) * 7 + uint64_t(target)) * 1000 + uint64_t(epoch)) * 100 +
            uint64_t(chunk)) *
               10 +
           uint64_t(word);
}

class Rank {
 public:
    /// With `network` null: over a fabric, see `use`.
    Rank(int node, Network* network, uint32_t seed, Break broken)
        : node_(node), network_(network), random_(seed * 97 + uint32_t(node)), break_(broken) {
        add(EPCOMM_FABRIC_SIGNALS, signals_, sizeof signals_);
        add(kOut, out_, sizeof out_);
        add(kIn, in_, sizeof in_);
        add(kInbox, inbox_, sizeof inbox_);
        add(kNote, note_, sizeof note_);
    }

    std::vector<Region> regions;

    /// Send over real proxy threads.
    void use(const epcomm_fabric* fabric) { fabric_ = fabric; }

    bool finished() const { return epoch_ > kEpochs; }

    /// Do one thing if possible. False: waiting.
    bool step() {
        pump();
        switch (phase_) {
            case 0: announce(); return true;
            case 1: return learn();
            case 2: send(); return true;
            default: return receive();
        }
    }

    bool wrong = false;

 private:
    void add(int id, void* memory, size_t bytes) {
        regions.push_back({id, memory, bytes, Memory::kHost, -1, -1, 0});
        if (network_ != nullptr) network_->add_region(node_, regions.back());
    }

    static uint64_t place(const void* base, const void* at) {
        return uint64_t(static_cast<const uint8_t*>(at) - static_cast<const uint8_t*>(base));
    }

    int signal(int source, int channel) const {
        const bool shared = break_ == Break::kSharedCounter && channel < kData;
        return source * kChannels + (shared ? 0 : channel);
    }

    uint64_t seen(int source, int channel) const {
        return load_acquire(&signals_[signal(source, channel)]);
    }

    /// Through a real ring, as a kernel would.
    void push(const Command& command) {
        if (fabric_ != nullptr) {
            CHECK(epcomm::fabric::push(*fabric_, command) != 0);
            return;
        }
        const uint64_t position = fetch_add(&producer_.head, 1);
        while (!wait_for_slot(ring_, position, &failed_, 0)) pump();
        publish(ring_, position, command);
    }

    void pump() {
        if (fabric_ != nullptr) return;
        Command command;
        while (take(ring_, next_, &command)) {
            network_->post(node_, {command, next_++});
            store_release(&consumer_.tail, next_);
        }
    }

    int parity() const { return break_ == Break::kOneAnnouncement ? 0 : epoch_ & 1; }

    void announce() {
        for (int peer = 0; peer < kNodes; ++peer) {
            chunks_to_[peer] = peer == node_ ? 0 : int(random_() % (kMaxChunks + 1));
            if (peer == node_) continue;
            Note& note = note_[epoch_ & 1][peer];
            note = {uint64_t(epoch_), uint64_t(chunks_to_[peer])};
            push({EPCOMM_FABRIC_PUT_SIGNAL,
                  peer,
                  kAnnounce,
                  signal(node_, kAnnounce),
                  {kNote, 0, place(note_, &note)},
                  {kInbox, 0, place(inbox_, &inbox_[parity()][node_])},
                  sizeof(Note),
                  0});
        }
        phase_ = 1;
    }

    /// Read the announcements, one rank per step.
    bool learn() {
        if (source_ == node_) return next_source(2);
        const uint64_t expected = uint64_t(epoch_) - announced_base_;
        if (break_ == Break::kNoAnnouncement && !sent_) {
            sent_ = true;
            send();
            phase_ = 1;
            return true;
        }
        if (seen(source_, kAnnounce) < expected) return false;
        const Note& note = inbox_[parity()][source_];
        wrong |= note.epoch != uint64_t(epoch_) || note.chunks > kMaxChunks;
        chunks_from_[source_] = int(note.chunks);
        return next_source(break_ == Break::kNoAnnouncement ? 3 : 2);
    }

    bool next_source(int then) {
        if (++source_ == kNodes) {
            source_ = 0;
            chunk_ = 0;
            phase_ = then;
        }
        return true;
    }

    void send() {
        for (int peer = 0; peer < kNodes; ++peer) {
            for (int chunk = 0; chunk < chunks_to_[peer]; ++chunk) {
                uint64_t* words = out_[peer][chunk];
                for (int w = 0; w < kWords; ++w) words[w] = word_of(node_, peer, epoch_, chunk, w);
                const int channel = chunk % kData;
                push({EPCOMM_FABRIC_PUT_SIGNAL,
                      peer,
                      channel,
                      signal(node_, channel),
                      {kOut, 0, place(out_, words)},
                      {kIn, 0, place(in_, in_[node_][chunk])},
                      sizeof out_[0][0],
                      0});
            }
        }
        phase_ = 3;
    }

    /// Read one chunk per step.
    bool receive() {
        if (source_ == node_ || chunk_ == chunks_from_[source_]) {
            chunk_ = 0;
            if (++source_ == kNodes) end_epoch();
            return true;
        }
        if (break_ == Break::kEarlyReturn && source_ == kNodes - 1 && chunk_ + 1 == kMaxChunks) {
            // Says that it is done while the last chunk is still to be read.
            if (!returned_) {
                returned_ = true;
                const int epoch = epoch_++;
                announce();
                epoch_ = epoch;
                phase_ = 3;
            }
        }
        const int channel = chunk_ % kData;
        uint64_t expected = received_[source_][channel] + uint64_t(chunk_ / kData) + 1;
        if (break_ == Break::kSharedCounter) {
            expected = received_[source_][0] + received_[source_][1] + uint64_t(chunk_) + 1;
        }
        if (seen(source_, channel) < expected) return false;
        for (int w = 0; w < kWords; ++w) {
            wrong |= in_[source_][chunk_][w] != word_of(source_, node_, epoch_, chunk_, w);
        }
        ++chunk_;
        return true;
    }

    void end_epoch() {
        for (int source = 0; source < kNodes; ++source) {
            for (int chunk = 0; source != node_ && chunk < chunks_from_[source]; ++chunk) {
                ++received_[source][chunk % kData];
            }
        }
        if (break_ == Break::kClearedCounters) {
            memset(signals_, 0, sizeof signals_);
            memset(received_, 0, sizeof received_);
            announced_base_ = uint64_t(epoch_);
        }
        source_ = chunk_ = 0;
        ++epoch_;
        phase_ = returned_ ? 1 : 0;
        sent_ = returned_ = false;
    }

    const int node_;
    Network* const network_;
    const epcomm_fabric* fabric_ = nullptr;
    std::mt19937 random_;
    const Break break_;
    int epoch_ = 1, phase_ = 0, source_ = 0, chunk_ = 0;
    int chunks_to_[kNodes] = {}, chunks_from_[kNodes] = {};
    uint64_t received_[kNodes][kData] = {};
    uint64_t announced_base_ = 0;
    bool sent_ = false, returned_ = false;

    alignas(16) uint64_t signals_[kNodes * kChannels + 1] = {};
    alignas(16) uint64_t out_[kNodes][kMaxChunks][kWords] = {};
    alignas(16) uint64_t in_[kNodes][kMaxChunks][kWords] = {};
    alignas(16) Note inbox_[2][kNodes] = {};
    alignas(16) Note note_[2][kNodes] = {};

    epcomm_trigger slots_[8] = {};
    epcomm_ring_producer producer_{};
    epcomm_ring_consumer consumer_{};
    uint32_t failed_ = 0;
    uint64_t next_ = 0;
    epcomm_ring ring_{slots_, &producer_, &consumer_, 8};
};

/// Whether every rank got what was sent to it, in bounded time.
bool right(uint32_t seed, Fault fault, Break broken) {
    Network network(kNodes, kChannels, seed, fault);
    std::vector<std::unique_ptr<Rank>> ranks;
    for (int n = 0; n < kNodes; ++n)
        ranks.push_back(std::make_unique<Rank>(n, &network, seed, broken));
    const uint32_t eager = 1 + network.random() % 8;  // steps of ranks for one of the network
    int idle = 0;
    while (idle < 1000) {
        bool all = true, moved = false;
        for (const auto& rank : ranks) {
            all = all && rank->finished();
            if (rank->wrong) return false;
        }
        if (all) return true;
        if (network.random() % (eager + 1) == 0) {
            moved = network.step();
        } else {
            Rank& rank = *ranks[network.random() % kNodes];
            moved = !rank.finished() && rank.step();
        }
        idle = moved ? 0 : idle + 1;
        if (idle == 999 && network.step()) idle = 0;  // nobody can go on, but something may arrive
    }
    return false;  // stuck
}

/// One rank over a fabric of its own, until it has finished.
void run_over_proxies(Rank& rank, int node, const std::vector<Region>& regions) {
    EndOptions options;
    options.node = node;
    options.nodes = kNodes;
    options.channels = kChannels;
    options.rings = 2;
    options.threads = 2;
    options.slots = 4;
    options.max_in_flight = 6;
    options.timeout_ns = 60'000'000'000;
    TestEnd end("chaos", options, regions);
    rank.use(end.fabric);
    const int64_t start = now_ns();
    while (!rank.finished() && !rank.wrong && now_ns() - start < 60'000'000'000) {
        if (!rank.step()) sched_yield();
    }
    CHECK(rank.finished() && !rank.wrong);
    // What this rank sent may still be on its way.
    for (int channel = 0; channel < kChannels; ++channel) {
        CHECK(flush(*end.fabric, channel, 60'000'000'000));
    }
}

int count_wrong(Fault fault, Break broken, uint32_t schedules = 2000) {
    int wrong = 0;
    for (uint32_t seed = 1; seed <= schedules; ++seed) wrong += right(seed, fault, broken) ? 0 : 1;
    printf("%d of %u schedules went wrong\n", wrong, schedules);
    return wrong;
}

}  // namespace

TEST(protocol_holds) { CHECK(count_wrong(Fault::kNone, Break::kNone, 4000) == 0); }

TEST(protocol_holds_over_proxy_threads) {
    for (uint32_t seed = 1; seed <= 60; ++seed) {
        Network network(kNodes, kChannels, seed, Fault::kNone);
        chaos::Transport::network = &network;
        std::vector<std::unique_ptr<Rank>> ranks;
        std::vector<std::thread> threads;
        for (int n = 0; n < kNodes; ++n) {
            ranks.push_back(std::make_unique<Rank>(n, nullptr, seed, Break::kNone));
            for (const Region& region : ranks.back()->regions) network.add_region(n, region);
        }
        for (int n = 0; n < kNodes; ++n) {
            threads.emplace_back(
                [&, n] { run_over_proxies(*ranks[size_t(n)], n, ranks[size_t(n)]->regions); });
        }
        for (std::thread& thread : threads) thread.join();
    }
}

TEST(signal_before_data_is_caught) {
    CHECK(count_wrong(Fault::kSignalBeforeData, Break::kNone) > 0);
}

TEST(signal_applied_twice_is_caught) { CHECK(count_wrong(Fault::kSignalTwice, Break::kNone) > 0); }

TEST(bytes_landing_after_their_signal_are_caught) {
    CHECK(count_wrong(Fault::kDataAfterSignal, Break::kNone) > 0);
}

TEST(shared_counter_is_caught) { CHECK(count_wrong(Fault::kNone, Break::kSharedCounter) > 0); }

TEST(cleared_counters_are_caught) { CHECK(count_wrong(Fault::kNone, Break::kClearedCounters) > 0); }

TEST(sending_without_announcement_is_caught) {
    CHECK(count_wrong(Fault::kNone, Break::kNoAnnouncement) > 0);
}

TEST(one_announcement_slot_is_caught) {
    CHECK(count_wrong(Fault::kNone, Break::kOneAnnouncement) > 0);
}

TEST(announcing_before_all_was_read_is_caught) {
    CHECK(count_wrong(Fault::kNone, Break::kEarlyReturn) > 0);
}
