"""At which depth can a linear probe read a fact, a feeling, an inference from the states?"""

from lab import at_first_use
from lab.concept_depth.accuracy import compare as compare
from lab.concept_depth.accuracy import run as run

FIGURES = {"concept_depth": "lab.concept_depth.figures"}
RUNS = {
    "concept_depth": "lab.concept_depth.accuracy",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(__name__, "explorer", "figures")  # no part of what a run measures
