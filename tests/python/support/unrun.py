"""The tests of a GPU that its stand-in does not run: `pytest --device cuda-stand-in`. They have only been read until a
GPU runs them by `--device cuda`.

A test in `FAILS` is run and has to fail: one that passes is an error, and so is one that is not there any more
(rules/test_unrun.py).
"""

from __future__ import annotations

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


def mark(items: list[pytest.Item]) -> None:
    """Expects those in the tables to fail."""
    for item in items:
        name = f"{item.path.parent.name}/{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in ABORTS:
            item.add_marker(pytest.mark.xfail(reason=ABORTS[name], run=False))
        elif name in FAILS:
            # A build of torch for CUDA, even without a GPU, may take what one for CPUs refuses.
            item.add_marker(pytest.mark.xfail(reason=FAILS[name], strict=torch.version.cuda is None))
