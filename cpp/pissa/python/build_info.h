// What was built, and what of it this machine uses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"

namespace pissa::python {

inline void define_build_info(pybind11::module_& m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = PISSA_VERSION;
        info["compiler"] = PISSA_COMPILER;
        info["torch_target"] = PISSA_TORCH_TARGET;
        info["isa"] = std::string(cpu::kernels().isa);
        info["isas_available"] = cpu::available_isas();
#ifdef PISSA_CUDA_RUNTIME
        pybind11::dict cuda;
        cuda["runtime"] = PISSA_CUDA_RUNTIME;
        cuda["architectures"] = pybind11::str(PISSA_CUDA_ARCHITECTURES).attr("split")(",");
        info["cuda"] = cuda;
#else
        info["cuda"] = pybind11::none();
#endif
        return info;
      },
      "Version, compiler, oldest torch supported, instruction set in use and the available ones (best last), CUDA.");
}

}  // namespace pissa::python
