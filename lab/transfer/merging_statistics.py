"""Numbers about merged and scaled models, on plain tables: paired differences, levels, and what the papers report.

No model, no torch. Every comparison is paired by (split, seed, task). Clusters are splits, as seeds of a split share its base;
intervals are Student's t on their means (`transfer_statistics.curves`).
"""

import numpy as np
import pandas as pd

from lab import statistics
from lab.transfer import statistics as transfer_statistics

MERGERS = ("task_arithmetic", "ties", "consensus")
# Paired differences of the merged models (normalised accuracy), by family: Holm's correction is within one.
MERGED = {
    "interference": [("own", "averaging"), ("own", "base"), ("averaging", "base")],
    "merger": [("task_arithmetic", "averaging"), ("ties", "task_arithmetic"), ("consensus", "task_arithmetic")],
    "lines": [
        (f"{name}_lines", f"{name}{other}")
        for name in MERGERS
        for other in ("", "_reversed", "_same_norm", "_permuted")
    ],
    "concrete": [
        ("concrete", other)
        for other in ("task_arithmetic", "concrete_shuffled", "concrete_draw", "by_block", "by_task")
    ],
}
# ... and of a single tuned model: target, control, and 2 x target + control.
SINGLE = {
    "lines": [
        ("lines", name)
        for name in ("tuned", "base", "lines_alpha_0", "reversed", "constant", "same_norm", "permuted", "frozen")
    ]
}


def summarise(table: pd.DataFrame, single: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Paired differences and levels of what passed the gate; empty if nothing did.

    Args:
        table: split, seed, gate, task, method, metric (accuracy, normalised, entropy: left out here), value.
        single: split, seed, gate, target, method, metric (target, control, objective), value.

    Returns:
        Summary and levels (`merging.COLUMNS`). verdict: "first better" or "second better" where p_holm is below 0.05, else
        "not shown", which is not "equal": the interval says how large a difference could still be.
    """
    about = {"task": "S", "distance": "-", "part": "none", "n": 0}
    runs = {
        "merge": table[table.metric != "entropy"].rename(columns={"task": "target", "method": "treatment"}),
        "single": single.rename(columns={"method": "treatment"}),
    }
    rows, levels = [], []
    for part, families in {"merge": MERGED, "single": SINGLE}.items():
        ours = transfer_statistics.passed(runs[part]).assign(**about)
        if ours.empty:
            continue
        levels.append(transfer_statistics.levels(ours, cluster=("split",)).assign(part=part))
        pairs = {f"{first} - {second}": (family, first, second)
                 for family, those in families.items() for first, second in those}  # fmt: skip
        wanted = {name: pair[1:] for name, pair in pairs.items()}
        found = transfer_statistics.curves(ours, wanted, cluster=("split",))
        found = found.rename(columns={"curve": "comparison"}).drop(columns="p_holm")
        named = found.comparison.map(pairs)
        found = found.assign(part=part, **{key: named.str[k] for k, key in enumerate(("family", "first", "second"))})
        rows.append(found)
    columns = ["part", "metric", "family", "comparison", "first", "second", "estimate", "low", "high", "p", "p_holm",
               "n_clusters", "verdict"]  # fmt: skip
    if not rows:
        return pd.DataFrame(columns=columns), pd.DataFrame()
    summary = pd.concat(rows, ignore_index=True).assign(p_holm=np.nan)
    for _, family in summary.groupby(["part", "metric", "family"]):
        summary.loc[family.index, "p_holm"] = statistics.holm(family.p.to_numpy())
    sure = summary.p_holm < 0.05
    better = [sure & (summary.low > 0), sure & (summary.high < 0)]
    summary["verdict"] = np.select(better, ["first better", "second better"], "not shown")
    level = pd.concat(levels, ignore_index=True).rename(columns={"treatment": "method"})
    return summary[columns], level[["part", "metric", "method", "estimate", "low", "high", "n_clusters"]]


# --- published ------------------------------------------------------------------------------------------------------


def published() -> pd.DataFrame:
    """Numbers of the papers, in percent: columns paper, setting, method, metric, value, known_from.

    None comes with an interval. "review": known from a summary of the paper only; "repository": read in the result files or
    notebook of the published code (wang-kee/LiNeS at 43a7bdd, tanganke/subspace_fusion at 67f8450).
    """
    clip, large, t5 = "CLIP ViT-B/32, 8 tasks", "CLIP ViT-L/14, 8 tasks", "Flan-T5-base LoRA-16, 8 tasks"
    rows: list[tuple[str, str, str, str, float, str]] = []
    one = "CLIP ViT-B/32, one task tuned, mean over 8"
    for method, metric, value in (("tuned", "target", 90.5), ("lines", "target", 90.3), ("tuned", "control", 38.0),
                                  ("lines", "control", 48.0), ("base", "control", 48.3)):  # fmt: skip
        rows.append(("LiNeS", one, method, metric, value, "review"))
    euro = "CLIP ViT-B/32, tuned on EuroSAT, alpha 0.1"
    rows += [
        ("LiNeS", euro, method, "target", value, "repository") for method, value in (("tuned", 99.87), ("lines", 98.70))
    ]
    controls = {
        "DTD": (44.0, 37.5, 43.8), "SUN397": (63.2, 52.6, 62.0), "MNIST": (48.3, 37.4, 55.5), "RESISC45": (60.7, 31.0, 46.5),
        "GTSRB": (32.6, 25.6, 34.3), "Cars": (59.7, 46.7, 58.0), "SVHN": (31.6, 18.5, 33.9),
    }  # fmt: skip
    for name, values in controls.items():
        rows += [("LiNeS", euro, method, f"control {name}", value, "repository")
                 for method, value in zip(("base", "tuned", "lines"), values, strict=True)]  # fmt: skip
    for name, gain in (("task_arithmetic", 3.1), ("ties", 4.0), ("consensus", 2.3)):
        rows.append(("LiNeS", "CLIP ViT-L/14, 20 tasks", f"{name}_lines - {name}", "gain, points", gain, "review"))
    for setting, method, pair in (
        ("T5-large, 7 tasks", "ties", (71.6, 72.0)),
        ("T5-large, 11 tasks", "consensus", (67.5, 67.5)),
    ):
        rows += [("LiNeS", setting, name, "accuracy", value, "review")
                 for name, value in zip((method, f"{method}_lines"), pair, strict=True)]  # fmt: skip
    results = {
        clip: {"base": 48.1, "own": 90.5, "averaging": 66.0, "task_arithmetic (lambda 0.2)": 70.2,
               "task_arithmetic (lambda 0.3)": 69.0, "ties": 72.8, "adamerging, by task": 71.1, "adamerging, by tensor": 80.9,
               "concrete": 77.3, "concrete, step 0": 68.9, "concrete adamerging, by task (100 steps)": 77.7,
               "concrete adamerging, by tensor": 84.0},
        large: {"task_arithmetic": 84.4, "ties": 86.5, "concrete": 87.4, "concrete adamerging, by tensor": 91.1},
        t5: {"base": 75.7, "own": 84.6, "averaging": 78.2, "task_arithmetic": 78.05, "ties": 78.05, "adamerging": 78.3,
             "concrete": 78.0, "concrete adamerging": 78.5},
    }  # fmt: skip
    for setting, found in results.items():
        rows += [("Concrete", setting, method, "accuracy", value, "repository") for method, value in found.items()]
    return pd.DataFrame(rows, columns=["paper", "setting", "method", "metric", "value", "known_from"])
