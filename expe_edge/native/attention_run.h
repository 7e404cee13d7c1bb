// A run of attention: which keys and queries there are, and the tasks that it is divided into.
#pragma once

#include <atomic>
#include <cstring>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "operands.h"

namespace attention {

// What an int8 cache is rounded by.
enum Scales : int { kNone, kOne, kByChannel };

// What a node says.
struct Node {
    int64_t heads, key_heads, window;
    float scale;  // 0 for what a head's size gives
    Scales key_scales, value_scales;
    int64_t scales;  // by channel, of each part of the cache; 0 where there are none of that kind
};

// What all tasks of a run share. Queries are (batch, tokens, ·), `query_stride` apart, and so are new keys and values.
// The cache is (batch, key heads, capacity, size), of the past `past_capacity`.
template <typename Element>
struct Run {
    const Node& node;
    int64_t batch{}, tokens{}, size{}, capacity{}, past_capacity{};
    const float *query{}, *key{}, *value{};
    int64_t query_stride{}, key_stride{};
    const Element *past_keys{}, *past_values{};
    Element *keys{}, *values{};
    const int32_t* last_keys{};
    bool whole_prompt{};
    const float *bias{}, *sink{}, *key_scales{}, *value_scales{};
    int64_t bias_rows{}, bias_heads{}, bias_keys{};
    float* output{};
    std::atomic<bool> out_of_memory{};

    explicit Run(const Node& node) : node(node) {}
    int64_t shared() const { return node.heads / node.key_heads; }
    int64_t queries() const { return shared() * tokens; }
    int64_t blocks() const { return (queries() + kMostQueries - 1) / kMostQueries; }
    // Products of all queries with the keys that they see, at most.
    int64_t products() const {
        int64_t keys = 0;
        for (int64_t row = 0; row < batch; row++) keys += past(row) + tokens;
        if (node.window > 0) keys = std::min(keys, batch * (node.window + tokens));
        return 2 * node.heads * tokens * keys * size;
    }
    // Tokens of a row in the cache before this run.
    int64_t past(int64_t row) const { return whole_prompt ? 0 : std::max<int64_t>(0, last_keys[row] + 1 - tokens); }
};

// Appending to the cache

inline void append_token(const float* from, const float*, int64_t, int64_t size, float* to) {
    std::memcpy(to, from, size * sizeof(float));
}

// Round as onnxruntime does: times what a scale is the inverse of, to the nearest, of two the even one.
inline void append_token(const float* from, const float* scales, int64_t step, int64_t size, int8_t* to) {
    for (int64_t d = 0; d < size; d += vnni::kLanes) {
        const __mmask16 lanes = vnni::first_lanes(size - d);
        const __m512 scale = step == 0 ? _mm512_set1_ps(scales[0]) : _mm512_maskz_loadu_ps(lanes, scales + d);
        const __m512 values = _mm512_maskz_loadu_ps(lanes, from + d);
        const __m512 levels = _mm512_mul_ps(values, _mm512_div_ps(_mm512_set1_ps(1), scale));
        const __m512 held = _mm512_max_ps(_mm512_min_ps(levels, _mm512_set1_ps(127)), _mm512_set1_ps(-128));
        _mm_mask_storeu_epi8(to + d, lanes, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(held)));
    }
}

// The scales of a key/value head.
inline const float* scales_of(const float* scales, Scales kind, int64_t key_head, int64_t size) {
    return kind == kByChannel ? scales + key_head * size : scales;
}

// Append what is new to one part of the cache of a head. Where past and present are two, what is past is copied, and
// what is behind both is 0.
template <typename Element>
void append_part(
    const Run<Element>& run, int64_t row, int64_t key_head, const float* from, const Element* past, Element* present,
    const float* scales, Scales kind
) {
    const int64_t before = run.past(row), size = run.size, head = row * run.node.key_heads + key_head;
    Element* to = present + head * run.capacity * size;
    if (past != present) {
        if (before > 0) std::memcpy(to, past + head * run.past_capacity * size, before * size * sizeof(Element));
        std::fill(to + (before + run.tokens) * size, to + run.capacity * size, Element{0});
    }
    const float* each = scales_of(scales, kind, key_head, size);
    for (int64_t token = 0; token < run.tokens; token++) {
        const float* values = from + (row * run.tokens + token) * run.key_stride + key_head * size;
        append_token(values, each, kind == kByChannel, size, to + (before + token) * size);
    }
}

template <typename Element>
void append(const Run<Element>& run, int64_t row, int64_t key_head) {
    const Node& node = run.node;
    append_part(run, row, key_head, run.key, run.past_keys, run.keys, run.key_scales, node.key_scales);
    append_part(run, row, key_head, run.value, run.past_values, run.values, run.value_scales, node.value_scales);
}

// Attending

template <typename Element>
Head<Element> head_of(const Run<Element>& run, int64_t row, int64_t key_head) {
    const Node& node = run.node;
    const int64_t begin = (row * node.key_heads + key_head) * run.capacity * run.size;
    return {run.keys + begin,
            run.values + begin,
            run.size,
            scales_of(run.key_scales, node.key_scales, key_head, run.size),
            scales_of(run.value_scales, node.value_scales, key_head, run.size),
            node.key_scales == kByChannel,
            node.value_scales == kByChannel};
}

// The queries of a key/value head from `begin` on, in the order of tokens: a block of them sees few keys in vain.
template <typename Element>
Queries queries_of(const Run<Element>& run, int64_t row, int64_t key_head, int64_t begin) {
    const Node& node = run.node;
    Queries queries;
    queries.count = std::min(kMostQueries, run.queries() - begin);
    const float scale = node.scale == 0 ? 1 / std::sqrt(static_cast<float>(run.size)) : node.scale;
    queries.scale = scale * kLog2E;
    for (int64_t i = 0; i < queries.count; i++) {
        const int64_t token = (begin + i) / run.shared(), head = key_head * run.shared() + (begin + i) % run.shared();
        const int64_t place = row * run.tokens + token, last = run.past(row) + token;
        queries.query[i] = run.query + place * run.query_stride + head * run.size;
        queries.output[i] = run.output + (place * node.heads + head) * run.size;
        queries.last[i] = last;
        queries.first[i] = node.window > 0 ? std::max<int64_t>(0, last + 1 - node.window) : 0;
        queries.sink[i] = run.sink == nullptr ? -INFINITY : run.sink[head] * kLog2E;
        const int64_t bias_row = run.bias_rows > 1 ? row : 0, bias_head = run.bias_heads > 1 ? head : 0;
        queries.bias[i] = run.bias == nullptr ? nullptr
            : run.bias + ((bias_row * run.bias_heads + bias_head) * run.tokens + token) * run.bias_keys;
    }
    return queries;
}

template <typename Element>
struct Ways;

template <>
struct Ways<float> {
    using Row = FloatRow;
    using Cache = Floats;
};

template <>
struct Ways<int8_t> {
    using Row = LevelsRow;
    using Cache = Levels;
};

template <typename Element>
void attend(Run<Element>& run, int64_t row, int64_t key_head, int64_t begin) {
    using Row = typename Ways<Element>::Row;
    using Cache = typename Ways<Element>::Cache;
    thread_local operands::Buffer buffer;
    const Head<Element> head = head_of(run, row, key_head);
    const Queries queries = queries_of(run, row, key_head, begin);
    const bool few = queries.count <= Row::kFewQueries;
    const size_t bytes = few ? queries.count * Row::bytes(run.size) : TileMemory<Cache>::bytes(run.size);
    uint8_t* memory = buffer.reserve(bytes);
    if (memory == nullptr) {
        run.out_of_memory = true;
    } else if (few) {
        attend_by_rows<Row>(head, queries, memory);
    } else {
        attend_in_tiles<Cache>(head, queries, memory);
    }
}

// Tasks, by number: a key/value head of a row, or a block of its queries.

template <typename Element>
void append_head(void* data, size_t task) {
    auto& run = *static_cast<Run<Element>*>(data);
    append(run, task / run.node.key_heads, task % run.node.key_heads);
}

template <typename Element>
void attend_head(void* data, size_t task) {
    auto& run = *static_cast<Run<Element>*>(data);
    append_head<Element>(data, task);
    attend(run, task / run.node.key_heads, task % run.node.key_heads, 0);
}

template <typename Element>
void attend_block(void* data, size_t task) {
    auto& run = *static_cast<Run<Element>*>(data);
    const int64_t head = task / run.blocks(), block = task % run.blocks();
    attend(run, head / run.node.key_heads, head % run.node.key_heads, block * kMostQueries);
}

}  // namespace attention
