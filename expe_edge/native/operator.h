// What the operators of this library have in common: reading what onnxruntime gives them, and running tasks on its
// threads.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <numeric>

#include "ort_abi.h"

namespace operators {

// Of operators that are onnxruntime's too, and of functions of packages' graphs.
constexpr const char *kMicrosoft = "com.microsoft", *kOwn = "expe_edge";

// End the function with what a call of the interface returns, unless that is success.
#define RETURN_IF_FAILED(call) \
    if (ort::Status* failed = (call)) return failed

inline ort::Status* refused(const ort::Api& api, const char* reason) {
    return api.create_status(ort::kNotImplemented, reason);
}

// An attribute, or 0 where the node has none of that name.
template <typename Value>
Value attribute(const ort::Api& api, const ort::KernelInfo* info, const char* name) {
    Value value{};
    if (ort::Status* absent = api.attribute(info, name, &value)) {
        api.release(absent);
        return {};
    }
    return value;
}

inline ort::Status* has_input(const ort::Api& api, const ort::KernelInfo* info, size_t index, bool* there) {
    size_t count = 0, size = 0;
    RETURN_IF_FAILED(api.input_count(info, &count));
    if (index < count) RETURN_IF_FAILED(api.input_name(info, index, nullptr, &size));
    *there = size > 1;  // one is the end of an empty name
    return nullptr;
}

// The sizes of a tensor's axes.
struct Shape {
    static constexpr size_t kMostAxes = 16;
    size_t axes = 0;
    int64_t sizes[kMostAxes] = {};

    bool is(std::initializer_list<int64_t> expected) const {
        return std::equal(sizes, sizes + axes, expected.begin(), expected.end());
    }
};

inline ort::Status* read_shape(const ort::Api& api, const ort::Value* value, Shape* shape) {
    ort::TensorInfo* info = nullptr;
    RETURN_IF_FAILED(api.tensor_info(value, &info));
    ort::Status* status = api.axis_count(info, &shape->axes);
    if (status == nullptr && shape->axes <= Shape::kMostAxes) status = api.sizes(info, shape->sizes, shape->axes);
    api.release(info);
    if (status == nullptr && shape->axes > Shape::kMostAxes) {
        return api.create_status(ort::kInvalidArgument, "a tensor of more than 16 axes");
    }
    return status;
}

// How many elements a constant has; 0 where the input is left away or is no constant.
inline ort::Status* count_constant(const ort::Api& api, const ort::KernelInfo* info, size_t index, int64_t* elements) {
    bool there = false;
    int is_constant = 0;
    const ort::Value* value = nullptr;
    Shape shape;
    *elements = 0;
    RETURN_IF_FAILED(has_input(api, info, index, &there));
    if (there) RETURN_IF_FAILED(api.constant_input(info, index, &is_constant, &value));
    if (!is_constant || value == nullptr) return nullptr;
    RETURN_IF_FAILED(read_shape(api, value, &shape));
    *elements = std::accumulate(shape.sizes, shape.sizes + shape.axes, int64_t{1}, std::multiplies<>());
    return nullptr;
}

// The elements of an input; null where it is left away. shape: where not null, its sizes, no axes of what is left away.
template <typename Element>
ort::Status* read_input(
    const ort::Api& api, const ort::KernelContext* context, size_t index, const Element** data, Shape* shape = nullptr
) {
    const ort::Value* found = nullptr;
    void* address = nullptr;
    RETURN_IF_FAILED(api.input(context, index, &found));
    if (found != nullptr) RETURN_IF_FAILED(api.data(const_cast<ort::Value*>(found), &address));
    *data = static_cast<const Element*>(address);
    return found != nullptr && shape != nullptr ? read_shape(api, found, shape) : nullptr;
}

template <typename Element>
ort::Status* make_output(
    const ort::Api& api, ort::KernelContext* context, size_t index, const int64_t* sizes, size_t axes, Element** data
) {
    ort::Value* made = nullptr;
    void* address = nullptr;
    RETURN_IF_FAILED(api.output(context, index, sizes, axes, &made));
    RETURN_IF_FAILED(api.data(made, &address));
    *data = static_cast<Element*>(address);
    return nullptr;
}

inline int64_t tasks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Run tasks on onnxruntime's threads; one alone on this thread.
inline ort::Status* run_tasks(
    const ort::Api& api, const ort::KernelContext* context, void (*task)(void*, size_t), size_t tasks, void* run
) {
    if (tasks > 1) return api.parallel_for(context, task, tasks, 0, run);
    for (size_t i = 0; i < tasks; i++) task(run, i);
    return nullptr;
}

// What all operators tell onnxruntime of themselves.
inline ort::CustomOp describe() {
    ort::CustomOp op{};
    op.version = ort::kApiVersion;
    op.execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.input_memory_type = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
    op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    const auto one = [](const ort::CustomOp*) { return 1; };
    op.variadic_input_min_arity = op.variadic_input_homogeneity = one;
    op.variadic_output_min_arity = op.variadic_output_homogeneity = one;
    op.first_version = one;
    op.last_version = [](const ort::CustomOp*) { return INT_MAX; };
    return op;
}

}  // namespace operators

// The operators, each in a file of its own.
const ort::CustomOp* matmul_nbits();
const ort::CustomOp* attention_over_floats();
const ort::CustomOp* attention_over_levels();
std::initializer_list<const ort::CustomOp*> functions();
