#include "pissa/cpu/factorize.h"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "pissa/core/error.h"
#include "pissa/core/tridiagonal.h"

namespace pissa::cpu {
namespace {

using RowMajorF32 = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowMajorF64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<RowMajorF32, Eigen::Unaligned, Eigen::OuterStride<>>;

Eigen::MatrixXd lower_triangle(const double* gram, std::int64_t k) {
  return Eigen::Map<const RowMajorF64>(gram, k, k).triangularView<Eigen::Lower>();
}

// Computes only the leading eigenpairs: eigenvalues of the tridiagonal form, their eigenvectors by inverse iteration
// from different random starts, and a Rayleigh-Ritz combination of those, which separates what remains mixed among
// close eigenvalues. Returns false if the vectors are too dependent for that.
bool leading_eigh(const Eigen::MatrixXd& matrix, std::span<double> values, Strided& out) {
  const Eigen::Index k = matrix.rows();
  const Eigen::Index count = static_cast<Eigen::Index>(values.size());
  const Eigen::Tridiagonalization<Eigen::MatrixXd> form(matrix);
  const Eigen::VectorXd diagonal = form.diagonal();
  const Eigen::VectorXd subdiagonal = form.subDiagonal();
  Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver;
  solver.computeFromTridiagonal(diagonal, subdiagonal, Eigen::EigenvaluesOnly);
  if (solver.info() != Eigen::Success) return false;
  const double largest = solver.eigenvalues().cwiseAbs().maxCoeff();
  const double tiny = std::max(largest * std::numeric_limits<double>::epsilon(), std::numeric_limits<double>::min());

  Eigen::MatrixXd basis(k, count), room(k, 3);
  std::uint64_t state = 0;  // a linear congruential generator; any start with a part of the eigenvector is good enough
  for (Eigen::Index i = 0; i < count; ++i) {
    for (Eigen::Index j = 0; j < k; ++j) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      basis(j, i) = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
    }
    const double shift = solver.eigenvalues()[k - 1 - i];
    for (int step = 0; step < 3; ++step) {
      solve_tridiagonal({diagonal.data(), subdiagonal.data(), k}, shift, tiny, {&basis(0, i)}, {&room(0, 0)},
                        {&room(0, 1)}, {&room(0, 2)});
      basis.col(i).normalize();
    }
  }
  Eigen::MatrixXd product = diagonal.asDiagonal() * basis;
  product.topRows(k - 1) += subdiagonal.asDiagonal() * basis.bottomRows(k - 1);
  product.bottomRows(k - 1) += subdiagonal.asDiagonal() * basis.topRows(k - 1);

  const Eigen::MatrixXd overlap = basis.transpose() * basis;
  const Eigen::LLT<Eigen::MatrixXd> llt(overlap);
  if (llt.info() != Eigen::Success || llt.matrixLLT().diagonal().minCoeff() < 1e-3) return false;
  Eigen::MatrixXd projected = basis.transpose() * product;
  llt.matrixL().solveInPlace(projected);
  projected.transposeInPlace();
  llt.matrixL().solveInPlace(projected);
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> ritz(projected);
  if (ritz.info() != Eigen::Success) return false;
  Eigen::MatrixXd rotation = ritz.eigenvectors();
  llt.matrixU().solveInPlace(rotation);
  Eigen::MatrixXd vectors = basis * rotation;
  vectors.applyOnTheLeft(form.matrixQ());
  for (Eigen::Index i = 0; i < count; ++i) {
    values[i] = std::max(ritz.eigenvalues()[count - 1 - i], 0.0);
    out.row(i) = vectors.col(count - 1 - i).transpose().cast<float>();
  }
  return true;
}

}  // namespace

std::optional<std::vector<double>> cholesky_inverse(const double* gram, std::int64_t k, double least_ratio,
                                                    double least_pivot, float* inverse) {
  const Eigen::LLT<Eigen::MatrixXd> llt(lower_triangle(gram, k));
  if (llt.info() != Eigen::Success) return std::nullopt;
  const Eigen::VectorXd diagonal = llt.matrixLLT().diagonal();
  if (!(diagonal.minCoeff() > std::max(least_pivot, least_ratio * diagonal.maxCoeff()))) return std::nullopt;
  const Eigen::MatrixXd inverse64 = llt.matrixL().solve(Eigen::MatrixXd::Identity(k, k));
  Eigen::Map<RowMajorF32>(inverse, k, k) = inverse64.cast<float>();
  return std::vector<double>(diagonal.begin(), diagonal.end());
}

void householder_rows(float* data, std::int64_t done, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
  Strided matrix(data, rows, cols, Eigen::OuterStride<>(ld));
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(matrix.cast<double>().transpose());
  Eigen::MatrixXd q = qr.householderQ() * Eigen::MatrixXd::Identity(cols, rows);
  for (std::int64_t i = done; i < rows; ++i) {
    const double sign = qr.matrixQR()(i, i) < 0 ? -1.0 : 1.0;
    matrix.row(i) = (sign * q.col(i)).transpose().cast<float>();
  }
}

void eigh(const double* gram, std::int64_t k, std::span<double> values, float* vectors, std::int64_t ld) {
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  const Eigen::MatrixXd matrix = lower_triangle(gram, k);
  Strided out(vectors, count, k, Eigen::OuterStride<>(ld));
  // All eigenvectors take several times as long as the tridiagonal form: at k = 720, 206 ms compared with 42 ms.
  constexpr std::int64_t kSmall = 96;
  if (k > kSmall && 2 * count <= k && leading_eigh(matrix, values, out)) return;
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(matrix);
  if (solver.info() != Eigen::Success) {
    throw std::runtime_error(message("the eigenvalues of a ", k, " x ", k, " Gram matrix did not converge"));
  }
  for (std::int64_t i = 0; i < count; ++i) {  // Eigen sorts ascending
    values[i] = std::max(solver.eigenvalues()[k - 1 - i], 0.0);
    out.row(i) = solver.eigenvectors().col(k - 1 - i).transpose().cast<float>();
  }
}

}  // namespace pissa::cpu
