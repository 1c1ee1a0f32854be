// pissa._C: build information, limits, and the numpy entry points. The torch ops live in the same library and register
// themselves when it is loaded (torch/schema.cc).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "pissa/python/build_info.h"
#include "pissa/python/limits.h"
#include "pissa/python/numpy_ops.h"

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled core of pissa. Import torch first; use pissa and pissa.ops instead of this module.";
  pissa::python::define_build_info(m);
  pissa::python::define_limits(m);
  pissa::python::define_numpy_ops(m);
}
