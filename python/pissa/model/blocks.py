"""Forward passes that go through a model's blocks together, so that a block's data is needed only during its passes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from os.path import commonpath
from typing import Any

import torch
from torch import nn


def blocks_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The names of the blocks that contain these layers, in order. Blocks are the members of one list of modules. Empty
    if the layers are in several lists, as in an encoder and a decoder, or in a single block."""
    path = commonpath([name.replace(".", "/") for name in layers]).split("/")
    for count in range(1, len(path) + 1):
        found = model.get_submodule(".".join(path[:count]))
        if isinstance(found, nn.ModuleList) and len(found) > 1:
            return [".".join((*path[:count], str(index))) for index in range(len(found))]
    return []


_THREADS = 1024
"""The limit for all passes together. OpenMP makes a team for each computing thread for as long as that lives."""


def side_by_side(model: nn.Module, blocks: Sequence[str], calls: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Calls the model with each of `calls`, without gradients, and yields each time all calls have gone through the
    next block. Without blocks it yields once, at the end. Only one call computes at a time, in order. Each call is a
    thread that waits before every block.

    Raises:
        Exception: the exception that a call raised; ValueError if a call runs the blocks in another order. The other
            calls are ended.
    """
    threads = max(1, min(torch.get_num_threads(), _THREADS // max(len(calls), 1)))  # a setting of each thread
    passes = [_Pass(model, call, threads) for call in calls]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(_wait, name, number))
        for number, name in enumerate(blocks)
    ]
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
    """Ends a call for which nobody waits any more."""


class _Pass(threading.Thread):
    """One call, which stops before each block."""

    def __init__(self, model: nn.Module, call: Mapping[str, Any], threads: int) -> None:
        super().__init__(daemon=True)
        self._model, self._call, self._threads = model, call, threads
        self._state = _thread_state(next(model.parameters()).device)
        self._reached = 0
        """The number of blocks that the call has reached."""
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ends = False

    def run(self) -> None:
        try:
            self._go.acquire()
            torch.set_num_threads(self._threads)
            if not self._ends:
                with torch.no_grad(), ExitStack() as stack:
                    for context in self._state:
                        stack.enter_context(context)
                    self._model(**self._call)
        except _EndedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ends = True
            self._stopped.release()

    def step(self) -> None:
        """Continues to the next block, or to the end."""
        if self._ends:
            return
        if not self.is_alive():
            self.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, name: str, number: int) -> None:
        """Waits before a block. Runs in the thread of the call."""
        if number != self._reached:
            raise ValueError(
                f"calibration: the model runs {name} again, or out of order, so that its blocks cannot be calibrated "
                "one after the other; give pissa.wrap what pissa.calibrate(model, batches) returns"
            )
        self._reached += 1
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


def _wait(name: str, number: int, *_: Any) -> None:
    one = threading.current_thread()
    if isinstance(one, _Pass):
        one.wait(name, number)


def _thread_state(device: torch.device) -> list[AbstractContextManager[Any]]:
    """The state that a new thread does not inherit, although a call may depend on it: autocast and the current GPU."""
    kind = device.type if device.type != "meta" else "cpu"
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    autocast = torch.autocast(kind, dtype=dtype, enabled=enabled)
    return [torch.cuda.device(device), autocast] if kind == "cuda" else [autocast]
