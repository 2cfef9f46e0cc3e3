"""Where are the two hops of a query resolved, and does sending a later state back to an earlier layer help?"""

from lab import at_first_use
from lab.back_patching.patching import cells as cells
from lab.back_patching.patching import chosen_queries as chosen_queries
from lab.back_patching.patching import compare_methods as compare_methods
from lab.back_patching.patching import fixed_pair as fixed_pair
from lab.back_patching.patching import patch_once as patch_once
from lab.back_patching.patching import places as places
from lab.back_patching.patching import positions_of as positions_of
from lab.back_patching.patching import require_answers_of as require_answers_of
from lab.back_patching.patching import run as run
from lab.back_patching.patching import search_cost as search_cost
from lab.back_patching.patching import success_matrix as success_matrix
from lab.back_patching.patching import sweep as sweep

FIGURES = dict.fromkeys(("two_hop", "back_patching", "hop_stages"), "lab.back_patching.figures")
RUNS = {
    "two_hop": "lab.back_patching.two_hop",
    "back_patching": "lab.back_patching.patching",
    "hop_stages": "lab.back_patching.stages",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(__name__, "explorer", "figures")  # no part of what a run measures
