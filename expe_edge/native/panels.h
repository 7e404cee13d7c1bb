// The product of many rows: 64 columns of weights are unpacked once, then met by six rows of activations at a time.
#pragma once

#include <algorithm>
#include <cstring>

#include "operands.h"

namespace panels {

using operands::Block;
using operands::Format;
using operands::Weights;
using vnni::kLanes;

constexpr int64_t kColumns = 64;
constexpr int kVectors = kColumns / kLanes;
// Rows of a tile: its 24 accumulators, 4 vectors of weights and one of activations stay in registers.
constexpr int kTileRows = 6;
// Bytes of 4 values of every column, which one step of the product takes.
constexpr int64_t kUnitBytes = 4 * kColumns;

// Activations (m, padded) rounded by block (m, blocks).
struct Rows {
    int8_t* codes;
    float* scales;
    int32_t* starts;
};

inline size_t rows_bytes(const Format& format, int64_t m) {
    return m * (format.padded() + format.blocks() * (sizeof(float) + sizeof(int32_t)));
}

// memory: of `rows_bytes`.
inline Rows rows_in(uint8_t* memory, const Format& format, int64_t m) {
    auto* scales = reinterpret_cast<float*>(memory);
    auto* starts = reinterpret_cast<int32_t*>(scales + m * format.blocks());
    return {reinterpret_cast<int8_t*>(starts + m * format.blocks()), scales, starts};
}

inline void round_row(const Format& format, const float* values, const Rows& rows, int64_t row) {
    for (int64_t b = 0; b < format.blocks(); b++) {
        const int64_t begin = b * format.block, count = std::min(format.block, format.k - begin);
        int8_t* codes = rows.codes + row * format.padded() + begin;
        const Block block = operands::round_block(format, values + begin, count, codes);
        rows.scales[row * format.blocks() + b] = block.scale;
        rows.starts[row * format.blocks() + b] = block.start;
    }
}

// 64 columns of a weight. codes: (padded / 4, 64, 4). scales: (blocks, 64).
struct Panel {
    uint8_t* codes;
    float* scales;
};

// Transposition works on whole vectors, so there is room for what it writes behind the last unit.
inline int64_t whole_vectors(int64_t bytes) {
    return (bytes + vnni::kVectorBytes - 1) / vnni::kVectorBytes * vnni::kVectorBytes;
}

inline size_t code_bytes(const Format& format) {
    return whole_vectors(format.row_bytes()) * kColumns * 8 / format.bits;
}

inline size_t panel_bytes(const Format& format) {
    return code_bytes(format) + whole_vectors(format.blocks() * sizeof(float)) * kColumns;
}

// memory: of `panel_bytes`.
inline Panel panel_in(uint8_t* memory, const Format& format) {
    return {memory, reinterpret_cast<float*>(memory + code_bytes(format))};
}

// Load 64 bytes from `offset` on of 16 rows of so many bytes; bytes 4i to 4i + 3 of row r go to lane r of vector i.
//
// next: 1 kB that is wanted later. It is fetched into the second cache meanwhile, in the order of memory: 16 rows side
// by side are read slowly without that, and hardly faster where it is fetched into the first cache.
inline void load_transposed(
    const uint8_t* const (&rows)[kLanes], int64_t offset, int64_t bytes, const uint8_t* next, __m512i (&vectors)[kLanes]
) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; r++) {
        __builtin_prefetch(next + r * vnni::kVectorBytes, 0, vnni::kSecondCache);
        vectors[r] = vnni::load_bytes(rows[r] + offset, bytes - offset);
    }
    vnni::transpose(vectors);
}

// Hand every four bytes of 16 rows of so many bytes to `store(i, vector)`, those of row r in lane r.
// What follows the rows in memory is fetched meanwhile.
template <typename Store>
inline void transpose_rows(const uint8_t* const (&rows)[kLanes], int64_t bytes, Store store) {
    const uint8_t* next = rows[0] + kLanes * bytes;
    for (int64_t offset = 0; offset < bytes; offset += vnni::kVectorBytes, next += kLanes * vnni::kVectorBytes) {
        __m512i vectors[kLanes];
        load_transposed(rows, offset, bytes, next, vectors);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store(offset / 4 + i, vectors[i]);
    }
}

// Where 16 columns are: their weights and their scales, as bytes.
struct Columns {
    const uint8_t* codes[kLanes];
    const uint8_t* scales[kLanes];
};

// The columns from `column` on. Those beyond the last are copies of it.
inline Columns columns_at(const Format& format, const Weights& weights, int64_t column) {
    Columns columns;
    for (int i = 0; i < kLanes; i++) {
        const int64_t n = std::min(column + i, format.n - 1);
        columns.codes[i] = weights.codes + n * format.row_bytes();
        columns.scales[i] = reinterpret_cast<const uint8_t*>(weights.scales + n * format.blocks());
    }
    return columns;
}

// Fill vector `v` of a panel whose first column is `column`.
inline void fill_vector(const Format& format, const Weights& weights, int64_t column, int v, const Panel& panel) {
    const Columns columns = columns_at(format, weights, column + v * kLanes);
    uint8_t* units = panel.codes + v * vnni::kVectorBytes;
    if (format.bits == 8) {
        transpose_rows(columns.codes, format.row_bytes(), [=](int64_t i, __m512i bytes) {
            _mm512_store_si512(units + i * kUnitBytes, bytes);
        });
    } else {
        transpose_rows(columns.codes, format.row_bytes(), [=](int64_t i, __m512i bytes) {
            _mm512_store_si512(units + 2 * i * kUnitBytes, vnni::low_halves(bytes));
            _mm512_store_si512(units + (2 * i + 1) * kUnitBytes, vnni::high_halves(bytes));
        });
    }
    transpose_rows(columns.scales, format.blocks() * sizeof(float), [&](int64_t block, __m512i values) {
        _mm512_store_si512(panel.scales + block * kColumns + v * kLanes, values);
    });
}

inline void fill(const Format& format, const Weights& weights, int64_t column, const Panel& panel) {
    for (int v = 0; v < kVectors; v++) fill_vector(format, weights, column, v, panel);
}

// Four signed bytes in every lane.
inline __m512i repeated(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

// Integer sums of a block, for `Count` rows from `row` on.
template <int Count>
inline void sum_block(
    const Format& format, const Rows& rows, int64_t row, int64_t block, const uint8_t* unit,
    __m512i (&sums)[Count][kVectors]
) {
    const int8_t* codes = rows.codes + row * format.padded() + block * format.block;
#pragma GCC unroll 8
    for (int r = 0; r < Count; r++) {
        const __m512i start = _mm512_set1_epi32(rows.starts[(row + r) * format.blocks() + block]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sums[r][v] = start;
    }
    for (int64_t k = 0; k < format.block; k += 4, unit += kUnitBytes) {
        __m512i bytes[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) bytes[v] = _mm512_load_si512(unit + v * vnni::kVectorBytes);
#pragma GCC unroll 8
        for (int r = 0; r < Count; r++) {
            const __m512i activations = repeated(codes + r * format.padded() + k);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) vnni::add_dot(sums[r][v], bytes[v], activations);
        }
    }
}

// The product of `Count` rows from `row` on with a panel, into `totals` (Count, 64).
template <int Count>
void multiply(const Format& format, const Rows& rows, int64_t row, const Panel& panel, float* totals) {
    for (int64_t b = 0; b < format.blocks(); b++) {
        __m512i sums[Count][kVectors];
        sum_block<Count>(format, rows, row, b, panel.codes + b * format.block * kColumns, sums);
        __m512 weight_scales[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) weight_scales[v] = _mm512_load_ps(panel.scales + b * kColumns + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Count; r++) {
            const __m512 scale = _mm512_set1_ps(rows.scales[(row + r) * format.blocks() + b]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) {
                float* place = totals + r * kColumns + v * kLanes;
                const __m512 before = b == 0 ? _mm512_setzero_ps() : _mm512_load_ps(place);
                const __m512 scales = _mm512_mul_ps(scale, weight_scales[v]);
                _mm512_store_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scales, before));
            }
        }
    }
}

using Multiply = void (*)(const Format&, const Rows&, int64_t, const Panel&, float*);
constexpr Multiply kMultiply[kTileRows] = {multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

// Write `count` rows of 16 columns, of totals `stride` apart, to an output (m, n) from `row` and `column` on, with the
// bias. Columns beyond the last are left away.
inline void write(
    const Format& format, const Weights& weights, const float* totals, int64_t stride, int64_t count, int64_t row,
    int64_t column, float* output
) {
    const __mmask16 lanes = vnni::first_lanes(format.n - column);
    if (lanes == 0) return;
    const __m512 bias = weights.bias ? _mm512_maskz_loadu_ps(lanes, weights.bias + column) : _mm512_setzero_ps();
    for (int64_t r = 0; r < count; r++) {
        const __m512 values = _mm512_add_ps(_mm512_load_ps(totals + r * stride), bias);
        _mm512_mask_storeu_ps(output + (row + r) * format.n + column, lanes, values);
    }
}

// The product of all m rows with the 64 columns from `column` on. Tiles are as equal in size as can be.
inline void product(
    const Format& format, const Weights& weights, const Rows& rows, int64_t m, int64_t column, const Panel& panel,
    float* output
) {
    fill(format, weights, column, panel);
    alignas(vnni::kVectorBytes) float totals[kTileRows * kColumns];
    for (int64_t tiles = (m + kTileRows - 1) / kTileRows, row = 0; tiles > 0; tiles--) {
        const int64_t count = (m - row + tiles - 1) / tiles;
        kMultiply[count - 1](format, rows, row, panel, totals);
        for (int64_t at = 0; at < kColumns; at += kLanes) {
            write(format, weights, totals + at, kColumns, count, row, column + at, output);
        }
        row += count;
    }
}

}  // namespace panels
