// Functions of packages' graphs, each a chain of standard nodes that onnxruntime puts in its place where this library is
// not there: a node costs a microsecond, whatever it computes, and a step has hundreds. float32.
#include <new>

#include "curves.h"
#include "operator.h"

namespace {

using operators::make_output;
using operators::read_input;
using operators::Shape;

// Numbers that a task is of at least: a thread is not worth waking for fewer.
constexpr int64_t kTaskNumbers = 1 << 14;

struct Kernel {
    const ort::Api* api;
};

using Compute = ort::Status* (*)(const ort::Api&, ort::KernelContext*);

ort::Status* disagree(const ort::Api& api, const char* reason) {
    return api.create_status(ort::kInvalidArgument, reason);
}

// Call `row(index)` for all of `rows`, each of which goes through so many numbers, on onnxruntime's threads.
template <typename Row>
ort::Status* for_rows(
    const ort::Api& api, const ort::KernelContext* context, int64_t rows, int64_t numbers, const Row& row
) {
    struct Run {
        const Row& row;
        int64_t rows, each;
    } run{row, rows, std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, numbers))};
    const auto task = [](void* data, size_t index) {
        const Run& run = *static_cast<Run*>(data);
        const int64_t begin = static_cast<int64_t>(index) * run.each;
        for (int64_t i = begin; i < std::min(run.rows, begin + run.each); i++) run.row(i);
    };
    return operators::run_tasks(api, context, task, operators::tasks_of(rows, run.each), &run);
}

// The second half of (B, T, 2·I) times the first one's SiLU.
ort::Status* swiglu(const ort::Api& api, ort::KernelContext* context) {
    const float* wide = nullptr;
    float* active = nullptr;
    Shape shape;
    RETURN_IF_FAILED(read_input(api, context, 0, &wide, &shape));
    if (shape.axes != 3 || shape.sizes[2] % 2 != 0) return disagree(api, "SwiGLU: not (B, T, 2·I)");
    const int64_t rows = shape.sizes[0] * shape.sizes[1], size = shape.sizes[2] /= 2;
    RETURN_IF_FAILED(make_output(api, context, 0, shape.sizes, 3, &active));
    return for_rows(api, context, rows, 2 * size, [=](int64_t row) {
        const float *gate = wide + 2 * size * row, *up = gate + size;
        for (int64_t i = 0; i < size; i += vnni::kLanes) {
            const __mmask16 lanes = vnni::first_lanes(size - i);
            const __m512 opened = curves::silu(_mm512_maskz_loadu_ps(lanes, gate + i));
            const __m512 values = _mm512_mul_ps(opened, _mm512_maskz_loadu_ps(lanes, up + i));
            _mm512_mask_storeu_ps(active + size * row + i, lanes, values);
        }
    });
}

// Each head of (B, T, H·D) times the sigmoid of `hidden` (B, T, C) and its row of a weight (H, C).
ort::Status* gated_heads(const ort::Api& api, ort::KernelContext* context) {
    const float *mixed = nullptr, *hidden = nullptr, *weight = nullptr;
    float* gated = nullptr;
    Shape of_mixed, of_hidden, of_weight;
    RETURN_IF_FAILED(read_input(api, context, 0, &mixed, &of_mixed));
    RETURN_IF_FAILED(read_input(api, context, 1, &hidden, &of_hidden));
    RETURN_IF_FAILED(read_input(api, context, 2, &weight, &of_weight));
    const int64_t heads = of_weight.sizes[0], width = of_weight.sizes[1], size = heads ? of_mixed.sizes[2] / heads : 0;
    if (of_weight.axes != 2 || !of_mixed.is({of_hidden.sizes[0], of_hidden.sizes[1], heads * size}) ||
        !of_hidden.is({of_hidden.sizes[0], of_hidden.sizes[1], width})) {
        return disagree(api, "GatedHeads: sizes that do not agree");
    }
    RETURN_IF_FAILED(make_output(api, context, 0, of_mixed.sizes, 3, &gated));
    const int64_t rows = of_hidden.sizes[0] * of_hidden.sizes[1];
    return for_rows(api, context, rows, heads * (width + size), [=](int64_t row) {
        for (int64_t head = 0; head < heads; head++) {
            const float gate = curves::sigmoid(curves::dot(weight + head * width, hidden + row * width, width));
            const int64_t begin = (row * heads + head) * size;
            curves::scale(mixed + begin, gate, size, gated + begin);
        }
    });
}

// Slopes (B, H, T): a scale (H, 1) times the softplus of `hidden` (B, T, C), a weight (H, C) and a start (H, 1).
ort::Status* slopes(const ort::Api& api, ort::KernelContext* context) {
    const float *hidden = nullptr, *weight = nullptr, *start = nullptr, *scale = nullptr;
    float* made = nullptr;
    Shape of_hidden, of_weight, of_start, of_scale;
    RETURN_IF_FAILED(read_input(api, context, 0, &hidden, &of_hidden));
    RETURN_IF_FAILED(read_input(api, context, 1, &weight, &of_weight));
    RETURN_IF_FAILED(read_input(api, context, 2, &start, &of_start));
    RETURN_IF_FAILED(read_input(api, context, 3, &scale, &of_scale));
    const int64_t heads = of_weight.sizes[0], width = of_weight.sizes[1], tokens = of_hidden.sizes[1];
    if (of_weight.axes != 2 || !of_start.is({heads, 1}) || !of_scale.is({heads, 1}) ||
        !of_hidden.is({of_hidden.sizes[0], tokens, width})) {
        return disagree(api, "Slopes: sizes that do not agree");
    }
    const int64_t sizes[] = {of_hidden.sizes[0], heads, tokens};
    RETURN_IF_FAILED(make_output(api, context, 0, sizes, 3, &made));
    return for_rows(api, context, sizes[0] * tokens, heads * width, [=](int64_t row) {
        float* slope = made + row / tokens * heads * tokens + row % tokens;
        for (int64_t head = 0; head < heads; head++) {
            const float learned = curves::dot(weight + head * width, hidden + row * width, width) + start[head];
            slope[head * tokens] = curves::softplus(learned) * scale[head];
        }
    });
}

// Slopes (B, H, T) times distances (B or 1, 1, T, S).
ort::Status* slope_bias(const ort::Api& api, ort::KernelContext* context) {
    const float *slopes = nullptr, *distances = nullptr;
    float* bias = nullptr;
    Shape of_slopes, of_distances;
    RETURN_IF_FAILED(read_input(api, context, 0, &slopes, &of_slopes));
    RETURN_IF_FAILED(read_input(api, context, 1, &distances, &of_distances));
    const int64_t rows = of_slopes.sizes[0], heads = of_slopes.sizes[1], tokens = of_slopes.sizes[2];
    const int64_t apart = of_distances.sizes[0], keys = of_distances.sizes[3];
    if (of_slopes.axes != 3 || !of_distances.is({apart, 1, tokens, keys}) || (apart != 1 && apart != rows)) {
        return disagree(api, "SlopeBias: sizes that do not agree");
    }
    const int64_t sizes[] = {rows, heads, tokens, keys};
    RETURN_IF_FAILED(make_output(api, context, 0, sizes, 4, &bias));
    return for_rows(api, context, rows * heads * tokens, keys, [=](int64_t query) {
        const int64_t row = apart == 1 ? 0 : query / (heads * tokens);
        curves::scale(distances + (row * tokens + query % tokens) * keys, slopes[query], keys, bias + query * keys);
    });
}

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo*, void** made) {
    *made = new (std::nothrow) Kernel{api};
    return *made == nullptr ? api->create_status(ort::kFail, "no memory for a kernel") : nullptr;
}

template <Compute compute, size_t inputs>
ort::CustomOp described(const char* (*name)(const ort::CustomOp*)) {
    ort::CustomOp op = operators::describe();
    op.name = name;
    op.input_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
    op.input_count = [](const ort::CustomOp*) { return inputs; };
    op.input_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
    op.output_count = [](const ort::CustomOp*) { return size_t{1}; };
    op.create_kernel_with_status = create;
    op.compute_with_status = [](void* kernel, ort::KernelContext* context) {
        return compute(*static_cast<Kernel*>(kernel)->api, context);
    };
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace

std::initializer_list<const ort::CustomOp*> functions() {
    static const ort::CustomOp ops[] = {
        described<swiglu, 1>([](const ort::CustomOp*) { return "SwiGLU"; }),
        described<gated_heads, 4>([](const ort::CustomOp*) { return "GatedHeads"; }),
        described<slopes, 4>([](const ort::CustomOp*) { return "Slopes"; }),
        described<slope_bias, 2>([](const ort::CustomOp*) { return "SlopeBias"; }),
    };
    static const std::initializer_list<const ort::CustomOp*> all = {&ops[0], &ops[1], &ops[2], &ops[3]};
    return all;
}
