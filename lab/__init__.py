"""How language models use their depth: a thin layer over TransformerLens hooks, for teaching and research."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.checks import check as check
    from lab.models import load as load
    from lab.results import Result as Result

__version__ = version("depth-lab")
CORE = (
    "checks",
    "identity",
    "interventions",
    "lenses",
    "models",
    "probes",
    "results",
    "runs",
    "states",
    "statistics",
    "texts",
)
ROOMS = ("concept_depth", "back_patching", "depth_efficiency", "transfer", "depth_budget")  # one room a question
__all__ = [*CORE, *ROOMS, "datasets", "explorers", "figures", "lessons", "maps", "nets", "Result", "check", "load"]


def at_first_use(package: str, *modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports these modules of it when they are wanted."""

    def found(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return found


# At first use, because importing torch takes seconds and `python -m lab --help` needs none of it.
_module = at_first_use("lab", *__all__)
_FUNCTIONS = {"Result": "lab.results", "check": "lab.checks", "load": "lab.models"}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    return _module(name)
