"""Which layers still compute: what later layers and the output lose when one is skipped, and where attributions end."""

from lab import at_first_use
from lab.depth_efficiency.layers import TREATMENTS as TREATMENTS
from lab.depth_efficiency.layers import contributions as contributions
from lab.depth_efficiency.layers import prompts as prompts
from lab.depth_efficiency.layers import run as run
from lab.depth_efficiency.layers import without as without
from lab.depth_efficiency.scores import depth_scores as depth_scores

FIGURES = dict.fromkeys(
    ("depth_efficiency", "depth_scores", "integrator", "linear_maps"), "lab.depth_efficiency.figures"
)
RUNS = {
    "depth_efficiency": "lab.depth_efficiency.layers",
    "depth_scores": "lab.depth_efficiency.scores",
    "integrator": "lab.depth_efficiency.integrator",
    "linear_maps": "lab.depth_efficiency.linear_maps",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(__name__, "explorer", "figures")  # no part of what a run measures
