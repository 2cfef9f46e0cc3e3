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

FIGURES = dict.fromkeys(("prefix_exits", "fixed_norms"), "lab.depth_budget.exits_figures")
FIGURES |= {"layer_bits": "lab.depth_budget.bits_figures"}
FIGURES |= dict.fromkeys(("pair_table", "block_search", "submodularity"), "lab.depth_budget.search_figures")
RUNS = {
    "layer_bits": "lab.depth_budget.quantisation",
    "prefix_exits": "lab.depth_budget.exits",
    "fixed_norms": "lab.depth_budget.exits",
    "pair_table": "lab.depth_budget.pairs",
    "block_search": "lab.depth_budget.search",
    "submodularity": "lab.depth_budget.submodularity",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(__name__, "submodularity")
