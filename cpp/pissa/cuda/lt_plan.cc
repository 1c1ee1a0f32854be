#include "pissa/cuda/lt_plan.h"

#include <bit>
#include <map>
#include <utility>

#include "pissa/cuda/of_thread.h"

namespace pissa::cuda {
namespace {

// What NVIDIA recommends for Hopper. Freed after the call, on its stream: torch's allocator hands it out again.
constexpr std::int64_t kWorkspaceBytes = 32 << 20;

// Batches of many lengths make many shapes: a plan has 2 KB.
constexpr std::size_t kMostPlans = 1024;

// Of a pointer and of the distances between columns and matrices: what a kernel may rely on.
std::uint32_t alignment(const BlasOperand& operand) {
  const std::int64_t size = operand.type == CUDA_R_64F ? 8 : operand.type == CUDA_R_32F ? 4 : 2;
  const std::uint64_t all = reinterpret_cast<std::uintptr_t>(operand.data) |
                            static_cast<std::uint64_t>((operand.ld | operand.stride) * size) | 256u;
  return 1u << std::countr_zero(all);
}

// Everything on which a plan depends.
using Key = std::array<std::int64_t, 25>;

Key key_of(const BlasProblem& problem) {
  Key key{problem.compute, problem.count, problem.bias != nullptr, problem.bias_type};
  std::size_t at = 4;
  for (const BlasOperand& it : {problem.left, problem.right, problem.out}) {
    const std::int64_t parts[] = {it.type, it.rows, it.cols, it.ld, it.stride, it.op, alignment(it)};
    for (const std::int64_t part : parts) key[at++] = part;
  }
  return key;
}

// map<Key, LtPlan>, a type of its own because OfThread is asked for it by type.
struct Plans {
  std::map<Key, LtPlan> by_key;
};

// Of statuses with which the handle's own GEMM may still succeed: bf16 on Turing is ARCH_MISMATCH.
bool knows_no_way(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH;
}

cublasLtHandle_t lt_handle(const Context& context) { return reinterpret_cast<cublasLtHandle_t>(context.blas); }

}  // namespace

void check(cublasStatus_t status, const Context& context, const BlasProblem& problem, const char* call) {
  if (succeeded(status)) return;
  check(status, context, call, "m", problem.out.cols, "n", problem.out.rows, "k", problem.inner(), "ld",
        problem.out.ld);
}

const LtPlan& LtPlan::of(const Context& context, const BlasProblem& problem) {
  std::map<Key, LtPlan>& plans = OfThread<Plans>::at(context.device).by_key;
  const Key key = key_of(problem);
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  LtPlan plan(context, problem);
  if (plans.size() == kMostPlans) plans.clear();
  return plans.emplace(key, std::move(plan)).first->second;
}

void LtPlan::forget(const Context& context) { OfThread<Plans>::at(context.device).by_key.clear(); }

bool LtPlan::run(const Context& context, const BlasProblem& problem, const void* alpha, const void* beta) const {
  if (!best_) return false;
  if (problem.bias) {
    check(cublasLtMatmulDescSetAttribute(description_.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &problem.bias,
                                         sizeof problem.bias),
          context, problem, "cublasLtMatmulDescSetAttribute");
  }
  std::optional<Array<char>> workspace;
  try {
    workspace.emplace(context, static_cast<std::int64_t>(best_->workspaceSize));
  } catch (const OutOfMemory&) {
    return false;  // the handle has a workspace of its own
  }
  const cublasStatus_t status = cublasLtMatmul(
      lt_handle(context), description_.get(), alpha, problem.left.data, layouts_[0].get(), problem.right.data,
      layouts_[1].get(), beta, problem.out.data, layouts_[2].get(), const_cast<void*>(problem.out.data),
      layouts_[2].get(), &best_->algo, workspace->data(), best_->workspaceSize, context.stream);
  if (knows_no_way(status)) return false;
  check(status, context, problem, "cublasLtMatmul");
  return true;
}

LtPlan::LtPlan(const Context& context, const BlasProblem& problem)
    : description_(nullptr, cublasLtMatmulDescDestroy),
      layouts_{Owned<cublasLtMatrixLayout_t>(nullptr, cublasLtMatrixLayoutDestroy),
               Owned<cublasLtMatrixLayout_t>(nullptr, cublasLtMatrixLayoutDestroy),
               Owned<cublasLtMatrixLayout_t>(nullptr, cublasLtMatrixLayoutDestroy)} {
  const auto make = [&](auto& owner, const char* call, auto create) {
    typename std::remove_reference_t<decltype(owner)>::pointer created = nullptr;
    check(create(&created), context, problem, call);
    owner.reset(created);
  };
  const auto set = [&](auto setter, const char* call, auto object, auto attribute, const auto& value) {
    check(setter(object, attribute, &value, sizeof value), context, problem, call);
  };

  const auto describe = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    set(cublasLtMatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute", description_.get(), attribute, value);
  };
  const cudaDataType_t scale_type = problem.compute == CUBLAS_COMPUTE_64F ? CUDA_R_64F : CUDA_R_32F;
  make(description_, "cublasLtMatmulDescCreate",
       [&](auto* to) { return cublasLtMatmulDescCreate(to, problem.compute, scale_type); });
  describe(CUBLASLT_MATMUL_DESC_TRANSA, problem.left.op);
  describe(CUBLASLT_MATMUL_DESC_TRANSB, problem.right.op);
  if (problem.bias) {
    describe(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, problem.bias);
    describe(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, problem.bias_type);
  }

  const BlasOperand* operands[] = {&problem.left, &problem.right, &problem.out};
  for (std::size_t i = 0; i < layouts_.size(); ++i) {
    const BlasOperand& operand = *operands[i];
    make(layouts_[i], "cublasLtMatrixLayoutCreate", [&](auto* to) {
      return cublasLtMatrixLayoutCreate(to, operand.type, static_cast<std::uint64_t>(operand.rows),
                                        static_cast<std::uint64_t>(operand.cols), operand.ld);
    });
    const auto stack = [&](cublasLtMatrixLayoutAttribute_t attribute, const auto& value) {
      set(cublasLtMatrixLayoutSetAttribute, "cublasLtMatrixLayoutSetAttribute", layouts_[i].get(), attribute, value);
    };
    if (problem.count > 1) stack(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, static_cast<std::int32_t>(problem.count));
    if (problem.count > 1) stack(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, operand.stride);
  }

  Owned<cublasLtMatmulPreference_t> preference(nullptr, cublasLtMatmulPreferenceDestroy);
  make(preference, "cublasLtMatmulPreferenceCreate", [](auto* to) { return cublasLtMatmulPreferenceCreate(to); });
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    set(cublasLtMatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute", preference.get(), attribute,
        value);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(kWorkspaceBytes));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(problem.left));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(problem.right));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(problem.out));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(problem.out));
  // Parts of a sum are added in f32: the other schemes do so in the output's type. With a bias there are no parts:
  // split-K adds it after it has rounded their sum to that type (pytorch#180875), under which schemes nobody says.
  const auto schemes = problem.bias ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(schemes));
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(lt_handle(context), description_.get(), layouts_[0].get(), layouts_[1].get(),
                                     layouts_[2].get(), layouts_[2].get(), preference.get(), 1, &best, &found);
  if (knows_no_way(status) || status == CUBLAS_STATUS_INVALID_VALUE) return;  // of layouts that only cublasLt refuses
  check(status, context, problem, "cublasLtMatmulAlgoGetHeuristic");
  if (found > 0 && best.state == CUBLAS_STATUS_SUCCESS) best_ = best;  // else its other members are not valid
}

}  // namespace pissa::cuda
