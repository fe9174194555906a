/// The float32 numbers that define the quantised formats. docs/formats.md and
/// epcomm/formats/reference.py say what is done with them.
#pragma once

/// X(name, value): literals that read back as the very float32 that is meant.
///   fp8_max, fp8_amax_floor   largest E4M3 value; least amax of a tile
///   logfmt_range              widest log2(max / min) that a LogFMT tile may span
///   logfmt_largest            largest finite BF16: decoders saturate there, for the rounded-up
///                             maximum of a tile may exceed it
///   logfmt_exponent_min, _max range of the power of two that a decoder sets apart, so that the
///                             rest stays normal
///   linear_0, linear_1        (a, b) of the rounding constant a - b * step, b = ln(2) / 8
///   round_magic               1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, which stands
///                             in the low bits of the sum
///   log2_split                sqrt(1/2): magnitudes are 2^e * m with m in [sqrt(1/2), sqrt(2))
///   log2_*                    log2(1 + f) / f, coefficients of rising power
///   exp2_*                    2^f for f in [-1/2, 1/2], likewise
///
/// The polynomials are minimax, evaluated by Horner's rule. Absolute error of log2 is 3e-7 (before
/// the exponent is added), relative error of exp2 1e-7; both are exact at powers of two.
#define EPCOMM_NUMBERS(X)            \
    X(fp8_max, 448.0f)               \
    X(fp8_amax_floor, 1e-4f)         \
    X(logfmt_range, 32.0f)           \
    X(logfmt_largest, 3.3895314e38f) \
    X(logfmt_exponent_min, -126.0f)  \
    X(logfmt_exponent_max, 96.0f)    \
    X(linear_0, 1.5f)                \
    X(linear_1, 0.0866434f)          \
    X(round_magic, 12582912.0f)      \
    X(log2_split, 0.70710677f)       \
    X(log2_0, 1.44269967f)           \
    X(log2_1, -0.72137588f)          \
    X(log2_2, 0.48046502f)           \
    X(log2_3, -0.35896185f)          \
    X(log2_4, 0.29726261f)           \
    X(log2_5, -0.2726979f)           \
    X(log2_6, 0.17063443f)           \
    X(exp2_0, 1.0f)                  \
    X(exp2_1, 0.69314724f)           \
    X(exp2_2, 0.24022235f)           \
    X(exp2_3, 0.055503085f)          \
    X(exp2_4, 0.0096718753f)         \
    X(exp2_5, 0.0013407259f)
