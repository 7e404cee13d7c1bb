// com.microsoft::MatMulNBits for processors with AVX-512 VNNI, as a custom operator of onnxruntime that takes the place
// of the one it has: weights of 4 or 8 bits in blocks without zero points, activations rounded to int8 by block
// (accuracy level 4), float32 in and out. What has anything else is refused when the kernel is made.
//
// Weights stay as the graph has them, copied into huge pages. One row goes by dots.h, a few by strips.h, many by panels.h.
#include <atomic>
#include <memory>
#include <new>

#include "dots.h"
#include "huge_pages.h"
#include "operator.h"
#include "panels.h"
#include "strips.h"

namespace {

using operands::Format;
using operands::Weights;
using operators::attribute;
using operators::has_input;
using operators::refused;
using operators::run_tasks;
using operators::Shape;
using operators::tasks_of;

constexpr const char* kName = "MatMulNBits";
constexpr int64_t kInt8Activations = 4;  // the accuracy level

enum Input : size_t { kActivations, kCodes, kScales, kZeroPoints, kOrder, kBias, kInputs };

// Rows that one task rounds.
constexpr int64_t kRoundedRows = 16;
// Tasks that the columns of a product of few rows are divided among, and the bytes of weights that one reads at least
// and at most.
constexpr int64_t kTasks = 32, kLeastTaskBytes = 8192, kMostTaskBytes = 49152;

struct Kernel {
    const ort::Api* api;
    Format format;
    huge_pages::Copy codes, scales, bias;

    Weights weights() const { return {codes.as<uint8_t>(), scales.as<float>(), bias.as<float>()}; }
};

// What all tasks of a run share.
struct Run {
    const Format& format;
    Weights weights;
    const float* input;
    float* output;
    int64_t m;
};

// Activations rounded by row, for strips and panels.
struct RowsRun : Run {
    panels::Rows rows;
    int64_t task_columns;
    std::atomic<bool> out_of_memory{false};

    RowsRun(const Run& run, uint8_t* memory, int64_t task_columns)
        : Run(run), rows(panels::rows_in(memory, format, m)), task_columns(task_columns) {}
};

struct DotRun : Run {
    dots::Walk walk;
    dots::Row row;
    int64_t task_columns;

    DotRun(const Run& run, const dots::Walk& walk, uint8_t* memory, int64_t task_columns)
        : Run(run), walk(walk), row(dots::row_in(memory, walk)), task_columns(task_columns) {}
};

// Columns for each task of few rows, a multiple of `multiple`.
int64_t columns_of_task(const Format& format, int64_t multiple) {
    const int64_t bytes = std::clamp(format.n * format.row_bytes() / kTasks, kLeastTaskBytes, kMostTaskBytes);
    return std::max<int64_t>(1, bytes / format.row_bytes() / multiple) * multiple;
}

// Memory of this thread to unpack into, which a run keeps for the next; null, and said so, where there is none.
uint8_t* scratch(RowsRun& run, size_t bytes) {
    thread_local operands::Buffer buffer;
    uint8_t* memory = buffer.reserve(bytes);
    if (memory == nullptr) run.out_of_memory = true;
    return memory;
}

// Tasks. onnxruntime gives each its number, and runs them on its own threads.

void round_rows(void* data, size_t task) {
    const RowsRun& run = *static_cast<RowsRun*>(data);
    const int64_t begin = task * kRoundedRows, end = std::min(run.m, begin + kRoundedRows);
    for (int64_t row = begin; row < end; row++) {
        panels::round_row(run.format, run.input + row * run.format.k, run.rows, row);
    }
}

void multiply_panel(void* data, size_t task) {
    RowsRun& run = *static_cast<RowsRun*>(data);
    uint8_t* memory = scratch(run, panels::panel_bytes(run.format));
    if (memory == nullptr) return;
    const panels::Panel panel = panels::panel_in(memory, run.format);
    panels::product(run.format, run.weights, run.rows, run.m, task * run.task_columns, panel, run.output);
}

void multiply_strips(void* data, size_t task) {
    RowsRun& run = *static_cast<RowsRun*>(data);
    auto* scales = reinterpret_cast<float*>(scratch(run, strips::scales_bytes(run.format)));
    if (scales == nullptr) return;
    const int64_t begin = task * run.task_columns, end = std::min(run.format.n, begin + run.task_columns);
    for (int64_t n = begin; n < end; n += vnni::kLanes) {
        strips::product(run.format, run.weights, run.rows, run.m, n, scales, run.output);
    }
}

void multiply_columns(void* data, size_t task) {
    const DotRun& run = *static_cast<DotRun*>(data);
    const int64_t begin = task * run.task_columns, end = std::min(run.format.n, begin + run.task_columns);
    dots::product(run.format, run.walk, run.weights, run.row, begin, end, run.output);
}

ort::Status* no_memory(const ort::Api& api) {
    return api.create_status(ort::kFail, "MatMulNBits: no memory to unpack weights or activations in");
}

ort::Status* run_rows(const ort::Api& api, const ort::KernelContext* context, const Run& run) {
    operands::Buffer buffer;
    uint8_t* memory = buffer.reserve(panels::rows_bytes(run.format, run.m));
    if (memory == nullptr) return no_memory(api);
    const bool few = run.m <= strips::kMostRows;
    RowsRun shared(run, memory, few ? columns_of_task(run.format, vnni::kLanes) : panels::kColumns);
    const size_t tasks = tasks_of(run.format.n, shared.task_columns);
    RETURN_IF_FAILED(run_tasks(api, context, round_rows, tasks_of(run.m, kRoundedRows), &shared));
    RETURN_IF_FAILED(run_tasks(api, context, few ? multiply_strips : multiply_panel, tasks, &shared));
    return shared.out_of_memory ? no_memory(api) : nullptr;
}

ort::Status* run_row(const ort::Api& api, const ort::KernelContext* context, const Run& run) {
    const dots::Walk walk(run.format);
    operands::Buffer buffer;
    uint8_t* memory = buffer.reserve(dots::row_bytes(walk));
    if (memory == nullptr) return no_memory(api);
    DotRun shared(run, walk, memory, columns_of_task(run.format, 1));
    dots::round_row(run.format, walk, run.input, shared.row);
    return run_tasks(api, context, multiply_columns, tasks_of(run.format.n, shared.task_columns), &shared);
}

// What onnxruntime calls for every run of a node.

// The output has the activations' shape but for its last axis, which is n. m: the product of the other axes.
ort::Status* make_output(const Kernel& kernel, ort::KernelContext* context, int64_t* m, float** output) {
    const ort::Api& api = *kernel.api;
    const ort::Value* value = nullptr;
    Shape shape;
    RETURN_IF_FAILED(api.input(context, kActivations, &value));
    RETURN_IF_FAILED(operators::read_shape(api, value, &shape));
    if (shape.axes < 1 || shape.sizes[shape.axes - 1] != kernel.format.k) {
        return api.create_status(ort::kInvalidArgument, "MatMulNBits: the last axis of its input is not K");
    }
    *m = 1;
    for (size_t axis = 0; axis + 1 < shape.axes; axis++) *m *= shape.sizes[axis];
    shape.sizes[shape.axes - 1] = kernel.format.n;
    return operators::make_output(api, context, 0, shape.sizes, shape.axes, output);
}

ort::Status* compute(void* self, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<Kernel*>(self);
    const ort::Api& api = *kernel.api;
    Run run{kernel.format, kernel.weights(), nullptr, nullptr, 0};
    RETURN_IF_FAILED(make_output(kernel, context, &run.m, &run.output));
    if (run.m == 0) return nullptr;
    RETURN_IF_FAILED(operators::read_input(api, context, kActivations, &run.input));
    return run.m == 1 ? run_row(api, context, run) : run_rows(api, context, run);
}

// What it asks when a session is made.

// Take weights, which must be constants of the size that the format gives them, so that no run reads behind them.
template <typename Element>
ort::Status* take_constant(
    const ort::Api& api, const ort::KernelInfo* info, Input index, int64_t elements, huge_pages::Copy* taken
) {
    int64_t count = 0;
    RETURN_IF_FAILED(operators::count_constant(api, info, index, &count));
    if (count == 0) return refused(api, "MatMulNBits: weights that are no constants");
    if (count != elements) return refused(api, "MatMulNBits: weights of another shape");
    int is_constant = 0;
    const ort::Value* value = nullptr;
    RETURN_IF_FAILED(api.constant_input(info, index, &is_constant, &value));
    void* data = nullptr;
    RETURN_IF_FAILED(api.data(const_cast<ort::Value*>(value), &data));
    *taken = huge_pages::Copy(data, count * sizeof(Element));
    return nullptr;
}

ort::Status* read_format(const ort::Api& api, const ort::KernelInfo* info, Format* format) {
    *format = {attribute<int64_t>(api, info, "K"), attribute<int64_t>(api, info, "N"),
               attribute<int64_t>(api, info, "bits"), attribute<int64_t>(api, info, "block_size")};
    const auto [k, n, bits, block] = *format;
    if (k < 1 || k > INT_MAX || n < 1 || n > INT_MAX) return refused(api, "MatMulNBits: sizes that are none");
    if (bits != 4 && bits != 8) return refused(api, "MatMulNBits: weights of other than 4 or 8 bits");
    if (block < operands::kLeastBlock || block > operands::kMostBlock || (block & (block - 1)) != 0) {
        return refused(api, "MatMulNBits: blocks of other than a power of two from 16 to 256 values");
    }
    if (attribute<int64_t>(api, info, "accuracy_level") != kInt8Activations) {
        return refused(api, "MatMulNBits: an accuracy level other than 4");
    }
    return nullptr;
}

ort::Status* read_kernel(const ort::Api& api, const ort::KernelInfo* info, Kernel* kernel) {
    kernel->api = &api;
    const Format& format = kernel->format;
    RETURN_IF_FAILED(read_format(api, info, &kernel->format));
    bool zero_points = false, order = false, bias = false;
    RETURN_IF_FAILED(has_input(api, info, kZeroPoints, &zero_points));
    RETURN_IF_FAILED(has_input(api, info, kOrder, &order));
    RETURN_IF_FAILED(has_input(api, info, kBias, &bias));
    if (zero_points || order) return refused(api, "MatMulNBits: zero points or an order of groups");
    RETURN_IF_FAILED(take_constant<uint8_t>(api, info, kCodes, format.n * format.row_bytes(), &kernel->codes));
    RETURN_IF_FAILED(take_constant<float>(api, info, kScales, format.n * format.blocks(), &kernel->scales));
    return bias ? take_constant<float>(api, info, kBias, format.n, &kernel->bias) : nullptr;
}

ort::Status* create_kernel(
    const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** made
) {
    std::unique_ptr<Kernel> kernel(new (std::nothrow) Kernel{});
    if (!kernel) return no_memory(*api);
    RETURN_IF_FAILED(read_kernel(*api, info, kernel.get()));
    *made = kernel.release();
    return nullptr;
}

ort::ElementType input_type(const ort::CustomOp*, size_t index) {
    constexpr ort::ElementType types[kInputs] = {ort::kFloat, ort::kUint8, ort::kFloat,
                                                 ort::kUint8, ort::kInt32, ort::kFloat};
    return types[index];
}

ort::Characteristic input_characteristic(const ort::CustomOp*, size_t index) {
    return index < kZeroPoints ? ort::kRequired : ort::kOptional;
}

ort::CustomOp describe() {
    ort::CustomOp op = operators::describe();
    op.name = [](const ort::CustomOp*) { return kName; };
    op.input_type = input_type;
    op.input_count = [](const ort::CustomOp*) { return size_t{kInputs}; };
    op.input_characteristic = input_characteristic;
    op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
    op.output_count = [](const ort::CustomOp*) { return size_t{1}; };
    op.create_kernel_with_status = create_kernel;
    op.compute_with_status = compute;
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace

const ort::CustomOp* matmul_nbits() {
    static const ort::CustomOp op = describe();
    return &op;
}
