// The product of a few rows: 16 columns of weights at a time, transposed in registers and met there by all rows.
#pragma once

#include <algorithm>

#include "panels.h"

namespace strips {

using operands::Format;
using operands::Weights;
using panels::Rows;
using vnni::kLanes;
using vnni::kVectorBytes;

// Rows that 16 vectors of weights and an accumulator for each leave registers for.
constexpr int kMostRows = 8;

// 16 columns, and their scales transposed, (blocks, 16).
struct Strip {
    panels::Columns columns;
    const float* scales;
};

inline size_t scales_bytes(const Format& format) {
    return panels::whole_vectors(format.blocks() * sizeof(float)) * kLanes;
}

// The strip whose first column is `column`. scales: of `scales_bytes`.
inline Strip strip_at(const Format& format, const Weights& weights, int64_t column, float* scales) {
    const panels::Columns columns = panels::columns_at(format, weights, column);
    const int64_t bytes = format.blocks() * sizeof(float);
    panels::transpose_rows(columns.scales, bytes, [=](int64_t block, __m512i values) {
        _mm512_store_si512(scales + block * kLanes, values);
    });
    return {columns, scales};
}

// Add the products of four bytes of 16 columns with what `Count` rows have for them.
template <int Bits, int Count>
inline void add_vector(__m512i weights, const int8_t* codes, int64_t row_stride, __m512i (&sums)[Count]) {
    const __m512i low = Bits == 8 ? weights : vnni::low_halves(weights), high = vnni::high_halves(weights);
#pragma GCC unroll 8
    for (int r = 0; r < Count; r++) {
        vnni::add_dot_repeated(sums[r], low, codes + r * row_stride);
        if constexpr (Bits == 4) vnni::add_dot_repeated(sums[r], high, codes + r * row_stride + 4);
    }
}

template <int Count>
inline void begin_block(const Format& format, const Rows& rows, int64_t block, __m512i (&sums)[Count]) {
#pragma GCC unroll 8
    for (int r = 0; r < Count; r++) sums[r] = _mm512_set1_epi32(rows.starts[r * format.blocks() + block]);
}

template <int Count>
inline void end_block(
    const Format& format, const Rows& rows, int64_t block, const Strip& strip, const __m512i (&sums)[Count],
    float* totals
) {
    const __m512 weight_scales = _mm512_load_ps(strip.scales + block * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Count; r++) {
        const __m512 scale = _mm512_set1_ps(rows.scales[r * format.blocks() + block]);
        const __m512 before = _mm512_load_ps(totals + r * kLanes);
        const __m512 both = _mm512_mul_ps(scale, weight_scales);
        _mm512_store_ps(totals + r * kLanes, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), both, before));
    }
}

// The product of `Count` rows with a strip, into `totals` (Count, 16).
template <int Bits, int Count>
void multiply(const Format& format, const Rows& rows, const Strip& strip, float* totals) {
    constexpr int kPart = operands::kLeastBlock * Bits / 32;  // vectors that belong to one block for sure
    const int64_t bytes = format.row_bytes(), block_end = format.block * Bits / 8 - 1;  // of a power of two, as a mask
    const int8_t* codes = rows.codes;
    const uint8_t* next = strip.columns.codes[0] + 2 * kLanes * bytes;  // two strips on: one alone comes too late
    std::fill(totals, totals + Count * kLanes, 0.0f);
    __m512i sums[Count];
    begin_block(format, rows, 0, sums);
    for (int64_t offset = 0, block = 0; offset < bytes; offset += kVectorBytes, next += kLanes * kVectorBytes) {
        __m512i vectors[kLanes];
        panels::load_transposed(strip.columns.codes, offset, bytes, next, vectors);
#pragma GCC unroll 8
        for (int part = 0; part < kLanes; part += kPart) {
            const int64_t done = offset + 4 * (part + kPart);
            if (done > bytes) break;
#pragma GCC unroll 4
            for (int i = part; i < part + kPart; i++, codes += 32 / Bits) {
                add_vector<Bits, Count>(vectors[i], codes, format.padded(), sums);
            }
            if ((done & block_end) == 0) {
                end_block(format, rows, block++, strip, sums, totals);
                if (done < bytes) begin_block(format, rows, block, sums);
            }
        }
    }
}

using Multiply = void (*)(const Format&, const Rows&, const Strip&, float*);

template <int Bits>
constexpr Multiply kMultiply[kMostRows] = {multiply<Bits, 1>, multiply<Bits, 2>, multiply<Bits, 3>, multiply<Bits, 4>,
                                           multiply<Bits, 5>, multiply<Bits, 6>, multiply<Bits, 7>, multiply<Bits, 8>};

// The product of all m rows, at most 8, with the 16 columns from `column` on. scales: of `scales_bytes`.
inline void product(
    const Format& format, const Weights& weights, const Rows& rows, int64_t m, int64_t column, float* scales,
    float* output
) {
    const Strip strip = strip_at(format, weights, column, scales);
    alignas(kVectorBytes) float totals[kMostRows * kLanes];
    const Multiply multiply = format.bits == 8 ? kMultiply<8>[m - 1] : kMultiply<4>[m - 1];
    multiply(format, rows, strip, totals);
    panels::write(format, weights, totals, kLanes, m, 0, column, output);
}

}  // namespace strips
