"""All experiments by name, in the order of the page."""

from __future__ import annotations

from bench.experiments.claims.alpha import Alpha
from bench.experiments.claims.any_start import AnyStart
from bench.experiments.claims.components import Components
from bench.experiments.claims.equal_rates import EqualRates
from bench.experiments.claims.fast_svd import FastSvd
from bench.experiments.claims.few_steps import FewSteps
from bench.experiments.claims.forgetting import Forgetting
from bench.experiments.claims.gemma import Gemma
from bench.experiments.claims.longer import Longer
from bench.experiments.claims.methods import Methods
from bench.experiments.claims.nlu import NLU
from bench.experiments.claims.quant_errors import QuantErrors
from bench.experiments.claims.ranks import Ranks
from bench.experiments.claims.released import Released
from bench.experiments.claims.repairs import Repairs
from bench.experiments.claims.start_norm import StartNorm
from bench.experiments.claims.suggested import Suggested
from bench.experiments.experiment import Experiment

_ALL: tuple[Experiment, ...] = (
    Methods(),
    EqualRates(),
    FewSteps(),
    StartNorm(),
    Alpha(),
    Longer(),
    Gemma(),
    AnyStart(),
    Repairs(),
    Released(),
    NLU(),
    Ranks(),
    Components(),
    QuantErrors(),
    FastSvd(),
    Forgetting(),
    Suggested(),
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
