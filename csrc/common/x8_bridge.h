// x in 8 bits, as the CUDA ops make it for their kernels before they run one.
#pragma once

#include "common/torch_cuda.h"
#include "quant_linear/op.h"

namespace taut::quant_linear {

// 8-bit activations: the codes, units and multiples of x, in one allocation.
struct QuantizedX {
  Tensor scratch;
  QuantizedRows rows;

  QuantizedX(const CudaCall& call, const Tensor& like, const CudaParams& p, bool for_sparse) {
    const int64_t k8 = padded_k8(p.weight.K), code_bytes = (p.M * k8 + 255) / 256 * 256, unit_bytes = (p.M * 4 + 255) / 256 * 256;
    const int64_t multiple_bytes = p.activations == Activations::kInt8 ? p.M * (k8 / 32) * 4 : 0;
    scratch = scratch_bytes(like, code_bytes + unit_bytes + multiple_bytes);
    uint8_t* codes = aligned(scratch);
    float* row_unit = reinterpret_cast<float*>(codes + code_bytes);
    float* multiple = multiple_bytes ? reinterpret_cast<float*>(codes + code_bytes + unit_bytes) : nullptr;
    call.expose("x8 codes", codes, p.M * k8, true);
    call.expose("x8 row_unit", row_unit, p.M * 4, true);
    if (multiple) call.expose("x8 multiple", multiple, multiple_bytes, true);
    cuda_sm75_quantize_rows::run(p, for_sparse, codes, row_unit, multiple);
    rows = {codes, row_unit, multiple};
  }
};

}  // namespace taut::quant_linear
