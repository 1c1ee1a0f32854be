"""Forward passes that go through a model's blocks together, so that what belongs to one block need be there only while
they are in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import commonpath
from typing import Any

import torch
from torch import nn


def blocks_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the blocks that hold these layers, in order: the members of one list of modules. An empty list if
    the layers are in more than one, as those of an encoder and a decoder."""
    path = commonpath([name.replace(".", "/") for name in layers]).split("/")
    for count in range(1, len(path) + 1):
        found = model.get_submodule(".".join(path[:count]))
        if isinstance(found, nn.ModuleList):
            return [".".join((*path[:count], str(index))) for index in range(len(found))]
    return []


def side_by_side(model: nn.Module, blocks: Sequence[str], calls: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Calls the model with each of `calls`, without gradients, and yields whenever all of the calls have gone through
    the next block; without blocks once, at the end. One call computes at a time, in order: each is a thread that waits
    before every block.

    Raises:
        Exception: what a call has raised. The others are ended.
    """
    passes = [_Pass(model, call) for call in calls]
    hooks = [model.get_submodule(name).register_forward_pre_hook(_wait) for name in blocks]
    try:
        for number in range(len(blocks) + 1):
            for one in passes:
                one.step()
            if number > 0 or not blocks:
                yield
    finally:
        for one in passes:
            one.end()
        for hook in hooks:
            hook.remove()


class _EndedError(Exception):
    """Ends a call that nobody waits for any more."""


class _Pass(threading.Thread):
    """One call, which stops before each block."""

    def __init__(self, model: nn.Module, call: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self._model, self._call = model, call
        self._threads = torch.get_num_threads()  # a setting of each thread
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ends = False

    def run(self) -> None:
        try:
            self._go.acquire()
            torch.set_num_threads(self._threads)
            if not self._ends:
                with torch.no_grad():
                    self._model(**self._call)
        except _EndedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ends = True
            self._stopped.release()

    def step(self) -> None:
        """Goes on to the next block, or to the end."""
        if self._ends:
            return
        if not self.is_alive():
            self.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """In the thread of the call: before a block."""
        self._stopped.release()
        self._go.acquire()
        if self._ends:
            raise _EndedError

    def end(self) -> None:
        """Ends the call wherever it is."""
        if self.is_alive():
            self._ends = True
            self._go.release()
            self.join()


def _wait(*_: Any) -> None:
    one = threading.current_thread()
    if isinstance(one, _Pass):
        one.wait()
