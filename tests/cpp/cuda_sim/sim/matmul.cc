// cublasLtMatmul. What it refuses is what the real one refuses or is wrong to be given.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "sim/blas.h"
#include "sim/modes.h"
#include "sim/product.h"

struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  cublasOperation_t op_a = CUBLAS_OP_N;
  cublasOperation_t op_b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  std::int32_t bias_type = -1;  // D's
};

struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  std::uint64_t rows;
  std::uint64_t cols;
  std::int64_t ld;
  std::int32_t batch = 1;
  std::int64_t batch_stride = 0;
};

struct cublasLtMatmulPreferenceOpaque_t {
  std::uint64_t workspace_bytes = 0;
  std::uint32_t alignments[4] = {256, 256, 256, 256};  // of A, B, C, D
  std::uint32_t reduction_schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
};

namespace cuda_sim::detail {
namespace {

using Layout = cublasLtMatrixLayoutOpaque_t;

/// What cublasLtMatmulAlgo_t holds.
struct Algorithm {
  std::uint64_t kind;  // of product that it was asked for
  std::uint64_t workspace_bytes;
  std::uint32_t alignments[4];
  bool rounds_parts;        // adds up parts of a sum in the output's type
  bool rounds_before_bias;  // splits a sum into parts, and rounds it before the bias is added
  bool refused;             // by cublasLtMatmul
};
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t));

/// What the heuristic asks for, where it is allowed to: so that callers have to bring it.
constexpr std::uint64_t kWorkspaceBytes = 4096;

struct Problem {
  cublasLtMatmulDescOpaque_t desc;
  Layout a, b, c, d;

  std::uint64_t m() const { return d.rows; }
  std::uint64_t n() const { return d.cols; }
  std::uint64_t k() const { return desc.op_a == CUBLAS_OP_N ? a.cols : a.rows; }

  std::uint64_t kind() const {
    std::uint64_t result = 1;
    for (const int part : {static_cast<int>(desc.compute), static_cast<int>(desc.op_a), static_cast<int>(desc.op_b),
                           static_cast<int>(desc.epilogue), static_cast<int>(a.type), static_cast<int>(d.type)}) {
      result = result * 131 + static_cast<std::uint64_t>(part);
    }
    return result;
  }

  bool supported() const {
    if (!types_supported(desc.compute, desc.scale, a.type, b.type, c.type, d.type)) return false;
    return desc.epilogue == CUBLASLT_EPILOGUE_DEFAULT || desc.bias_type == -1 || desc.bias_type == d.type;
  }

  bool consistent() const {
    for (const Layout* layout : {&a, &b, &c, &d}) {
      if (layout->rows == 0 || layout->cols == 0 || layout->batch < 1 || layout->batch != d.batch) return false;
      if (layout->ld < 0 || static_cast<std::uint64_t>(layout->ld) < layout->rows) return false;
    }
    const bool n_a = desc.op_a == CUBLAS_OP_N;
    const bool n_b = desc.op_b == CUBLAS_OP_N;
    return (n_a ? a.rows : a.cols) == m() && (n_b ? b.rows : b.cols) == k() && (n_b ? b.cols : b.rows) == n() &&
           c.rows == m() && c.cols == n();
  }

  cublasStatus_t check() const {
    if (!supported()) return CUBLAS_STATUS_NOT_SUPPORTED;
    return consistent() ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
  }
};

Stack stack(const void* data, const Layout& layout) {
  return {const_cast<void*>(data), layout.type, layout.rows, layout.cols, layout.ld, layout.batch_stride};
}

bool is_aligned(const void* pointer, std::uint32_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

/// Sets one attribute; its size must be that of the real one's type.
template <class Stored, class Given = Stored>
cublasStatus_t assign(Stored& stored, const void* value, std::size_t bytes) {
  if (bytes != sizeof(Given)) return CUBLAS_STATUS_INVALID_VALUE;
  Given given;
  std::memcpy(&given, value, sizeof given);
  stored = static_cast<Stored>(given);
  return CUBLAS_STATUS_SUCCESS;
}

template <class T, class... Args>
cublasStatus_t create(T** result, Args... args) {
  const BlasCall call;
  if (call.failed()) return call.status();
  *result = new T{args...};
  return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t destroy(T* object) {
  delete object;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace
}  // namespace cuda_sim::detail

using namespace cuda_sim::detail;

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  return create(desc, compute, scale);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  const BlasCall call;
  if (call.failed()) return call.status();
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return assign<cublasOperation_t, std::int32_t>(desc->op_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return assign<cublasOperation_t, std::int32_t>(desc->op_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return assign<cublasLtEpilogue_t, std::uint32_t>(desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return assign(desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return assign(desc->bias_type, value, bytes);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, std::uint64_t rows,
                                          std::uint64_t cols, std::int64_t ld) {
  return create(layout, type, rows, cols, ld);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                std::size_t bytes) {
  const BlasCall call;
  if (call.failed()) return call.status();
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      return assign(layout->batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
      return assign(layout->batch_stride, value, bytes);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) { return create(preference); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return destroy(preference); }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    std::size_t bytes) {
  const BlasCall call;
  if (call.failed()) return call.status();
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return assign(preference->workspace_bytes, value, bytes);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return assign(preference->reduction_schemes, value, bytes);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return assign(preference->alignments[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(reinterpret_cast<cublasHandle_t>(handle))) return status;
  if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
  const Problem problem{*desc, *a, *b, *c, *d};
  *returned = 0;
  if (const cublasStatus_t status = problem.check()) return status;
  for (const std::uint32_t alignment : preference->alignments) {
    if (!std::has_single_bit(alignment)) return CUBLAS_STATUS_INVALID_VALUE;
  }
  const cuda_sim::Defect defect = library_modes.defect;
  if (defect == cuda_sim::Defect::lt_arch) return CUBLAS_STATUS_ARCH_MISMATCH;
  if (defect == cuda_sim::Defect::lt_layouts) return CUBLAS_STATUS_INVALID_VALUE;
  const bool knows_none = std::ranges::min(preference->alignments) < library_modes.no_algorithm_below ||
                          problem.m() == library_modes.no_algorithm_for;
  if (knows_none && library_modes.no_algorithm == cuda_sim::NoAlgorithm::none_returned) return CUBLAS_STATUS_SUCCESS;
  if (knows_none && library_modes.no_algorithm == cuda_sim::NoAlgorithm::not_supported)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  constexpr std::uint32_t kRounding = CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
  Algorithm algorithm{problem.kind(),
                      preference->workspace_bytes < kWorkspaceBytes ? 0 : kWorkspaceBytes,
                      {},
                      (preference->reduction_schemes & kRounding) != 0,
                      preference->reduction_schemes != CUBLASLT_REDUCTION_SCHEME_NONE,
                      knows_none};
  std::memcpy(algorithm.alignments, preference->alignments, sizeof algorithm.alignments);
  results[0] = {};
  std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
  results[0].workspaceSize = algorithm.workspace_bytes;
  results[0].wavesCount = 1;
  if (defect == cuda_sim::Defect::lt_state) results[0].state = CUBLAS_STATUS_NOT_SUPPORTED;
  *returned = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t stream) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(reinterpret_cast<cublasHandle_t>(handle))) return status;
  if (!a || !b || !d || !is_stream(stream)) return CUBLAS_STATUS_INVALID_VALUE;
  if (device_of(stream) != current_device()) return CUBLAS_STATUS_EXECUTION_FAILED;
  const cuda_sim::Defect defect = library_modes.defect;
  if (defect == cuda_sim::Defect::lt_refuses) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (defect == cuda_sim::Defect::lt_fails) return CUBLAS_STATUS_EXECUTION_FAILED;
  const Problem problem{*desc, *a_layout, *b_layout, *c_layout, *d_layout};
  if (const cublasStatus_t status = problem.check()) return status;
  Product product{
      .call = "cublasLtMatmul",
      .op_a = desc->op_a,
      .op_b = desc->op_b,
      .a = stack(a, *a_layout),
      .b = stack(b, *b_layout),
      .c = stack(c, *c_layout),
      .d = stack(d, *d_layout),
      .batch = d_layout->batch,
      .alpha = load_scalar(desc->scale, alpha) * (defect == cuda_sim::Defect::lt_sums ? 0.5 : 1.0),
      .beta = load_scalar(desc->scale, beta),
      .bias = desc->epilogue == CUBLASLT_EPILOGUE_BIAS && defect != cuda_sim::Defect::lt_bias ? desc->bias : nullptr,
      .rounds_parts = false,
      .rounds_before_bias = false,
      .tf32 = desc->compute == CUBLAS_COMPUTE_32F_FAST_TF32,
      .flushes = library_modes.flush_denormals};
  if (product.beta != 0 && !c) return CUBLAS_STATUS_INVALID_VALUE;
  const bool in_place = c == d && product.beta != 0;
  if (in_place && (c_layout->ld != d_layout->ld || c_layout->batch_stride != d_layout->batch_stride)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (desc->epilogue == CUBLASLT_EPILOGUE_BIAS && !desc->bias) return CUBLAS_STATUS_INVALID_VALUE;
  std::uint64_t needed = 0;
  if (algo) {
    Algorithm algorithm;
    std::memcpy(&algorithm, algo, sizeof algorithm);
    if (algorithm.kind != problem.kind()) return CUBLAS_STATUS_INVALID_VALUE;
    if (algorithm.refused) return CUBLAS_STATUS_NOT_SUPPORTED;
    const void* pointers[] = {a, b, product.beta == 0 ? nullptr : c, d};
    for (int i = 0; i < 4; ++i) {
      if (!is_aligned(pointers[i], algorithm.alignments[i])) return CUBLAS_STATUS_INVALID_VALUE;
    }
    needed = algorithm.workspace_bytes;
    product.rounds_parts = algorithm.rounds_parts;
    product.rounds_before_bias = algorithm.rounds_before_bias;
  }
  if (workspace_bytes < needed || (needed > 0 && (!workspace || !is_aligned(workspace, 16)))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  record_product(product);
  enqueue(stream, [=] {
    spoil(workspace, workspace ? workspace_bytes : 0, "cublasLtMatmul: workspace");
    product.run();
  });
  return CUBLAS_STATUS_SUCCESS;
}
