"""Where depth needs bits, weights or whole blocks: what each costs when it is saved, and what beats a random order."""

from lab import at_first_use
from lab.depth_budget.changes import SKIP as SKIP
from lab.depth_budget.changes import Bits as Bits
from lab.depth_budget.changes import Noise as Noise
from lab.depth_budget.changes import Pruned as Pruned
from lab.depth_budget.changes import bits_a_weight as bits_a_weight
from lab.depth_budget.changes import round_to_nearest as round_to_nearest
from lab.depth_budget.evaluation import Evaluator as Evaluator
from lab.depth_budget.evaluation import texts_of as texts_of
from lab.depth_budget.exits import norms as norms
from lab.depth_budget.exits import prefix_exits as prefix_exits
from lab.depth_budget.pairs import pair_table as pair_table
from lab.depth_budget.search import block_search as block_search

_DRAWN = {
    "bits": ("layer_bits",),
    "pruning": ("rate_distortion", "additivity"),
    "search": ("pair_table", "block_search", "submodularity"),
    "exits": ("prefix_exits", "fixed_norms"),
    "trained": ("nested", "macaron", "triples", "depth_policy"),
}
FIGURES = {kind: f"lab.depth_budget.{part}_figures" for part, kinds in _DRAWN.items() for kind in kinds}
RUNS = {
    "layer_bits": "lab.depth_budget.quantisation",
    "rate_distortion": "lab.depth_budget.pruning",
    "additivity": "lab.depth_budget.additivity",
    "pair_table": "lab.depth_budget.pairs",
    "block_search": "lab.depth_budget.search",
    "submodularity": "lab.depth_budget.submodularity",
    "prefix_exits": "lab.depth_budget.exits",
    "fixed_norms": "lab.depth_budget.exits",
    "nested": "lab.depth_budget.nested",
    "macaron": "lab.depth_budget.macaron",
    "triples": "lab.depth_budget.triples",
    "depth_policy": "lab.depth_budget.depth_policy",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(
    __name__, *{name.split(".")[-1] for name in RUNS.values()}, *(f"{part}_figures" for part in _DRAWN), "programme"
)
