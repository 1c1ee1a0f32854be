// What was built, and what of it this machine uses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "isa.h"

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
        return info;
      },
      "Version, compiler, oldest torch supported, instruction set in use and the available ones (best last).");
}

}  // namespace pissa::python
