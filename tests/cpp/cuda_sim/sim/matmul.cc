// cublasLtMatmul. What it refuses is what the real one refuses or is wrong to be given; the sums are in double.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "sim/blas.h"

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
  bool rounds_parts;  // adds up parts of a sum in the output's type
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
    const bool f64 = desc.compute == CUBLAS_COMPUTE_64F && desc.scale == CUDA_R_64F;
    const bool f32 = desc.compute == CUBLAS_COMPUTE_32F && desc.scale == CUDA_R_32F;
    if (a.type != b.type || c.type != d.type) return false;
    if (desc.op_a == CUBLAS_OP_C || desc.op_b == CUBLAS_OP_C) return false;
    if (desc.epilogue == CUBLASLT_EPILOGUE_BIAS && desc.bias_type != -1 && desc.bias_type != d.type) return false;
    if (desc.epilogue != CUBLASLT_EPILOGUE_BIAS && desc.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return false;
    switch (a.type) {
      case CUDA_R_64F:
        return f64 && d.type == CUDA_R_64F;
      case CUDA_R_32F:
        return f32 && d.type == CUDA_R_32F;
      case CUDA_R_16BF:
      case CUDA_R_16F:
        return f32 && (d.type == a.type || d.type == CUDA_R_32F);
      default:
        return false;
    }
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

std::optional<Problem> problem_of(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
  if (!desc || !a || !b || !c || !d) return {};
  return Problem{*desc, *a, *b, *c, *d};
}

std::size_t size_of(int type) {
  switch (type) {
    case CUDA_R_64F:
      return 8;
    case CUDA_R_32F:
      return 4;
    default:
      return 2;
  }
}

Type type_of(int type) {
  switch (type) {
    case CUDA_R_64F:
      return Type::f64;
    case CUDA_R_32F:
      return Type::f32;
    case CUDA_R_16BF:
      return Type::bf16;
    default:
      return Type::f16;
  }
}

double load(int type, const void* from, std::size_t index) {
  switch (type) {
    case CUDA_R_64F:
      return static_cast<const double*>(from)[index];
    case CUDA_R_32F:
      return static_cast<const float*>(from)[index];
    case CUDA_R_16BF:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[index]);
    default:
      return __half2float(static_cast<const __half*>(from)[index]);
  }
}

/// To float with the last bit set if anything was lost: rounding that to fewer bits is rounding once.
float to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (nearest == value || std::isnan(value)) return nearest;
  auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::fabs(nearest) > std::fabs(value)) --bits;
  return std::bit_cast<float>(bits | 1);
}

void store(int type, void* to, std::size_t index, double value) {
  switch (type) {
    case CUDA_R_64F:
      static_cast<double*>(to)[index] = value;
      break;
    case CUDA_R_32F:
      static_cast<float*>(to)[index] = static_cast<float>(value);
      break;
    case CUDA_R_16BF:
      static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(to_odd(value));
      break;
    default:
      static_cast<__half*>(to)[index] = __float2half_rn(to_odd(value));
  }
}

double rounded(int type, double value) {
  double stored;
  store(type, &stored, 0, value);
  return load(type, &stored, 0);
}

/// The first element of a matrix of the batch, all of it allocated.
template <class Pointer>
Pointer* matrix(Pointer* first, const Layout& layout, int batch, const char* what) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  const auto element = static_cast<std::int64_t>(size_of(layout.type));
  Byte* start = static_cast<Byte*>(first) + batch * layout.batch_stride * element;
  require_allocated(start, extent(layout.rows, layout.cols, static_cast<std::size_t>(layout.ld), element), what);
  return start;
}

/// op(matrix) in double, its columns one after the other.
std::vector<double> decoded(const void* from, const Layout& layout, cublasOperation_t op) {
  std::vector<double> result(layout.rows * layout.cols);
  for (std::uint64_t j = 0; j < layout.cols; ++j) {
    for (std::uint64_t i = 0; i < layout.rows; ++i) {
      const double value = load(layout.type, from, j * static_cast<std::uint64_t>(layout.ld) + i);
      result[op == CUBLAS_OP_N ? j * layout.rows + i : i * layout.cols + j] = value;
    }
  }
  return result;
}

/// Of all different matrices of the batch: one without a stride is the same each time.
double bytes_of(const Layout& layout) {
  const int different = layout.batch_stride == 0 ? 1 : layout.batch;
  return 1.0 * different * static_cast<double>(layout.rows * layout.cols * size_of(layout.type));
}

void record_matmul(const Problem& problem, bool reads_c) {
  const auto& [desc, a, b, c, d] = problem;
  const double bias = desc.epilogue == CUBLASLT_EPILOGUE_BIAS ? static_cast<double>(d.rows * size_of(d.type)) : 0;
  const auto m = static_cast<std::int64_t>(problem.m()), n = static_cast<std::int64_t>(problem.n()),
             k = static_cast<std::int64_t>(problem.k());
  record({.kind = Kind::library,
          .name = "cublasLtMatmul",
          .type = type_of(a.type),
          .m = m,
          .n = n,
          .k = k,
          .batch = d.batch,
          .flops = d.batch * gemm_flops(static_cast<double>(m), static_cast<double>(n), static_cast<double>(k)),
          .bytes = bytes_of(a) + bytes_of(b) + (reads_c ? bytes_of(c) : 0.0) + bytes_of(d) + bias});
}

struct Operands {
  const void *a, *b, *c;
  void* d;
  double alpha, beta;
  bool rounds_parts;
};

void multiply(const Problem& problem, const Operands& with, int batch) {
  const auto [desc, a_layout, b_layout, c_layout, d_layout] = problem;
  const std::uint64_t m = problem.m(), n = problem.n(), k = problem.k();
  const auto a = decoded(matrix(with.a, a_layout, batch, "cublasLtMatmul: A"), a_layout, desc.op_a);
  const auto b = decoded(matrix(with.b, b_layout, batch, "cublasLtMatmul: B"), b_layout, desc.op_b);
  const void* c = with.beta == 0 ? nullptr : matrix(with.c, c_layout, batch, "cublasLtMatmul: C");
  void* d = matrix(with.d, d_layout, batch, "cublasLtMatmul: D");
  std::vector<double> sums(m), bias(m);
  if (desc.epilogue == CUBLASLT_EPILOGUE_BIAS) {
    require_allocated(desc.bias, m * size_of(d_layout.type), "cublasLtMatmul: bias");
    for (std::uint64_t i = 0; i < m; ++i) bias[i] = load(d_layout.type, desc.bias, i);
  }
  for (std::uint64_t j = 0; j < n; ++j) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (std::uint64_t p = 0; p < k; ++p) {
      if (with.rounds_parts && p == (k + 1) / 2) {
        for (double& sum : sums) sum = rounded(d_layout.type, sum);
      }
      const double factor = b[j * k + p];
      const double* column = a.data() + p * m;
      double* to = sums.data();
      for (std::uint64_t i = 0; i < m; ++i) to[i] += factor * column[i];
    }
    for (std::uint64_t i = 0; i < m; ++i) {
      double value = with.alpha * sums[i] + bias[i];
      if (c) value += with.beta * load(c_layout.type, c, j * static_cast<std::uint64_t>(c_layout.ld) + i);
      store(d_layout.type, d, j * static_cast<std::uint64_t>(d_layout.ld) + i, value);
    }
  }
}

bool is_aligned(const void* pointer, std::uint32_t alignment) {
  return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

/// Sets one attribute; its size must be that of the real one's type.
template <class Stored, class Given = Stored>
cublasStatus_t assign(Stored& stored, const void* value, std::size_t bytes) {
  if (!value || bytes != sizeof(Given)) return CUBLAS_STATUS_INVALID_VALUE;
  Given given;
  std::memcpy(&given, value, sizeof given);
  stored = static_cast<Stored>(given);
  return CUBLAS_STATUS_SUCCESS;
}

template <class T, class... Args>
cublasStatus_t create(T** result, Args... args) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (!result) return CUBLAS_STATUS_INVALID_VALUE;
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

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return cublasCreate_v2(reinterpret_cast<cublasHandle_t*>(handle));
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return cublasDestroy_v2(reinterpret_cast<cublasHandle_t>(handle));
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  return create(desc, compute, scale);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
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
  if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
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
  if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
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
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  const auto problem = problem_of(desc, a, b, c, d);
  if (!problem || !preference || requested < 1 || !results || !returned) return CUBLAS_STATUS_INVALID_VALUE;
  *returned = 0;
  if (const cublasStatus_t status = problem->check()) return status;
  for (const std::uint32_t alignment : preference->alignments) {
    if (!std::has_single_bit(alignment)) return CUBLAS_STATUS_INVALID_VALUE;
  }
  constexpr std::uint32_t kRounding = CUBLASLT_REDUCTION_SCHEME_INPLACE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;
  Algorithm algorithm{problem->kind(),
                      preference->workspace_bytes < kWorkspaceBytes ? 0 : kWorkspaceBytes,
                      {},
                      (preference->reduction_schemes & kRounding) != 0};
  std::memcpy(algorithm.alignments, preference->alignments, sizeof algorithm.alignments);
  results[0] = {};
  std::memcpy(&results[0].algo, &algorithm, sizeof algorithm);
  results[0].workspaceSize = algorithm.workspace_bytes;
  results[0].wavesCount = 1;
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
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  const auto problem = problem_of(desc, a_layout, b_layout, c_layout, d_layout);
  if (!problem || !alpha || !beta || !a || !b || !d || !is_stream(stream)) return CUBLAS_STATUS_INVALID_VALUE;
  if (const cublasStatus_t status = problem->check()) return status;
  Operands operands{a, b, c, d, load(desc->scale, alpha, 0), load(desc->scale, beta, 0), false};
  if (operands.beta != 0 && !c) return CUBLAS_STATUS_INVALID_VALUE;
  const bool in_place = c == d && operands.beta != 0;
  if (in_place && (c_layout->ld != d_layout->ld || c_layout->batch_stride != d_layout->batch_stride)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (desc->epilogue == CUBLASLT_EPILOGUE_BIAS && !desc->bias) return CUBLAS_STATUS_INVALID_VALUE;
  std::uint64_t needed = 0;
  if (algo) {
    Algorithm algorithm;
    std::memcpy(&algorithm, algo, sizeof algorithm);
    if (algorithm.kind != problem->kind()) return CUBLAS_STATUS_INVALID_VALUE;
    const void* pointers[] = {a, b, operands.beta == 0 ? nullptr : c, d};
    for (int i = 0; i < 4; ++i) {
      if (!is_aligned(pointers[i], algorithm.alignments[i])) return CUBLAS_STATUS_INVALID_VALUE;
    }
    needed = algorithm.workspace_bytes;
    operands.rounds_parts = algorithm.rounds_parts;
  }
  if (workspace_bytes < needed || (needed > 0 && (!workspace || !is_aligned(workspace, 16)))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  record_matmul(*problem, operands.beta != 0);
  enqueue(stream, [=, kept = *problem] {
    spoil(workspace, workspace ? workspace_bytes : 0, "cublasLtMatmul: workspace");
    for (int batch = 0; batch < kept.d.batch; ++batch) multiply(kept, operands, batch);
  });
  return CUBLAS_STATUS_SUCCESS;
}
