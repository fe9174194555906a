// Sums to records and back, in every format of the wire.
#pragma once

#include "columns.cuh"
#include "logfmt_record.cuh"
#include "sum_nodes.cuh"

namespace epcomm {

/// A record holds a row's elements in the rows' format or in the other of BF16 and float32: bytes
/// of it that correspond to 16 of the row.
template <bool f32, bool wire_f32>
constexpr int kWireColumn = f32 == wire_f32 ? 16
                            : wire_f32      ? 32
                                            : 8;

/// Store the sums as BF16 or float32.
template <bool f32, bool wire_f32>
__device__ __forceinline__ void store_plain(const Sums<f32>& sums, int first, int row_bytes,
                                            uint8_t* record) {
#pragma unroll
    for (int u = 0; u < kSumColumns; ++u) {
        const int at = column_at(first, u);
        if (at >= row_bytes) continue;
        uint8_t* to = record + int64_t(at) / 16 * kWireColumn<f32, wire_f32>;
        if constexpr (f32 == wire_f32) {
            store_once(to, narrow<f32>(sums.column[u]));
        } else if constexpr (wire_f32) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float part[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) part[e] = sums.column[u][4 * half + e];
                store_once(to + 16 * half, narrow<true>(part));
            }
        } else {
            float padded[8] = {};
#pragma unroll
            for (int e = 0; e < 4; ++e) padded[e] = sums.column[u][e];
            const uint4 pairs = narrow<false>(padded);
            *reinterpret_cast<uint2*>(to) = make_uint2(pairs.x, pairs.y);
        }
    }
}

/// Add what such a record holds.
template <bool f32, bool wire_f32>
__device__ __forceinline__ void add_plain(const uint8_t* record, int first, int row_bytes,
                                          Sums<f32>* sums) {
#pragma unroll
    for (int u = 0; u < kSumColumns; ++u) {
        const int at = column_at(first, u);
        if (at >= row_bytes) continue;
        const uint8_t* from = record + int64_t(at) / 16 * kWireColumn<f32, wire_f32>;
        if constexpr (f32 == wire_f32) {
            accumulate<f32, false>(load_once(from), 1.0f, sums->column[u]);
        } else if constexpr (wire_f32) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x[4];
                widen<true>(load_once(from + 16 * half), x);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& sum = sums->column[u][4 * half + e];
                    sum = __fadd_rn(sum, x[e]);
                }
            }
        } else {
            const uint2 pairs = *reinterpret_cast<const uint2*>(from);
            float x[8];
            widen<false>(make_uint4(pairs.x, pairs.y, 0, 0), x);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums->column[u][e] = __fadd_rn(sums->column[u][e], x[e]);
            }
        }
    }
}

/// Bits of an element on a LogFMT wire; 0: the wire is BF16 or float32.
template <int wire>
constexpr int kLogfmtBits = wire == EPCOMM_FORMAT_LOGFMT8    ? 8
                            : wire == EPCOMM_FORMAT_LOGFMT10 ? 10
                                                             : 0;

/// A warp's BF16 columns are a LogFMT step each, its two float32 columns together are one.
template <bool f32>
constexpr int kLogfmtSteps = f32 ? 1 : kSumColumns;
static_assert(kSumColumns == 2, "two columns of float32 are two tiles");

template <bool f32, int bits>
__device__ __forceinline__ void store_logfmt(const Sums<f32>& sums, int first,
                                             const logfmt::Row& row) {
#pragma unroll
    for (int u = 0; u < kLogfmtSteps<f32>; ++u) {
        const int element = first / (f32 ? 4 : 2) + u * logfmt::kStep;
        if (element >= row.hidden) continue;
        if constexpr (f32) {
            float x[logfmt::kHeld];
            logfmt::columns_to_step(sums.column, x);
            logfmt::store_step<bits>(x, element, row);
        } else {
            logfmt::store_step<bits>(sums.column[u], element, row);
        }
    }
}

template <bool f32, int bits>
__device__ __forceinline__ void add_logfmt(const logfmt::Row& row, int first, Sums<f32>* sums) {
    logfmt::Loaded<bits> loaded[kLogfmtSteps<f32>];
#pragma unroll
    for (int u = 0; u < kLogfmtSteps<f32>; ++u) {
        loaded[u] = logfmt::load_step<bits>(first / (f32 ? 4 : 2) + u * logfmt::kStep, row);
    }
    Sums<f32> found;
#pragma unroll
    for (int u = 0; u < kLogfmtSteps<f32>; ++u) {
        if constexpr (f32) {
            float x[logfmt::kHeld];
            logfmt::decode(loaded[u].codes, loaded[u].metadata, x);
            logfmt::step_to_columns(x, found.column);
        } else {
            logfmt::decode(loaded[u].codes, loaded[u].metadata, found.column[u]);
        }
    }
    sums->add(found);
}

/// Any format, looked at for each part of a record: for what is not worth a kernel of its own.
constexpr int kAnyWire = -1;

/// A record and what is known of it.
struct WireRecord {
    uint8_t* bytes;
    int scales;  ///< offset of the scales, or of LogFMT's metadata
    int format;
};

/// Round the sums to the wire's format and store them in a record. The whole warp.
template <bool f32, int wire>
__device__ __forceinline__ void store_wire(const Sums<f32>& sums, int first, int row_bytes,
                                           const WireRecord& record) {
    if constexpr (wire == kAnyWire) {
        if (record.format == EPCOMM_FORMAT_F32) {
            store_wire<f32, EPCOMM_FORMAT_F32>(sums, first, row_bytes, record);
        } else if (record.format == EPCOMM_FORMAT_BF16) {
            store_wire<f32, EPCOMM_FORMAT_BF16>(sums, first, row_bytes, record);
        } else if (record.format == EPCOMM_FORMAT_LOGFMT8) {
            store_wire<f32, EPCOMM_FORMAT_LOGFMT8>(sums, first, row_bytes, record);
        } else {
            store_wire<f32, EPCOMM_FORMAT_LOGFMT10>(sums, first, row_bytes, record);
        }
    } else if constexpr (kLogfmtBits<wire> != 0) {
        const logfmt::Row row = {record.bytes, row_bytes / (f32 ? 4 : 2), record.scales};
        store_logfmt<f32, kLogfmtBits<wire>>(sums, first, row);
    } else {
        store_plain<f32, wire == EPCOMM_FORMAT_F32>(sums, first, row_bytes, record.bytes);
    }
}

/// Add what a record holds. The whole warp.
template <bool f32, int wire>
__device__ __forceinline__ void add_wire(const WireRecord& record, int first, int row_bytes,
                                         Sums<f32>* sums) {
    if constexpr (wire == kAnyWire) {
        if (record.format == EPCOMM_FORMAT_F32) {
            add_wire<f32, EPCOMM_FORMAT_F32>(record, first, row_bytes, sums);
        } else if (record.format == EPCOMM_FORMAT_BF16) {
            add_wire<f32, EPCOMM_FORMAT_BF16>(record, first, row_bytes, sums);
        } else if (record.format == EPCOMM_FORMAT_LOGFMT8) {
            add_wire<f32, EPCOMM_FORMAT_LOGFMT8>(record, first, row_bytes, sums);
        } else {
            add_wire<f32, EPCOMM_FORMAT_LOGFMT10>(record, first, row_bytes, sums);
        }
    } else if constexpr (kLogfmtBits<wire> != 0) {
        const logfmt::Row row = {record.bytes, row_bytes / (f32 ? 4 : 2), record.scales};
        add_logfmt<f32, kLogfmtBits<wire>>(row, first, sums);
    } else {
        add_plain<f32, wire == EPCOMM_FORMAT_F32>(record.bytes, first, row_bytes, sums);
    }
}

/// The formats of rows and wire that a kernel is compiled for.
template <bool f32_rows, int wire_format>
struct Formats {
    static constexpr bool f32 = f32_rows;
    static constexpr int wire = wire_format;
    /// A record holds the row as it is.
    static constexpr bool kRaw = wire == (f32 ? EPCOMM_FORMAT_F32 : EPCOMM_FORMAT_BF16);
};

/// Whether sums are sent in a format.
__host__ __device__ inline bool is_wire(int format) {
    return format == EPCOMM_FORMAT_F32 || format == EPCOMM_FORMAT_BF16 ||
           format == EPCOMM_FORMAT_LOGFMT8 || format == EPCOMM_FORMAT_LOGFMT10;
}

/// Call `with` with the `Formats` of the kernel for such rows and such a wire. `few`: without the
/// kernels for records that hold rows as they are, in which a column has room for `num_topk` rows.
template <bool few, class With>
auto with_formats(bool f32, int wire, int num_topk, const With& with) {
    if constexpr (!few) {
        const bool room = num_topk <= kPullCopies;
        if (room && f32 && wire == EPCOMM_FORMAT_F32) {
            return with(Formats<true, EPCOMM_FORMAT_F32>());
        }
        if (room && !f32 && wire == EPCOMM_FORMAT_BF16) {
            return with(Formats<false, EPCOMM_FORMAT_BF16>());
        }
    }
    return f32 ? with(Formats<true, kAnyWire>()) : with(Formats<false, kAnyWire>());
}

}  // namespace epcomm
