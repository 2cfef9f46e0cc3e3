"""One module a question; each has one main function, `run(model, data, ...) -> Result`."""

from lab.experiments import concept_depth

__all__ = ["concept_depth"]
