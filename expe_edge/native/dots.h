// The product of few rows: each column's dot products straight from the weights, which are read once for several rows.
#pragma once

#include <algorithm>
#include <cstring>

#include "operands.h"

namespace dots {

using operands::Block;
using operands::Format;
using operands::Weights;
using vnni::kLanes;
using vnni::kVectorBytes;

// Rows that share one reading of the weights.
constexpr int kMostRows = 4;

// How a row is walked: in steps of 64 bytes of weights. The steps of a group have the same scales: those of one long
// block, or one step over several short ones, whose lanes then have scales of their own.
struct Walk {
    int64_t step_values, steps, group_steps, groups, blocks_per_step, lanes_per_block;
    __mmask16 blocks_of_step, blocks_of_last;

    explicit Walk(const Format& format)
        : step_values(kVectorBytes * 8 / format.bits),
          steps((format.padded() + step_values - 1) / step_values),
          group_steps(std::max<int64_t>(1, format.block / step_values)),
          groups(steps / group_steps),
          blocks_per_step(std::max<int64_t>(1, step_values / format.block)),
          lanes_per_block(kLanes / blocks_per_step),
          blocks_of_step(vnni::first_lanes(blocks_per_step)),
          blocks_of_last(vnni::first_lanes(format.blocks() - (groups - 1) * blocks_per_step)) {}
};

// Activations rounded and laid out for the walk. codes: (m, steps, step_values), zeros behind a row's end; of 4 bits
// those of low halves first in each step. scales, starts: (m, groups, 16); a block's start is in its first lane.
struct Rows {
    int8_t* codes;
    float* scales;
    int32_t* starts;
};

inline size_t rows_bytes(const Walk& walk, int64_t m) {
    return m * (walk.steps * walk.step_values + walk.groups * kLanes * (sizeof(float) + sizeof(int32_t)));
}

// memory: of `rows_bytes`.
inline Rows rows_in(uint8_t* memory, const Walk& walk, int64_t m) {
    auto* codes = reinterpret_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(codes + m * walk.steps * walk.step_values);
    return {codes, scales, reinterpret_cast<int32_t*>(scales + m * walk.groups * kLanes)};
}

// Bring a step of 4-bit codes from an order in which every 8 have their even ones first to one with all even ones first.
inline void split_step(int8_t* codes) {
    const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + kVectorBytes);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    _mm512_storeu_si512(codes, _mm512_permutex2var_epi32(first, evens, second));
    _mm512_storeu_si512(codes + kVectorBytes, _mm512_permutex2var_epi32(first, odds, second));
}

inline void round_row(const Format& format, const Walk& walk, const float* values, const Rows& rows, int64_t row) {
    int8_t* codes = rows.codes + row * walk.steps * walk.step_values;
    float* scales = rows.scales + row * walk.groups * kLanes;
    int32_t* starts = rows.starts + row * walk.groups * kLanes;
    std::fill(scales, scales + walk.groups * kLanes, 0.0f);
    std::fill(starts, starts + walk.groups * kLanes, 0);
    std::fill(codes + format.padded(), codes + walk.steps * walk.step_values, int8_t{0});
    for (int64_t b = 0; b < format.blocks(); b++) {
        const int64_t begin = b * format.block, count = std::min(format.block, format.k - begin);
        const Block block = operands::round_block(format, values + begin, count, codes + begin);
        const int64_t lane = b * walk.lanes_per_block;
        std::fill_n(scales + lane, walk.lanes_per_block, block.scale);
        starts[lane] = block.start;
    }
    if (format.bits == 4) {
        for (int64_t step = 0; step < walk.steps; step++) split_step(codes + step * walk.step_values);
    }
}

// The scales of a column's weights in a group, by lane.
template <bool Short>
inline __m512 weight_scales(const Walk& walk, const float* scales, int64_t group) {
    if constexpr (!Short) return _mm512_set1_ps(scales[group]);
    const int64_t first = group * walk.blocks_per_step;
    const __mmask16 there = group + 1 < walk.groups ? walk.blocks_of_step : walk.blocks_of_last;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i blocks = _mm512_srli_epi32(lanes, __builtin_ctzll(walk.lanes_per_block));
    return _mm512_permutexvar_ps(blocks, _mm512_maskz_loadu_ps(there, scales + first));
}

template <int Bits, int Count>
inline void add_step(const int8_t* codes, int64_t row_stride, __m512i weights, __m512i (&sums)[Count]) {
    const __m512i low = Bits == 8 ? weights : vnni::low_halves(weights), high = vnni::high_halves(weights);
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) {
        const int8_t* row = codes + r * row_stride;
        vnni::add_dot(sums[r], low, _mm512_loadu_si512(row));
        if constexpr (Bits == 4) vnni::add_dot(sums[r], high, _mm512_loadu_si512(row + kVectorBytes));
    }
}

// The dot products of `Count` rows from `row` on with column `n`.
template <int Bits, bool Short, int Count>
inline void column(
    const Format& format, const Walk& walk, const Weights& weights, const Rows& rows, int64_t row, int64_t n,
    float* output
) {
    const uint8_t* bytes = weights.codes + n * format.row_bytes();
    const float* scales = weights.scales + n * format.blocks();
    const int64_t row_codes = walk.steps * walk.step_values, row_lanes = walk.groups * kLanes;
    const int8_t* codes = rows.codes + row * row_codes;
    __m512 totals[Count];
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) totals[r] = _mm512_setzero_ps();
    for (int64_t group = 0, left = format.row_bytes(); group < walk.groups; group++) {
        const int64_t lanes = row * row_lanes + group * kLanes;
        __m512i sums[Count];
#pragma GCC unroll 4
        for (int r = 0; r < Count; r++) sums[r] = _mm512_loadu_si512(rows.starts + lanes + r * row_lanes);
        for (int64_t step = 0; step < walk.group_steps; step++, left -= kVectorBytes) {
            const __m512i part = Short ? vnni::load_bytes(bytes, left) : _mm512_loadu_si512(bytes);
            add_step<Bits, Count>(codes, row_codes, part, sums);
            bytes += kVectorBytes;
            codes += walk.step_values;
        }
        const __m512 of_weights = weight_scales<Short>(walk, scales, group);
#pragma GCC unroll 4
        for (int r = 0; r < Count; r++) {
            const __m512 both = _mm512_mul_ps(_mm512_loadu_ps(rows.scales + lanes + r * row_lanes), of_weights);
            totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r]), both, totals[r]);
        }
    }
    const float bias = weights.bias ? weights.bias[n] : 0;
    for (int r = 0; r < Count; r++) output[(row + r) * format.n + n] = _mm512_reduce_add_ps(totals[r]) + bias;
}

template <int Bits, bool Short, int Count>
void columns(
    const Format& format, const Walk& walk, const Weights& weights, const Rows& rows, int64_t row, int64_t begin,
    int64_t end, float* output
) {
    for (int64_t n = begin; n < end; n++) column<Bits, Short, Count>(format, walk, weights, rows, row, n, output);
}

using Columns = void (*)(
    const Format&, const Walk&, const Weights&, const Rows&, int64_t, int64_t, int64_t, float*
);

template <int Bits, bool Short>
Columns columns_of(int64_t count) {
    constexpr Columns by_count[kMostRows] = {columns<Bits, Short, 1>, columns<Bits, Short, 2>, columns<Bits, Short, 3>,
                                             columns<Bits, Short, 4>};
    return by_count[count - 1];
}

inline Columns columns_of(const Format& format, const Walk& walk, int64_t count) {
    const bool is_short = format.block < walk.step_values;
    if (format.bits == 8) return is_short ? columns_of<8, true>(count) : columns_of<8, false>(count);
    return is_short ? columns_of<4, true>(count) : columns_of<4, false>(count);
}

// The product of all m rows with columns [begin, end).
inline void product(
    const Format& format, const Walk& walk, const Weights& weights, const Rows& rows, int64_t m, int64_t begin,
    int64_t end, float* output
) {
    for (int64_t groups = (m + kMostRows - 1) / kMostRows, row = 0; groups > 0; groups--) {
        const int64_t count = (m - row + groups - 1) / groups;
        columns_of(format, walk, count)(format, walk, weights, rows, row, begin, end, output);
        row += count;
    }
}

}  // namespace dots
