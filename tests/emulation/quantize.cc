// A kernel that packs rows to FP8 as a dispatch does, and the divisions it is made of.
#include "../../csrc/kernels/move.cuh"
#include "cuda_emulation.h"

extern "C" {

/// Rows of `x` are [hidden] BF16 or float32; of `codes` [hidden] bytes; of `scales` float32, or
/// bytes if `power_of_two`, [tiles] rounded up to a multiple of 4 bytes.
typedef struct {
    int32_t f32;
    int32_t power_of_two;
    int32_t tokens;
    int32_t hidden;
    int32_t scale_bytes;
    const uint8_t* x;
    uint8_t* codes;
    uint8_t* scales;
} emulated_packing;

}  // extern "C"

namespace {

template <bool f32>
void pack_kernel(const void* argument) {
    using namespace epcomm;
    const auto& call = *static_cast<const emulated_packing*>(argument);
    for (int t = warp_id(); t < call.tokens; t += int(blockDim.x) / 32) {
        const uint8_t* from = call.x + int64_t(t) * call.hidden * (f32 ? 4 : 2);
        auto* scales = reinterpret_cast<uint32_t*>(call.scales + int64_t(t) * call.scale_bytes);
        pack_and_move_row<f32>(from, call.hidden, call.power_of_two != 0, 1u,
                               call.codes + int64_t(t) * call.hidden, scales);
    }
}

}  // namespace

extern "C" void emulate_packing(const emulated_packing* call) {
    emulation::run_blocks(1, 2, 0, call, call->f32 ? pack_kernel<true> : pack_kernel<false>);
}

/// Of all mantissas, and exponents enough that a reciprocal comes out right and off by one either
/// way: how many quotients of a tile's scale differ from the machine's own division.
extern "C" int64_t wrong_quotients() {
    using namespace epcomm;
    constexpr float most = numbers::fp8_max;
    int64_t wrong = 0;
    for (uint32_t bits = 0x3f800000; bits < 0x3f800000 + 3 * (1u << 23); ++bits) {
        const float amax = __uint_as_float(bits);
        wrong += divide(most, amax) != most / amax;
        wrong += divide(amax, most, 1.0f / most) != amax / most;
    }
    return wrong;
}
