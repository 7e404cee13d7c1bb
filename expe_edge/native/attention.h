// What attention of few queries and of many have in common. Scores are in units of log 2: weights are powers of two.
#pragma once

#include <algorithm>
#include <cmath>

#include "curves.h"

namespace attention {

using curves::kLog2E;
using curves::power_of_two;
using vnni::kLanes;

// Queries that attend together.
constexpr int64_t kMostQueries = 64;
// What a score is that a query does not see, and what the largest score begins with: below all others, and so far above
// what is hidden that a query which sees no key gives it no weight.
constexpr float kHidden = -3e38f, kLowest = -1e30f;
// The most keys of a tile, whose weights are taken relative to the largest of them; and what that is rounded to where
// values are int8. Sums of rounded weights and values stay below 2^31: 128 products of 2^15 and 2^7 make 2^29. Rounding
// moves 128 · 2^-16 = 0.002 of a tile's weight at most, where all are rounded the same way.
constexpr int64_t kKeys = 128;
constexpr float kMostWeight = 32767;

// A key/value head in a row of the batch. keys, values: (tokens, size). scales: what a level of int8 is worth, by
// dimension, or of all where the step is 0; null of floats.
template <typename Element>
struct Head {
    const Element *keys, *values;
    int64_t size;
    const float *key_scales, *value_scales;
    int64_t key_step, value_step;
};

// What attends to a head. A query sees the keys from `first` to `last`.
// bias: of the keys from 0 on, or null. sink: what is beside all scores, in units of log 2.
struct Queries {
    int64_t count;
    float scale;  // of scores
    const float* query[kMostQueries];
    const float* bias[kMostQueries];
    float* output[kMostQueries];
    int32_t first[kMostQueries], last[kMostQueries];
    float sink[kMostQueries];
};

// The dimensions of a query as they meet keys: times the scale of scores, and of keys.
template <typename Element>
inline __m512 scaled_query(const Head<Element>& head, const float* query, float scale, int64_t begin) {
    const __mmask16 lanes = vnni::first_lanes(head.size - begin);
    __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, query + begin), _mm512_set1_ps(scale));
    if (head.key_scales != nullptr) {
        const __m512 scales = head.key_step == 0 ? _mm512_set1_ps(head.key_scales[0])
                                                   : _mm512_maskz_loadu_ps(lanes, head.key_scales + begin);
        values = _mm512_mul_ps(values, scales);
    }
    return values;
}

// The largest magnitude of a query that is rounded to multiply keys of int8. It has two signed bytes, the upper one
// 127 at most; and sums of `size` products with 128 at most stay below 2^31.
inline float most_level(int64_t size) { return std::min<int64_t>(127 * 256, (int64_t{1} << 24) / size - 1); }

// Round a query to whole numbers up to `most_level`, 16 at a time, which are handed to `store(begin, levels)`; return
// what one is worth.
template <typename Store>
inline float round_query(const Head<int8_t>& head, const float* query, float scale, Store store) {
    __m512 peaks = _mm512_setzero_ps();
    for (int64_t d = 0; d < head.size; d += kLanes) {
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(scaled_query(head, query, scale, d)));
    }
    const float peak = _mm512_reduce_max_ps(peaks);
    const __m512 steps = _mm512_set1_ps(peak > 0 ? most_level(head.size) / peak : 0);
    for (int64_t d = 0; d < head.size; d += kLanes) {
        store(d, _mm512_cvtps_epi32(_mm512_mul_ps(scaled_query(head, query, scale, d), steps)));
    }
    return peak / most_level(head.size);
}

// What a sum of weighted values is multiplied by. total: of the weights, relative to the score `peak`, of which the
// largest is `most_weight`. Both are taken relative to a sink that is larger than all scores.
inline float factor_of(float peak, float total, float sink, float most_weight) {
    const float larger = std::max(peak, sink), kept = std::exp2(peak - larger);
    const float all = total * kept + most_weight * std::exp2(sink - larger);
    return all > 0 ? kept / all : 0;
}

template <typename Element>
inline float value_scale(const Head<Element>& head, int64_t d) {
    return head.value_scales == nullptr ? 1 : head.value_scales[d * head.value_step];
}

}  // namespace attention
