// Powers and what is made of them, of 16 floats at a time; and products of rows.
#pragma once

#include <cmath>

#include "vnni.h"

namespace curves {

constexpr float kLog2E = 1.44269504f;

// 2 to the power of x, to 8e-8 of it: a polynomial for what is left of a whole power.
inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(0.001327647129f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.009675540961f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.05550713092f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.2402212024f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.6931469440f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0000001192f));
    return _mm512_scalef_ps(power, whole);
}

// x / (1 + e^-x)
inline __m512 silu(__m512 x) {
    const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// ln(1 + e^x)
inline float softplus(float x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// Σ left · right
inline float dot(const float* left, const float* right, int64_t size) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < size; i += vnni::kLanes) {
        const __mmask16 lanes = vnni::first_lanes(size - i);
        __m512& sum = sums[i / vnni::kLanes % 2];
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, left + i), _mm512_maskz_loadu_ps(lanes, right + i), sum);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

// to = factor · from
inline void scale(const float* from, float factor, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += vnni::kLanes) {
        const __mmask16 lanes = vnni::first_lanes(size - i);
        const __m512 values = _mm512_maskz_loadu_ps(lanes, from + i);
        _mm512_mask_storeu_ps(to + i, lanes, _mm512_mul_ps(values, _mm512_set1_ps(factor)));
    }
}

}  // namespace curves
