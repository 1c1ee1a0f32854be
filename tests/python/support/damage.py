"""Adapters on the disk, the ways to damage them, and what must hold when one is loaded: see containers/test_damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pissa
from language_models import assert_same, logits, snapshot, train
from mapped_files import read_tensors, unmap_unused
from pissa import PissaConfig, PissaModel, notices
from pissa.adapters.pissa_layout import MARK, checksum
from pissa.containers.tensor_file import TensorFile, write_tensors

RECORD, WEIGHTS, STARTS = FILES = ("pissa.json", "adapter_model.safetensors", "pissa.safetensors")
TARGETS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
FIELDS: dict[str, dict[str, Any]] = {
    "implicit": {"modules_to_save": ["lm_head"], "rank_pattern": {"v_proj": 3}},
    "nf4": {"quant": "nf4"},
    "dora": {"use_dora": True, "use_rslora": True},
    "explicit": {"residual": "explicit"},
    "experts": {"target_modules": ["embed_tokens", "gate_up_proj", "down_proj"]},
    "second": {"quant": "nf4"},  # with an adapter of a rank of its own, which needs the base's factors beside its own
}


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
        unmap_unused()
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

    def attempt(self, *words: str, refused: bool = False, ways: Sequence[str] = ("base", "default", "fresh")) -> bool:
        """Loads the folder and checks what comes of it; whether it loaded in every way.

        Args:
            words: that a refusal must say, besides the folder.
            refused: it must not load. Otherwise what loads is what was saved.
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
    unmap_unused()
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


def flipped(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def truncated(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.choice([0, 7, 8, len(content) - 1, dice.randrange(len(content))])]


def inserted(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + dice.choice([b"\0", b"[" * 100_000, dice.randbytes(9)]) + content[place:]


def moved(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(0, len(content) - 16, 4)
    return content[:place] + content[place + 8 : place + 16] + content[place : place + 8] + content[place + 16 :]


def declared_huge(content: bytes, dice: random.Random) -> bytes:
    return ((1 << 63) - 1).to_bytes(8, "little") + content[8:]


BYTES = (flipped, truncated, inserted, moved, declared_huge)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# ---- Tensors: each gives the name that the message has to say --------------------------------------------------------

TRICKS = ["../x", "/etc/passwd", "a\nb", "", ".", "%s", "{0}", "'"]


def filled(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    tensors[name].view(-1)[dice.randrange(tensors[name].numel())] = dice.choice([torch.nan, -torch.inf])
    return name


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
    trick = dice.choice(TRICKS)
    # Of the base's own embeddings none has to be there: then the new name is one too many.
    own = any(key.endswith("embed_tokens.base_layer.weight") for key in tensors)
    optional = own and name.endswith(("embed_tokens.base_layer.weight", "lm_head.weight"))
    tensors[trick] = tensors.pop(name)
    return trick if optional else name


def added(tensors: dict[str, Tensor], name: str, dice: random.Random) -> str:
    trick = dice.choice([name + ".weight", name.upper(), *TRICKS])
    tensors[trick] = tensors[name].clone()
    return trick


TENSORS = (filled, recast, reshaped, renamed, added)


def damage_tensors(saved: Saved, damage: Callable[..., str], dice: random.Random) -> None:
    """One tensor damaged by one of `TENSORS`; the checksums are those of what is left."""
    saved.reset()
    tensors = read_tensors(saved.folder / STARTS)
    blamed = damage(tensors, dice.choice(sorted(tensors)), dice)
    write_marked(saved.folder, tensors)
    saved.attempt(STARTS, repr(blamed), refused=True)


def write_marked(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes pissa.safetensors with other tensors."""
    unmap_unused()
    write_tensors(folder / STARTS, tensors, {MARK: TensorFile(folder / STARTS).metadata[MARK]})


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes pissa.safetensors with another record, with the checksum of what that says."""
    signed = record | {"xxh3": checksum({name: value for name, value in record.items() if name != "xxh3"})}
    write_text(folder, json.dumps(signed))


def write_text(folder: Path, text: str) -> None:
    """Writes pissa.safetensors with another text as its record."""
    unmap_unused()
    write_tensors(folder / STARTS, read_tensors(folder / STARTS), {MARK: text})
