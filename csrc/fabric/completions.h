// Which of a ring's operations have completed: from completions in any order to one count.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace epcomm::fabric {

/// Positions are taken in order and finish in any order; `prefix` is how many from the start have
/// all finished. Only that may be published: a mere number of completions would call a wait done
/// while an early operation is still under way and a later one has overtaken it.
class CompletedPrefix {
 public:
    /// `capacity`: most positions between the prefix and the last one taken; a power of two.
    explicit CompletedPrefix(size_t capacity) : finished_(capacity, 0) {}

    bool full() const { return taken_ - prefix_ == finished_.size(); }
    uint64_t taken() const { return taken_; }
    uint64_t prefix() const { return prefix_; }

    /// The next position; not when full.
    uint64_t take() { return taken_++; }

    void finish(uint64_t position) {
        finished_[position & (finished_.size() - 1)] = 1;
        while (prefix_ < taken_ && finished_[prefix_ & (finished_.size() - 1)] != 0) {
            finished_[prefix_++ & (finished_.size() - 1)] = 0;
        }
    }

 private:
    std::vector<uint8_t> finished_;
    uint64_t taken_ = 0;
    uint64_t prefix_ = 0;
};

}  // namespace epcomm::fabric
