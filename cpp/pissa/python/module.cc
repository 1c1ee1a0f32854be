// pissa._C: what was built, what of it this machine uses, and limits. The torch ops live in the same library and
// register themselves when it is loaded (torch/schema.cc).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"
#include "pissa/python/limits.h"

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = PISSA_VERSION;
  info["compiler"] = PISSA_COMPILER;
  info["torch_target"] = PISSA_TORCH_TARGET;
  info["isa"] = std::string(pissa::cpu::kernels().isa);
  info["int8"] = pissa::cpu::kernels().bytes != 0;
  info["isas_available"] = pissa::cpu::available_isas();
  info["isas_unused"] = pissa::cpu::unused_isas();
#ifdef PISSA_CUDA_RUNTIME
  py::dict cuda;
  cuda["runtime"] = PISSA_CUDA_RUNTIME;
  cuda["architectures"] = py::str(PISSA_CUDA_ARCHITECTURES).attr("split")(",");
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module.";
  m.def(
      "build_info", build_info,
      "Version, compiler, oldest torch supported, instruction set in use, whether it multiplies bytes, the available\n"
      "ones (fastest last), why not the faster ones, CUDA.");
  m.def("isa_failure", pissa::cpu::isa_failure,
        "The self-test of an instruction set that failed and what follows from it, or an empty string.");
  pissa::python::define_limits(m);
}
