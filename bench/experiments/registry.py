"""All experiments by name, in the order of the page."""

from __future__ import annotations

from bench.experiments.claims.fast_svd import FastSvd
from bench.experiments.claims.first_steps import FirstSteps
from bench.experiments.claims.methods import Methods
from bench.experiments.claims.mnist import Mnist
from bench.experiments.claims.quant_errors import QuantErrors
from bench.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (Methods(), QuantErrors(), FastSvd(), FirstSteps(), Mnist())
}
