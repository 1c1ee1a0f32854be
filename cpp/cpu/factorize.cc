#include "factorize.h"

#include <Eigen/Cholesky>
#include <Eigen/Eigenvalues>
#include <Eigen/QR>
#include <algorithm>
#include <stdexcept>

#include "pissa/error.h"

namespace pissa::cpu {
namespace {

using RowMajorF32 = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowMajorF64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Strided = Eigen::Map<RowMajorF32, Eigen::Unaligned, Eigen::OuterStride<>>;

Eigen::MatrixXd lower_triangle(const double* gram, std::int64_t k) {
  return Eigen::Map<const RowMajorF64>(gram, k, k).triangularView<Eigen::Lower>();
}

}  // namespace

bool cholesky_inverse(const double* gram, std::int64_t k, double least_ratio, double least_pivot, float* inverse) {
  const Eigen::LLT<Eigen::MatrixXd> llt(lower_triangle(gram, k));
  if (llt.info() != Eigen::Success) return false;
  const Eigen::VectorXd pivots = llt.matrixLLT().diagonal();
  if (!(pivots.minCoeff() > std::max(least_pivot, least_ratio * pivots.maxCoeff()))) return false;
  const Eigen::MatrixXd inverse64 = llt.matrixL().solve(Eigen::MatrixXd::Identity(k, k));
  Eigen::Map<RowMajorF32>(inverse, k, k) = inverse64.cast<float>();
  return true;
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
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(lower_triangle(gram, k));
  if (solver.info() != Eigen::Success) {
    throw std::runtime_error(message("the eigenvalues of a ", k, " x ", k, " Gram matrix did not converge"));
  }
  const std::int64_t count = static_cast<std::int64_t>(values.size());
  Strided out(vectors, count, k, Eigen::OuterStride<>(ld));
  for (std::int64_t i = 0; i < count; ++i) {  // Eigen sorts ascending
    values[i] = std::max(solver.eigenvalues()[k - 1 - i], 0.0);
    out.row(i) = solver.eigenvectors().col(k - 1 - i).transpose().cast<float>();
  }
}

}  // namespace pissa::cpu
