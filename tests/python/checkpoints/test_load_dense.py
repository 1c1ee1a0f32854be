"""pissa.load of a dense folder whose layers get another form: the model of pissa.wrap, bit for bit, without the dense
weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mixtures
import pissa
from architectures import ARCHITECTURES
from checkpoint_folders import change_tensors
from cuda_stand_in import CudaStandIn
from daily import each
from language_models import Make, assert_equal, logits, train
from live_bytes import LiveBytes
from pissa.checkpoints import unread
from pissa.checkpoints.unread import to_replace
from pissa.containers.checkpoint import Checkpoint
from pissa.containers.tensor_file import WEIGHTS
from pissa.layers.layer import pissa_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore::pissa.notices.AllLinearWarning",  # Llama 4's router
    "ignore::pissa.notices.InexactLoraWarning",
    "ignore::pissa.notices.TiedWeightWarning",
)
NF4: dict[str, Any] = {"r": 2, "quant": "nf4", "task_type": "CAUSAL_LM"}

# What is loaded, and the fields beside NF4. Among them are tied embeddings, biases, weights [in, out], experts that
# transformers joins, and layers of which some stay dense.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama3", {}),
    "qwen2, with biases": ("qwen2", {"quant": "int8"}),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {"use_dora": True}),
    "mixtral": ("mixtral", {}),
    "mixtral, one weight": ("mixtral", {"target_modules": r".*(q_proj|experts\.\d\.gate_up_proj)"}),
    "gpt_oss": ("gpt_oss", {"quant_iters": 2}),
    "llama4": ("llama4", {"init": "lora"}),
    "explicit": ("llama3", {"quant": None, "residual": "explicit"}),
    "tied": ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    made = mixtures.make(name, dtype) if name in mixtures.KINDS else ARCHITECTURES[name].make().to(dtype)
    made.save_pretrained(folder)
    return folder


def wrapped(source: Path, dtype: Any = "auto", **fields: Any) -> Any:
    return pissa.wrap(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), **fields)


def test_a_weight_in_another_dtype_is_left_to_transformers(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(save("llama3", tmp_path), lambda found: found | {name: found[name].double()})
    assert to_replace(Checkpoint.open(tmp_path), pissa.PissaConfig(**NF4)).keys() == {
        f"{layer}.weight" for layer in pissa_layers(wrapped(tmp_path, **NF4).base_model.model)
    } - {name}


@pytest.mark.parametrize("case", each(CASES, ["gpt2", "mixtral", "tied"]))
def test_it_is_the_model_of_wrap(case: str, tokens: Tensor, tmp_path: Path) -> None:
    name, more = CASES[case]
    source = save(name, tmp_path)
    model, expected = pissa.load(source, **NF4 | more), wrapped(source, **NF4 | more)
    assert [*model.state_dict()] == [*expected.state_dict()]
    assert_equal(model.state_dict(), expected.state_dict())
    tokens = tokens % 90
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    assert train(model, tokens) == train(expected, tokens)


@pytest.mark.parametrize("fields", [{"repair": "activations", "error_feedback": True}, {"init": "activations"}, {}])
def test_the_model_runs_over_its_files_to_be_calibrated(fields: dict[str, Any], tokens: Tensor, tmp_path: Path) -> None:
    source = save("qwen2", tmp_path)
    fields = NF4 | fields
    batches = [tokens % 90, tokens.flip(0) % 90]
    model = pissa.load(source, calibration=batches, **fields)
    assert_equal(model.state_dict(), wrapped(source, calibration=batches, **fields).state_dict())
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the start and the codes of .*run are known"):
        pissa.load(source, adapter=tmp_path / "run", calibration=batches)


def test_a_saved_adapter_comes_back(tokens: Tensor, tmp_path: Path) -> None:
    source = save("mixtral", tmp_path)
    model = pissa.load(source, **NF4)
    train(model, tokens % 90)
    model.save_pretrained(tmp_path / "run")
    again = pissa.load(source, adapter=tmp_path / "run")
    assert torch.equal(logits(again, tokens % 90), logits(model, tokens % 90))


def test_on_a_gpu(tmp_path: Path) -> None:
    source = save("qwen2", tmp_path)
    expected = {name: value.clone() for name, value in pissa.load(source, **NF4).state_dict().items()}
    with CudaStandIn():
        state = pissa.load(source, device="cuda", **NF4).state_dict()
        assert {value.device.type for value in state.values()} == {"cuda"}
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in state.items())


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.system_calls("/proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_is_never_in_memory(
    dtype: torch.dtype, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it in float32, to which the weights are cast before they are decomposed. Of the file, few pages stay."""
    monkeypatch.setattr("pissa.model.decompose._GROUP", 1)
    monkeypatch.setattr(unread, "_PAGES", 0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = tiny_llama(dtype=torch.bfloat16, **sizes)
    base.save_pretrained(tmp_path)
    blocks = sum(parameter.numel() for parameter in base.model.layers.parameters())
    largest, read, resident = 512 * 2048, Checkpoint.matrix, []

    def noted(checkpoint: Checkpoint, parts: Sequence[Any]) -> Tensor:
        resident.append(pages_of(tmp_path / WEIGHTS))
        matrix = read(checkpoint, parts)
        matrix.float().sum()
        return matrix

    monkeypatch.setattr(Checkpoint, "matrix", noted)
    with LiveBytes() as alive:
        model = pissa.load(tmp_path, dtype=dtype, **NF4)
    left = alive.now()
    assert left < blocks  # 4 bits, factors and embeddings; dense, they would take 2 bytes for each of the elements
    assert alive.peak < left + 8 * 4 * largest  # one weight, and what splits it, in float32
    assert max(resident) < 2 * blocks / 4  # beside one weight, those that the system reads ahead
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.dtype == dtype


def pages_of(path: Path) -> int:
    """The bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begins = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    sizes = (next(line for line in lines[begin:] if line.startswith("Rss:")) for begin in begins)
    return sum(1024 * int(size.split()[1]) for size in sizes)
