"""How language models use their depth: a thin layer over TransformerLens hooks, for teaching and research."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab import (
        answers,
        branches,
        checks,
        datasets,
        depth_plots,
        effects,
        experiments,
        identity,
        interventions,
        lenses,
        maps,
        merging_plots,
        metrics,
        models,
        plots,
        probes,
        published_data,
        replicas,
        small_models,
        states,
        texts,
        transfer_plots,
        widgets,
    )
    from lab.checks import check
    from lab.models import load
    from lab.results import Result

__version__ = version("depth-lab")
__all__ = [
    "Result",
    "answers",
    "branches",
    "check",
    "checks",
    "datasets",
    "depth_plots",
    "effects",
    "experiments",
    "identity",
    "interventions",
    "lenses",
    "load",
    "maps",
    "merging_plots",
    "metrics",
    "models",
    "plots",
    "probes",
    "published_data",
    "replicas",
    "small_models",
    "states",
    "texts",
    "transfer_plots",
    "widgets",
]

# Found at first use, because importing torch takes seconds and `python -m lab --help` needs none of it.
_FUNCTIONS = {"Result": "lab.results", "check": "lab.checks", "load": "lab.models"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return import_module(f"lab.{name}")
    raise AttributeError(f"module 'lab' has no attribute {name!r}")
