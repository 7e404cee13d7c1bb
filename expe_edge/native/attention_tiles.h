// Attention of many queries: up to 64 of them stand side by side in the lanes of four vectors, and meet 128 keys at a
// time. Scores are in memory for one such tile alone; what later keys change of what earlier ones gave is a factor.
//
// A key's and a value's dimensions are repeated to all lanes as they lie in the cache, so nothing is transposed but the
// queries and their bias. Over floats a step multiplies one dimension in float32. Over int8 it multiplies two as 16-bit
// integers: keys and values are widened once for all queries, queries and weights are rounded to 16 bits, and sums are
// exact.
#pragma once

#include <algorithm>

#include "attention.h"

namespace attention {

// How a cache of floats is read: words are its elements.
struct Floats {
    using Element = float;
    using Word = float;
    using Vector = __m512;
    static constexpr int64_t kStep = 1;  // dimensions, or keys, that a word holds
    static constexpr float kMostWeight = 1;

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* words) { return _mm512_load_ps(words); }
    static Vector repeated(const float* word) { return _mm512_set1_ps(*word); }
    static __m512 as_floats(Vector sums) { return sums; }
    static void add_product(Vector& sums, Vector words, Vector repeated) {
        asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(words), "v"(repeated));
    }
};

// How a cache of int8 is read: words are two 16-bit integers.
struct Levels {
    using Element = int8_t;
    using Word = int32_t;
    using Vector = __m512i;
    static constexpr int64_t kStep = 2;
    static constexpr float kMostWeight = attention::kMostWeight;

    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector load(const int32_t* words) { return _mm512_load_si512(words); }
    static Vector repeated(const int32_t* word) { return _mm512_set1_epi32(*word); }
    static __m512 as_floats(Vector sums) { return _mm512_cvtepi32_ps(sums); }
    static void add_product(Vector& sums, Vector words, Vector repeated) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(words), "v"(repeated));
    }
};

// Sums of products, which stay in registers meanwhile: of the `lanes` of V vectors, one set behind the other, with
// `Count` words that are repeated to all lanes, each `stride` words on in the next step. A function of its own, since
// GCC keeps the sums in memory where it is a part of what comes before and after.
template <typename Cache, int Count, int V>
__attribute__((noinline)) void multiply(
    const typename Cache::Word* lanes, const typename Cache::Word* const (&words)[Count], int64_t stride, int64_t steps,
    typename Cache::Vector (&results)[Count][V]
) {
    typename Cache::Vector sums[Count][V];
    const typename Cache::Word* places[Count];
#pragma GCC unroll 8
    for (int i = 0; i < Count; i++) {
        places[i] = words[i];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[i][v] = Cache::zero();
    }
    for (int64_t step = 0; step < steps; step++, lanes += V * kLanes) {
        typename Cache::Vector vectors[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) vectors[v] = Cache::load(lanes + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Count; i++) {
            const typename Cache::Vector word = Cache::repeated(places[i]);
            places[i] += stride;
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) Cache::add_product(sums[i][v], vectors[v], word);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Count; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) results[i][v] = sums[i][v];
    }
}

// Memory for tiles of `kMostQueries`, whatever there are.
template <typename Cache>
struct TileMemory {
    typename Cache::Word *queries, *keys, *values;  // (size / step, queries); over int8 (128, size / 2) and (64, size)
    float *scores, *bias, *output;                  // (128, queries) twice, (size, queries)

    static size_t bytes(int64_t size) { return sizeof(float) * kMostQueries * (4 * size + 2 * kKeys); }

    TileMemory(uint8_t* memory, int64_t size) {
        queries = reinterpret_cast<typename Cache::Word*>(memory);
        keys = queries + size * kMostQueries;
        values = keys + size * kMostQueries;
        output = reinterpret_cast<float*>(values + size * kMostQueries);
        scores = output + size * kMostQueries;
        bias = scores + kKeys * kMostQueries;
    }
};

// V: vectors that the queries fill.
template <typename Cache, int V>
class Tiles {
    using Element = typename Cache::Element;
    using Word = typename Cache::Word;
    using Vector = typename Cache::Vector;

    static constexpr int64_t kWidth = V * kLanes;
    // Keys, or dimensions of values, whose sums for all queries stay in registers.
    static constexpr int kTogether = V <= 2 ? 8 : 4;

public:
    Tiles(const Head<Element>& head, const Queries& queries, const TileMemory<Cache>& memory)
        : head_(head), queries_(queries), memory_(memory), steps_(head.size / Cache::kStep) {}

    void attend() {
        begin();
        const int64_t end = *std::max_element(last_, last_ + kWidth) + 1;
        for (int64_t key = *std::min_element(first_, first_ + kWidth); key < end; key += kKeys) {
            read_tile(key, std::min(kKeys, end - key));
            score();
            weigh();
            mix();
        }
        finish();
    }

private:
    // Lane `lane` of the queries; those beyond the last are copies of it.
    int64_t query_of(int64_t lane) const { return std::min(lane, queries_.count - 1); }

    void begin() {
        for (int64_t lane = 0; lane < kWidth; lane++) {
            const int64_t query = query_of(lane);
            first_[lane] = queries_.first[query];
            last_[lane] = queries_.last[query];
            place_query(lane, queries_.query[query]);
        }
        latest_begin_ = *std::max_element(first_, first_ + kWidth);
        earliest_end_ = *std::min_element(last_, last_ + kWidth);
        std::fill(peak_, peak_ + kWidth, kLowest);
        std::fill(total_, total_ + kWidth, 0.0f);
        std::fill(memory_.output, memory_.output + head_.size * kWidth, 0.0f);
    }

    void place_query(int64_t lane, const float* query) {
        alignas(vnni::kVectorBytes) Word words[kLanes];
        const auto place = [&](int64_t begin, int64_t count) {
            for (int64_t i = 0; i < count; i++) memory_.queries[(begin + i) * kWidth + lane] = words[i];
        };
        if constexpr (Cache::kStep == 1) {
            for (int64_t d = 0; d < head_.size; d += kLanes) {
                _mm512_store_ps(words, scaled_query(head_, query, queries_.scale, d));
                place(d, std::min(kLanes, head_.size - d));
            }
        } else {
            step_[lane] = round_query(head_, query, queries_.scale, [&](int64_t d, __m512i levels) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi32_epi16(levels));
                place(d / 2, std::min(kLanes, head_.size - d) / 2);
            });
        }
    }

    // Make the `count` keys from `key` on the tile.
    void read_tile(int64_t key, int64_t count) {
        key_ = key;
        count_ = count;
        if constexpr (Cache::kStep > 1) widen();
        if (queries_.bias[0] != nullptr) turn_bias();
    }

    // Widen the tile's keys to 16 bits, and its values so that those of two keys are side by side.
    void widen() {
        const int64_t size = head_.size;
        const Element *keys = head_.keys + key_ * size, *values = head_.values + key_ * size;
        auto* wide = reinterpret_cast<int16_t*>(memory_.keys);
        for (int64_t begin = 0; begin < count_ * size; begin += 2 * kLanes) {  // of all keys, one behind the other
            const int64_t left = count_ * size - begin;
            const __mmask32 bytes = left < 32 ? (1u << left) - 1 : ~0u;
            _mm512_store_si512(wide + begin, _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(bytes, keys + begin)));
        }
        for (int64_t key = 0; key < count_; key += 2) {
            for (int64_t d = 0; d < size; d += kLanes) {
                const __mmask16 bytes = vnni::first_lanes(size - d), second = key + 1 < count_ ? bytes : 0;
                const __m512i low = widened(bytes, values + key * size + d);
                const __m512i high = widened(second, values + (key + 1) * size + d);
                _mm512_mask_storeu_epi32(memory_.values + key / 2 * size + d, bytes, paired(low, high));
            }
        }
    }

    static __m512i widened(__mmask16 bytes, const int8_t* levels) {
        return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(bytes, levels));
    }

    // Two integers of 16 bits as one word.
    static __m512i paired(__m512i low, __m512i high) {
        return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16));
    }

    // The bias of the tile's keys, (keys, queries), in units of log 2.
    void turn_bias() {
        for (int64_t begin = 0; begin < count_; begin += kLanes) {
            const int64_t bytes = (count_ - begin) * sizeof(float);
            for (int64_t lane = 0; lane < kWidth; lane += kLanes) {
                __m512i rows[kLanes];
#pragma GCC unroll 16
                for (int r = 0; r < kLanes; r++) {
                    const float* row = queries_.bias[query_of(lane + r)] + key_ + begin;
                    __builtin_prefetch(row + kKeys, 0, vnni::kSecondCache);  // of the next tile
                    rows[r] = vnni::load_bytes(row, bytes);
                }
                vnni::transpose(rows);
#pragma GCC unroll 16
                for (int r = 0; r < kLanes; r++) {
                    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(rows[r]), _mm512_set1_ps(kLog2E));
                    _mm512_store_ps(memory_.bias + (begin + r) * kWidth + lane, scaled);
                }
            }
        }
    }

    const Word* words_of_key(int64_t key) const {
        if constexpr (Cache::kStep == 1) return head_.keys + (key_ + key) * head_.size;
        else return memory_.keys + key * steps_;
    }

    const Word* words_of_values() const {
        if constexpr (Cache::kStep == 1) return head_.values + key_ * head_.size;
        else return memory_.values;
    }

    // Scores of all queries with the tile's keys, and the largest of each query.
    void score() {
        std::fill(tile_peak_, tile_peak_ + kWidth, kLowest);
        const bool all_seen = key_ >= latest_begin_ && key_ + count_ - 1 <= earliest_end_;
        for (int64_t key = 0; key < count_; key += kTogether) {
            const Word* words[kTogether];
            for (int k = 0; k < kTogether; k++) words[k] = words_of_key(std::min(key + k, count_ - 1));
            Vector sums[kTogether][V];
            multiply<Cache, kTogether, V>(memory_.queries, words, 1, steps_, sums);
            keep_scores(key, all_seen, sums);
        }
    }

    void keep_scores(int64_t key, bool all_seen, const Vector (&sums)[kTogether][V]) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            __m512 peaks = _mm512_load_ps(tile_peak_ + v * kLanes);
#pragma GCC unroll 8
            for (int k = 0; k < kTogether; k++) {
                if (key + k >= count_) break;
                const int64_t place = (key + k) * kWidth + v * kLanes;
                __m512 scores = Cache::as_floats(sums[k][v]);
                if constexpr (Cache::kStep > 1) scores = _mm512_mul_ps(scores, _mm512_load_ps(step_ + v * kLanes));
                if (queries_.bias[0] != nullptr) scores = _mm512_add_ps(scores, _mm512_load_ps(memory_.bias + place));
                if (!all_seen) scores = hide(scores, key_ + key + k, v);
                _mm512_store_ps(memory_.scores + place, scores);
                peaks = _mm512_max_ps(peaks, scores);
            }
            _mm512_store_ps(tile_peak_ + v * kLanes, peaks);
        }
    }

    __m512 hide(__m512 scores, int64_t key, int v) const {
        const __m512i place = _mm512_set1_epi32(static_cast<int>(key));
        const __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_load_si512(first_ + v * kLanes), place) &
                               _mm512_cmpge_epi32_mask(_mm512_load_si512(last_ + v * kLanes), place);
        return _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), seen, scores);
    }

    // Make weights of scores, in their place as words, relative to the tile's largest, and their sums; what was before
    // and what the tile gives get their factors.
    void weigh() {
        for (int64_t lane = 0; lane < kWidth; lane += kLanes) {
            const __m512 tile_peak = _mm512_load_ps(tile_peak_ + lane), before = _mm512_load_ps(peak_ + lane);
            const __m512 peak = _mm512_max_ps(before, tile_peak);
            const __m512 kept = power_of_two(_mm512_sub_ps(before, peak));
            const __m512 gained = power_of_two(_mm512_sub_ps(tile_peak, peak));
            const __m512 sum = weigh_lanes(lane, tile_peak);
            const __m512 total = _mm512_mul_ps(_mm512_load_ps(total_ + lane), kept);
            _mm512_store_ps(total_ + lane, _mm512_fmadd_ps(sum, gained, total));
            _mm512_store_ps(peak_ + lane, peak);
            _mm512_store_ps(kept_ + lane, kept);
            _mm512_store_ps(gained_ + lane, gained);
        }
    }

    __m512 weigh_lanes(int64_t lane, __m512 peak) {
        float* scores = memory_.scores + lane;
        if constexpr (Cache::kStep == 1) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t key = 0; key < count_; key++, scores += kWidth) {
                const __m512 weights = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores), peak));
                sum = _mm512_add_ps(sum, weights);
                _mm512_store_ps(scores, weights);
            }
            return sum;
        } else {
            __m512i sum = _mm512_setzero_si512();
            auto* words = reinterpret_cast<int32_t*>(scores);  // never ahead of the scores
            for (int64_t key = 0; key < count_; key += 2, scores += 2 * kWidth, words += kWidth) {
                const __m512i low = rounded_weights(_mm512_load_ps(scores), peak);
                const __m512i high = key + 1 < count_ ? rounded_weights(_mm512_load_ps(scores + kWidth), peak)
                                                      : _mm512_setzero_si512();
                sum = _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
                _mm512_store_si512(words, paired(low, high));
            }
            return _mm512_cvtepi32_ps(sum);
        }
    }

    static __m512i rounded_weights(__m512 scores, __m512 peak) {
        const __m512 weights = power_of_two(_mm512_sub_ps(scores, peak));
        return _mm512_cvtps_epi32(_mm512_mul_ps(weights, _mm512_set1_ps(kMostWeight)));
    }

    // Add the tile's values, by weight, to the output.
    void mix() {
        const auto* weights = reinterpret_cast<const Word*>(memory_.scores);
        const int64_t steps = (count_ + Cache::kStep - 1) / Cache::kStep;
        for (int64_t d = 0; d < head_.size; d += kTogether) {
            const Word* words[kTogether];
            for (int k = 0; k < kTogether; k++) words[k] = words_of_values() + d + k;
            Vector sums[kTogether][V];
            multiply<Cache, kTogether, V>(weights, words, head_.size, steps, sums);
            add_to_output(d, sums);
        }
    }

    void add_to_output(int64_t d, const Vector (&sums)[kTogether][V]) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            const __m512 kept = _mm512_load_ps(kept_ + v * kLanes), gained = _mm512_load_ps(gained_ + v * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kTogether; i++) {
                float* place = memory_.output + (d + i) * kWidth + v * kLanes;
                const __m512 before = _mm512_mul_ps(_mm512_load_ps(place), kept);
                _mm512_store_ps(place, _mm512_fmadd_ps(Cache::as_floats(sums[i][v]), gained, before));
            }
        }
    }

    // Divide by the sums of weights, and write (queries, size).
    void finish() {
        for (int64_t lane = 0; lane < queries_.count; lane++) {
            factor_[lane] = factor_of(peak_[lane], total_[lane], queries_.sink[lane], Cache::kMostWeight);
        }
        for (int64_t d = 0; d < head_.size; d++) {
            const float scale = value_scale(head_, d);
            for (int64_t lane = 0; lane < queries_.count; lane++) {
                queries_.output[lane][d] = memory_.output[d * kWidth + lane] * factor_[lane] * scale;
            }
        }
    }

    const Head<Element>& head_;
    const Queries& queries_;
    const TileMemory<Cache>& memory_;
    const int64_t steps_;
    int64_t key_ = 0, count_ = 0, latest_begin_ = 0, earliest_end_ = 0;
    // By lane. step_: what one of an integer score is worth.
    alignas(vnni::kVectorBytes) int32_t first_[kWidth], last_[kWidth];
    alignas(vnni::kVectorBytes) float step_[kWidth], peak_[kWidth], tile_peak_[kWidth], total_[kWidth];
    alignas(vnni::kVectorBytes) float kept_[kWidth], gained_[kWidth], factor_[kWidth];
};

// The attention of up to 64 queries. memory: of `TileMemory::bytes`.
template <typename Cache>
void attend_in_tiles(const Head<typename Cache::Element>& head, const Queries& queries, uint8_t* memory) {
    const TileMemory<Cache> tile(memory, head.size);
    switch ((queries.count + kLanes - 1) / kLanes) {
        case 1: return Tiles<Cache, 1>(head, queries, tile).attend();
        case 2: return Tiles<Cache, 2>(head, queries, tile).attend();
        case 3: return Tiles<Cache, 3>(head, queries, tile).attend();
        default: return Tiles<Cache, 4>(head, queries, tile).attend();
    }
}

}  // namespace attention
