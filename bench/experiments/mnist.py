"""The cell of MNIST: a small perceptron that has learned the odd digits learns the even ones, as in the paper's
figure 2a."""

from __future__ import annotations

import multiprocessing
import time
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.experiments.experiment import Cell, Options, Result
from bench.experiments.idx import read_idx
from bench.experiments.methods import METHODS, Setting
from bench.experiments.numbers import rounded

INPUTS, HIDDEN, CLASSES = 8, 128, 5
R = 8
PRETRAINING_RATE = 5e-4
PRETRAINING_EPOCHS, EPOCHS = 200, 100
PRETRAINING_DIGITS, DIGITS, HELD_OUT = 10_000, 1_000, 2_000


@dataclass(frozen=True)
class MnistCell(Cell):
    """One training. The seed draws the perceptron, before it learns the odd digits, and LoRA's A."""

    kind: ClassVar[str] = "mnist"
    method: str
    rate: float
    seed: int = 0

    def prepare(self, options: Options) -> None:
        load(options)
        _pretrained(self.seed, options)

    def run(self, options: Options) -> Result:
        digits, method = load(options), METHODS[self.method]
        epochs = 5 if options.quick else EPOCHS
        model = _perceptron(self.seed)
        model.load_state_dict({name: torch.tensor(w) for name, w in _pretrained(self.seed, options).items()})
        # The head's weight has five rows, and so a rank of at most five.
        setting = Setting(R, self.seed, epochs, None, ["hidden", "head"], rank_pattern={"head": CLASSES})
        model = method.wrap(model, setting)
        begun = time.process_time()
        losses = _fit(model, digits.even, self.rate, epochs)
        trained = time.process_time()
        return {
            "after": _evaluate(model, digits.held_out),
            "losses": [rounded(loss) for loss in losses],
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "epochs": epochs,
            "seconds": {"training": round(trained - begun, 2)},
        }


def _perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = {
        "hidden": nn.Linear(INPUTS, HIDDEN, bias=False),
        "relu": nn.ReLU(),
        "head": nn.Linear(HIDDEN, CLASSES, bias=False),
    }
    return nn.Sequential(OrderedDict(layers))


@cache
def _pretrained(seed: int, options: Options) -> dict[str, np.ndarray]:
    """The weights after the odd digits. A process of its own finds them, and a new one: no fork of one that has
    computed gradients can compute any with a torch for CUDA."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_pretrain, seed, options).result()


def _pretrain(seed: int, options: Options) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)  # as cells have
    model = _perceptron(seed)
    _fit(model, load(options).odd, PRETRAINING_RATE, 10 if options.quick else PRETRAINING_EPOCHS)
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


class Labelled(NamedTuple):
    """Digits as their principal components, float32 [n, INPUTS], and half of each, rounded down, as the class."""

    inputs: Tensor
    classes: Tensor


class Digits(NamedTuple):
    """The digits that are learned first, those that are learned next, and those held out of the latter."""

    odd: Labelled
    even: Labelled
    held_out: Labelled


@cache
def load(options: Options) -> Digits:
    """MNIST: the first digits of each kind, raw pixels; the components are those of the odd ones. With `quick`:
    scikit-learn's digits of 8 x 8 pixels."""
    train, test = _small() if options.quick else _mnist(options.path("mnist"))
    odd = _first(*train, remainder=1, count=PRETRAINING_DIGITS)
    pca = PCA(INPUTS, svd_solver="covariance_eigh").fit(odd[0])

    def labelled(pixels: np.ndarray, labels: np.ndarray) -> Labelled:
        return Labelled(torch.from_numpy(pca.transform(pixels)).float(), torch.from_numpy(labels // 2).long())

    even, held_out = _first(*train, remainder=0, count=DIGITS), _first(*test, remainder=0, count=HELD_OUT)
    return Digits(labelled(*odd), labelled(*even), labelled(*held_out))


Images = tuple[np.ndarray, np.ndarray]
"""Pixels [n, pixels], and the digits."""


def _mnist(folder: Path) -> tuple[Images, Images]:
    def part(name: str) -> Images:
        images = read_idx(folder / f"{name}-images-idx3-ubyte", 3)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise SystemExit(f"{folder}: {len(images)} images but {len(labels)} labels in {name}-*: fetch them again")
        return images.reshape(len(images), -1), labels

    return part("train"), part("t10k")


def _small() -> tuple[Images, Images]:
    pixels, labels = load_digits(return_X_y=True)
    return (pixels[:1200], labels[:1200]), (pixels[1200:], labels[1200:])


def _first(pixels: np.ndarray, labels: np.ndarray, remainder: int, count: int) -> Images:
    chosen = np.flatnonzero(labels % 2 == remainder)[:count]
    return pixels[chosen].astype(np.float64), labels[chosen]


def _fit(model: nn.Module, digits: Labelled, rate: float, epochs: int) -> list[float]:
    """Trains with Adam on all digits at once. Returns the loss before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(epochs):
        loss = cross_entropy(model(digits.inputs), digits.classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _evaluate(model: nn.Module, digits: Labelled) -> dict[str, float | None]:
    logits = model(digits.inputs).double()
    accuracy = (logits.argmax(-1) == digits.classes).double().mean()
    return {"loss": rounded(cross_entropy(logits, digits.classes).item()), "accuracy": rounded(accuracy.item())}
