// What onnxruntime looks for in a library of operators.
#include "operator.h"

namespace {

// A domain is made anew for each session, which never frees it.
ort::Status* add_domain(
    ort::SessionOptions* options, const ort::Api* api, const char* name, std::initializer_list<const ort::CustomOp*> ops
) {
    ort::CustomOpDomain* domain = nullptr;
    RETURN_IF_FAILED(api->create_domain(name, &domain));
    for (const ort::CustomOp* op : ops) RETURN_IF_FAILED(api->add_operator(domain, op));
    return api->add_domain(options, domain);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base
) {
    const ort::Api* api = base->get_api(ort::kApiVersion);
    const auto known = {matmul_nbits(), attention_over_floats(), attention_over_levels()};
    RETURN_IF_FAILED(add_domain(options, api, operators::kMicrosoft, known));
    return add_domain(options, api, operators::kOwn, functions());
}
