"""An adapter on a base that is loaded, or lies on the disk, in another dtype than the one that it was trained on in:
docs/choices.md has the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from daily import each
from language_models import EVERY_FORM, assert_same, error, logits, snapshot, train
from pissa import PissaConfig, PissaModel, notices
from pissa.checkpoints.init import init
from pissa.checkpoints.merge import merge

pytestmark = [pytest.mark.cpu_only, pytest.mark.filterwarnings("ignore::pissa.notices.InexactLoraWarning")]

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYER = "model.layers.0.self_attn.q_proj"
tokens = torch.arange(18).reshape(2, 9)

WIDTHS = each(FLOATS, ["float32", "bfloat16"])
stored = pytest.mark.parametrize("stored", WIDTHS)
trained = pytest.mark.parametrize("trained", WIDTHS)
here = pytest.mark.parametrize("here", WIDTHS)
forms = pytest.mark.parametrize("form", EVERY_FORM)


def base(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))
    return model.eval()


def load(checkpoint: Path, dtype: str) -> nn.Module:
    """What `AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)` is; the folder has the name of its dtype."""
    return base().to(FLOATS[checkpoint.name]).to(FLOATS[dtype])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], tuple[Path, Path, PissaModel]]:
    """Of a checkpoint in the dtype `stored`: its folder, that of an adapter which was trained on it in `trained`, and
    the model that was trained."""
    root, made = tmp_path_factory.mktemp("dtypes"), dict[tuple[str, str, str], tuple[Path, Path, PissaModel]]()

    def get(stored: str, trained: str, form: str) -> tuple[Path, Path, PissaModel]:
        key = stored, trained, form
        if key not in made:
            checkpoint, adapter = root / stored, root / "-".join(key)
            if not checkpoint.exists():
                base().to(FLOATS[stored]).save_pretrained(checkpoint)
            fields: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
            model = pissa.wrap(load(checkpoint, trained), **fields, **EVERY_FORM[form])
            train(model, tokens)
            model.save_pretrained(adapter)
            made[key] = checkpoint, adapter, model.eval()
        return made[key]

    return get


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and its warnings of another dtype."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert not [one for one in caught if one.category is notices.OtherRoundingWarning]
    return result, [str(one.message) for one in caught if one.category is notices.OtherDtypeWarning]


def is_exact(checkpoint: Path, trained: str, here: str) -> bool:
    """Whether the weights of a checkpoint, in the dtype `here`, are those of the training once they are cast."""
    weight = load_file(checkpoint / "model.safetensors")[f"{LAYER}.weight"]
    return torch.equal(weight.to(FLOATS[here]).to(FLOATS[trained]), weight.to(FLOATS[trained]))


def weights(model: PissaModel) -> Tensor:
    """The base's and the merged weight of a layer, float32."""
    layer = model.base_model.model.get_submodule(LAYER)
    return torch.cat([layer.base.matrix().float(), layer.delta_matrix("default").float()])


@stored
@trained
@here
@forms
def test_from_pretrained_on_a_model_in_another_dtype(
    stored: str, trained: str, here: str, form: str, run: Callable[..., tuple[Path, Path, PissaModel]]
) -> None:
    checkpoint, adapter, model = run(stored, trained, form)
    loaded, said = warned(lambda: PissaModel.from_pretrained(load(checkpoint, here), adapter))
    exact = is_exact(checkpoint, trained, here)
    if form == "explicit":  # the residual is in the model's dtype
        exact &= torch.promote_types(FLOATS[trained], FLOATS[here]) == FLOATS[here]
    assert len(said) == (0 if exact else 1)
    assert exact or (f"base in {FLOATS[trained]}, which is in {FLOATS[here]} here" in said[0] and LAYER in said[0])
    layers = [one.base_model.model.get_submodule(LAYER) for one in (model, loaded)]
    for part in ("a", "b"):
        assert torch.equal(*(getattr(layer.deltas("default"), part) for layer in layers))
    if form != "implicit" and exact:
        # The residual is that of the training, decoded in float32.
        assert torch.equal(*(layer.base.dense_residual() for layer in layers))
    # A rounding of a weight, and one of an explicit residual: half a unit in the last place each, of the wider dtype's.
    unit = max(torch.finfo(FLOATS[dtype]).eps for dtype in (stored, trained, here))
    step = 0.0 if form in ("implicit", "explicit") else 1 / 4  # another code of a residual: a level of its format
    difference = (weights(model) - weights(loaded)).abs().max()
    assert difference <= (2 * unit + step) * weights(model).abs().max()
    again, also = warned(lambda: pissa.load(checkpoint, adapter=adapter, dtype=FLOATS[here]))
    assert also == said
    assert torch.equal(weights(again), weights(loaded))


@trained
@forms
def test_what_was_loaded_elsewhere_is_saved_and_loaded_again(
    trained: str, form: str, run: Callable[..., tuple[Path, Path, PissaModel]], tmp_path: Path
) -> None:
    """The record names the dtype of the base that the model has now."""
    checkpoint, adapter, _ = run("float32", trained, form)
    (loaded, _) = warned(lambda: PissaModel.from_pretrained(load(checkpoint, "bfloat16"), adapter))
    loaded.save_pretrained(tmp_path)
    again, said = warned(lambda: PissaModel.from_pretrained(load(checkpoint, "bfloat16"), tmp_path))
    assert said == []
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))


@stored
@trained
@forms
@pytest.mark.parametrize("command", ["merge", "bnb4"])
def test_commands_on_the_checkpoint(
    stored: str,
    trained: str,
    form: str,
    command: str,
    run: Callable[..., tuple[Path, Path, PissaModel]],
    tmp_path: Path,
) -> None:
    checkpoint, adapter, model = run(stored, trained, form)

    def call() -> object:
        if command == "merge":
            return merge(adapter, checkpoint, tmp_path / "out")
        return pissa.export(adapter, tmp_path / "out", to=command, base=checkpoint)

    if command == "bnb4" and form != "nf4":
        with pytest.raises(ValueError, match=r"nf4|4 bits|residual"):
            call()
        return
    _, said = warned(call)
    assert said == []  # cast to the dtype of the training, the checkpoint has its weights
    written = load_file(tmp_path / "out" / "model.safetensors")
    layer = model.base_model.model.get_submodule(LAYER)
    if command == "bnb4":
        assert torch.equal(written[f"{LAYER}.weight"].flatten(), layer.base.residual.codes.flatten())
        return
    exact = (layer.base.matrix().float() + layer.delta_matrix("default").float()).to(FLOATS[stored])
    assert torch.equal(written[f"{LAYER}.weight"], exact)


@stored
@trained
@pytest.mark.parametrize("narrow", WIDTHS)
def test_a_checkpoint_that_was_narrowed_is_merged_with_a_warning(
    stored: str, trained: str, narrow: str, run: Callable[..., tuple[Path, Path, PissaModel]], tmp_path: Path
) -> None:
    checkpoint, adapter, _ = run(stored, trained, "nf4")
    load(checkpoint, narrow).save_pretrained(tmp_path / "narrow")
    _, said = warned(lambda: merge(adapter, tmp_path / "narrow", tmp_path / "out"))
    assert len(said) == (0 if is_exact(checkpoint, trained, narrow) else 1)


@stored
@here
@pytest.mark.parametrize("form", ["explicit", "nf4", "int8"])
def test_load_of_a_split_folder(stored: str, here: str, form: str, run: Any, tmp_path: Path) -> None:
    checkpoint, _, _ = run(stored, stored, "implicit")
    init(checkpoint, tmp_path / "split", PissaConfig(r=4, **EVERY_FORM[form]))
    loaded, said = warned(lambda: pissa.load(tmp_path / "split", dtype=FLOATS[here]))
    rounds = form == "explicit" and torch.promote_types(FLOATS[stored], FLOATS[here]) != FLOATS[here]
    assert len(said) == int(rounds)
    loaded.save_pretrained(tmp_path / "adapter")
    again, _ = warned(lambda: pissa.load(tmp_path / "split", adapter=tmp_path / "adapter", dtype=FLOATS[here]))
    assert error(logits(again, tokens), logits(loaded, tokens)) == 0


@trained
@here
@forms
def test_another_base_is_refused_in_any_dtype(
    trained: str, here: str, form: str, run: Callable[..., tuple[Path, Path, PissaModel]], tmp_path: Path
) -> None:
    _, adapter, _ = run("float32", trained, form)
    other = base(seed=1).to(FLOATS[here])
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"not the base that .* was trained on: the first layer .* {LAYER}"):
        PissaModel.from_pretrained(other, adapter)
    assert_same(other, before)
    base(seed=1).to(FLOATS[here]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not the base"):
        merge(adapter, tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
