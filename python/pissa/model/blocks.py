"""Forward passes that go through a model block by block, so that a block's data is needed only during its passes.

In a call's first pass, only the first block computes. Each other block notes its arguments and returns what the first
has returned. Later it computes from these arguments and from what the block before it has returned.

This relies on how models use their blocks: they pass on the tensors that a block returns as they are, and all other
arguments, such as masks and positions, may differ between blocks but do not depend on what blocks compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from posixpath import commonpath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def run_block_by_block(
    model: nn.Module, layers: Iterable[str], calls: Sequence[Mapping[str, Any]], restart: Callable[[], None]
) -> Iterator[str]:
    """Calls the model with each of `calls`, without gradients. Each time all calls have gone through the next block, it
    yields what the names of this block's modules begin with.

    If `layers` are not in consecutive blocks, or the model does more between blocks than to pass on what they return,
    all calls go through the whole model, and it yields "" once. Before, it calls `restart` if some have been begun.
    """
    blocks = _blocks_of(model, layers)
    modules = [model.get_submodule(name) for name in blocks]
    runs = [_Run() for _ in calls]
    with torch.no_grad():
        try:
            for call, run in zip(calls, runs, strict=True):
                with _replace_forwards(modules, run.stand_in):
                    model(**call)
                run.check_unchanged()
        except _NotByBlocksError:
            restart()
            blocks, modules = [], []
            for call in calls:
                model(**call)
    yield f"{blocks[0]}." if blocks else ""
    for name, block in zip(blocks[1:], modules[1:], strict=True):
        with torch.no_grad():
            for run in runs:
                run.advance(block)
        yield f"{name}."


def _blocks_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the blocks that contain these layers, in order. Blocks are the members of one list of modules. Empty
    if the layers are in several lists, as in an encoder and a decoder, or in a single block."""
    path = commonpath([name.replace(".", "/") for name in layers]).split("/")
    for count in range(1, len(path) + 1):
        blocks = model.get_submodule(".".join(path[:count]))
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1:
            return [".".join((*path[:count], str(index))) for index in range(len(blocks))]
    return []


class _NotByBlocksError(Exception):
    """The model does more between blocks than to pass on what they return."""


_Arguments = tuple[list[Any], dict[str, Any]]


class _Passed(NamedTuple):
    """Stands for an argument of a block that is a part of what the block before it returns."""

    number: int


class _Run:
    """One call of a model."""

    def __init__(self) -> None:
        self._reached = 0
        """The number of blocks that the call has reached."""
        self._arguments: deque[_Arguments] = deque()
        """The arguments of the blocks that have yet to compute."""
        self._output: Any = None
        """What the last block that has computed has returned."""
        self._versions: list[int] = []

    def stand_in(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a block in the first pass of the call, in place of its own `forward`."""
        if number != self._reached:
            raise _NotByBlocksError
        self._reached += 1
        if number == 0:
            self._output = forward(*args, **kwargs)
            self._versions = _versions(self._output)
        else:
            parts = {id(part): _Passed(i) for i, part in enumerate(_parts(self._output)) if isinstance(part, Tensor)}
            hidden = next(iter(parts), None)  # the first tensor
            if hidden not in [id(value) for value in (*args, *kwargs.values())]:
                raise _NotByBlocksError
            self._arguments.append(_map(lambda value: parts.get(id(value), value), args, kwargs))
        return self._output

    def check_unchanged(self) -> None:
        """Checks that the first pass has not changed in place what the first block has returned."""
        if _versions(self._output) != self._versions:
            raise _NotByBlocksError

    def advance(self, block: nn.Module) -> None:
        """Computes the next block, if the call has reached it."""
        if self._arguments:
            parts = _parts(self._output)
            args, kwargs = _map(
                lambda value: parts[value.number] if isinstance(value, _Passed) else value, *self._arguments.popleft()
            )
            self._output = block(*args, **kwargs)


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _versions(output: Any) -> list[int]:
    """How often each tensor has been changed in place."""
    return [part._version for part in _parts(output) if isinstance(part, Tensor)]


def _map(change: Callable[[Any], Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> _Arguments:
    return [change(value) for value in args], {name: change(value) for name, value in kwargs.items()}


@contextmanager
def _replace_forwards(modules: Sequence[Any], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Calls `stand_in(number, forward, ...)` in place of each module's own `forward(...)`."""
    own = [vars(module).get("forward") for module in modules]  # accelerate replaces those of offloaded modules
    for number, module in enumerate(modules):
        module.forward = partial(stand_in, number, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
