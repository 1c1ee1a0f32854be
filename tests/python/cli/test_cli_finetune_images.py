"""`pissa finetune` and `pissa dpo` on models that see: images in the training step, by TRL's handling of processors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from pissa.cli import main
from runs import logged, refused
from tiny_vision_models import COLOURS, save_gemma3, save_images

ANSWERS = {"finetune": {"completion": COLOURS}, "dpo": {"chosen": COLOURS, "rejected": COLOURS[::-1]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model with its processor."""
    return save_gemma3(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("data"), **ANSWERS["finetune"])


def command(base: Path, data: Path, out: Path, *more: str, name: str = "finetune") -> list[str]:
    """Of one batch a step, which has all rows."""
    return runs.command(name, base, data, out, "--batch-size", "8", "--rank", "4", *more, steps=3)


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(command(base, data, out, "--eval-data", str(data))) == 0
    return out


def answer_loss(model: Any, folder: Path, colours: tuple[str, str]) -> float:
    """The loss of an answer's tokens, which name the colours of COLOURS, after squares of other colours."""
    from PIL import Image
    from transformers import AutoProcessor

    processor, losses = AutoProcessor.from_pretrained(folder), []
    for shown, answer in zip(colours, COLOURS, strict=True):
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "colour?"}]}]
        prompt = processor.apply_chat_template(question, add_generation_prompt=True)
        inputs = processor(
            images=[Image.new("RGB", (16, 16), shown)], text=prompt + answer + "</s>", return_tensors="pt"
        )
        with torch.no_grad():
            predicted = model(**inputs).logits[0, :-1].log_softmax(-1)
        targets = inputs["input_ids"][0, 1:, None]
        losses.append(-predicted.gather(1, targets)[-len(answer) - 1 :])  # a token for each letter, and the end
    return torch.cat(losses).mean().item()


def test_images_are_in_the_step_and_the_language_part_is_trained(base: Path, trained: Path) -> None:
    from transformers import AutoModelForImageTextToText

    import pissa

    model = AutoModelForImageTextToText.from_pretrained(base)
    start = answer_loss(model, base, COLOURS)
    assert abs(start - answer_loss(model, base, COLOURS[::-1])) > 1e-3 * start
    losses = logged(trained)
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[2] < losses[0]  # the first step has the rate 0

    loaded = pissa.PissaModel.from_pretrained(model, trained)
    assert answer_loss(loaded, trained, COLOURS) == pytest.approx(logged(trained, "eval_loss")[-1], rel=1e-5)
    assert changed(loaded) == {"language_model"}


def changed(model: Any) -> set[str]:
    """The parts of a model in which every adapter has learned; dB starts at 0."""
    parts: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            (part,) = re.findall(r"\.(language_model|vision_tower)\.", name)
            parts[part] = parts.get(part, True) and bool(parameter.any())
    return {part for part, all_have in parts.items() if all_have}


def test_a_pattern_that_names_the_tower_trains_it_too(base: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    import pissa

    out = tmp_path / "run"
    assert main(command(base, data, out, "--target-modules", r".*\.q_proj")) == 0
    trained = pissa.PissaModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out)
    assert changed(trained) == {"language_model", "vision_tower"}


def test_a_folder_of_images_with_their_rows_is_the_same_data(base: Path, trained: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (16, 16), COLOURS[i % 2]).save(folder / f"{i}.png")
        messages = {"prompt": ("user", "colour?"), "completion": ("assistant", COLOURS[i % 2])}
        row = {name: [{"role": role, "content": text}] for name, (role, text) in messages.items()}
        rows.append(json.dumps({"file_name": f"{i}.png", **row}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    assert main(command(base, folder, tmp_path / "run")) == 0
    assert logged(tmp_path / "run") == logged(trained)


def test_text_alone_trains_a_model_that_sees(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "1+1", "answer": "2", "images": []}\n' * 8)
    assert main(command(base, path, tmp_path / "run")) == 0
    assert logged(tmp_path / "run")[2] < logged(tmp_path / "run")[0]


def test_preferences_have_images(base: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    pairs = save_images(tmp_path / "pairs", **ANSWERS["dpo"])
    assert main(command(base, pairs, tmp_path / "run", name="dpo")) == 0
    assert logged(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(tmp_path / "run")[2] < logged(tmp_path / "run")[0]


# ---- Refusals ----


@pytest.mark.parametrize("name", ANSWERS)
def test_an_image_that_is_cut_is_refused(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_images(tmp_path, **ANSWERS[name])
    message = refused(command(base, data, tmp_path / "run", "--max-length", "4", name=name), capsys)
    assert message.startswith(f"pissa {name}: the first batch: Image features and image tokens do not match")
    assert message.endswith("; if --max-length cuts images, raise it [P106]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["image", "images"])
def test_images_in_a_file_of_records_are_refused(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    for kind, row in {"finetune": {"completion": "b"}, "dpo": {"chosen": "b", "rejected": "c"}}.items():
        path.write_text(json.dumps({"prompt": "a", **row, name: "1.png"}))
        message = refused(command(base, path, tmp_path / "run", name=kind), capsys)
        assert f'{path}:1: found "{name}"; a file of records contains only text' in message
        assert "metadata.jsonl" in message


def test_what_a_processor_lacks_is_named(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise ImportError(
            "\nAProcessor requires the Torchvision library but it was not found. Check out the\npage: ..."
        )

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", load)
    message = refused(command(base, data, tmp_path / "run"), capsys)
    assert message.endswith(f"{base}: AProcessor requires the Torchvision library but it was not found; install it")
