"""CUDA as it is seen on a machine without it: what is loaded, what is refused and in which words, mixed devices."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pissa import build_info, ops
from pissa.ops import _load, checks

LIBRARY = "libpissa_cuda13.so"

linux = pytest.mark.skipif(sys.platform != "linux", reason="the library is built for Linux alone")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the library's name, beside a torch that says it is built for CUDA 13."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    path = tmp_path / LIBRARY
    path.write_bytes(b"no library")
    return path


def test_a_build_without_the_library_says_how_to_build_it(tmp_path: Path) -> None:
    problem = _load._load_cuda(tmp_path / LIBRARY)
    assert "no CUDA library" in problem
    assert "PISSA_CUDA=ON" in problem


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        (None, "is built without CUDA: install a build of torch for CUDA 13"),
        ("12.8", "is built for CUDA 12.8: install a build of torch for CUDA 13"),
        ("14.0", "is built for CUDA 14.0: install a build of torch for CUDA 13"),
    ],
)
def test_beside_another_torch_the_library_is_not_touched(
    library: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    assert reason in _load._load_cuda(library)


@linux
def test_what_keeps_the_library_from_loading_is_kept(library: Path) -> None:
    problem = _load._load_cuda(library)
    assert problem.startswith("pissa's CUDA library could not be loaded: ")
    assert f"{library}: file too short" in problem or f"{library}: invalid ELF header" in problem
    assert "`pip install nvidia-cublas nvidia-cusolver`" in problem


@linux
def test_the_library_is_loaded_beside_a_torch_for_cuda_13(library: Path) -> None:
    """A library of torch's own stands for it: it links what is in the process already."""
    shutil.copy(Path(torch.__file__).parent / "lib" / "libtorch.so", library)
    assert _load._load_cuda(library) is None
    assert str(library) in torch.ops.loaded_libraries
    assert str(library) in Path("/proc/self/maps").read_text()


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch for CUDA has loaded CUDA's own libraries")
@pytest.mark.parametrize("folders", [("cu13", "cu13"), ("cusparse", "cusolver")], ids=["one folder", "one a package"])
def test_cudas_libraries_are_found_beside_torch(folders: tuple[str, str], tmp_path: Path) -> None:
    """torch is in another folder than pissa: ours needs cuSOLVER, which needs cuSPARSE, and neither is loaded yet."""
    made: list[Path] = []
    for name, folder in zip(("libcusparse.so.12", "libcusolver.so.12", LIBRARY), (*folders, None), strict=True):
        path = tmp_path / (f"packages/nvidia/{folder}/lib/{name}" if folder else f"pissa/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        source = f"int f{len(made)}(void) {{ return {f'f{len(made) - 1}()' if made else '1'}; }}"
        if made:
            source = f"int f{len(made) - 1}(void); {source}"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *map(str, made[-1:])]
        subprocess.run([*command, f"-Wl,-soname,{name}", "-o", path], input=source, text=True, check=True)
        made.append(path)
    code = """if True:
        import sys, torch
        from pathlib import Path
        from pissa.ops import _load
        torch.version.cuda, torch.__file__ = "13.0", sys.argv[1]
        print(_load._load_cuda(Path(sys.argv[2])))"""
    command = [sys.executable, "-c", code, str(tmp_path / "packages/torch/__init__.py"), str(made[-1])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"
    made[0].unlink()
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "could not be loaded: libcu" in run.stdout
    assert "`pip install nvidia-cublas nvidia-cusolver`" in run.stdout


def test_importing_does_not_initialise_cuda() -> None:
    code = "import pissa, torch; print(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("False\n", "")


def test_build_info_says_what_the_cuda_library_is_built_for() -> None:
    cuda = build_info()["cuda"]
    assert (cuda is not None) == Path(_load.__file__).with_name(LIBRARY).exists()
    if cuda is not None:
        assert cuda.keys() == {"runtime", "architectures"}
        assert cuda["runtime"].startswith("13.")
        assert all(isinstance(name, str) and name[0] in "0123456789" for name in cuda["architectures"])


@pytest.mark.parametrize("problem", [None, "torch is built for CUDA 12.8"])
def test_the_environment_report_has_a_line_on_cuda(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    from pissa.cli import env

    monkeypatch.setattr(_load, "cuda_problem", problem)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build = {"runtime": "13.0", "architectures": ["80", "120"]}
    expected = "not used: torch is built for CUDA 12.8" if problem else "13.0, for 80 120; no device found"
    assert env._cuda(build) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(_load, "routes", lambda: "lt: wrong")
    assert ("some GPU; lt: wrong" in env._cuda(build)) == (problem is None)
    assert "cuda" in env.environment()
    assert not any("build: cuda" in name for name in env.environment())


# ---- Arguments -------------------------------------------------------------------------------------------------------


def on(device: str) -> Tensor:
    with FakeTensorMode():
        return torch.empty(4, 4, device=device)


@pytest.mark.skipif(_load.FORCED, reason="about the kernels")
@pytest.mark.parametrize("problem", [None, "no CUDA library"])
def test_which_devices_have_kernels(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> None:
    monkeypatch.setattr(_load, "cuda_problem", problem)
    found = {name: _load.has_kernels(torch.device(name)) for name in ("cpu", "cuda", "xpu", "mps", "meta")}
    assert found == {"cpu": True, "cuda": problem is None, "xpu": False, "mps": False, "meta": False}


def test_devices_are_named_with_their_tensors() -> None:
    here, there = torch.empty(2), torch.empty(2, device="meta")
    checks.check_devices({})
    checks.check_devices({"x": None})
    checks.check_devices({"x": there, "bias": None, "y": there})
    message = r"^weight on meta; x, a0 on cpu; needed: all tensors on one device; move them with \.to\('cpu'\)$"
    with pytest.raises(ValueError, match=message):
        checks.check_devices({"x": here, "weight": there, "bias": None, "a0": here})


LINEAR = {
    "x": torch.ones(3, 32),
    "weight": torch.ones(16, 32),
    "bias": torch.ones(16),
    "a": torch.ones(2, 32),
    "b": torch.ones(16, 2),
    "a0": torch.ones(2, 32),
    "b0": torch.ones(16, 2),
}
NF4 = ops.quantize(torch.ones(16, 32))
LOW_RANK = {name: tensor for name, tensor in LINEAR.items() if name not in ("weight", "bias")} | {
    "y": torch.ones(3, 16)
}


@pytest.mark.parametrize(
    ("function", "tensors", "moved"),
    [
        *((ops.linear, LINEAR, name) for name in LINEAR),
        *((ops.add_low_rank, LOW_RANK, name) for name in LOW_RANK),
        (ops.linear, LINEAR | {"weight": NF4}, "x"),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_mixed_devices_are_refused(function: Any, tensors: dict[str, Any], moved: str) -> None:
    function(**tensors)
    with pytest.raises(ValueError, match=rf"\b{moved}( of weight)? on meta; .*one device; move them with") as raised:
        function(**tensors | {moved: tensors[moved].to("meta")})
    assert all(name in str(raised.value) for name in tensors)


def test_the_meta_device_alone_is_one_device() -> None:
    assert ops.linear(**{name: tensor.to("meta") for name, tensor in LINEAR.items()}).shape == (3, 16)


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax", "offset"])
def test_a_4_bit_weight_in_pieces_on_two_devices_is_refused(part: str) -> None:
    weight = NF4._replace(**{part: getattr(NF4, part).to("meta")})
    for function in (ops.dequantize, lambda weight: ops.linear(LINEAR["x"], weight)):
        with pytest.raises(ValueError, match=rf"weight\.{part} on meta; .*one device"):
            function(weight)


class SaysCuda(Tensor):
    """A tensor with values, as those of the meta device have none, that claims to be on a GPU."""

    device = torch.device("cuda:0")


def test_weights_on_two_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "cuda_problem", None)
    weights = [torch.ones(8, 8), torch.ones(8, 8).as_subclass(SaysCuda)]
    with pytest.raises(ValueError, match=r"^second on cuda:0; first on cpu; needed: all tensors on one device"):
        ops.split_many(weights, [2, 2], [1.0, 1.0], names=["first", "second"])


# What the forward keeps for the backward depends on the device: the compiled op and its fake have to agree.
@pytest.mark.parametrize(
    ("dtype", "tokens", "start", "implicit", "halves"),  # of sums, beside x Aᵀ
    [
        (torch.bfloat16, 17, True, False, 2 * (32 + 16)),
        (torch.float16, 17, True, True, 2 * 32),
        (torch.bfloat16, 16, True, False, 0),
        (torch.float32, 17, True, False, 0),
        (torch.bfloat16, 17, False, False, 0),
    ],
)
def test_what_a_forward_keeps(dtype: torch.dtype, tokens: int, start: bool, implicit: bool, halves: int) -> None:
    for device in ("cuda", "cpu"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(tokens, 32, dtype=dtype, device=device)
            weight, base = (torch.empty(*shape, dtype=dtype, device=device) for shape in ((16, 32), (tokens, 16)))
            a, b = torch.empty(2, 32, device=device), torch.empty(16, 2, device=device)
            factors = (a, b, a, b) if start else (a, b, None, None)
            for op, first in ((torch.ops.pissa.linear, (x, weight, None)), (torch.ops.pissa.add_low_rank, (base, x))):
                _, kept = op(*first, *factors, 1.0, implicit)
                assert kept.dtype == torch.float32
                in_halves = device == "cuda" and dtype != torch.float32 and tokens > 16
                of_xa = tokens if in_halves and dtype == torch.bfloat16 else 2 * tokens  # float16 might not hold it
                assert kept.shape == (of_xa + (halves // 2 if in_halves else 0),)
