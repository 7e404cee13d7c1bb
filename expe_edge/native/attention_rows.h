// Attention of few queries, one after the other over a tile of keys that stays in the processor's first cache, at the
// speed of reading memory. Dimensions stand side by side in lanes, as they do there.
#pragma once

#include <optional>

#include "attention.h"

namespace attention {

// Bytes ahead of what is read that are fetched meanwhile, by the first query for all.
constexpr int64_t kAhead = 2048;
// Bytes of a tile's keys, which are `kKeys` at most.
constexpr int64_t kTileBytes = 16384;
// Values of int8 that a vector holds.
constexpr int64_t kVectorLevels = vnni::kVectorBytes;

// Add up the lanes of each of 16 vectors: those of vector i become lane i.
template <typename Add>
inline __m512i sums_of_lanes(__m512i (&vectors)[kLanes], Add add) {
    __m512i fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i *four = vectors + 4 * i;
        const __m512i first = add(_mm512_unpacklo_epi32(four[0], four[1]), _mm512_unpackhi_epi32(four[0], four[1]));
        const __m512i second = add(_mm512_unpacklo_epi32(four[2], four[3]), _mm512_unpackhi_epi32(four[2], four[3]));
        fours[i] = add(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    }
    constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of two vectors
    const auto quarters = [&](__m512i a, __m512i b) {
        return add(_mm512_shuffle_i32x4(a, b, kEven), _mm512_shuffle_i32x4(a, b, kOdd));
    };
    return quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]));
}

// A query over floats. query, output: (size, whole chunks).
class FloatRow {
public:
    using Element = float;
    static constexpr float kMostWeight = 1;
    static constexpr int64_t kFewQueries = 12;

    static size_t bytes(int64_t size) { return 2 * sizeof(float) * kChunk * chunks_of(size); }

    // fetches: whether to fetch what comes behind the tile.
    FloatRow(const Head<float>& head, uint8_t* memory, bool fetches)
        : head_(head), fetches_(fetches), query_(reinterpret_cast<float*>(memory)),
          output_(query_ + chunks_of(head.size) * kChunk) {}

    void begin(const float* query, float scale) {
        std::fill(query_, query_ + 2 * chunks_of(head_.size) * kChunk, 0.0f);
        for (int64_t d = 0; d < head_.size; d += kLanes) {
            _mm512_store_ps(query_ + d, scaled_query(head_, query, scale, d));
        }
    }

    // Scores of 16 keys from `key` on; those beyond `last` are copies of its.
    __m512 scores(int64_t key, int64_t last) const {
        __m512i sums[kLanes] = {};
        for (int64_t begin = 0; begin < head_.size; begin += kChunk) {
            const Masks masks(head_.size - begin);
            const Chunk query = load(query_ + begin, masks);
            const float* place = head_.keys + key * head_.size + begin;
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; k++) {
                prefetch(place);
                const Chunk values = load(place, masks);
                place += key + k < last ? head_.size : 0;
                __m512 sum = _mm512_castsi512_ps(sums[k]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) sum = _mm512_fmadd_ps(query.vectors[v], values.vectors[v], sum);
                sums[k] = _mm512_castps_si512(sum);
            }
        }
        return _mm512_castsi512_ps(sums_of_lanes(sums, [](__m512i a, __m512i b) {
            return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
        }));
    }

    // Weights, in place, of scores less `peak`; return their sum.
    static __m512 weigh(float* scores, __m512 peak) {
        const __m512 weights = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores), peak));
        _mm512_store_ps(scores, weights);
        return weights;
    }

    // Output = output · kept + gained · Σ weights · values, of `count` keys from `key` on.
    void mix(const float* weights, int64_t key, int64_t count, float kept, float gained) {
        for (int64_t begin = 0; begin < head_.size; begin += kChunk) {
            mix_chunk(weights, head_.values + key * head_.size + begin, count, begin, kept, gained);
        }
    }

    float output(int64_t d) const { return output_[d]; }

private:
    static constexpr int64_t kVectors = 4, kChunk = kVectors * kLanes;

    struct Chunk {
        __m512 vectors[kVectors];
    };

    // Which lanes of a chunk the first `count` numbers fill.
    struct Masks {
        __mmask16 of[kVectors];

        explicit Masks(int64_t count) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) of[v] = vnni::first_lanes(count - v * kLanes);
        }
    };

    static int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

    static Chunk load(const float* place, const Masks& masks) {
        Chunk chunk;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) chunk.vectors[v] = _mm512_maskz_loadu_ps(masks.of[v], place + v * kLanes);
        return chunk;
    }

    void prefetch(const float* place) const {
        if (!fetches_) return;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            __builtin_prefetch(place + kAhead / sizeof(float) + v * kLanes, 0, vnni::kSecondCache);
        }
    }

    static void add(const Chunk& values, float weight, Chunk& sums) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            sums.vectors[v] = _mm512_fmadd_ps(_mm512_set1_ps(weight), values.vectors[v], sums.vectors[v]);
        }
    }

    void mix_chunk(const float* weights, const float* values, int64_t count, int64_t begin, float kept, float gained) {
        const int64_t size = head_.size;
        const Masks masks(size - begin);
        Chunk even{}, odd{};
        for (int64_t k = 0; k + 1 < count; k += 2, values += 2 * size) {
            prefetch(values);
            prefetch(values + size);
            add(load(values, masks), weights[k], even);
            add(load(values + size, masks), weights[k + 1], odd);
        }
        if (count % 2 == 1) add(load(values, masks), weights[count - 1], even);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            float* place = output_ + begin + v * kLanes;
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(place), _mm512_set1_ps(kept));
            const __m512 sum = _mm512_add_ps(even.vectors[v], odd.vectors[v]);
            _mm512_store_ps(place, _mm512_fmadd_ps(sum, _mm512_set1_ps(gained), before));
        }
    }

    const Head<float>& head_;
    const bool fetches_;
    float *query_, *output_;
};

// A query over int8, of 16 bits that are two bytes, both signed: products are of bytes, those with upper bytes counting
// 256 times. Keys are made unsigned by adding 128, which `start_` takes off again. Weights are two unsigned bytes.
// upper, lower: (size, whole vectors). output: (size, whole vectors), the lanes of every 64 in `place`.
class LevelsRow {
public:
    using Element = int8_t;
    static constexpr float kMostWeight = attention::kMostWeight;
    static constexpr int64_t kFewQueries = 8;

    static size_t bytes(int64_t size) {
        return (2 + sizeof(float)) * kVectorLevels * ((size + kVectorLevels - 1) / kVectorLevels);
    }

    LevelsRow(const Head<int8_t>& head, uint8_t* memory, bool)
        : head_(head), vectors_((head.size + kVectorLevels - 1) / kVectorLevels),
          upper_(reinterpret_cast<int8_t*>(memory)), lower_(upper_ + vectors_ * kVectorLevels),
          output_(reinterpret_cast<float*>(lower_ + vectors_ * kVectorLevels)) {}

    void begin(const float* query, float scale) {
        std::fill(upper_, upper_ + 2 * vectors_ * kVectorLevels, int8_t{0});
        std::fill(output_, output_ + vectors_ * kVectorLevels, 0.0f);
        __m512i sums = _mm512_setzero_si512();
        step_ = round_query(head_, query, scale, [&](int64_t d, __m512i levels) {
            const __m512i lower = _mm512_srai_epi32(_mm512_slli_epi32(levels, 24), 24);
            const __m512i upper = _mm512_srai_epi32(_mm512_sub_epi32(levels, lower), 8);
            const __mmask16 there = vnni::first_lanes(head_.size - d);
            _mm_mask_storeu_epi8(lower_ + d, there, _mm512_cvtepi32_epi8(lower));
            _mm_mask_storeu_epi8(upper_ + d, there, _mm512_cvtepi32_epi8(upper));
            sums = _mm512_add_epi32(sums, levels);
        });
        start_ = -128 * _mm512_reduce_add_epi32(sums);
    }

    __m512 scores(int64_t key, int64_t last) const {
        const __m512i unsigned_bytes = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i sums[kLanes] = {};
        for (int64_t v = 0; v < vectors_; v++) {
            const __mmask64 there = mask_of(v);
            const __m512i of_upper = _mm512_load_si512(upper_ + v * kVectorLevels);
            const __m512i of_lower = _mm512_load_si512(lower_ + v * kVectorLevels);
            const int8_t* levels = head_.keys + key * head_.size + v * kVectorLevels;
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; k++) {
                const __m512i bytes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, levels), unsigned_bytes);
                levels += key + k < last ? head_.size : 0;
                __m512i upper = _mm512_setzero_si512();
                vnni::add_dot(upper, bytes, of_upper);
                sums[k] = _mm512_add_epi32(sums[k], _mm512_slli_epi32(upper, 8));
                vnni::add_dot(sums[k], bytes, of_lower);
            }
        }
        const __m512i sum = sums_of_lanes(sums, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_set1_epi32(start_)));
        return _mm512_mul_ps(whole, _mm512_set1_ps(step_));
    }

    static __m512 weigh(float* scores, __m512 peak) {
        const __m512 weights = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores), peak));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(weights, _mm512_set1_ps(kMostWeight)));
        _mm512_store_si512(scores, whole);
        return _mm512_cvtepi32_ps(whole);
    }

    void mix(const float* weights, int64_t key, int64_t count, float kept, float gained) {
        alignas(vnni::kVectorBytes) int8_t upper[kKeys], lower[kKeys];
        for (int64_t k = 0; k < count; k += kLanes) {  // weights behind the last are 0
            const __m512i whole = _mm512_load_si512(weights + k);
            _mm_store_si128(reinterpret_cast<__m128i*>(lower + k), _mm512_cvtepi32_epi8(whole));
            _mm_store_si128(reinterpret_cast<__m128i*>(upper + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
        }
        for (int64_t v = 0; v < vectors_; v++) mix_vector(upper, lower, key, count, v, kept, gained);
    }

    float output(int64_t d) const {
        const int64_t within = d % kVectorLevels;  // lane 4·q + e of vector i is dimension 16·q + 4·i + e
        const int64_t place = within / 4 % 4 * kLanes + within / kLanes * 4 + within % 4;
        return output_[d - within + place];
    }

private:
    __mmask64 mask_of(int64_t vector) const {
        const int64_t left = head_.size - vector * kVectorLevels;
        return left >= kVectorLevels ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    }

    void mix_vector(
        const int8_t* upper, const int8_t* lower, int64_t key, int64_t count, int64_t vector, float kept, float gained
    ) {
        __m512i uppers[4], lowers[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) uppers[i] = lowers[i] = _mm512_setzero_si512();
        const int8_t* values = head_.values + key * head_.size + vector * kVectorLevels;
        const __mmask64 there = mask_of(vector);
        for (int64_t k = 0; k < count; k += 4) {
            __m512i rows[4], fours[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                rows[r] = _mm512_maskz_loadu_epi8(there, values);
                values += k + r + 1 < count ? head_.size : 0;
            }
            interleave(rows, fours);
            const __m512i by_upper = four_bytes(upper + k), by_lower = four_bytes(lower + k);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                vnni::add_dot(uppers[i], by_upper, fours[i]);
                vnni::add_dot(lowers[i], by_lower, fours[i]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            float* place = output_ + vector * kVectorLevels + i * kLanes;
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(uppers[i], 8), lowers[i]);
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(place), _mm512_set1_ps(kept));
            _mm512_store_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(gained), before));
        }
    }

    // Bytes of four rows side by side: lane 4·q + e of vector i has those of byte 16·q + 4·i + e.
    static void interleave(const __m512i (&rows)[4], __m512i (&fours)[4]) {
        const __m512i first = _mm512_unpacklo_epi8(rows[0], rows[1]), second = _mm512_unpacklo_epi8(rows[2], rows[3]);
        const __m512i third = _mm512_unpackhi_epi8(rows[0], rows[1]), fourth = _mm512_unpackhi_epi8(rows[2], rows[3]);
        fours[0] = _mm512_unpacklo_epi16(first, second);
        fours[1] = _mm512_unpackhi_epi16(first, second);
        fours[2] = _mm512_unpacklo_epi16(third, fourth);
        fours[3] = _mm512_unpackhi_epi16(third, fourth);
    }

    static __m512i four_bytes(const int8_t* bytes) {
        return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(bytes));
    }

    const Head<int8_t>& head_;
    const int64_t vectors_;
    int8_t *upper_, *lower_;
    float* output_;
    float step_ = 0;
    int32_t start_ = 0;
};

// Where a query is: the largest score so far, and the sum of weights relative to it.
struct Progress {
    float peak = kLowest, total = 0;
};

// Attend from query `index` to `count` keys from `key` on, of which it sees those that it sees.
template <typename Row>
void attend_to_tile(const Queries& queries, int64_t index, int64_t key, int64_t count, Row& row, Progress& progress) {
    alignas(vnni::kVectorBytes) float scores[kKeys];
    __m512 peaks = _mm512_set1_ps(kLowest);
    for (int64_t k = 0; k < count; k += kLanes) {
        const __mmask16 there = vnni::first_lanes(count - k);
        __m512 some = row.scores(key + k, key + count - 1);
        if (queries.bias[index] != nullptr) {
            const __m512 bias = _mm512_maskz_loadu_ps(there, queries.bias[index] + key + k);
            some = _mm512_fmadd_ps(bias, _mm512_set1_ps(kLog2E), some);
        }
        some = _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), there, some);
        peaks = _mm512_max_ps(peaks, some);
        _mm512_store_ps(scores + k, some);
    }
    const float tile_peak = _mm512_reduce_max_ps(peaks), peak = std::max(tile_peak, progress.peak);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += kLanes) {
        sums = _mm512_add_ps(sums, Row::weigh(scores + k, _mm512_set1_ps(tile_peak)));
    }
    const float kept = std::exp2(progress.peak - peak), gained = std::exp2(tile_peak - peak);
    progress = {peak, progress.total * kept + gained * _mm512_reduce_add_ps(sums)};
    row.mix(scores, key, count, kept, gained);
}

// The attention of up to `Row::kFewQueries`; of more tiles are the faster way. memory: of `count` times `Row::bytes`.
template <typename Row>
void attend_by_rows(const Head<typename Row::Element>& head, const Queries& queries, uint8_t* memory) {
    std::optional<Row> rows[Row::kFewQueries];
    Progress progress[Row::kFewQueries];
    for (int64_t i = 0; i < queries.count; i++) {
        rows[i].emplace(head, memory + i * Row::bytes(head.size), i == 0);
        rows[i]->begin(queries.query[i], queries.scale);
    }
    const int64_t key_bytes = head.size * sizeof(typename Row::Element);
    const int64_t keys = std::clamp(kTileBytes / key_bytes / kLanes * kLanes, kLanes, kKeys);
    const int64_t last = *std::max_element(queries.last, queries.last + queries.count);
    for (int64_t tile = *std::min_element(queries.first, queries.first + queries.count); tile <= last; tile += keys) {
        for (int64_t i = 0; i < queries.count; i++) {
            const int64_t key = std::max<int64_t>(tile, queries.first[i]);
            const int64_t end = std::min<int64_t>(tile + keys, queries.last[i] + 1);
            if (key < end) attend_to_tile(queries, i, key, end - key, *rows[i], progress[i]);
        }
    }
    for (int64_t i = 0; i < queries.count; i++) {
        const float factor = factor_of(progress[i].peak, progress[i].total, queries.sink[i], Row::kMostWeight);
        for (int64_t d = 0; d < head.size; d++) {
            queries.output[i][d] = rows[i]->output(d) * factor * value_scale(head, d);
        }
    }
}

}  // namespace attention
