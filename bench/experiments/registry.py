"""All experiments by name, in the order of the page."""

from __future__ import annotations

from bench.experiments.claims.methods import Methods
from bench.experiments.claims.paper_nlg import PaperNlg
from bench.experiments.claims.paper_nlg_rates import PaperNlgRates
from bench.experiments.claims.paper_nlu import PaperNlu
from bench.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (Methods(), PaperNlg(), PaperNlgRates(), PaperNlu())
}
