"""What are the features of a net's first n blocks worth on another task, and in another net?

    result = transfer.run("D")                             # digits: a minute or three on two cores
    result = transfer.run("S", "standard", distance="far") # Markov chains against rules
    result.summary                                         # four curves over n, paired, with intervals

After Yosinski et al. (arXiv 1411.1792), carried over to small transformers, with what that work lacks: every difference
paired by split, seed and target; equal steps, batch order and fresh upper weights in all treatments; accuracy after the
last step instead of the best of many evaluations; random features with matched sizes; a gate. `transfer_pretrained` asks
the like of a language model. What it does not show: that features are general or specific as such. They are so for this pair of
halves, this distance, this many examples.
"""

import difflib
import inspect
import time
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
from lab.transfer import statistics, tasks
from lab.transfer.tasks import Task, seed_of

METRICS = ("accuracy", "nll")
_FROZEN = ("BnB", "AnB", "random", "random_matched")
_MATCHED_ON = 256  # training examples on which sizes are matched


@dataclass(frozen=True)
class Preset:
    """Sizes of one task at one scale. n: blocks copied; seeds: how many a split; targets: halves trained on."""

    n_blocks: int
    recipe: Recipe
    n: tuple[int, ...]
    splits: int
    targets: tuple[str, ...] = ("B",)
    seeds: int = 1
    d_model: int = 64
    n_heads: int = 2
    skip: bool = True
    sizes: dict[str, Any] = field(default_factory=dict)


# Steps and data were cut until the bases just passed their gates on two CPU cores, well below the ceiling: D 0.84 to 0.95
# (chance 0.2), S 0.65 to 0.81 (chance 0.05), F 0.76 to 0.91 of the facts stored (chance 0.005; 50 steps more: 0.97). On D,
# steps of 4 learn as much as steps of 8: half the arithmetic, and with stacked replicas no more overhead. Mod learns its
# training pairs and nothing else (2,500 steps of 256: training 1.0, test 0.04), so it fails its gate. Nothing of "full"
# has been run.
_D = Recipe(steps=400, batch=4, rate=1e-3, decay=0.01)
_S = Recipe(steps=600, batch=16, rate=3e-3, decay=0.1)
_F = Recipe(steps=450, batch=64, rate=2e-3, decay=0.1)
_MOD = Recipe(steps=1500, batch=64, rate=2e-3, decay=1.0)
_BOTH = ("A", "B")
PRESETS: dict[str, dict[str, Preset]] = {
    "quick": {
        "D": Preset(6, _D, (0, 1, 2, 4, 6), splits=5),
        "S": Preset(4, _S, (0, 2, 4), splits=2),
        "F": Preset(4, _F, (0, 2, 4), splits=3),
        "Mod": Preset(2, _MOD, (0, 1, 2), splits=2),
    },
    "standard": {
        "D": Preset(6, _D, (0, 1, 2, 3, 4, 5, 6), splits=10, targets=_BOTH),
        "S": Preset(4, _S, (0, 1, 2, 3, 4), splits=4, targets=_BOTH),
        "F": Preset(4, _F, (0, 1, 2, 3, 4), splits=4, targets=_BOTH),
        "Mod": Preset(2, replace(_MOD, steps=5000, batch=256), (0, 1, 2), splits=4, targets=_BOTH),
    },
    "full": {
        "D": Preset(6, _D, (0, 1, 2, 3, 4, 5, 6), splits=20, targets=_BOTH, seeds=3),
        "S": Preset(
            *(8, replace(_S, steps=2000, rate=1e-3), tuple(range(9))), splits=4, targets=_BOTH, seeds=3, d_model=128,
            n_heads=4, sizes={"train_per_class": 500},
        ),
        "F": Preset(6, _F, tuple(range(7)), splits=4, targets=_BOTH, seeds=3, d_model=128, n_heads=4),
        "Mod": Preset(
            *(2, replace(_MOD, steps=40_000, batch=512, rate=1e-3), (0, 1, 2)), splits=4, targets=_BOTH, seeds=3,
            d_model=128, n_heads=4,
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class _Planned:
    """One net to train for a target: which treatment, how much is copied, from where, and whether it stays frozen."""

    target: str
    treatment: str
    part: str = "none"
    n: int = 0

    @property
    def name(self) -> str:
        return statistics.run_name(self.treatment, self.part, self.n)

    @property
    def frozen(self) -> bool:
        return self.treatment in _FROZEN and self.part != "none"


def run(
    task: str = "S",
    preset: str = "quick",
    *,
    seed: int = 0,
    distance: str = "near",
    n: Sequence[int] | None = None,
    splits: int | None = None,
    seeds: int | None = None,
    targets: Sequence[str] | None = None,
    steps: int | None = None,
    n_blocks: int | None = None,
    skip: bool = True,
    embedding_only: bool = True,
    random: bool = True,
    own_rows: str = "fresh",
    halves: tuple[Sequence[int], Sequence[int]] | None = None,
    gate: float | None = None,
    at_once: int = 12,
    resume: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
    **sizes: Any,
) -> Result:
    """Train all treatments of one task, and compare them pairwise.

    For each split and seed: baseA and baseB; if both pass the task's gate, for each target half and n the nets BnB, AnB,
    BnB_plus, AnB_plus, random and random_matched (see `lab.transfer.statistics`), the control n = 0 ("BnB"
    with nothing copied: a new seed of the base), base2, and "E": the embedding alone copied. The final norm and the
    classifier are always fresh, and never shared by the halves; what is not copied comes from one fresh net a target, the
    same in all treatments. So does the order of the batches.

    Departures from the paper: blocks for layers; the embedding and positions travel with n >= 1; one net for a target's
    fresh weights, which pairs the treatments; base2 keeps its classifier, as it goes on; tokens that the source never saw
    (F, Mod) get fresh rows that train, in all treatments alike (`own_rows`).

    Args:
        task: D, S, F or Mod (`lab.transfer.tasks`).
        preset: quick, standard or full: sizes in `PRESETS`.
        seed: first of the seeds; a seed draws examples, initial weights and batch order, a split the halves.
        distance: near or far.
        n, splits, seeds, targets, steps, n_blocks: instead of the preset's: numbers of copied blocks; numbers of splits and
            of seeds a split; halves trained on ("A", "B"); steps; blocks of the net (then pass n as well).
        skip: attention and MLP add to the stream. False: they replace it, as layers do in the paper's nets: is a residual
            stream the reason for a missing dip of co-adaptation, and for strong random features? Takes few blocks. No
            random_matched then: the norm that reads an update undoes its scale.
        embedding_only: also "E".
        random: also random and random_matched.
        own_rows: what the rows of tokens that the other half lacks (F, Mod) start from; they train in every treatment.
            "fresh": new ones, in BnB as in AnB: specificity then is about the blocks alone, but co-adaptation also holds
            what learning these rows anew costs. "copied": from the source: the other way round.
        halves: class numbers of A and B instead of random ones (D, S near): the same in all splits.
        gate: least accuracy of the bases, instead of the task's own.
        at_once: replicas trained in one batch (memory against time).
        resume: keep finished (split, seed) under the cache folder, and go on from them after an interruption.
        executor: runs them elsewhere (`lab.results.run_shards`).
        progress: print an estimate and show progress bars.
        sizes: of the task, see `tasks.make`.

    Returns:
        Result with
        `.table`: task, distance, split, seed, target, treatment, part, n, metric (accuracy; nll, train_loss: nats), value,
            gate ("passed" or "base failed: ..."; then the bases are all there is).
        `.summary`: `statistics.curves` of the splits that passed; empty if none did.
        `.tables`: "gate" (a row a split, seed and half), "levels", "differences", "n_star", and "items": each test item
            with the class predicted by each net (column `statistics.run_name`).

    Raises:
        ValueError: unknown task, preset, distance or size; n outside 0..blocks; overlapping halves; all before training.

    A frozen net with larger n has fewer trained blocks: compare treatments at one n, not points along one curve. A
    residual stream passes its input on, so random blocks are a strong baseline. The same seed gives the same numbers
    with the same number of threads: another number sums in another order, and training turns that rounding into other
    nets, as another seed would.
    """
    tasks.check(task, distance)
    _check_options(task, sizes)
    check_executor(executor)
    seed, at_once = require.seed(seed, hint="; seeds= says how many"), require.whole("at_once", at_once, 1)
    chosen = PRESETS[require.one_of("preset", preset, PRESETS)][task]
    blocks = chosen.n_blocks if n_blocks is None else require.whole("n_blocks", n_blocks, 1)
    skip, embedding_only, random = require.flags(skip=skip, embedding_only=embedding_only, random=random)
    steps = chosen.recipe.steps if steps is None else require.whole("steps", steps, 1)
    chosen = replace(
        chosen,
        n=tuple(sorted(require.wholes("n", chosen.n if n is None else n, 0, blocks))),
        splits=chosen.splits if splits is None else require.whole("splits", splits, 1),
        seeds=chosen.seeds if seeds is None else require.whole("seeds", seeds, 1),
        targets=tuple(require.some_of("targets", chosen.targets if targets is None else targets, _BOTH)),
        recipe=replace(chosen.recipe, steps=steps),
        n_blocks=blocks,
        skip=skip,
        sizes={**chosen.sizes, **sizes},
    )
    own_rows = require.one_of("own_rows", own_rows, ("fresh", "copied"))
    if halves is not None:
        halves = tasks.check_halves(halves, 10 if task == "D" else 40)
    example = tasks.make(task, distance=distance, split=0, seed=seed, halves=halves, **chosen.sizes)
    chosen = replace(chosen, sizes={**chosen.sizes, **{name: (example.sizes or {})[name] for name in sizes}})
    least = example.gate.least if gate is None else require.number("gate", gate, 0, 1)
    settings = {
        "task": task, "distance": distance, **asdict(chosen), "embedding_only": embedding_only, "random": random,
        "own_rows": own_rows, "halves": None if halves is None else [list(half) for half in halves], "gate": least,
        "ceiling": example.gate.most, "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = {name: value for name, value in settings.items() if name not in ("splits", "seeds")}
    kept, shards = keep(_shard, resume=resume), []
    for split in range(chosen.splits):
        for one in range(seed, seed + chosen.seeds):
            shard: dict[str, Any] = {"split": split, "seed": one, "settings": known}
            key = kept.key(shard)
            shards.append({**shard, "key": key, "at_once": at_once, "progress": progress and executor is None})
    missing = [one for one in shards if not kept.has(one["key"])]
    if progress and missing:
        _print_estimate(example, chosen, _plan(known), len(missing), at_once)
    parts = run_shards(_shard, shards, folder=kept.folder, executor=executor, describe="splits", progress=progress)
    table = pd.concat([part.table for part in parts], ignore_index=True)
    names = ("gate", "items")
    tables = {name: pd.concat([part.tables[name] for part in parts], ignore_index=True) for name in names}
    _say_failures(tables["gate"], len(shards))
    scored = statistics.passed(table)
    scored = scored[scored.metric.isin(METRICS)]
    summary = pd.DataFrame(columns=statistics.CURVE_COLUMNS)
    if len(scored):
        summary = statistics.curves(scored)
        tables["levels"] = statistics.levels(scored)
        tables["differences"] = statistics.differences(scored)
        tables["n_star"] = statistics.n_star(summary)
    parameters = {
        **settings, "preset": preset, "seed": seed, "model": _name(chosen), "dataset": task, "n_classes": example.n_classes,
        "data_checksum": example.checksum(), "versions": versions(),
    }  # fmt: skip
    return Result("transfer", table, summary, parameters, tables)


def compare(result: Result, first: str, second: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Paired differences of two treatments at every n, and their curve with intervals: first minus second.

    Returns:
        Tables of `statistics.differences` and of `statistics.curves`.

    Raises:
        ValueError: unknown treatments, or a result in which no split passed its gate.
    """
    scored = statistics.passed(result.table)
    scored = scored[scored.metric.isin(METRICS)]
    there = sorted(scored.treatment.unique())
    unknown = [name for name in (first, second) if name not in there]
    if unknown or first == second:
        raise ValueError(f"compare({first!r}, {second!r}): pass two of {', '.join(there) or 'none (no split passed)'}")
    chosen = {f"{first} - {second}": (first, second)}
    return statistics.differences(scored, chosen), statistics.curves(scored, chosen)


def task_of(result: Result, split: int = 0, seed: int | None = None) -> Task:
    """The task of one split and seed (None: the run's first), made again from a result's parameters: to see its examples."""
    about = result.parameters
    seed = about["seed"] if seed is None else seed
    return tasks.make(
        about["task"], distance=about["distance"], split=split, seed=seed, halves=about["halves"], **about["sizes"]
    )


# --- one shard: one split and seed ----------------------------------------------------------------------------------


def _shard(*, split: int, seed: int, settings: dict[str, Any], at_once: int, progress: bool, key: str = "") -> Result:
    """Bases, gate, and all treatments of one split and seed."""
    settings = dict(settings)
    recipe = Recipe(**settings["recipe"])
    task = tasks.make(
        settings["task"], distance=settings["distance"], split=split, seed=seed, halves=settings["halves"],
        **settings["sizes"],
    )  # fmt: skip
    shape = _shape(task, **{name: settings[name] for name in ("n_blocks", "d_model", "n_heads", "skip")})
    about = {"task": task.name, "distance": task.distance, "split": split, "seed": seed}
    pool = _Pool(task, recipe, (split, seed))
    trained = _train_bases(shape, pool, recipe, split, seed, progress)
    bases = {side: replicas.pick(trained.weights, [place]) for place, side in enumerate(_BOTH)}
    base_scores = {
        side: {**_score(shape, bases[side], pool.test[side])[0], "train_loss": float(trained.loss[place])}
        for place, side in enumerate(_BOTH)
    }
    accuracy = {side: score["accuracy"] for side, score in base_scores.items()}
    verdict = tasks.Gate(settings["gate"], settings["ceiling"]).verdict(accuracy)
    gate = pd.DataFrame(
        [{**about, "side": side, "accuracy": accuracy[side], "least": settings["gate"], "most": settings["ceiling"],
          "gate": verdict} for side in _BOTH]
    )  # fmt: skip
    rows, items = [], []
    plan = _plan(settings) if verdict == "passed" else []
    starts = [_start(shape, task, bases, net, settings, split, seed) for net in plan]
    results = None
    if plan:
        results = replicas.train(
            *(shape, replicas.join(starts), pool.inputs, pool.labels, pool.order([net.target for net in plan]), recipe),
            frozen_blocks=[net.n if net.frozen else 0 for net in plan],
            trained_rows=torch.stack([_trained_rows(task, net) for net in plan]),
            at_once=at_once, progress=progress, describe=f"split {split}, seed {seed}: treatments",
        )  # fmt: skip
    for target in settings["targets"] if plan else _BOTH:
        scores = {"base": (_Planned(target, "base"), base_scores[target])}
        mine = [place for place, net in enumerate(plan) if net.target == target]
        if results is not None:
            found = _score(shape, replicas.pick(results.weights, mine), pool.test[target])
            for place, score in zip(mine, found, strict=True):
                score["train_loss"] = float(results.loss[place])
                scores[plan[place].name] = (plan[place], score)
        for net, score in scores.values():
            where = {**about, "target": target, "treatment": net.treatment, "part": net.part, "n": net.n}
            rows += [
                {**where, "metric": name, "value": score[name]} for name in (*METRICS, "train_loss") if name in score
            ]
        labels = pool.test[target][1].numpy()
        predicted = {name: score["predicted"] for name, (_, score) in scores.items()}
        items.append(
            pd.DataFrame({**about, "target": target, "item": np.arange(len(labels)), "label": labels, **predicted})
        )
    table = pd.DataFrame(rows).assign(gate=verdict)
    tables = {"gate": gate, "items": pd.concat(items, ignore_index=True)}
    return Result("transfer", table, pd.DataFrame(), {**settings, **about}, tables)


def _plan(settings: dict[str, Any]) -> list[_Planned]:
    """All nets of a shard but the bases, in a fixed order."""
    copies = ["BnB", "AnB", "BnB_plus", "AnB_plus"]
    nets = []
    for target in settings["targets"]:
        nets.append(_Planned(target, "base2"))
        if 0 in settings["n"]:
            nets.append(_Planned(target, "BnB"))
        if settings["embedding_only"]:
            extra = ["random"] if settings["random"] else []
            nets += [_Planned(target, treatment, "embedding") for treatment in copies + extra]
        # without a stream, the norm that reads an update undoes any scale of it: matching sizes would change nothing
        extra = (["random", "random_matched"] if settings["skip"] else ["random"]) if settings["random"] else []
        for n in settings["n"]:
            if n:
                nets += [_Planned(target, treatment, "blocks", n) for treatment in copies + extra]
    return nets


def _start(
    shape: Shape, task: Task, bases: dict[str, Weights], net: _Planned, settings: dict[str, Any], split: int, seed: int
) -> Weights:
    """Weights of a net before training: [1, ...]."""
    if net.treatment == "base2":
        return replicas.pick(bases[net.target], [0])
    where = (task.name, task.distance, split, seed, net.target)
    start = replicas.initial(shape, [seed_of("fresh", *where)])
    if net.part == "none":
        return start
    other = _BOTH[1 - _BOTH.index(net.target)]
    if net.treatment.startswith("random"):
        source = replicas.initial(shape, [seed_of("random", *where)])
        if net.treatment == "random_matched":
            seen = torch.as_tensor(task.sides[net.target].train.inputs)
            chosen = np.random.default_rng(seed_of("matched", *where)).permutation(len(seen))[:_MATCHED_ON]
            source = replicas.match_sizes(shape, source, bases[other], seen[torch.as_tensor(chosen)])
    else:
        source = bases[net.target if net.treatment.startswith("BnB") else other]
    fresh_rows = start["embedding"].clone()
    for name in replicas.below(shape, net.n):
        start[name] = source[name].clone()
    if settings["own_rows"] == "fresh":
        own = torch.as_tensor(task.own_tokens(net.target))
        start["embedding"][:, own] = fresh_rows[:, own]
    return start


def _trained_rows(task: Task, net: _Planned) -> torch.Tensor:
    """Which rows of the embedding train: all, or in a frozen net those of tokens that the other half lacks."""
    rows = torch.ones(task.n_inputs, dtype=torch.bool)
    if net.frozen:
        rows[:] = False
        rows[torch.as_tensor(task.own_tokens(net.target))] = True
    return rows


def _train_bases(
    shape: Shape, pool: "_Pool", recipe: Recipe, split: int, seed: int, progress: bool
) -> replicas.Trained:
    where = (pool.task.name, pool.task.distance, split, seed)
    start = replicas.initial(shape, [seed_of("base", *where, side) for side in _BOTH])
    return replicas.train(
        shape, start, pool.inputs, pool.labels, pool.order(_BOTH), recipe, progress=progress,
        describe=f"split {split}, seed {seed}: bases",
    )  # fmt: skip


class _Pool:
    """Training examples of both halves as one array, and each half's order of batches."""

    def __init__(self, task: Task, recipe: Recipe, where: tuple[int, int]) -> None:
        self.task, self.recipe = task, recipe
        train = [task.sides[side].train for side in _BOTH]
        self.inputs = torch.as_tensor(np.concatenate([part.inputs for part in train]))
        self.labels = torch.as_tensor(np.concatenate([part.labels for part in train]))
        ends = np.cumsum([0, *(len(part.labels) for part in train)])
        self.rows = {side: np.arange(ends[place], ends[place + 1]) for place, side in enumerate(_BOTH)}
        self.seeds = {side: seed_of("order", task.name, task.distance, *where, side) for side in _BOTH}
        self.test = {
            side: (torch.as_tensor(half.test.inputs), torch.as_tensor(half.test.labels))
            for side, half in task.sides.items()
        }

    def order(self, targets: Sequence[str]) -> torch.Tensor:
        """What each replica sees: the same for all replicas of a target."""
        once = {side: replicas.orders([self.rows[side]], [self.seeds[side]], self.recipe)[0] for side in set(targets)}
        return torch.stack([once[target] for target in targets])


def _score(shape: Shape, weights: Weights, test: tuple[torch.Tensor, torch.Tensor]) -> list[dict[str, Any]]:
    """For each replica: accuracy, nll (nats) and the predicted classes."""
    inputs, labels = test
    log_p = replicas.log_probabilities(shape, weights, inputs)
    right = labels.numpy()
    return [
        {
            "accuracy": float((one.argmax(-1) == right).mean()),
            "nll": float(-one[np.arange(len(right)), right].mean()),
            "predicted": one.argmax(-1),
        }
        for one in log_p
    ]


# --- checks and messages --------------------------------------------------------------------------------------------


def _check_options(task: str, sizes: dict[str, Any]) -> None:
    """Misspelt options arrive among the sizes of the task."""
    options = [name for name in inspect.signature(run).parameters if name not in ("task", "preset", "sizes")]
    known = tasks.sizes_of(task)
    for name in sizes:
        if name not in known:
            near = difflib.get_close_matches(name, options + known, 1)
            raise ValueError(
                f"there is no option {name}{f' (did you mean {near[0]}?)' if near else ''}; options are {', '.join(options)}; "
                f"sizes of task {task} are {', '.join(known)}"
            )


def _shape(task: Task, n_blocks: int, d_model: int, n_heads: int, skip: bool = True) -> Shape:
    return Shape(
        n_blocks=n_blocks, d_model=d_model, n_heads=n_heads, n_positions=task.n_positions, n_classes=task.n_classes,
        n_inputs=task.n_inputs, patches=task.patches, causal=task.causal, skip=skip,
    )  # fmt: skip


def _name(chosen: Preset) -> str:
    skips = "" if chosen.skip else ", no skip connections"
    return f"transformer, {chosen.n_blocks} blocks, d_model {chosen.d_model}{skips}"


def _say_failures(gate: pd.DataFrame, shards: int) -> None:
    failed = gate[gate.gate != "passed"].drop_duplicates(["split", "seed"])
    for row in failed.itertuples():
        print(f"task {row.task} {row.distance}, split {row.split}, seed {row.seed}: {row.gate}.")
    if len(failed):
        print(
            f"{len(failed)} of {shards} left out of every curve. Below the gate: more steps or examples; at the ceiling: "
            "fewer, or more noise."
        )


def _print_estimate(task: Task, chosen: Preset, plan: list[_Planned], shards: int, at_once: int) -> None:
    """Time a few steps of as many replicas as are trained at once, and scale up. Right to a factor of two."""
    shape = _shape(task, chosen.n_blocks, chosen.d_model, chosen.n_heads, chosen.skip)
    few = replace(chosen.recipe, steps=3)
    pool = _Pool(task, few, (0, 0))
    count = min(at_once, len(plan))
    weights = replicas.initial(shape, range(count))
    start = time.perf_counter()
    replicas.train(shape, weights, pool.inputs, pool.labels, pool.order(["B"] * count), few, at_once=at_once)
    per_step = (time.perf_counter() - start) / 3 / count
    units = 2 + sum(1 - 2 / 3 * (net.n / shape.n_blocks if net.frozen else 0) for net in plan)
    seconds = shards * units * chosen.recipe.steps * per_step
    print(
        f"About {seconds:.0f} s for {shards} splits and seeds of task {task.name} {task.distance}: {len(plan) + 2} nets each, "
        f"{chosen.recipe.steps} steps of {chosen.recipe.batch} examples."
    )
