"""Models tuned from one base, merged into one: does it help to scale the merged update by depth?

    result = merging.run()                # four bases, each tuned on four groups of classes: a minute or two
    result.summary                        # paired differences with intervals: LiNeS and Concrete against their controls
    result.tables["single"]               # LiNeS for one tuned model: its own task against the others
    result.tables["mask_profile"]         # Concrete's mask by block
    merging_statistics.published()        # the numbers of the papers, to stand beside ours

A small transformer learns half A of the sources task (`transfer_tasks`, S). Half B's classes fall into groups, one task
each; for each task a head (final norm and classifier) is fitted on the frozen base and stays fixed from then on, as CLIP's
heads do; the body alone is tuned. What is merged is the body, and each task reads the merged body through its own head.

LiNeS (arXiv 2410.17146) scales block l by alpha + beta (l - 1) / (L - 1): shallow blocks stay closer to the base. Concrete
(2312.06173) learns from unlabelled examples which weights to keep. What this does not show: that either is right or wrong for
large pretrained models. The base here is small, and so is what it shares with its tasks.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from lab import require
from lab.nets import replicas
from lab.nets.replicas import Recipe, Shape, Weights
from lab.results import Result, check_executor, keep, run_shards, versions
from lab.transfer import concrete, merging_statistics, task_vectors, tasks
from lab.transfer.task_vectors import add, line, lines, lines_alpha, scale_blocks
from lab.transfer.tasks import Task, seed_of

PARTS = ("validation", "unlabelled", "test")
COLUMNS = {
    "split": "number of the split, which draws the classes, groups, data and the base",
    "seed": "of tuning: heads and order of batches",
    "gate": "passed, or own models failed and why; those are left out of the summary",
    "task": "number of the task, from 0: a group of classes",
    "method": "way to merge or to scale, see `run`",
    "metric": "accuracy, 0 to 1; normalised: by the own model's; entropy of the predictions, nats; for a single model as in "
    "single_scores",
    "value": "of the metric, on test examples",
    "part": "merge or single",
    "family": "comparisons that Holm's correction takes together",
    "comparison": "first - second",
    "first": "method that the other is subtracted from",
    "second": "method that is subtracted",
    "estimate": "mean over splits of the paired difference",
    "levels.estimate": "mean over splits",
    "low": "lower end of the 95 % t interval over splits (seeds of a split count by their mean); nan for one split",
    "high": "upper end of that interval",
    "p": "t test of the difference against 0, two-sided",
    "p_holm": "p, Holm-corrected within a part, metric and family",
    "n_clusters": "number of splits",
    "verdict": "first better or second better where p_holm is below 0.05, else not shown (which is not equal)",
    "target": "number of the task that the single model is tuned on; -1 for a merge",
    "alpha": "start of the ramp and factor of the embedding, see `run`; of constant and same_norm the constant; of frozen the "
    "share of blocks; nan where there is none",
    "beta": "rise of a merge's ramp; nan where there is none, and for a single model, where it is 1 - alpha",
    "scale": "lambda, by which the whole update is multiplied; nan where there is none",
    "evaluations": "number of candidates that were tried on validation examples",
    "validation": "what the choice makes largest: mean normalised accuracy of a merge; of a single model 2 x target + control",
    "role": "target, the task that was tuned on, or control",
    "accuracy": "share of the task's test examples, 0 to 1",
    "normalised": "accuracy by that of the tuned model (target) or of the base (control)",
    "single_scores.metric": "target: normalised accuracy, 1 = tuned; control: mean of the others', 1 = base; objective: "
    "2 x target + control",
    "classes": "names of the task's classes",
    "own": "accuracy of the task's own model on validation examples",
    "base": "accuracy there of the untouched body with the task's head",
    "least": "accuracy that every own model must reach",
    "mask": "which mask: concrete (expected), concrete_draw or concrete_shuffled",
    "block": "number of the block, from 0, or embedding for what lies outside",
    "mean_mask": "mean of the mask over the block's weights; each tensor is divided by its mean when it is used",
    "sd_mask": "standard deviation over them",
    "update_ratio": "norm of the masked update by that of the plain one",
    "step": "first of the 20 steps of adaptation",
    "entropy": "of the predictions on unlabelled examples, nats, summed over tasks, mean of 20 steps",
    "entropy_before": "of task_arithmetic's predictions on test examples, nats",
    "entropy_after": "of the method's, nats",
    "accuracy_before": "of task_arithmetic on test examples, 0 to 1",
    "accuracy_after": "of the method, 0 to 1",
    "both_fell": "whether both are lower after; with no effect on accuracy they would be for about half of the tasks",
}


@dataclass(frozen=True)
class Preset:
    """Sizes at one scale. targets: tasks for which single-task LiNeS is run; *_per_class: examples of each part."""

    pretrain: Recipe
    tune: Recipe
    splits: int
    seeds: int
    targets: int
    scales: tuple[float, ...]  # grid of lambda, and of beta
    alphas: tuple[float, ...]  # grid of single-task LiNeS, from 1 down
    permutations: int
    adapt: concrete.Steps = concrete.Steps()
    probe: Recipe = Recipe(steps=60, batch=16, rate=1e-2, decay=0.0)
    groups: int = 4
    n_blocks: int = 4
    d_model: int = 32
    n_heads: int = 2
    validation_per_class: int = 10
    unlabelled_per_class: int = 30
    test_per_class: int = 20
    sizes: dict[str, Any] = field(default_factory=lambda: {"weight": 0.9, "token_noise": 0.1})


# In "quick" each split is one base with one tuning seed: four clusters that share nothing. Several seeds of one base would
# be cheaper, but they share its classes. Nothing of "full" has been run.
_TENTHS = tuple(round(0.1 * k, 1) for k in range(1, 11))
_TUNE = Recipe(steps=150, batch=8, rate=3e-3, decay=0.0)
_STANDARD = Preset(
    Recipe(steps=600, batch=16, rate=3e-3, decay=0.1), _TUNE, splits=4, seeds=3, targets=4, scales=_TENTHS,
    alphas=(*_TENTHS[::-1], 0.0), permutations=23, adapt=concrete.Steps(steps=400), validation_per_class=20,
    test_per_class=40,
)  # fmt: skip
PRESETS = {
    "quick": Preset(
        Recipe(steps=400, batch=8, rate=3e-3, decay=0.1), _TUNE, splits=4, seeds=1, targets=1,
        scales=(0.1, 0.2, 0.3, 0.4, 0.6, 1.0), alphas=(1.0, 0.8, 0.6, 0.4, 0.2, 0.0), permutations=23,
        adapt=concrete.Steps(batch=4),
    ),
    "standard": _STANDARD,
    "full": replace(_STANDARD, splits=8, n_blocks=8, d_model=128, n_heads=4, sizes={**_STANDARD.sizes, "train_per_class": 500}),
}  # fmt: skip


def run(
    preset: str = "quick",
    *,
    seed: int = 0,
    distance: str = "near",
    gate: float = 0.6,
    resume: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
    **changes: Any,
) -> Result:
    """Pretrain, tune, merge and scale; all choices on validation, all numbers on test.

    LiNeS, its baseline and its controls are chosen from grids of the same length: equally many evaluations. For a merge,
    lambda (TIES: 1.5 times the grid, as published) by the mean normalised accuracy on validation; with LiNeS, alpha is given
    by the norms and only beta is chosen, from the same grid. As published, that grid has no 0: LiNeS cannot fall back to a
    constant factor where that is better. For a single model, alpha (beta = 1 - alpha) is chosen by 2 x the target's + the mean
    of the controls' normalised accuracy. Like the published rule, this uses labels of the control tasks.

    Methods of the merge: own (each task's tuned model), base (the untouched body), averaging (lambda = 1 / N),
    task_arithmetic, ties, consensus, each also with _lines, _reversed (the ramp turned round: deep blocks small, beta tuned as
    well), _same_norm (a constant, the update as long as that of _lines) and _permuted (the factors of _lines in other orders,
    mean over orders; like _same_norm not tuned itself); concrete (expected mask, lambda of task_arithmetic), concrete_draw (one
    random draw of it, as published), concrete_shuffled (its values at other places), by_block and by_task (as many steps on
    L + 1 factors, on N lambdas; the latter with a tenth of the rate, as it moves lambdas and not logits).

    Methods of a single model: tuned, base, lines, lines_alpha_0, reversed and constant (WiSE-FT), both with their own tuned
    alpha; same_norm (constant, the update as long as that of lines), permuted (the lambdas of lines in other orders, embedding
    as it is: mean over all orders but the first, or over random ones); frozen (tuned once more, with the embedding and the
    first n blocks left alone: n from 1 to L - 1, chosen as alpha is).

    Args:
        preset: quick, standard or full: sizes in `PRESETS`.
        seed: first of the tuning seeds (heads, order of batches); a split draws the classes, groups, data and the base.
        distance: near (half A like half B) or far (Markov chains against rules), see `transfer_tasks`.
        gate: least validation accuracy that every own model must reach; other (split, seed) are left out of the summary.
        resume: keep finished splits under the cache folder, and go on from them after an interruption.
        executor: runs splits elsewhere (`lab.results.run_shards`).
        progress: show progress bars.
        changes: fields of `Preset` to set otherwise, such as splits=2, or concrete's `adapt`.

    Returns:
        Result of kind "merging" with the merged models' scores, and paired differences as summary. `.tables`: "levels", "single"
        and "single_scores" (LiNeS for one tuned model), "chosen", "gate", "mask_profile", "adaptation" and "collapse".

    Raises:
        ValueError: unknown preset, distance or size, empty or unsorted grids, too many groups; all before training.
    """
    check_executor(executor)
    preset, seed = require.one_of("preset", preset, PRESETS), require.seed(seed)
    gate = require.number("gate", gate, 0, 1)
    unknown = sorted(set(changes) - set(asdict(PRESETS[preset])))
    if unknown:
        raise ValueError(f"no size {', '.join(unknown)}; sizes are {', '.join(asdict(PRESETS[preset]))}")
    chosen = _checked(replace(PRESETS[preset], **changes))
    task = _make(chosen, distance, 0)
    chosen = replace(chosen, sizes={name: (task.sizes or {})[name] for name in chosen.sizes})  # as plain numbers
    settings = {"preset": preset, "distance": distance, "gate": gate, "threads": torch.get_num_threads()}
    kept, shards = keep(_shard, resume=resume), []
    for split in range(chosen.splits):
        shard: dict[str, Any] = {
            "split": split, "seeds": list(range(seed, seed + chosen.seeds)), "gate": gate, "distance": distance,
        }  # fmt: skip
        known = {**shard, "sizes": asdict(replace(chosen, splits=1)), "threads": settings["threads"]}
        shards.append({**shard, "chosen": chosen, "key": kept.key(known), "progress": progress and executor is None})
    parts = run_shards(_shard, shards, folder=kept.folder, executor=executor, describe="splits", progress=progress)
    table = pd.concat([part.table for part in parts], ignore_index=True)
    names = parts[0].tables
    tables = {name: pd.concat([part.tables[name] for part in parts], ignore_index=True) for name in names}
    failed = tables["gate"].query("gate != 'passed'").drop_duplicates(["split", "seed"])
    for row in failed.itertuples():
        print(f"split {row.split}, seed {row.seed}: {row.gate}; left out of the summary.")
    summary, tables["levels"] = merging_statistics.summarise(table, tables["single_scores"])
    gap = summary.query("metric == 'normalised' and comparison == 'own - averaging'")
    if (gap.low <= 0).any():
        print(
            "Own models are not shown to be above the averaged one: little interferes, or there are too few bases to see it."
        )
    parameters = {
        **settings, **asdict(chosen), "seed": seed, "dataset": "S", "data_checksum": task.checksum(),
        "model": f"transformer, {chosen.n_blocks} blocks, d_model {chosen.d_model}", "versions": versions(),
    }  # fmt: skip
    return Result("merging", table, summary, parameters, tables).described(COLUMNS)


# --- one split ------------------------------------------------------------------------------------------------------


class _Bench:
    """Tasks with their heads: scores any bodies on a part of the data."""

    def __init__(self, shape: Shape, parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]], heads: list[Weights]):
        self.shape, self.parts, self.heads = shape, parts, heads

    def score(self, bodies: Sequence[Weights], part: str) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy and mean entropy (nats), both [body task]."""
        accuracy, entropy = np.empty((2, len(bodies), len(self.heads)))
        for start in range(0, len(bodies), 2):  # few at once stay in the processor's cache
            some = bodies[start : start + 2]
            body = replicas.join(some)
            for task, ((inputs, labels), head) in enumerate(zip(self.parts[part], self.heads, strict=True)):
                top = replicas.pick(head, [0] * len(some))
                log_p = replicas.log_probabilities(self.shape, {**body, **top}, inputs)
                accuracy[start : start + 2, task] = (log_p.argmax(-1) == labels.numpy()).mean(1)
                entropy[start : start + 2, task] = -(np.exp(log_p) * log_p).sum(-1).mean(1)
        return accuracy, entropy


def _shard(
    *, split: int, seeds: list[int], distance: str, gate: float, chosen: Preset, progress: bool, key: str = ""
) -> Result:
    """Base, tuned models and all methods of one split."""
    task = _make(chosen, distance, split)
    shape, parts, classes = _parts(task, chosen, split)
    base = _pretrain(task, chosen, split, progress)
    tunings, by_frozen = _tune(shape, base, parts["train"], chosen, split, seeds, progress)
    rows: dict[str, list[pd.DataFrame]] = {}
    for place, seed in enumerate(seeds):
        mine = range(place * chosen.groups, (place + 1) * chosen.groups)
        weights = [replicas.pick(tunings, [number]) for number in mine]
        heads = [{name: one[name] for name in replicas.TOP} for one in weights]
        bench = _Bench(shape, parts, heads)
        models = [task_vectors.tuned(base, _body(shape, one)) for one in weights]
        taus = task_vectors.task_vectors(base, models)
        own, zero = (bench.score(bodies, "validation")[0] for bodies in ([m.weights for m in models], [base]))
        verdict = tasks.Gate(gate, 1.0).verdict({f"task {t}": own[t, t] for t in range(chosen.groups)})
        verdict = verdict.replace("base failed", "own models failed")
        about = {
            "task": range(chosen.groups),
            "classes": classes,
            "own": own.diagonal(),
            "base": zero[0],
            "least": gate,
        }
        found = [{"gate": pd.DataFrame(about).assign(gate=verdict)}]
        found.append(_merge(bench, base, taus, chosen, seed_of("adapt", split, seed) % 2**63))
        rng = np.random.default_rng(seed_of("orders", split, seed))
        for target in range(chosen.targets):
            frozen = [_body(shape, replicas.pick(nets, [mine[target]])) for nets in by_frozen]
            found.append(_single(bench, base, taus, frozen, chosen, target, rng))
        for frames in found:
            for name, frame in frames.items():
                frame.insert(0, "split", split)
                frame.insert(1, "seed", seed)
                if name in ("table", "single", "single_scores"):
                    frame.insert(2, "gate", verdict)
                rows.setdefault(name, []).append(frame)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in rows.items()}
    return Result("merging", tables.pop("table"), pd.DataFrame(), {"split": split}, tables)


def _merge(bench: _Bench, base: Weights, taus: list[Weights], chosen: Preset, seed: int) -> dict[str, pd.DataFrame]:
    """All merged models of one tuning seed."""
    n, n_blocks, shape = len(taus), chosen.n_blocks, bench.shape
    own = bench.score([add(base, tau) for tau in taus], "validation")[0].diagonal()
    merged = {
        "task_arithmetic": task_vectors.task_arithmetic(taus),
        "ties": task_vectors.ties(taus),
        "consensus": task_vectors.consensus(taus),
    }
    bodies = {"base": base, "averaging": add(base, merged["task_arithmetic"], 1 / n)}
    orders = _orders(n_blocks, chosen.permutations, np.random.default_rng(seed_of("merge orders", seed)))
    settings, permuted = [], {}
    for name, tau in merged.items():
        grid = [scale * (1.5 if name == "ties" else 1.0) for scale in chosen.scales]
        alpha = lines_alpha(taus, tau)
        variants = {
            name: [add(base, tau, scale) for scale in grid],
            f"{name}_lines": [add(base, lines(tau, n_blocks, alpha, beta)) for beta in grid],
            f"{name}_reversed": [
                add(base, scale_blocks(tau, line(n_blocks, alpha, beta)[::-1].tolist(), alpha)) for beta in grid
            ],
        }
        for method, candidates in variants.items():
            values = (bench.score(candidates, "validation")[0] / own).mean(1)
            best = int(values.argmax())
            bodies[method] = candidates[best]
            plain = method == name
            settings.append((method, np.nan if plain else alpha, np.nan if plain else grid[best],
                             grid[best] if plain else np.nan, len(grid), values[best]))  # fmt: skip
            if method == f"{name}_lines":
                same_norm, others = _controls(tau, alpha, grid[best], orders, n_blocks)
                bodies[f"{name}_same_norm"] = add(base, same_norm)
                permuted[f"{name}_permuted"] = [add(base, other) for other in others]
    scale, tau = settings[0][3], merged["task_arithmetic"]
    examples = [inputs for inputs, _ in bench.parts["unlabelled"]]
    options: dict[str, Any] = {"scale": scale, "steps": chosen.adapt, "seed": seed}
    logits, traced = concrete.masks(shape, base, tau, bench.heads, examples, **options)
    traces = {"concrete": traced}
    mask = concrete.expected(logits)
    generator = torch.Generator().manual_seed(seed_of("draw", seed) % 2**63)
    mixed = {
        "concrete": mask,
        "concrete_draw": {name: concrete.draw(x, generator) for name, x in logits.items()},
        "concrete_shuffled": concrete.shuffled(mask, seed_of("shuffled", seed) % 2**63),
    }
    bodies |= {name: add(base, concrete.masked(tau, one), scale) for name, one in mixed.items()}
    update, traces["by_block"] = concrete.by_block(shape, base, tau, bench.heads, examples, **options)
    bodies["by_block"] = add(base, update, scale)
    options["steps"] = replace(chosen.adapt, rate=chosen.adapt.rate / 10)
    scaled, traces["by_task"] = concrete.by_task(shape, base, taus, bench.heads, examples, **options)
    bodies["by_task"] = add(base, scaled)
    accuracy, entropy = bench.score(list(bodies.values()), "test")
    alone, unsure = (found.diagonal() for found in bench.score([add(base, tau) for tau in taus], "test"))
    levels = {"own": (alone, unsure)}
    levels |= {name: (accuracy[place], entropy[place]) for place, name in enumerate(bodies)}
    for name, several in permuted.items():
        right, spread = bench.score(several, "test")
        levels[name] = (right.mean(0), spread.mean(0))
    rows = [
        (task, method, metric, float(values[task]))
        for method, (right, spread) in levels.items()
        for metric, values in {"accuracy": right, "normalised": right / alone, "entropy": spread}.items()
        for task in range(n)
    ]
    before = levels["task_arithmetic"]
    collapse = pd.DataFrame(
        [(task, method, before[1][task], levels[method][1][task], before[0][task], levels[method][0][task])
         for method in ("concrete", "by_block", "by_task") for task in range(n)],
        columns=["task", "method", "entropy_before", "entropy_after", "accuracy_before", "accuracy_after"],
    )  # fmt: skip
    collapse["both_fell"] = (collapse.entropy_after < collapse.entropy_before) & (
        collapse.accuracy_after < collapse.accuracy_before
    )
    profiles = [concrete.profile(tau, one, n_blocks).assign(mask=name) for name, one in mixed.items()]
    traced = pd.DataFrame(
        [(method, start, float(trace[start : start + 20].mean()))
         for method, trace in traces.items() for start in range(0, len(trace), 20)],
        columns=["method", "step", "entropy"],
    )  # fmt: skip
    tuned = pd.DataFrame(settings, columns=["method", "alpha", "beta", "scale", "evaluations", "validation"])
    return {
        "table": pd.DataFrame(rows, columns=["task", "method", "metric", "value"]),
        "chosen": tuned.assign(part="merge", target=-1),
        "mask_profile": pd.concat(profiles, ignore_index=True),
        "adaptation": traced,
        "collapse": collapse,
    }


def _controls(
    tau: Weights, alpha: float, beta: float, orders: Sequence[Sequence[int]], n_blocks: int
) -> tuple[Weights, list[Weights]]:
    """Of LiNeS's update: tau times a constant, as long; and the factors of its blocks in other orders."""
    ramp = line(n_blocks, alpha, beta)
    length = task_vectors.norm(lines(tau, n_blocks, alpha, beta)) / task_vectors.norm(tau)
    permuted = [scale_blocks(tau, ramp[list(order)].tolist(), alpha) for order in orders]
    return {name: length * value for name, value in tau.items()}, permuted


def _single(
    bench: _Bench,
    base: Weights,
    taus: list[Weights],
    frozen: list[Weights],
    chosen: Preset,
    target: int,
    rng: np.random.Generator,
) -> dict[str, pd.DataFrame]:
    """LiNeS for the model tuned on one task, with its controls. frozen: bodies tuned with 1, 2, ... blocks left alone."""
    n_blocks, tau, whole = chosen.n_blocks, taus[target], add(base, taus[target])
    others = [task for task in range(len(taus)) if task != target]

    def ramp(alpha: float, order: Sequence[int] = range(n_blocks)) -> Weights:
        return scale_blocks(tau, line(n_blocks, alpha, 1 - alpha)[list(order)].tolist(), alpha)

    unit = {}  # accuracies by which others are divided
    for part in ("validation", "test"):
        tuned, unit[part] = bench.score([whole, base], part)[0]
        unit[part][target] = tuned[target]
    variants = {
        "lines": [ramp(alpha) for alpha in chosen.alphas],
        "reversed": [ramp(alpha, range(n_blocks)[::-1]) for alpha in chosen.alphas],
        "constant": [{name: alpha * value for name, value in tau.items()} for alpha in chosen.alphas],
    }
    alphas, settings = {}, []
    bodies = {"tuned": whole, "base": base, "lines_alpha_0": add(base, ramp(0.0))}
    tried = {method: [add(base, one) for one in updates] for method, updates in variants.items()} | {"frozen": frozen}
    for method, candidates in tried.items():
        relative = bench.score(candidates, "validation")[0] / unit["validation"]
        values = 2 * relative[:, target] + relative[:, others].mean(1)
        best = int(values.argmax())  # the first of equals: the one closest to the tuned model
        alphas[method] = (best + 1) / n_blocks if method == "frozen" else chosen.alphas[best]
        bodies[method] = candidates[best]
        settings.append((method, alphas[method], len(candidates), values[best]))
    alpha = alphas["lines"]
    length = task_vectors.norm(ramp(alpha)) / task_vectors.norm(tau)
    bodies["same_norm"] = add(base, tau, length)
    permuted = [add(base, ramp(alpha, order)) for order in _orders(n_blocks, chosen.permutations, rng)]
    alphas |= {"tuned": 1.0, "base": 0.0, "lines_alpha_0": 0.0, "same_norm": length, "permuted": alpha}
    accuracy = bench.score([*bodies.values(), *permuted], "test")[0]
    levels = dict(zip([*bodies, "permuted"], [*accuracy[: len(bodies)], accuracy[len(bodies) :].mean(0)], strict=True))
    rows, scores = [], []
    for method, right in levels.items():
        relative = right / unit["test"]
        for task in range(len(taus)):
            role = "target" if task == target else "control"
            rows.append((method, alphas[method], task, role, float(right[task]), float(relative[task])))
        at, away = float(relative[target]), float(relative[others].mean())
        values = {"target": at, "control": away, "objective": 2 * at + away}
        scores += [(method, metric, value) for metric, value in values.items()]
    found = {
        "single": pd.DataFrame(rows, columns=["method", "alpha", "task", "role", "accuracy", "normalised"]),
        "single_scores": pd.DataFrame(scores, columns=["method", "metric", "value"]),
        "chosen": pd.DataFrame(settings, columns=["method", "alpha", "evaluations", "validation"]).assign(
            part="single"
        ),
    }
    for frame in found.values():
        frame.insert(0, "target", target)
    return found


def _orders(n: int, most: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """All orders of n blocks but the straight one, or `most` random ones of them where there are more (n! grows fast)."""
    if n <= 4:
        every = list(itertools.permutations(range(n)))[1:]
        return every if len(every) <= most else [every[k] for k in rng.choice(len(every), most, replace=False)]
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < most:
        drawn.add(tuple(int(block) for block in rng.permutation(n)))
        drawn.discard(tuple(range(n)))
    return sorted(drawn)


# --- data and training ----------------------------------------------------------------------------------------------


def _make(chosen: Preset, distance: str, split: int) -> Task:
    held_out = chosen.validation_per_class + chosen.unlabelled_per_class + chosen.test_per_class
    return tasks.make("S", distance=distance, split=split, test_per_class=held_out, **chosen.sizes)


def _parts(
    task: Task, chosen: Preset, split: int
) -> tuple[Shape, dict[str, list[tuple[torch.Tensor, torch.Tensor]]], list[str]]:
    """Shape of the tuned models, each part's examples by group (classes numbered within it), and the groups' classes."""
    side, size = task.sides["B"], task.n_classes // chosen.groups
    order = np.random.default_rng(seed_of("groups", split)).permutation(task.n_classes)
    groups = [sorted(order[start : start + size].tolist()) for start in range(0, size * chosen.groups, size)]
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in ("train", *PARTS)}
    ends = np.cumsum([0, chosen.validation_per_class, chosen.unlabelled_per_class, chosen.test_per_class])
    for group in groups:
        by_class = {name: [np.flatnonzero(examples.labels == one) for one in group]
                    for name, examples in (("train", side.train), ("test", side.test))}  # fmt: skip
        chosen_rows = {"train": np.concatenate(by_class["train"])}
        for place, name in enumerate(PARTS):
            chosen_rows[name] = np.concatenate([rows[ends[place] : ends[place + 1]] for rows in by_class["test"]])
        for name, rows in chosen_rows.items():
            examples = side.train if name == "train" else side.test
            labels = torch.as_tensor(np.searchsorted(group, examples.labels[rows]))
            parts[name].append((torch.as_tensor(examples.inputs[rows]), labels))
    return _shape(chosen, task, size), parts, [", ".join(side.classes[one] for one in group) for group in groups]


def _shape(chosen: Preset, task: Task, n_classes: int) -> Shape:
    return Shape(
        chosen.n_blocks, chosen.d_model, chosen.n_heads, n_positions=task.n_positions, n_classes=n_classes,
        n_inputs=task.n_inputs, patches=task.patches, causal=task.causal,
    )  # fmt: skip


def _body(shape: Shape, weights: Weights) -> Weights:
    return {name: weights[name] for name in replicas.below(shape, shape.n_blocks)}


def _pretrain(task: Task, chosen: Preset, split: int, progress: bool) -> Weights:
    """The body of a net trained on half A."""
    shape, train = _shape(chosen, task, task.n_classes), task.sides["A"].train
    inputs, labels = torch.as_tensor(train.inputs), torch.as_tensor(train.labels)
    order = replicas.orders([np.arange(len(labels))], [seed_of("pretrain", split)], chosen.pretrain)
    start = replicas.initial(shape, [seed_of("base", split)])
    trained = replicas.train(shape, start, inputs, labels, order, chosen.pretrain, progress=progress, describe="base")
    return _body(shape, trained.weights)


def _tune(
    shape: Shape,
    base: Weights,
    train: list[tuple[torch.Tensor, torch.Tensor]],
    chosen: Preset,
    split: int,
    seeds: Sequence[int],
    progress: bool,
) -> tuple[Weights, list[Weights]]:
    """Heads fitted on the frozen base, and bodies tuned below them: replicas [seed x group], group fastest.

    Returns:
        The tuned models; and a list of the same, tuned with the embedding and the first 1, ..., L - 1 blocks frozen.
    """
    every = [(seed, group) for seed in seeds for group in range(len(train))]
    inputs, labels = (torch.cat(column) for column in zip(*train, strict=True))
    ends = np.cumsum([0, *(len(own) for _, own in train)])
    rows = [np.arange(ends[group], ends[group + 1]) for _, group in every]
    weights = replicas.initial(shape, [seed_of("head", split, *one) for one in every])
    weights |= replicas.pick(base, [0] * len(every))
    still = torch.zeros(len(every), shape.n_inputs, dtype=torch.bool)

    def trained(start: Weights, name: str, recipe: Recipe, **options: Any) -> Weights:
        order = replicas.orders(rows, [seed_of(name, split, *one) for one in every], recipe)
        words: dict[str, Any] = {"progress": progress, "describe": f"split {split}: {name}"}
        return replicas.train(shape, start, inputs, labels, order, recipe, **words, **options).weights

    def frozen(n: int) -> dict[str, Any]:
        return {"frozen_blocks": [n] * len(every), "trained_rows": still}

    with_heads = trained(weights, "heads", chosen.probe, **frozen(shape.n_blocks))
    models = trained(with_heads, "models", chosen.tune, trained_top=False)
    return models, [
        trained(with_heads, "models", chosen.tune, trained_top=False, **frozen(n)) for n in range(1, shape.n_blocks)
    ]


# --- checks ---


def _checked(chosen: Preset) -> Preset:
    """The sizes as plain numbers."""
    counts: dict[str, tuple[int, int | None]] = {
        "n_blocks": (2, None), "groups": (2, 10), "splits": (1, None), "seeds": (1, None), "permutations": (1, None),
        "d_model": (1, None), "n_heads": (1, None), "validation_per_class": (1, None), "unlabelled_per_class": (1, None),
        "test_per_class": (1, None),
    }  # fmt: skip
    found: dict[str, Any] = {name: require.whole(name, getattr(chosen, name), *ends) for name, ends in counts.items()}
    found["targets"] = require.whole("targets", chosen.targets, 1, found["groups"], hint=", the number of groups")
    for name, low in (("scales", None), ("alphas", 0)):
        found[name] = tuple(require.numbers(name, getattr(chosen, name), low=low, least=1))
    if list(found["alphas"]) != sorted(found["alphas"], reverse=True):
        raise ValueError(f"alphas={list(found['alphas'])}: pass them falling, from 1 to 0")
    return replace(chosen, **found)
