// com.microsoft::GroupQueryAttention for processors with AVX-512 VNNI, in place of onnxruntime's own: float32 in and
// out, over a cache of float32 or int8, with a bias, a window and a sink where they are given. What asks for anything
// else is refused when the kernel is made.
//
// Few queries of a head go by attention_rows.h, many by attention_tiles.h. Their scores are never in memory as a whole.
#include <cstring>
#include <memory>
#include <new>
#include <tuple>

#include "attention_run.h"
#include "operator.h"

namespace {

using attention::kByChannel;
using attention::kNone;
using attention::kOne;
using attention::Run;
using attention::Scales;
using operators::attribute;
using operators::refused;
using operators::Shape;

enum Input : size_t {
    kQuery, kKey, kValue, kPastKey, kPastValue, kLastKeys, kTotal, kCosines, kSines, kPositions, kBias, kSink,
    kKeyScales, kValueScales, kInputs
};
enum Output : size_t { kMixed, kPresentKey, kPresentValue, kOutputs };

// Products that threads are not worth waking for: they take this one some ten microseconds.
constexpr int64_t kFewProducts = 1 << 17;

struct Kernel : attention::Node {
    const ort::Api* api;
};

template <typename Element>
ort::Status* run_tasks(const ort::Api& api, const ort::KernelContext* context, Run<Element>& run) {
    const int64_t heads = run.batch * run.node.key_heads;
    if (run.blocks() == 1 && run.products() < kFewProducts) {
        for (int64_t head = 0; head < heads; head++) attention::attend_head<Element>(&run, head);
    } else if (run.blocks() == 1) {
        RETURN_IF_FAILED(operators::run_tasks(api, context, attention::attend_head<Element>, heads, &run));
    } else {
        RETURN_IF_FAILED(operators::run_tasks(api, context, attention::append_head<Element>, heads, &run));
        const auto task = attention::attend_block<Element>;
        RETURN_IF_FAILED(operators::run_tasks(api, context, task, heads * run.blocks(), &run));
    }
    return run.out_of_memory ? api.create_status(ort::kFail, "GroupQueryAttention: no memory for a tile") : nullptr;
}

// What onnxruntime calls for every run of a node.

ort::Status* invalid(const ort::Api& api, const char* reason) {
    return api.create_status(ort::kInvalidArgument, reason);
}

// Queries, keys and values, side by side in one tensor where the last two are left away.
template <typename Element>
ort::Status* read_states(const ort::Api& api, const ort::KernelContext* context, Run<Element>& run) {
    const attention::Node& node = run.node;
    Shape queries, keys, values;
    RETURN_IF_FAILED(operators::read_input(api, context, kQuery, &run.query, &queries));
    RETURN_IF_FAILED(operators::read_input(api, context, kKey, &run.key, &keys));
    RETURN_IF_FAILED(operators::read_input(api, context, kValue, &run.value, &values));
    const bool packed = run.key == nullptr;
    const int64_t heads = node.heads + (packed ? 2 * node.key_heads : 0), width = queries.sizes[2];
    run.batch = queries.sizes[0];
    run.tokens = queries.sizes[1];
    run.size = width / heads;
    run.query_stride = width;
    run.key_stride = packed ? width : node.key_heads * run.size;
    const std::initializer_list<int64_t> expected = {run.batch, run.tokens, run.key_stride};
    const bool agree = packed ? run.value == nullptr : keys.is(expected) && values.is(expected);
    if (queries.axes != 3 || run.size * heads != width || run.size % 8 != 0 || run.size == 0 || !agree) {
        return invalid(api, "GroupQueryAttention: queries, keys and values of sizes that do not agree");
    }
    if (packed) {
        run.key = run.query + node.heads * run.size;
        run.value = run.key + node.key_heads * run.size;
    }
    return nullptr;
}

// How long the rows are, and the cache before.
template <typename Element>
ort::Status* read_past(const ort::Api& api, const ort::KernelContext* context, Run<Element>& run) {
    const int32_t* total = nullptr;
    Shape keys, values, last, one;
    RETURN_IF_FAILED(operators::read_input(api, context, kPastKey, &run.past_keys, &keys));
    RETURN_IF_FAILED(operators::read_input(api, context, kPastValue, &run.past_values, &values));
    RETURN_IF_FAILED(operators::read_input(api, context, kLastKeys, &run.last_keys, &last));
    RETURN_IF_FAILED(operators::read_input(api, context, kTotal, &total, &one));
    if (!one.is({}) && !one.is({1})) return invalid(api, "GroupQueryAttention: a total that is no number");
    if (!last.is({run.batch})) return invalid(api, "GroupQueryAttention: rows of another number than lengths");
    run.past_capacity = keys.axes == 4 ? keys.sizes[2] : 0;
    run.capacity = std::max<int64_t>(run.past_capacity, total[0]);
    run.whole_prompt = run.tokens == total[0];
    const std::initializer_list<int64_t> expected = {run.batch, run.node.key_heads, run.past_capacity, run.size};
    const bool none = run.past_keys == nullptr && run.past_values == nullptr && run.past_capacity == 0;
    if (!none && !(keys.is(expected) && values.is(expected))) {
        return invalid(api, "GroupQueryAttention: a cache of another size than the new keys");
    }
    for (int64_t row = 0; row < run.batch; row++) {
        if (run.past(row) > run.past_capacity || run.past(row) + run.tokens > total[0]) {
            return invalid(api, "GroupQueryAttention: a row of more keys than there are");
        }
    }
    return nullptr;
}

template <typename Element>
ort::Status* read_bias(const ort::Api& api, const ort::KernelContext* context, Run<Element>& run) {
    Shape shape;
    RETURN_IF_FAILED(operators::read_input(api, context, kBias, &run.bias, &shape));
    if (run.bias == nullptr) return nullptr;
    int64_t most = 0;
    for (int64_t row = 0; row < run.batch; row++) most = std::max(most, run.past(row) + run.tokens);
    const auto [rows, heads, tokens, keys] = std::tie(shape.sizes[0], shape.sizes[1], shape.sizes[2], shape.sizes[3]);
    const bool shared_rows = rows == 1 || rows == run.batch, shared_heads = heads == 1 || heads == run.node.heads;
    if (shape.axes != 4 || !shared_rows || !shared_heads || tokens != run.tokens || keys < most) {
        return invalid(api, "GroupQueryAttention: a bias of another size than the scores");
    }
    run.bias_rows = rows;
    run.bias_heads = heads;
    run.bias_keys = keys;
    return nullptr;
}

template <typename Element>
ort::Status* read_constants(const ort::Api& api, const ort::KernelContext* context, Run<Element>& run) {
    const attention::Node& node = run.node;
    RETURN_IF_FAILED(operators::read_input(api, context, kSink, &run.sink));
    RETURN_IF_FAILED(operators::read_input(api, context, kKeyScales, &run.key_scales));
    RETURN_IF_FAILED(operators::read_input(api, context, kValueScales, &run.value_scales));
    if (node.scales == 0 || node.scales == node.key_heads * run.size) return nullptr;
    return invalid(api, "GroupQueryAttention: scales of another number than channels");
}

// The cache after, which is the one before where a client gives one buffer for both.
template <typename Element>
ort::Status* make_outputs(const ort::Api& api, ort::KernelContext* context, Run<Element>& run) {
    const int64_t mixed[] = {run.batch, run.tokens, run.node.heads * run.size};
    const int64_t present[] = {run.batch, run.node.key_heads, run.capacity, run.size};
    RETURN_IF_FAILED(operators::make_output(api, context, kMixed, mixed, 3, &run.output));
    RETURN_IF_FAILED(operators::make_output(api, context, kPresentKey, present, 4, &run.keys));
    return operators::make_output(api, context, kPresentValue, present, 4, &run.values);
}

template <typename Element>
ort::Status* compute(void* self, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(self);
    const ort::Api& api = *kernel.api;
    Run<Element> run(kernel);
    RETURN_IF_FAILED(read_states(api, context, run));
    RETURN_IF_FAILED(read_past(api, context, run));
    RETURN_IF_FAILED(read_bias(api, context, run));
    RETURN_IF_FAILED(read_constants(api, context, run));
    RETURN_IF_FAILED(make_outputs(api, context, run));
    if (run.batch == 0 || run.tokens == 0) return nullptr;
    return run_tasks(api, context, run);
}

// What it asks when a session is made.

// How a part of the cache is rounded; `kNone` where the node does not say.
ort::Status* read_kind(const ort::Api& api, const ort::KernelInfo* info, const char* name, Scales* kind) {
    char text[16] = {};
    size_t size = sizeof text;
    *kind = kNone;
    if (ort::Status* failed = api.attribute(info, name, text, &size)) {
        api.release(failed);
        return nullptr;
    }
    if (std::strcmp(text, "PER_TENSOR") == 0) *kind = kOne;
    if (std::strcmp(text, "PER_CHANNEL") == 0) *kind = kByChannel;
    return nullptr;
}

// Scales must be constants, whose number is compared with every run's channels. Sinks, too: one for each head.
ort::Status* read_counts(const ort::Api& api, const ort::KernelInfo* info, Kernel* kernel) {
    bool has_sinks = false;
    int64_t sinks = 0, keys = 0, values = 0;
    RETURN_IF_FAILED(operators::has_input(api, info, kSink, &has_sinks));
    RETURN_IF_FAILED(operators::count_constant(api, info, kSink, &sinks));
    RETURN_IF_FAILED(operators::count_constant(api, info, kKeyScales, &keys));
    RETURN_IF_FAILED(operators::count_constant(api, info, kValueScales, &values));
    if (has_sinks && sinks != kernel->heads) {
        return refused(api, "GroupQueryAttention: sinks that are no constants, or not one for each head");
    }
    const auto fits = [](Scales kind, int64_t count) {
        return kind == kOne ? count == 1 : (count > 0) == (kind == kByChannel);
    };
    if (!fits(kernel->key_scales, keys) || !fits(kernel->value_scales, values)) {
        return refused(api, "GroupQueryAttention: scales that are no constants, or of another number");
    }
    if (kernel->key_scales == kByChannel) kernel->scales = keys;
    if (kernel->value_scales == kByChannel) kernel->scales = values;
    const bool both = kernel->key_scales == kByChannel && kernel->value_scales == kByChannel;
    return both && keys != values ? refused(api, "GroupQueryAttention: scales of two numbers") : nullptr;
}

ort::Status* require_plain(const ort::Api& api, const ort::KernelInfo* info) {
    for (const char* name : {"do_rotary", "smooth_softmax"}) {
        if (attribute<int64_t>(api, info, name) > 0) return refused(api, "GroupQueryAttention: rotation or smoothing");
    }
    if (attribute<int64_t>(api, info, "qk_output") > 0 || attribute<float>(api, info, "softcap") != 0) {
        return refused(api, "GroupQueryAttention: scores that are capped or given out");
    }
    for (size_t input : {kCosines, kSines, kPositions}) {
        bool there = false;
        RETURN_IF_FAILED(operators::has_input(api, info, input, &there));
        if (there) return refused(api, "GroupQueryAttention: positions");
    }
    return nullptr;
}

ort::Status* read_kernel(const ort::Api& api, const ort::KernelInfo* info, bool is_int8, Kernel* kernel) {
    kernel->api = &api;
    kernel->heads = attribute<int64_t>(api, info, "num_heads");
    kernel->key_heads = attribute<int64_t>(api, info, "kv_num_heads");
    kernel->window = attribute<int64_t>(api, info, "local_window_size");
    kernel->scale = attribute<float>(api, info, "scale");
    if (kernel->heads < 1 || kernel->key_heads < 1 || kernel->heads % kernel->key_heads != 0) {
        return refused(api, "GroupQueryAttention: heads that share no key/value heads");
    }
    RETURN_IF_FAILED(require_plain(api, info));
    RETURN_IF_FAILED(read_kind(api, info, "k_quant_type", &kernel->key_scales));
    RETURN_IF_FAILED(read_kind(api, info, "v_quant_type", &kernel->value_scales));
    const bool rounded = kernel->key_scales != kNone && kernel->value_scales != kNone;
    if (rounded != is_int8 || (is_int8 && attribute<int64_t>(api, info, "kv_cache_bit_width") != 8)) {
        return refused(api, "GroupQueryAttention: a cache of other than float32 or 8 bits");
    }
    return read_counts(api, info, kernel);
}

template <typename Element>
ort::Status* create_kernel(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** made) {
    std::unique_ptr<Kernel> kernel(new (std::nothrow) Kernel{});
    if (!kernel) return api->create_status(ort::kFail, "GroupQueryAttention: no memory");
    RETURN_IF_FAILED(read_kernel(*api, info, std::is_same_v<Element, int8_t>, kernel.get()));
    *made = kernel.release();
    return nullptr;
}

template <typename Element>
constexpr ort::ElementType kCacheType = std::is_same_v<Element, int8_t> ? ort::kInt8 : ort::kFloat;

template <typename Element>
ort::ElementType input_type(const ort::CustomOp*, size_t index) {
    switch (index) {
        case kPastKey: case kPastValue: return kCacheType<Element>;
        case kLastKeys: case kTotal: return ort::kInt32;
        case kPositions: return ort::kInt64;
        default: return ort::kFloat;
    }
}

template <typename Element>
ort::CustomOp describe() {
    ort::CustomOp op = operators::describe();
    op.name = [](const ort::CustomOp*) { return "GroupQueryAttention"; };
    op.input_type = input_type<Element>;
    op.input_count = [](const ort::CustomOp*) { return size_t{kInputs}; };
    op.input_characteristic = [](const ort::CustomOp*, size_t index) {
        return index == kQuery || index == kLastKeys || index == kTotal ? ort::kRequired : ort::kOptional;
    };
    op.output_type = [](const ort::CustomOp*, size_t index) {
        return index == kMixed ? ort::kFloat : kCacheType<Element>;
    };
    op.output_count = [](const ort::CustomOp*) { return size_t{kOutputs}; };
    op.create_kernel_with_status = create_kernel<Element>;
    op.compute_with_status = compute<Element>;
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace

const ort::CustomOp* attention_over_floats() {
    static const ort::CustomOp op = describe<float>();
    return &op;
}

const ort::CustomOp* attention_over_levels() {
    static const ort::CustomOp op = describe<int8_t>();
    return &op;
}
