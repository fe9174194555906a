// A kernel that encodes rows of float32 sums to records and decodes them, as a combine does.
#include "../../csrc/kernels/wire.cuh"
#include "cuda_emulation.h"

extern "C" {

/// Rows of `x` and `decoded` are [hidden] float32; `scales` and `record_bytes` are of a record.
typedef struct {
    int32_t f32_rows;  ///< the lanes' columns are those of float32 rows, else of BF16 rows
    int32_t wire;
    int32_t tokens;
    int32_t hidden;
    int32_t scales;
    int32_t record_bytes;
    const float* x;
    uint8_t* records;
    float* decoded;
} emulated_codec;

}  // extern "C"

namespace {

template <bool f32>
void move_columns(float* row, int hidden, int first, epcomm::Sums<f32>* sums, bool load) {
    using namespace epcomm;
    constexpr int kSize = f32 ? 4 : 2;
    for (int u = 0; u < kSumColumns; ++u) {
        for (int e = 0; e < kElements<f32>; ++e) {
            const int at = column_at(first, u) / kSize + e;
            if (at < hidden && load) sums->column[u][e] = row[at];
            if (at < hidden && !load) row[at] = sums->column[u][e];
        }
    }
}

template <bool f32>
void codec_kernel(const void* argument) {
    using namespace epcomm;
    const auto& call = *static_cast<const emulated_codec*>(argument);
    const int row_bytes = call.hidden * (f32 ? 4 : 2);
    for (int t = warp_id(); t < call.tokens; t += int(blockDim.x) / 32) {
        uint8_t* bytes = call.records + int64_t(t) * call.record_bytes;
        const WireRecord record = {bytes, call.scales, call.wire};
        float* x = const_cast<float*>(call.x) + int64_t(t) * call.hidden;
        float* y = call.decoded + int64_t(t) * call.hidden;
        for (int first = 0; first < row_bytes; first += kSumColumns * 32 * 16) {
            Sums<f32> sums;
            sums.clear();
            move_columns(x, call.hidden, first, &sums, true);
            store_wire<f32, kAnyWire>(sums, first, row_bytes, record);
        }
        __syncwarp();
        for (int first = 0; first < row_bytes; first += kSumColumns * 32 * 16) {
            Sums<f32> sums;
            // The one number that changes nothing it is added to, a zero's sign included.
            for (auto& column : sums.column) {
                for (float& value : column) value = -0.0f;
            }
            add_wire<f32, kAnyWire>(record, first, row_bytes, &sums);
            move_columns(y, call.hidden, first, &sums, false);
        }
    }
}

}  // namespace

extern "C" void emulate_codec(const emulated_codec* call) {
    emulation::run_blocks(1, 2, 0, call, call->f32_rows ? codec_kernel<true> : codec_kernel<false>);
}
