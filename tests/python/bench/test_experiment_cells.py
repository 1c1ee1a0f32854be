"""bench.experiments: quantisation errors and truncated SVDs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pissa import ops
from tiny_model import tiny_tokenizer

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]
WORDS = ["the", "film", "is", "a", "good", "bad", "plot", "and", "one", "of", "its", "kind", "not", "so", "much"]


@pytest.fixture(autouse=True)
def _bench_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a tokenizer and a configuration of MiniLM's kind, in model/; and reviews, in reviews/."""
    from transformers import BertConfig, BertTokenizer

    folder = tmp_path_factory.mktemp("stand_ins")
    for name in ("model", "reviews"):
        (folder / name).mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    lines = [f"{i}\t{(-1) ** i}\t{' '.join(generator.choice(WORDS, 12))}\n" for i in range(96)]
    (folder / "reviews" / "movieReviewSnippets_GroundTruth.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def options(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from bench.experiments import encoder
    from bench.experiments.experiment import Options

    monkeypatch.setattr(encoder, "required_package", lambda *_: stand_ins)
    return Options(data=(("reviews", stand_ins / "reviews"),), quick=True)


# ---- Quantisation errors ---------------------------------------------------------------------------------------------


def nuclear(error: np.ndarray) -> float:
    return float(np.linalg.svd(error, compute_uv=False).sum())


def best(weight: np.ndarray, r: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(weight)
    return (u[:, :r] * s[:r]) @ vh[:r]


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_errors_are_those_of_numpy_in_float64(options: Any, format: str) -> None:
    from bench.experiments.quant_error import QuantErrorCell, removed, weights

    def quantised(weight: np.ndarray) -> np.ndarray:
        return ops.dequantize(ops.quantize(torch.from_numpy(weight).float(), format)).double().numpy()

    [stored] = weights("power law 1", options)[""]
    weight, r = stored.double().numpy(), 4
    result = QuantErrorCell("power law 1", "", format, r).run(options)
    norms = {name: values[0] for name, values in result["nuclear_norms"].items()}
    plain = nuclear(weight - quantised(weight))
    assert norms["plain"] == pytest.approx(plain, rel=1e-5)  # six digits are kept
    principal = best(weight, r)
    # A code that rounds the other way, since L is float32's, changes the norm by less than a 1000th.
    expected = nuclear(weight - principal - quantised(weight - principal))
    assert norms["QPiSSA, T = 1"] == pytest.approx(expected, rel=1e-3)
    assert removed(result, "QPiSSA, T = 1") == pytest.approx(1 - expected / plain, abs=1e-3)
    # LoftQ's factors are of an error without a spectrum's decay: never better than the best ones, nor 2% worse.
    error = weight - quantised(weight)
    least = nuclear(error - best(error, r))
    assert least * (1 - 1e-5) < norms["LoftQ, T = 1"] < 1.02 * least
    assert norms["LoftQ, T = 5"] < norms["LoftQ, T = 1"]


# ---- Truncated SVDs --------------------------------------------------------------------------------------------------


def test_energy_and_difference_are_those_of_numpy_in_float64(options: Any) -> None:
    from bench.experiments.svd import SvdCell, weights_of

    [stored] = weights_of("spikes", options)
    weight, r = stored.double().numpy(), 8
    u, s, v = (part.double().numpy() for part in ops.svd_lowrank(stored, r, passes=2))
    result = SvdCell("spikes", "pissa", 2, r).run(options)
    exact = best(weight, r)
    kept = np.linalg.norm(weight @ np.linalg.qr(v)[0]) ** 2 / np.linalg.norm(exact) ** 2
    assert result["energy_lost"] == pytest.approx(1 - kept, rel=1e-4)
    assert result["difference"] == pytest.approx(np.abs((u * s) @ v.T - exact).sum() / np.abs(exact).sum(), rel=1e-4)
    more = SvdCell("spikes", "pissa", 8, r).run(options)
    assert more["energy_lost"] < result["energy_lost"] / 2
    assert SvdCell("spikes", "torch", "exact", r).run(options)["difference"] < 1e-4  # float32's, over a gap of 1%


# ---- Answers that are generated --------------------------------------------------------------------------------------


def test_an_answer_is_right_by_its_first_line() -> None:
    from bench.experiments.language import generated
    from bench.experiments.language_tasks import LanguageTask

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    problems = {"one": ("7", " 7 \nand more"), "a longer one": ("-8", "-8"), "two": ("9", "19"), "three": ("10", "")}
    rows = []
    for question, (answer, _) in problems.items():
        prompt, ids = tokenizer(question).input_ids, tokenizer(f"{answer}</s>").input_ids
        rows.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})

    class Scripted(torch.nn.Module):
        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
            asked = [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
            answers = [tokenizer(problems[question][1] + "</s>").input_ids for question in asked]
            longest = max(map(len, answers))
            padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in answers]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    task = LanguageTask(Path(), tokenizer, 1, 1, rows, rows, [], True, [], [])
    assert generated(Scripted(), task) == 0.5


def test_the_loss_of_labels_alone_is_trls(tmp_path: Path) -> None:
    """Before, in and after a training: to float32's rounding, in sums of fewer than 64 terms."""
    from bench.experiments.language import LanguageCell, make_trainer
    from bench.experiments.language_tasks import LanguageTask
    from bench.experiments.methods import METHODS, Setting
    from checkpoint_folders import llama
    from reference import EPS

    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(1)
    rows = []
    for prompt, length in zip([1, 4, 2, 3, 1, 2] * 3, [9, 6, 13, 7, 12, 8] * 3, strict=True):
        ids = torch.randint(len(tokenizer), (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    found = []
    for file in (None, tmp_path / "model.gguf"):
        task = LanguageTask(tmp_path, tokenizer, 3, 2, rows, rows[:9], [], False, [], [], file)
        torch.manual_seed(0)
        model = METHODS["lora"].wrap(llama(vocab_size=len(tokenizer)), Setting(4, 0, 3, "CAUSAL_LM"))
        trainer = make_trainer(model, task, LanguageCell("gsm8k", "lora", 4, 1e-2), tmp_path)
        losses = [trainer.evaluate()["eval_loss"]]
        trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        found.append([*losses, *norms, trainer.evaluate()["eval_loss"]])
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], rel=64 * EPS[torch.float32])


# ---- Starts from other components ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first"), [("medium", 8), ("minor", 16)])
def test_components_of_the_middle_and_the_end_of_the_spectrum(name: str, first: int) -> None:
    from bench.experiments.methods import METHODS, Setting
    from language_models import error
    from one_layer import OneLayer, adapted
    from reference import EPS, power_law

    linear = torch.nn.Linear(24, 20, bias=False)
    linear.weight.data.copy_(power_law(20, 24, 1.0))
    u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    model = METHODS[name].wrap(OneLayer(linear), Setting(4, 0, 1, None, ["proj"]))
    start, part = adapted(model).start_of("default"), slice(first, first + 4)
    # Singular vectors turn by rounding errors of the weight over the gap, 1/19 - 1/20 at the end of the spectrum.
    assert error(start.b0.double() @ start.a0.double(), (u[:, part] * s[part]) @ vh[part]) < 9600 * EPS[torch.float32]


@pytest.mark.parametrize("fields", [{}, {"quant": "nf4", "repair": "pissa"}], ids=str)
def test_an_orthonormal_start_has_the_vectors_alone(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the scaling is. What a stored base lacks is PiSSA's start."""
    import pissa
    from bench.experiments.triplets import UNIT

    monkeypatch.setitem(pissa.INIT_METHODS, UNIT.name, UNIT)
    u, _, vh = torch.linalg.svd(torch.randn(20, 24, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    linear = torch.nn.Linear(24, 20, bias=False)
    linear.weight.data.copy_((u / torch.arange(1, 21)) @ vh)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["0"]}
    model = pissa.wrap(torch.nn.Sequential(linear), init=UNIT.name, **options, **fields)
    layer: Any = model.base_model.model[0]
    start, lacking = layer.start_of("default"), layer.base.start
    assert (start.b0 @ start.a0 - u[:, :4] @ vh[:4]).abs().max() < 1e-4
    for vectors in (start.a0, start.b0.mT):
        assert (vectors.double().norm(dim=1) - 1).abs().max() <= 2.0**-23  # each element is rounded once
    assert (lacking is None) == (not fields)
    assert lacking is None or lacking.origin.init == "pissa"
