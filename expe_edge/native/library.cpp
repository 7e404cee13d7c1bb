// What onnxruntime looks for in a library of operators.
#include "operator.h"

// The domain is made anew for each session, which never frees it.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base
) {
    const ort::Api* api = base->get_api(ort::kApiVersion);
    ort::CustomOpDomain* domain = nullptr;
    RETURN_IF_FAILED(api->create_domain(operators::kDomain, &domain));
    for (const ort::CustomOp* op : {matmul_nbits(), attention_over_floats(), attention_over_levels()}) {
        RETURN_IF_FAILED(api->add_operator(domain, op));
    }
    return api->add_domain(options, domain);
}
