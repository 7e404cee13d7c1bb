// The product of one row: each column's dot product, straight from the weights.
#pragma once

#include <algorithm>

#include "operands.h"

namespace dots {

using operands::Block;
using operands::Format;
using operands::Weights;
using vnni::kLanes;
using vnni::kVectorBytes;

// Bytes ahead of what is read, where columns side by side leave no stream for the processor to recognise.
constexpr int64_t kAhead = 12288;

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

// A row of activations, rounded and laid out for the walk. codes: (steps, step_values), zeros behind the end; of 4 bits
// those of low halves first in each step. scales, starts: (groups, 16); a block's start is in its first lane.
struct Row {
    int8_t* codes;
    float* scales;
    int32_t* starts;
};

inline size_t row_bytes(const Walk& walk) {
    return walk.steps * walk.step_values + walk.groups * kLanes * (sizeof(float) + sizeof(int32_t));
}

// memory: of `row_bytes`.
inline Row row_in(uint8_t* memory, const Walk& walk) {
    auto* codes = reinterpret_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(codes + walk.steps * walk.step_values);
    return {codes, scales, reinterpret_cast<int32_t*>(scales + walk.groups * kLanes)};
}

// Reorder a step of 4-bit codes, in which every 8 have their even ones first, so that all even ones come first.
inline void split_step(int8_t* codes) {
    const __m512i first = _mm512_load_si512(codes), second = _mm512_load_si512(codes + kVectorBytes);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    _mm512_store_si512(codes, _mm512_permutex2var_epi32(first, evens, second));
    _mm512_store_si512(codes + kVectorBytes, _mm512_permutex2var_epi32(first, odds, second));
}

inline void round_row(const Format& format, const Walk& walk, const float* values, const Row& row) {
    std::fill_n(row.scales, walk.groups * kLanes, 0.0f);
    std::fill_n(row.starts, walk.groups * kLanes, 0);
    std::fill(row.codes + format.padded(), row.codes + walk.steps * walk.step_values, int8_t{0});
    for (int64_t b = 0; b < format.blocks(); b++) {
        const int64_t begin = b * format.block, count = std::min(format.block, format.k - begin);
        const Block block = operands::round_block(format, values + begin, count, row.codes + begin);
        const int64_t lane = b * walk.lanes_per_block;
        std::fill_n(row.scales + lane, walk.lanes_per_block, block.scale);
        row.starts[lane] = block.start;
    }
    if (format.bits == 4) {
        for (int64_t step = 0; step < walk.steps; step++) split_step(row.codes + step * walk.step_values);
    }
}

// The scales of a column's weights in a group, by lane. Short: whether blocks are shorter than a step.
template <bool Short>
inline __m512 weight_scales(const Walk& walk, const float* scales, int64_t group) {
    if constexpr (!Short) return _mm512_set1_ps(scales[group]);
    const __mmask16 there = group + 1 < walk.groups ? walk.blocks_of_step : walk.blocks_of_last;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i blocks = _mm512_srli_epi32(lanes, __builtin_ctzll(walk.lanes_per_block));
    return _mm512_permutexvar_ps(blocks, _mm512_maskz_loadu_ps(there, scales + group * walk.blocks_per_step));
}

template <int Bits>
inline void add_step(__m512i& sums, const int8_t* codes, __m512i weights) {
    if constexpr (Bits == 8) {
        vnni::add_dot(sums, weights, _mm512_load_si512(codes));
    } else {
        vnni::add_dot(sums, vnni::low_halves(weights), _mm512_load_si512(codes));
        vnni::add_dot(sums, vnni::high_halves(weights), _mm512_load_si512(codes + kVectorBytes));
    }
}

// The dot products with `Count` columns from `n` on, into `output`.
template <int Bits, bool Short, int Count>
inline void dot(
    const Format& format, const Walk& walk, const Weights& weights, const Row& row, int64_t n, float* output
) {
    const int64_t bytes = format.row_bytes();
    const uint8_t *step_weights = weights.codes + n * bytes, *ahead = step_weights + kAhead;
    const float* scales = weights.scales + n * format.blocks();
    const int8_t* codes = row.codes;
    int64_t left = bytes;
    __m512 totals[Count];
    for (int c = 0; c < Count; c++) totals[c] = _mm512_setzero_ps();
    for (int64_t group = 0; group < walk.groups; group++) {
        __m512i sums[Count];
        for (int c = 0; c < Count; c++) sums[c] = _mm512_load_si512(row.starts + group * kLanes);
        for (int64_t step = 0; step < walk.group_steps; step++) {
            for (int c = 0; c < Count; c++) {
                const uint8_t* place = step_weights + c * bytes;
                if constexpr (Count > 1) __builtin_prefetch(ahead + c * kVectorBytes, 0, vnni::kSecondCache);
                add_step<Bits>(sums[c], codes, Short ? vnni::load_bytes(place, left) : _mm512_loadu_si512(place));
            }
            step_weights += kVectorBytes;
            ahead += Count * kVectorBytes;
            left -= kVectorBytes;
            codes += walk.step_values;
        }
        const __m512 row_scales = _mm512_load_ps(row.scales + group * kLanes);
        for (int c = 0; c < Count; c++) {
            const __m512 of_weights = weight_scales<Short>(walk, scales + c * format.blocks(), group);
            const __m512 both = _mm512_mul_ps(row_scales, of_weights);
            totals[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[c]), both, totals[c]);
        }
    }
    for (int c = 0; c < Count; c++) {
        output[n + c] = _mm512_reduce_add_ps(totals[c]) + (weights.bias ? weights.bias[n + c] : 0);
    }
}

// Long blocks are read as fast as memory allows one column after the other. Short ones take more scaling than products,
// and four columns share the row's part of it.
template <int Bits, bool Short>
void columns(
    const Format& format, const Walk& walk, const Weights& weights, const Row& row, int64_t begin, int64_t end,
    float* output
) {
    constexpr int kTogether = Short ? 4 : 1;
    int64_t n = begin;
    for (; n + kTogether <= end; n += kTogether) dot<Bits, Short, kTogether>(format, walk, weights, row, n, output);
    for (; n < end; n++) dot<Bits, Short, 1>(format, walk, weights, row, n, output);
}

// The product with columns [begin, end).
inline void product(
    const Format& format, const Walk& walk, const Weights& weights, const Row& row, int64_t begin, int64_t end,
    float* output
) {
    const bool is_short = format.block < walk.step_values;
    const auto columns_of = format.bits == 8 ? (is_short ? columns<8, true> : columns<8, false>)
                                             : (is_short ? columns<4, true> : columns<4, false>);
    columns_of(format, walk, weights, row, begin, end, output);
}

}  // namespace dots
