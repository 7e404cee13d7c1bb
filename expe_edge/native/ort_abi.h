// The part of onnxruntime's C interface that a custom operator needs, as facts about its layout.
//
// `OrtApi` is a table of functions that releases only append to, so a function is known by its place in it. The places
// are those of version 18 of the interface, which onnxruntime 1.18 and every later one offers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 18;

struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct TensorInfo;
struct ShapeContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

// Places of functions in the table.
enum Place : size_t {
    kCreateStatus = 0,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorTypeAndShape = 65,
    kKernelInfoGetAttributeFloat = 85,
    kKernelInfoGetAttributeInt64 = 86,
    kKernelInfoGetAttributeString = 87,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseTensorInfo = 99,
    kKernelInfoGetInputCount = 230,
    kKernelInfoGetInputName = 232,
    kKernelInfoGetConstantInput = 249,
    kKernelContextParallelFor = 274,
};

// The table, with the functions that are used under their types.
class Api {
public:
    Status* create_status(ErrorCode code, const char* message) const {
        return call<Status*>(kCreateStatus, static_cast<int>(code), message);
    }
    void release(Status* status) const { call<void>(kReleaseStatus, status); }

    Status* create_domain(const char* name, CustomOpDomain** domain) const {
        return call<Status*>(kCreateCustomOpDomain, name, domain);
    }
    Status* add_operator(CustomOpDomain* domain, const struct CustomOp* op) const {
        return call<Status*>(kCustomOpDomainAdd, domain, op);
    }
    Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
        return call<Status*>(kAddCustomOpDomain, options, domain);
    }

    Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
        return call<Status*>(kKernelInfoGetAttributeInt64, info, name, value);
    }
    Status* attribute(const KernelInfo* info, const char* name, float* value) const {
        return call<Status*>(kKernelInfoGetAttributeFloat, info, name, value);
    }
    // size: bytes of `text`, its end included, and becomes those that were needed.
    Status* attribute(const KernelInfo* info, const char* name, char* text, size_t* size) const {
        return call<Status*>(kKernelInfoGetAttributeString, info, name, text, size);
    }
    Status* input_count(const KernelInfo* info, size_t* count) const {
        return call<Status*>(kKernelInfoGetInputCount, info, count);
    }
    // size: bytes of `name`, its end included; where `name` is null, becomes the bytes needed.
    Status* input_name(const KernelInfo* info, size_t index, char* name, size_t* size) const {
        return call<Status*>(kKernelInfoGetInputName, info, index, name, size);
    }
    Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
        return call<Status*>(kKernelInfoGetConstantInput, info, index, is_constant, value);
    }

    Status* input(const KernelContext* context, size_t index, const Value** value) const {
        return call<Status*>(kKernelContextGetInput, context, index, value);
    }
    Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t axes, Value** value) const {
        return call<Status*>(kKernelContextGetOutput, context, index, sizes, axes, value);
    }
    Status* parallel_for(
        const KernelContext* context, void (*task)(void*, size_t), size_t tasks, size_t batches, void* data
    ) const {
        return call<Status*>(kKernelContextParallelFor, context, task, tasks, batches, data);
    }

    Status* data(Value* value, void** data) const { return call<Status*>(kGetTensorMutableData, value, data); }
    Status* tensor_info(const Value* value, TensorInfo** info) const {
        return call<Status*>(kGetTensorTypeAndShape, value, info);
    }
    void release(TensorInfo* info) const { call<void>(kReleaseTensorInfo, info); }
    Status* axis_count(const TensorInfo* info, size_t* axes) const {
        return call<Status*>(kGetDimensionsCount, info, axes);
    }
    Status* sizes(const TensorInfo* info, int64_t* sizes, size_t axes) const {
        return call<Status*>(kGetDimensions, info, sizes, axes);
    }

private:
    template <typename Result, typename... Arguments>
    Result call(Place place, Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(functions_[place])(arguments...);
    }

    void (*functions_[kKernelContextParallelFor + 1])();
};

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

// What onnxruntime asks an operator. Where a function is null, it takes a default.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*execution_provider)(const CustomOp*);
    ElementType (*input_type)(const CustomOp*, size_t index);
    size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, size_t index);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void* kernel, KernelContext*);
    void (*destroy_kernel)(void* kernel);
    Characteristic (*input_characteristic)(const CustomOp*, size_t index);
    Characteristic (*output_characteristic)(const CustomOp*, size_t index);
    MemoryType (*input_memory_type)(const CustomOp*, size_t index);
    int (*variadic_input_min_arity)(const CustomOp*);
    int (*variadic_input_homogeneity)(const CustomOp*);
    int (*variadic_output_min_arity)(const CustomOp*);
    int (*variadic_output_homogeneity)(const CustomOp*);
    Status* (*create_kernel_with_status)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
    Status* (*compute_with_status)(void* kernel, KernelContext*);
    Status* (*infer_output_shapes)(const CustomOp*, ShapeContext*);
    int (*first_version)(const CustomOp*);
    int (*last_version)(const CustomOp*);
    size_t (*may_inplace)(int** inputs, int** outputs);
    void (*release_may_inplace)(int* inputs, int* outputs);
    size_t (*alias_map)(int** inputs, int** outputs);
    void (*release_alias_map)(int* inputs, int* outputs);
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*));

}  // namespace ort
