// Division without the branch for operands that are not normal, whose call costs registers.
#pragma once

#include "memory.cuh"

namespace epcomm {

/// a / b, rounded to nearest, given 1 / b but for the last place: the last steps of a division.
/// `a`, `b` and the quotient are normal numbers, far from both ends.
__device__ __forceinline__ float divide(float a, float b, float reciprocal) {
    const float q = __fmul_rn(a, reciprocal);
    return __fmaf_rn(reciprocal, __fmaf_rn(-b, q, a), q);
}

/// a / b, rounded to nearest, by the steps of the compiler's own division. Operands as above. That
/// they round right was tried with all 2^23 mantissas of what varies where it is used, and
/// reciprocals off by one.
__device__ __forceinline__ float divide(float a, float b) {
    const float about = reciprocal_about(b);
    return divide(a, b, __fmaf_rn(about, __fmaf_rn(-b, about, 1.0f), about));
}

}  // namespace epcomm
