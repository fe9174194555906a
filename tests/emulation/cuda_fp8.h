// Stands for CUDA's header of this name in emulated kernels.
#pragma once

#include "cuda_emulation.h"

enum { __NV_SATFINITE, __NV_E4M3 };

/// Nearest even to E4M3; beyond 448 saturates, NaN becomes 0x7F with its sign.
inline uint8_t emulated_e4m3(float x) {
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    const float magnitude = fabsf(x);
    if (isnan(x)) return sign | 0x7f;
    if (magnitude >= 448.0f) return sign | 0x7e;
    // Steps are 2^-9 below the smallest normal number, and 1/8 of the power of two above.
    int exponent = 0;
    frexpf(magnitude, &exponent);
    const int step = (magnitude < 0x1p-6f ? -6 : exponent - 1) - 3;
    const float rounded = ldexpf(nearbyintf(ldexpf(magnitude, -step)), step);
    if (rounded < 0x1p-6f) return sign | uint8_t(ldexpf(rounded, 9));
    frexpf(rounded, &exponent);
    const int mantissa = int(ldexpf(rounded, 4 - exponent)) & 7;
    return sign | uint8_t((exponent - 1 + 7) << 3 | mantissa);
}

inline uint32_t __nv_cvt_float2_to_fp8x2(float2 v, int, int) {
    return uint32_t(emulated_e4m3(v.x)) | uint32_t(emulated_e4m3(v.y)) << 8;
}
