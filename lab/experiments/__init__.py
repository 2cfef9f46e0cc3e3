"""One module a question; each has one main function, `run(model, data, ...) -> Result`."""

from lab.experiments import (
    back_patching,
    concept_depth,
    depth_efficiency,
    depth_statistics,
    hop_stages,
    hop_statistics,
    probe_transfer,
    stitching,
    transfer,
    transfer_statistics,
    transfer_tasks,
    two_hop,
)

__all__ = [
    "back_patching",
    "concept_depth",
    "depth_efficiency",
    "depth_statistics",
    "hop_stages",
    "hop_statistics",
    "probe_transfer",
    "stitching",
    "transfer",
    "transfer_statistics",
    "transfer_tasks",
    "two_hop",
]
