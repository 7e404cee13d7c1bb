// What the products share of AVX-512: 16 lanes of 4 bytes, each a dot product of its own.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace vnni {

constexpr int64_t kLanes = 16;
constexpr int64_t kVectorBytes = 64;
constexpr int kSecondCache = 2;  // as __builtin_prefetch counts

// sums[lane] += Σ over 4 bytes of unsigned × signed. As assembly, because GCC 12 spills the accumulators of a large
// tile around the intrinsic.
inline void add_dot(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// The same with four signed bytes for all lanes.
inline void add_dot_repeated(__m512i& sums, __m512i unsigned_bytes, const int8_t* four) {
    const auto& memory = *reinterpret_cast<const int8_t(*)[4]>(four);
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "m"(memory));
}

// The first `count` of 16 lanes; none below 0, all beyond 16.
inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// The first `count` of 64 bytes at `address`, the rest 0; what lies behind them is not touched.
inline __m512i load_bytes(const void* address, int64_t count) {
    if (count >= kVectorBytes) return _mm512_loadu_si512(address);
    return _mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, address);
}

// The low and the high four bits of every byte, as bytes.
inline __m512i low_halves(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

// Lane j of vector i becomes lane i of vector j.
inline void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Quarter q of fours[4 * i + j] is lane 4 * q + j of rows 4 * i to 4 * i + 3.
    __m512i fours[16];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
    constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of two vectors
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i upper_even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kEven);
        const __m512i upper_odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kOdd);
        const __m512i lower_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kEven);
        const __m512i lower_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kOdd);
        rows[j] = _mm512_shuffle_i32x4(upper_even, lower_even, kEven);
        rows[4 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kEven);
        rows[8 + j] = _mm512_shuffle_i32x4(upper_even, lower_even, kOdd);
        rows[12 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, kOdd);
    }
}

}  // namespace vnni
