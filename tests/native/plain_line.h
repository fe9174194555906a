// NICs on lines whose times can be worked out by hand.
#pragma once

#include "rig.h"

namespace rig {

/// 10 bytes per ns, no headers, no gaps, 1000 ns each way.
inline Options plain(uint32_t num_nics = 2) {
    Options options;
    options.line = {10, 4096, 0, 0, 0, 1000, 500'000, 0};
    options.num_nics = num_nics;
    options.num_blocks = options.num_completions = 64;
    options.memory_bytes = 1 << 20;
    return options;
}

/// So many messages of 800 bytes, each after the completion of the one before it.
inline void write_in_turn(Rig& r, Writer* w, int count = 1) {
    for (int i = 0; i < count; ++i) {
        CHECK(r.write(w, 0, 0, 800) != 0);
        CHECK(r.flush(w));
    }
}

}  // namespace rig
