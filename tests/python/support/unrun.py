"""The tests that a stand-in does not run: that for a GPU (`pytest --device cuda-stand-in`), and Wine, in the place of
Windows. They have only been read until a GPU runs them by `--device cuda`, or Windows.

A test in `FAILS` is run and has to fail: one that passes is an error, and so is one that is not there any more
(rules/test_unrun.py).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

import pytest
import torch

_COMPILE = "torch.compile compiles nothing below a mode"
_STREAMS = "streams of a GPU"
_GRAPHS = "captures a CUDA graph"
_ASKED = "transformers asks for the GPU"
_OPCHECK = "torch traces below its modes, with tensors that have no memory of which one could say where it is"

FAILS = {
    "ops/test_gpu.py::test_work_is_ordered_by_the_current_stream": _STREAMS,
    "ops/test_gpu.py::test_a_decomposition_on_a_stream_of_its_own": _STREAMS,
    "ops/test_gpu.py::test_forward_and_backward_in_a_graph": _GRAPHS,
    "ops/test_ops_linear.py::test_add_low_rank_compiles": _COMPILE,
    "ops/test_ops_linear.py::test_compiles_without_a_graph_break": _COMPILE,
    "base/test_bitsandbytes.py::test_a_model_that_transformers_has_loaded_quantised": _ASKED,
    "base/test_bitsandbytes.py::test_all_layers_are_dense_or_none_is": _ASKED,
    "base/test_bitsandbytes.py::test_an_adapter_on_a_dense_layer_leaves_the_codes": _ASKED,
    "base/test_bitsandbytes.py::test_a_mixture_that_no_configuration_describes_is_refused": _ASKED,
    "ops/test_gpu.py::test_a_weight_of_more_than_2_to_the_31_elements": "asks for 16 GiB of a GPU's memory",
}
"""Why a test does not pass on the stand-in."""

ABORTS = {
    "ops/test_fake_cuda.py::test_opcheck": _OPCHECK,
}
"""Why a test would end the process there. The others of ops/test_fake_cuda.py have what of it can be had."""

_BACKWARD = "an exception of Python in a backward pass ends the process: of torch alone, too"
_NO_KERNEL = "torch's own error, that an op has no kernel for sparse tensors, ends the process: without our ops, too"

ABORTS_UNDER_WINE = {
    "ops/test_checkpointed.py::test_a_factor_that_has_changed_is_noticed": _BACKWARD,
    "ops/test_ops_linear.py::test_second_derivatives_are_refused": _BACKWARD,
    "ops/test_ops_linear.py::test_a_sparse_input_is_refused_by_name": _NO_KERNEL,
}
"""The same under Wine 10."""


def under_wine() -> bool:
    return sys.platform == "win32" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


def mark(items: list[pytest.Item], fails: Mapping[str, str], aborts: Mapping[str, str]) -> None:
    """Expects those in the tables to fail."""
    for item in items:
        name = f"{item.path.parent.name}/{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in aborts:
            item.add_marker(pytest.mark.xfail(reason=aborts[name], run=False))
        elif name in fails:
            # A build of torch for CUDA, even without a GPU, may take what one for CPUs refuses.
            item.add_marker(pytest.mark.xfail(reason=fails[name], strict=torch.version.cuda is None))
