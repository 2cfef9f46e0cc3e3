"""What are a layer's features good for elsewhere: frozen, tuned, stitched to another net, merged, read by a probe?"""

from lab import at_first_use
from lab.transfer.curves import Preset as Preset
from lab.transfer.curves import compare as compare
from lab.transfer.curves import run as run
from lab.transfer.curves import task_of as task_of

FIGURES = {
    **dict.fromkeys(("transfer", "transfer_pretrained", "transfer_tuned"), "lab.transfer.figures"),
    **dict.fromkeys(
        ("merging", "tuned_scaling", "layer_ensemble", "probe_transfer", "stitching"), "lab.transfer.merging_figures"
    ),
}
RUNS = {
    "transfer": "lab.transfer.curves",
    "transfer_pretrained": "lab.transfer.pretrained",
    "transfer_tuned": "lab.transfer.tuned",
    "merging": "lab.transfer.merging",
    "tuned_scaling": "lab.transfer.scaling",
    "layer_ensemble": "lab.transfer.ensemble",
    "probe_transfer": "lab.transfer.probe_transfer",
    "stitching": "lab.transfer.stitching",
}  # results by kind: the module that makes them, with its COLUMNS

__getattr__ = at_first_use(__name__, "explorer", "figures")  # no part of what a run measures
