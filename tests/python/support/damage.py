"""Adapters on the disk, the ways to damage them, and what must hold when one is loaded: see test_loader_fuzz. The ways
are those of checkpoints, too."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from language_models import assert_same, logits, snapshot, train
from pissa import PissaConfig, PissaModel, notices
from pissa.files.record import checksum
from pissa.files.tensor_file import write_tensors

RECORD, WEIGHTS, STARTS = FILES = ("pissa.json", "adapter_model.safetensors", "pissa.safetensors")
TARGETS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
FIELDS: dict[str, dict[str, Any]] = {
    "implicit": {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 3}},
    "nf4": {"quant": "nf4"},
    "dora": {"use_dora": True, "use_rslora": True},
    "adalora": {"use_adalora": True, "residual": "explicit"},
    "experts": {"target_modules": ["embed_tokens", "gate_up_proj", "down_proj"]},
    "second": {"quant": "nf4"},  # with an adapter of a rank of its own, which needs the base's factors beside its own
}

few_or_many = pytest.mark.parametrize("examples", [5, pytest.param(40, marks=pytest.mark.nightly)])
"""Of random damage: few on every change, many at night."""


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
            path = self.folder / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(content):
                remove(path)
            elif path.read_bytes() == content:
                continue
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

    def attempt(
        self, *words: str, refused: bool = False, exact: bool = True, ways: Sequence[str] = ("base", "default", "fresh")
    ) -> bool:
        """Loads the folder and checks what comes of it; whether it loaded in every way.

        Args:
            words: that a refusal must say, besides the folder.
            refused: it must not load.
            exact: what loads is what was saved; otherwise it may be anything finite.
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
                found = logits(loaded, self.tokens)
                assert torch.equal(found, self.expected) if exact else found.isfinite().all(), into
                outcomes.add(True)
        return all(outcomes)


def remove(path: Path) -> None:
    if not path.is_symlink() and path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_base(form: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if form == "experts":
            return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=3)).eval()
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def make_saved(form: str, folder: Path) -> Saved:
    base = make_base(form)
    tokens = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))
    model = pissa.wrap(copy.deepcopy(base), PissaConfig(**TARGETS | FIELDS[form]))
    if form == "second":
        model.add_adapter("second", PissaConfig(**TARGETS | {"r": 3}))
        model.set_adapter("second")
    train(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", notices.InexactLoraWarning)
        model.save_pretrained(folder)
    if form == "second":
        folder = folder / "second"
    expected = logits(model.eval(), tokens)
    host = PissaModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    train(host, tokens)
    assert not torch.equal(logits(host.eval(), tokens), expected)
    content = {name: (folder / name).read_bytes() for name in FILES}
    return Saved(folder, base, host, tokens, expected, content, copy.deepcopy((base, host)))


# ---- Bytes -----------------------------------------------------------------------------------------------------------


def flipped(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 1, 5])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def overwritten(content: bytearray, dice: random.Random) -> None:
    start, length = dice.randrange(len(content)), dice.choice([1, 4, 50])
    content[start : start + length] = dice.choice([dice.randbytes(length), bytes(length), b"\xff" * length])


def truncated(content: bytearray, dice: random.Random) -> None:
    del content[dice.choice([0, 1, 7, 8, 9, len(content) - 1, dice.randrange(len(content))]) :]


def cut(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    del content[start : start + dice.choice([1, 4, 8, 100])]


def inserted(content: bytearray, dice: random.Random) -> None:
    where = dice.choice([0, 8, len(content), dice.randrange(len(content))])
    content[where:where] = dice.choice([b"\0", b" ", b"[" * 100_000, dice.randbytes(9), bytes(content)])


def moved(content: bytearray, dice: random.Random) -> None:
    a, b = (dice.randrange(0, len(content) - 8, 4) for _ in range(2))
    content[a : a + 8], content[b : b + 8] = content[b : b + 8], content[a : a + 8]


def declared_huge(content: bytearray, dice: random.Random) -> None:
    content[:8] = dice.choice([0, 1, len(content), 1 << 32, (1 << 63) - 1, (1 << 64) - 1]).to_bytes(8, "little")


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
def changed(draw: st.DrawFn, value: Any, similar: Callable[[Any], st.SearchStrategy[Any]]) -> tuple[Any, set[Any]]:
    """A JSON value of which one part is another, gone, or under another name; and the keys that this is about.

    Args:
        similar: what is in the place of a part more often than any other JSON.
    """
    value = copy.deepcopy(value)
    path = draw(st.sampled_from([path for path in places(value) if path]))
    parent, key = value, path[-1]
    for step in path[:-1]:
        parent = parent[step]
    action = draw(st.sampled_from(["replace"] * 5 + ["delete", "rename", "exchange"]))
    if action == "replace":
        parent[key] = draw(st.one_of(similar(parent[key]), similar(parent[key]), JSON))
    elif action == "delete":
        del parent[key]
    elif isinstance(parent, dict):
        other = draw(st.sampled_from([*parent] if action == "exchange" else TRICKS))
        parent[other], parent[key] = parent[key], parent.get(other)
        return value, {key, other}
    return value, {key}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def filled(value: float) -> Callable[[dict[str, Tensor], str, random.Random], str]:
    def fill(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
        tensors[name].view(-1)[dice.randrange(tensors[name].numel())] = value
        return name

    return fill


def recast(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    kinds = [torch.int32, torch.bool, torch.float8_e4m3fn]
    if "lm_head" not in name and not name.endswith("base_layer.weight"):  # whole modules may be of any floating dtype
        kinds += [torch.float64, torch.bfloat16]
    tensors[name] = tensors[name].to(dice.choice(kinds))
    return name


def reshaped(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    tensor = tensors[name]
    others = [tensor[:1], tensor[:0], tensor[None], tensor.flatten(), torch.cat([tensor, tensor]), tensor.sum()]
    tensors[name] = dice.choice([other for other in others if other.shape != tensor.shape]).clone()
    return name


def renamed(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    trick = dice.choice(TRICKS[:-4])
    # Of the base's own embeddings none has to be there: then the new name is one too many.
    own = any(key.endswith("embed_tokens.base_layer.weight") for key in tensors)
    optional = own and name.endswith(("embed_tokens.base_layer.weight", "lm_head.weight"))
    tensors[trick] = tensors.pop(name)
    return trick if optional else name


def added(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    trick = dice.choice([name + ".weight", name.upper(), *TRICKS[:7]])
    tensors[trick] = tensors[name].clone()
    return trick


def exchanged(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    """Of one shape, under each other's names, by somebody who leaves the checksums as they are."""
    twins = [o for o, t in tensors.items() if t.shape == tensors[name].shape and not torch.equal(t, tensors[name])]
    other = dice.choice(twins or [name])
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


# ---- pissa.json ------------------------------------------------------------------------------------------------------

WORDS = ["CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION", "LORA", "default"]
WORDS += ["all", "lora_only", "none", "nf4", "explicit", "implicit", "exact", "krylov", "loftq", "olora", "pissa_minor"]
WORDS += ["all-linear", "(", "*", "[", "lm_head", "q_proj", ".*q_proj", "v_proj", "nope"]
LISTS = [[], ["lm_head"], ["q_proj"], ["q_proj", "v_proj", "k_proj"], ["nope"], ["("], [0], [99], ["q_proj", 1]]
DICTIONARIES = [{}, {"q_proj": 1}, {"q_proj": 99}, {"(": 2}, {"": 2}, {"v_proj": 0.5}]
COUNTS = [0, 1, 2, 3, 4, 8, 32, 64, 128, 0.5, 2.5, 1e-300, 99, -1, 2**40]

# What a record that is changed and signed anew may say without its being found: how the start factors came about, and
# the residual that the base had, which another machine rounds otherwise.
FORGEABLE = {"seed", "svd", "svd_passes", "init", "quant_iters", "blocksize", "double_quant", "scaling"}


def alike(part: Any) -> st.SearchStrategy[Any]:
    """What a later or an earlier version might have in the place of a part of the record."""
    if isinstance(part, bool):
        return st.just(not part)
    for kind, others in ((str, WORDS), ((int, float), COUNTS), (list, LISTS), (dict, DICTIONARIES)):
        if isinstance(part, kind):
            return st.sampled_from(others)
    return st.sampled_from([*WORDS, *LISTS, *DICTIONARIES, *COUNTS, True])


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """With the checksum of what it says."""
    return record | {"xxh3": checksum({name: value for name, value in record.items() if name != "xxh3"})}
