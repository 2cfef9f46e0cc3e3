"""How language models use their depth: a thin layer over TransformerLens hooks, for teaching and research."""

from importlib.metadata import version

from lab import datasets, experiments, metrics, models, plots, texts
from lab.checks import check
from lab.models import load
from lab.results import Result

__version__ = version("depth-lab")
__all__ = ["Result", "check", "datasets", "experiments", "load", "metrics", "models", "plots", "texts"]
