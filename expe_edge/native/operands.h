// What is multiplied: weights as MatMulNBits stores them, and activations rounded to int8 by row and block.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vnni.h"

namespace operands {

// Values of a block. With longer ones onnxruntime's results are not those of activations rounded by block.
constexpr int64_t kLeastBlock = 16, kMostBlock = 256;

// Memory that vectors are aligned in.
class Buffer {
public:
    // Return room for so many bytes, whose contents are lost; null where memory has none.
    uint8_t* reserve(size_t bytes) {
        if (bytes > size_) {
            const size_t whole = (bytes + vnni::kVectorBytes - 1) / vnni::kVectorBytes * vnni::kVectorBytes;
            memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(vnni::kVectorBytes, whole)));
            size_ = memory_ ? whole : 0;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t, Free> memory_;
    size_t size_ = 0;
};

// A weight (n, k) of 4 or 8 bits in blocks of `block` values along k. A row's last block is whole, whatever k is.
struct Format {
    int64_t k, n, bits, block;

    int64_t blocks() const { return (k + block - 1) / block; }
    int64_t padded() const { return blocks() * block; }
    int64_t row_bytes() const { return padded() * bits / 8; }
    // The code that stands for 0.
    int32_t zero() const { return 1 << (bits - 1); }
};

// codes: (n, row_bytes), of 4 bits the even values low in their bytes. scales: (n, blocks). bias: (n,) or null.
struct Weights {
    const uint8_t* codes;
    const float* scales;
    const float* bias;
};

// A block of activations is codes · scale; `start` is what sums of products with weights' codes begin at, so that they
// end as if those were centred: −zero · Σ codes.
struct Block {
    float scale;
    int32_t start;
};

// Write the codes of 16 values in the order in which weights have them: as they are, or, of 4 bits, of every 8 the even
// ones first, since those are what four bytes of weights hold low.
inline void write_codes(int8_t* codes, __m512i values, bool halves) {
    const __m128i evens_first = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const __m128i bytes = _mm512_cvtepi32_epi8(values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), halves ? _mm_shuffle_epi8(bytes, evens_first) : bytes);
}

// Round the first `count` of a block's values to whole multiples of a 127th of their largest magnitude; the rest is 0.
inline Block round_block(const Format& format, const float* values, int64_t count, int8_t* codes) {
    __m512 peaks = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += vnni::kLanes) {
        const __m512 part = _mm512_maskz_loadu_ps(vnni::first_lanes(count - i), values + i);
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(part));
    }
    const float peak = _mm512_reduce_max_ps(peaks);
    const __m512 steps = _mm512_set1_ps(peak > 0 ? 127 / peak : 0);
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < format.block; i += vnni::kLanes) {
        const __m512 part = _mm512_maskz_loadu_ps(vnni::first_lanes(count - i), values + i);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(part, steps));
        sums = _mm512_add_epi32(sums, rounded);
        write_codes(codes + i, rounded, format.bits == 4);
    }
    return {peak / 127, -format.zero() * _mm512_reduce_add_epi32(sums)};
}

}  // namespace operands
