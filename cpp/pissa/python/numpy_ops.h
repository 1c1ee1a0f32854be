// The core on numpy arrays (float32, C order), for use without torch tensors: same results, one thread.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "pissa/core/quantized.h"
#include "pissa/core/rsvd.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/isa.h"

namespace pissa::python {

using Array = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;
using Bytes = pybind11::array_t<std::uint8_t, pybind11::array::c_style>;

inline cpu::CpuBackend numpy_backend() {
  static const cpu::ThreadExecutor executor(1);
  return {executor, cpu::kernels()};
}

inline Matrix matrix(const Array& array) {
  PISSA_CHECK(array.ndim() == 2, "weight: got ", array.ndim(), " dimensions; needed: 2, [out, in]");
  return {array.data(), array.shape(0), array.shape(1), array.shape(1), Format::f32};
}

inline MutableMatrix mutable_matrix(Array& array) {
  return {array.mutable_data(), array.shape(0), array.shape(1), array.shape(1), Format::f32};
}

inline pybind11::tuple svd_lowrank(const Array& weight, std::int64_t r, std::optional<std::int64_t> passes,
                                   std::uint64_t seed) {
  const Matrix w = matrix(weight);
  const SvdOptions options{SvdMethod::krylov, passes, seed};
  check_svd(w, r, options);
  Array u({w.rows, r});
  Array s(r);
  Array vh({r, w.cols});
  const MutableMatrix u_view = mutable_matrix(u);
  const MutableMatrix vh_view = mutable_matrix(vh);
  float* s_data = s.mutable_data();
  {
    pybind11::gil_scoped_release release;
    auto backend = numpy_backend();
    const auto factors = pissa::svd_lowrank(backend, w, r, options);
    const std::vector<float> ones(r, 1.0f);
    backend.scale_rows(factors.u.view(), Matrix{ones.data(), 1, r, r}, 1.0f, u_view, Op::t);
    backend.copy(factors.v.view(), vh_view);
    backend.copy(factors.s.view(), MutableMatrix{s_data, 1, r, r});
  }
  return pybind11::make_tuple(u, s, vh);
}

inline pybind11::tuple nf4_quantize(const Array& weight, std::int64_t blocksize) {
  const Matrix w = matrix(weight);
  check_blocksize(Format::nf4, blocksize, w.cols);
  Bytes codes(code_bytes(Format::nf4, w.rows * w.cols));
  Array absmax(ceil_div(w.rows * w.cols, blocksize));
  const QuantOutput out{Format::nf4, blocksize, codes.mutable_data(), absmax.mutable_data()};
  {
    pybind11::gil_scoped_release release;
    numpy_backend().gemm_quantized({}, w, out);
  }
  return pybind11::make_tuple(codes, absmax);
}

inline Array nf4_dequantize(const Bytes& codes, const Array& absmax, std::int64_t rows, std::int64_t cols,
                            std::int64_t blocksize) {
  check_blocksize(Format::nf4, blocksize, cols);
  PISSA_CHECK(rows >= 0 && cols >= 0 && codes.size() == code_bytes(Format::nf4, rows * cols) &&
                  absmax.size() == ceil_div(rows * cols, blocksize),
              "codes, absmax: got ", codes.size(), " and ", absmax.size(),
              " elements; needed: ", code_bytes(Format::nf4, rows * cols), " and ", ceil_div(rows * cols, blocksize),
              " for [", rows, ", ", cols, "]");
  Array out({rows, cols});
  Matrix w{codes.data(), rows, cols, cols, Format::nf4};
  w.scales.blocksize = blocksize;
  w.scales.absmax = absmax.data();
  const MutableMatrix out_view = mutable_matrix(out);
  {
    pybind11::gil_scoped_release release;
    numpy_backend().copy(w, out_view);
  }
  return out;
}

inline void define_numpy_ops(pybind11::module_& m) {
  using pybind11::arg;
  m.def("svd_lowrank", svd_lowrank, arg("weight"), arg("r"), arg("passes") = pybind11::none(), arg("seed") = 0,
        "Leading r singular triplets (U [out, r], S [r], Vh [r, in]) of a float32 array [out, in].\n"
        "passes over it: an even number, or None for as many as the rank needs.");
  m.def(
      "nf4_quantize", nf4_quantize, arg("weight"), arg("blocksize") = 64,
      "(codes uint8 [ceil(out * in / 2)], absmax float32 [blocks]) of a float32 array [out, in], bitsandbytes' bytes.");
  m.def("nf4_dequantize", nf4_dequantize, arg("codes"), arg("absmax"), arg("rows"), arg("cols"), arg("blocksize") = 64,
        "float32 array [rows, cols] from NF4 codes and absmax.");
}

}  // namespace pissa::python
