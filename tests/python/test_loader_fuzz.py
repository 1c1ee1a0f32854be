"""Whatever lies in an adapter's folder: it loads as the function that was saved, or is refused with a ValueError that
names the file, and the tensor where one is at fault, and the model is as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from language_models import assert_same, logits, snapshot, train
from pissa import PissaConfig, PissaModel
from pissa.record import checksum
from pissa.tensor_file import write_tensors

RECORD, WEIGHTS, STARTS = FILES = ("pissa.json", "adapter_model.safetensors", "pissa.safetensors")
TARGETS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
FIELDS: dict[str, dict[str, Any]] = {
    "implicit": {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 3}},
    "nf4": {"quant": "nf4"},
    "dora": {"use_dora": True, "use_rslora": True},
    "adalora": {"use_adalora": True, "residual": "explicit"},
    "second": {"quant": "nf4"},  # with an adapter of a rank of its own, which needs the base's factors beside its own
}


def many(default: int) -> pytest.MarkDecorator:
    """As many examples, and ten times as many with -m slow."""
    return pytest.mark.parametrize("examples", [default, pytest.param(10 * default, marks=pytest.mark.slow)])


def hypothetical(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )


@dataclasses.dataclass
class Saved:
    """An adapter on the disk, and the ways to load it."""

    folder: Path
    base: nn.Module
    host: PissaModel
    """Of the same base, with an adapter of the same name that has been trained on."""
    tokens: Tensor
    expected: Tensor
    content: dict[str, bytes]
    pristine: tuple[nn.Module, PissaModel]

    def reset(self) -> None:
        """The folder as it was saved."""
        for name, content in self.content.items():
            if (path := self.folder / name).is_symlink() or not path.is_file() or path.read_bytes() != content:
                remove(path)
                path.write_bytes(content)

    def renew(self) -> None:
        """Models that nothing has been loaded into."""
        self.base, self.host = copy.deepcopy(self.pristine)

    def load(self, into: str) -> nn.Module:
        """ "base": onto the base; "default", "fresh": into an adapter that is there, or beside it."""
        if into == "base":
            return PissaModel.from_pretrained(self.base, self.folder)
        self.host.load_adapter(self.folder, into)
        self.host.set_adapter(into)
        return self.host.eval()

    def attempt(self, *words: str, refused: bool = False, ways: Sequence[str] = ("base", "default", "fresh")) -> bool:
        """Loads the folder and checks what comes of it; whether it loaded in every way.

        Args:
            words: that a refusal must say, besides the folder.
            refused: it must not load.
            ways: see `load`.
        """
        outcomes = set()
        for into in ways:
            model = self.base if into == "base" else self.host
            before = snapshot(model)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    loaded = self.load(into)
            except ValueError as error:
                message = str(error)
                assert all(word in message for word in (str(self.folder), *words)), message
                assert_same(model, before)
                outcomes.add(False)
            else:
                self.renew()
                assert not refused, into
                assert torch.equal(logits(loaded, self.tokens), self.expected), into
                outcomes.add(True)
        return all(outcomes)


def remove(path: Path) -> None:
    if not path.is_symlink() and path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_saved(form: str, folder: Path) -> Saved:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
        tokens = torch.randint(0, 19, (2, 7))
    model = pissa.wrap(copy.deepcopy(base), PissaConfig(**TARGETS, **FIELDS[form]))
    if form == "second":
        model.add_adapter("second", PissaConfig(**TARGETS | {"r": 3}))
        model.set_adapter("second")
    train(model, tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The residual of the base is stored as", UserWarning)
        model.save_pretrained(folder)
    if form == "second":
        folder = folder / "second"
    expected = logits(model.eval(), tokens)
    host = PissaModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    train(host, tokens)
    assert not torch.equal(logits(host.eval(), tokens), expected)
    content = {name: (folder / name).read_bytes() for name in FILES}
    return Saved(folder, base, host, tokens, expected, content, copy.deepcopy((base, host)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {form: make_saved(form, tmp_path_factory.mktemp(form)) for form in FIELDS}


@pytest.fixture
def saved(made: dict[str, Saved], request: pytest.FixtureRequest) -> Iterator[Saved]:
    """Of the form that the test is parametrized with."""
    one = made[request.param]
    one.reset()
    yield one
    one.reset()


forms = pytest.mark.parametrize("saved", FIELDS, indirect=True)
implicit = pytest.mark.parametrize("saved", ["implicit"], indirect=True)


@forms
def test_undamaged_it_loads_in_every_way(saved: Saved) -> None:
    assert saved.attempt()


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def flipped(content: bytearray, random: random.Random) -> None:
    for _ in range(random.choice([1, 1, 1, 5])):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def overwritten(content: bytearray, random: random.Random) -> None:
    start, length = random.randrange(len(content)), random.choice([1, 4, 50])
    content[start : start + length] = random.choice([random.randbytes(length), bytes(length), b"\xff" * length])


def truncated(content: bytearray, random: random.Random) -> None:
    del content[random.choice([0, 1, 7, 8, 9, len(content) - 1, random.randrange(len(content))]) :]


def cut(content: bytearray, random: random.Random) -> None:
    start = random.randrange(len(content))
    del content[start : start + random.choice([1, 4, 8, 100])]


def inserted(content: bytearray, random: random.Random) -> None:
    where = random.choice([0, 8, len(content), random.randrange(len(content))])
    content[where:where] = random.choice([b"\0", b" ", b"[" * 100_000, random.randbytes(9), bytes(content)])


def moved(content: bytearray, random: random.Random) -> None:
    a, b = (random.randrange(0, len(content) - 8, 4) for _ in range(2))
    content[a : a + 8], content[b : b + 8] = content[b : b + 8], content[a : a + 8]


def declared_huge(content: bytearray, random: random.Random) -> None:
    content[:8] = random.choice([0, 1, len(content), 1 << 32, (1 << 63) - 1, (1 << 64) - 1]).to_bytes(8, "little")


BYTES = (flipped, overwritten, truncated, cut, inserted, moved, declared_huge)


def damage_bytes(saved: Saved, seed: int) -> None:
    """One file damaged by one of `BYTES`."""
    dice = random.Random(seed)
    name, damage = dice.choice(FILES), dice.choice(BYTES)
    content = bytearray(saved.content[name])
    damage(content, dice)
    saved.reset()
    (saved.folder / name).write_bytes(content)
    try:
        saved.attempt(name)
    except BaseException as error:
        error.add_note(f"{damage.__name__} {name}, seed {seed}")
        raise


@many(60)
@forms
def test_damaged_bytes(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_bytes(saved, seed)


# ---- The header of a safetensors file --------------------------------------------------------------------------------

TRICKS = ["../x", "/etc/passwd", "a\0b", "a\nb", "", ".", "\ud7ff", "x" * 70_000, "__metadata__", "%s", "{0}", "'"]
NUMBERS = [-1, 0, 1, 3, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**30, 0.5, 1e308, True]
SCALARS = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TRICKS), st.text(max_size=5))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", ""]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: Any, also: st.SearchStrategy[Any]) -> tuple[Any, tuple[Any, ...]]:
    """A JSON value of which one part is another, gone, or under another name; and the way to that part."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from([path for path in places(value) if path]))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "exchange"]))
    if action == "replace":
        parent[path[-1]] = draw(st.one_of(also, JSON))
    elif action == "delete":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        other = draw(st.sampled_from([*parent] if action == "exchange" else TRICKS))
        parent[other], parent[path[-1]] = parent[path[-1]], parent.get(other)
    return value, path


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@many(50)
@pytest.mark.parametrize("name", [WEIGHTS, STARTS])
@implicit
def test_changed_headers(saved: Saved, name: str, examples: int) -> None:
    header, data = split(saved.content[name])

    @hypothetical(examples)
    @given(changed(header, st.sampled_from([*DTYPES, *NUMBERS])))
    def run(change: tuple[Any, tuple[Any, ...]]) -> None:
        saved.reset()
        (saved.folder / name).write_bytes(joined(change[0], data))
        saved.attempt(name)

    run()


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def filled(value: float) -> Callable[[dict[str, Tensor], str, random.Random], str]:
    def fill(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
        tensors[name].view(-1)[random.randrange(tensors[name].numel())] = value
        return name

    return fill


def recast(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
    tensors[name] = tensors[name].to(random.choice([torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]))
    return name


def reshaped(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
    tensor = tensors[name]
    others = [tensor[:1], tensor[:0], tensor[None], tensor.flatten(), torch.cat([tensor, tensor]), tensor.sum()]
    tensors[name] = random.choice([other for other in others if other.shape != tensor.shape]).clone()
    return name


def renamed(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
    tensors[random.choice(TRICKS[:-4])] = tensors.pop(name)
    return name


def added(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
    trick = random.choice([name + ".weight", name.upper(), *TRICKS[:7]])
    tensors[trick] = tensors[name].clone()
    return trick


def exchanged(tensors: dict[str, Tensor], name: str, random: random.Random) -> str:
    """Of one shape, under each other's names, by somebody who leaves the checksums as they are."""
    twins = [o for o, t in tensors.items() if t.shape == tensors[name].shape and not torch.equal(t, tensors[name])]
    other = random.choice(twins or [name])
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return min(name, other)


TENSORS = (filled(torch.nan), filled(-torch.inf), recast, reshaped, renamed, added)


def damage_tensors(saved: Saved, seed: int) -> None:
    """One tensor damaged by one of `TENSORS`; the checksums are those of what is left."""
    dice = random.Random(seed)
    name = dice.choice([WEIGHTS, STARTS])
    saved.reset()
    tensors = load_file(saved.folder / name)
    damage = dice.choice(TENSORS)
    blamed = damage(tensors, dice.choice(sorted(tensors)), dice)
    write_tensors(saved.folder / name, tensors)
    try:
        saved.attempt(name, repr(blamed)[:200], refused=True)
    except BaseException as error:
        error.add_note(f"{damage.__name__} {blamed!r} in {name}, seed {seed}")
        raise


@many(15)
@forms
def test_damaged_tensors(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        damage_tensors(saved, seed)


@many(4)
@forms
def test_exchanged_tensors(saved: Saved, examples: int) -> None:
    for seed in range(examples):
        dice = random.Random(seed)
        name = dice.choice([WEIGHTS, STARTS])
        header, data = split(saved.content[name])
        tensors = load_file(saved.folder / name)
        key = dice.choice(sorted(tensors))
        before = dict(tensors)
        first = exchanged(tensors, key, dice)
        other = next((o for o in tensors if o != first and tensors[o] is not before[o]), None)
        if other is None:
            continue
        header[first], header[other] = header[other], header[first]
        (saved.folder / name).write_bytes(joined(header, data))
        saved.attempt(name, repr(first), refused=True)
        saved.reset()


# ---- pissa.json ------------------------------------------------------------------------------------------------------

OPTIONS = [
    "CAUSAL_LM",
    "SEQ_CLS",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "TOKEN_CLS",
    "FEATURE_EXTRACTION",
    "all",
    "lora_only",
]
OPTIONS += ["nf4", "explicit", "implicit", "exact", "krylov", "loftq", "olora", "lora", "pissa_minor", "all-linear"]
OPTIONS += [
    "(",
    "*",
    "[",
    "lm_head",
    "q_proj",
    ".*q_proj",
    "v_proj",
    ["lm_head"],
    ["q_proj", "v_proj", "k_proj"],
    {"(": 2},
]
VALUES = st.sampled_from([*OPTIONS, 2, 4, 32, 128, 1e-300, 2.5, 99, [0], [], {}, {"q_proj": 1}, "0" * 64])


@many(60)
@forms
def test_changed_records(saved: Saved, examples: int) -> None:
    record = json.loads(saved.content[RECORD])

    @hypothetical(examples)
    @given(changed(record, VALUES), st.booleans())
    def run(change: tuple[Any, tuple[Any, ...]], signed: bool) -> None:
        content = change[0]
        if signed and "sha256" in content:
            content["sha256"] = checksum({name: value for name, value in content.items() if name != "sha256"})
        saved.reset()
        (saved.folder / RECORD).write_text(json.dumps(content))
        saved.attempt()

    run()


TEXTS = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "deep": "[" * 1_000_000,
    "deep objects": '{"a":' * 100_000,
    "NaN": '{"format": NaN}',
    "infinite": '{"format": 1e999}',
    "many digits": '{"format": ' + "9" * 10_000 + "}",
    "a lone surrogate": '{"\\ud800": 1, "format": 1}',
    "twice": '{"format": 1, "format": 1}',
    "NUL": "\0",
}


@pytest.mark.parametrize("text", TEXTS)
@implicit
def test_records_of_other_json(saved: Saved, text: str) -> None:
    (saved.folder / RECORD).write_text(TEXTS[text])
    saved.attempt(RECORD, refused=True)


@implicit
def test_a_record_in_another_encoding(saved: Saved) -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        (saved.folder / RECORD).write_bytes(saved.content[RECORD].decode().encode(encoding))
        saved.attempt(RECORD, refused=True)


# ---- Files that are something else -----------------------------------------------------------------------------------


class Executed:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Executed(path.parent / "executed")))


def torch_pickled(path: Path) -> None:
    torch.save({"a": Executed(path.parent / "executed")}, path)


def beside(path: Path) -> None:
    for name in ("adapter_model.bin", "pissa.bin", "pissa.pt", "pissa.json.pkl"):
        torch_pickled(path.with_name(name))


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": Path.touch,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a name that is too long": lambda path: path.symlink_to("x" * 1000),
    "link to a folder": lambda path: path.symlink_to(".."),
    "link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "link to null": lambda path: path.symlink_to("/dev/null"),
    "pickle": pickled,
    "torch's pickle": torch_pickled,
    "pickle beside": beside,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
@implicit
def test_files_of_another_kind(saved: Saved, name: str, kind: str) -> None:
    remove(saved.folder / name)
    KINDS[kind](saved.folder / name)
    try:
        saved.attempt(name, refused=True)
        assert not (saved.folder / "executed").exists()
    finally:
        for path in [
            saved.folder / name,
            *saved.folder.glob("*.bin"),
            *saved.folder.glob("*.p*t*"),
            *saved.folder.glob("*.pkl"),
        ]:
            remove(path)


@pytest.mark.parametrize("other", FIELDS)
@forms
def test_an_adapter_of_another_kind_in_the_model(saved: Saved, other: str, made: dict[str, Saved]) -> None:
    host = made[other]
    dataclasses.replace(saved, host=host.host, pristine=host.pristine).attempt(ways=("default", "fresh"))
    host.renew()


@forms
def test_links_to_the_files_are_followed(saved: Saved, tmp_path: Path) -> None:
    for name in FILES:
        (saved.folder / name).replace(tmp_path / name)
        (saved.folder / name).symlink_to(tmp_path / name)
    assert saved.attempt()


@implicit
def test_folders_of_another_kind(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("file", "nothing", "loop", "", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match="holds no PiSSA adapter"):
            PissaModel.from_pretrained(saved.base, f"{tmp_path}/{folder}")
