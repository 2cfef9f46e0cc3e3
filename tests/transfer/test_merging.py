"""Merging: identities, plain reference implementations, one tiny run from end to end, and what is refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lab import statistics
from lab.nets import replicas
from lab.nets.replicas import Recipe, Shape, Weights
from lab.results import Result
from lab.transfer import concrete, merging, merging_statistics, task_vectors
from lab.transfer.task_vectors import add, line, lines, scale_blocks

SHAPE = Shape(
    n_blocks=12, d_model=8, n_heads=2, n_positions=6, n_classes=3, n_inputs=10
)  # blocks 10 and 11 have two digits


def body(seed: int, shape: Shape = SHAPE) -> Weights:
    weights = replicas.initial(shape, [seed])
    return {name: weights[name] for name in replicas.below(shape, shape.n_blocks)}


def vectors(count: int, shape: Shape = SHAPE) -> tuple[Weights, list[Weights], list[Weights]]:
    """A base, nets near it, and their task vectors."""
    base = body(0, shape)
    nets = [
        {name: base[name] + 0.1 * value for name, value in body(seed, shape).items()} for seed in range(1, count + 1)
    ]
    return base, nets, task_vectors.task_vectors(base, [task_vectors.tuned(base, net) for net in nets])


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


# --- task vectors and LiNeS -----------------------------------------------------------------------------------------


def test_lines_with_alpha_1_is_the_tuned_model_to_the_last_bit() -> None:
    base, nets, taus = vectors(1)
    assert same(add(base, lines(taus[0], 12, alpha=1.0, beta=0.0)), nets[0])
    assert same(add(base, lines(taus[0], 12, alpha=0.0, beta=0.0)), base)
    assert not same(add(base, lines(taus[0], 12, alpha=0.9, beta=0.1)), nets[0])


def test_each_block_gets_its_own_factor_also_from_block_10_on() -> None:
    base, _, (tau,) = vectors(1)
    scaled = lines(tau, 12, alpha=0.2, beta=0.8)
    for name, value in scaled.items():
        number = name.split(".")[0]
        wanted = 0.2 + 0.8 * int(number) / 11 if number.isdigit() else 0.2
        assert torch.allclose(value, wanted * tau[name], rtol=1e-12, atol=0), name
    names = [
        "model.layers.1.mlp.0.weight",
        "model.layers.10.mlp.1.weight",
        "model.layers.2.1.x",
        "model.norm.1.x",
        "1.qkv",
    ]
    assert [task_vectors.block_of(name, "model.layers.") for name in names] == [1, 10, 2, None, None]
    assert task_vectors.block_of("10.qkv") == 10 and task_vectors.block_of("a.10.qkv") is None
    assert line(1, 0.3, 0.7).tolist() == [0.3]


def test_published_norm_rule_gives_one_over_n_for_task_arithmetic() -> None:
    _, _, taus = vectors(3)
    merged = task_vectors.task_arithmetic(taus)
    assert task_vectors.lines_alpha(taus, merged) == pytest.approx(1 / 3)
    half = {name: value / 2 for name, value in merged.items()}
    assert task_vectors.lines_alpha(taus, half) == pytest.approx(2 / 3)


def test_models_of_another_base_or_shape_are_refused() -> None:
    base, nets, taus = vectors(2)
    other = body(9)
    stray = task_vectors.tuned(other, nets[1])
    with pytest.raises(ValueError, match="model 1 was tuned from another base .*only models tuned from one base"):
        task_vectors.task_vectors(base, [task_vectors.tuned(base, nets[0]), stray])
    small = body(0, replace(SHAPE, n_blocks=2))
    with pytest.raises(
        ValueError, match=r"the base and the tuned weights differ in 40 weights, the first is '10.mlp_in'"
    ):
        task_vectors.tuned(base, small)
    with pytest.raises(ValueError, match="task vector 0 and task vector 1 differ in 40 weights"):
        task_vectors.ties([taus[0], {name: value.double() for name, value in small.items()}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda base, taus: task_vectors.task_vectors(base, []), "no models were given"),
        (lambda base, taus: task_vectors.ties([]), "no task vectors were given"),
        (lambda base, taus: task_vectors.ties(taus, keep=0.0), "keep=0.0: pass a share above 0"),
        (lambda base, taus: task_vectors.consensus(taus, at_least=3), "at_least=3: pass 1 to 2"),
        (lambda base, taus: lines(taus[0], 4, 1.0, 0.0), "4 factors, and blocks .*: pass one factor for each block"),
        (lambda base, taus: scale_blocks(taus[0], [1.0] * 12, 1.0, "model."), r"12 factors, and blocks \[\]"),
    ],
)
def test_what_the_mergers_refuse(call: Callable, message: str) -> None:
    base, _, taus = vectors(2)
    with pytest.raises(ValueError, match=message):
        call(base, taus)


# --- mergers against plain ones -------------------------------------------------------------------------------------


def slow_ties(taus: list[dict[str, np.ndarray]], keep: float) -> dict[str, np.ndarray]:
    """Entry by entry, as the paper says it."""
    kept = []
    for tau in taus:
        sizes = sorted((abs(x) for value in tau.values() for x in value.ravel()), reverse=True)
        least = sizes[max(1, round(keep * len(sizes))) - 1]
        kept.append({name: np.where(np.abs(value) >= least, value, 0) for name, value in tau.items()})
    found = {}
    for name in taus[0]:
        out = np.zeros(taus[0][name].shape)
        for place in np.ndindex(out.shape):
            entries = [tau[name][place] for tau in kept]
            elected = np.sign(sum(entries))
            agreeing = [x for x in entries if x != 0 and np.sign(x) == elected]
            out[place] = sum(agreeing) / len(agreeing) if agreeing else 0
        found[name] = out
    return found


@pytest.mark.parametrize("keep", [0.2, 0.6, 1.0])
def test_ties_is_what_a_plain_loop_gives(keep: float) -> None:
    _, _, taus = vectors(3, replace(SHAPE, n_blocks=1))
    wanted = slow_ties([{name: value.numpy() for name, value in tau.items()} for tau in taus], keep)
    found = task_vectors.ties(taus, keep)
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-12, atol=0)
    empty = sum(int((value == 0).sum()) for value in found.values()) / sum(value.numel() for value in found.values())
    assert (empty == 0) == (keep == 1)


def test_ties_by_hand() -> None:
    rows = [[5.0, -1.0, 3.0, 0.1], [4.0, 2.0, -6.0, 0.1], [-1.0, 2.0, 2.0, 0.1]]
    taus = [{"w": torch.tensor(row, dtype=torch.float64)} for row in rows]
    # two of four stay: [5 . 3 .], [4 . -6 .], [. 2 2 .]
    assert task_vectors.ties(taus, keep=0.5)["w"].tolist() == [4.5, 2.0, -6.0, 0.0]


def test_ties_keeps_k_and_a_tie_gives_nothing() -> None:
    """The authors' code would keep three of four here, and give 2, the mean of the majority's sign, where 2 meets -2."""
    taus = [{"w": torch.tensor(row, dtype=torch.float64)} for row in ([9.0, 2.0, 1.0, 0.5], [9.0, -2.0, 1.0, 0.5])]
    assert task_vectors.ties(taus, keep=0.5)["w"].tolist() == [9.0, 0.0, 0.0, 0.0]


def test_consensus_by_hand() -> None:
    taus = [{"w": torch.tensor(row, dtype=torch.float64)} for row in ([4.0, 1.0, 1.0], [4.0, 0.1, -5.0])]
    # sums 8, 1.1, -4; |tau| against 0.4 * |sum - tau|: 4 > 1.6, 1 > 0.04, 1 < 2; and 4 > 1.6, 0.1 < 0.4, 5 > 0.4
    assert task_vectors.tall_mask(taus[0], {"w": taus[0]["w"] + taus[1]["w"]}, 0.4)["w"].tolist() == [True, True, False]
    assert task_vectors.consensus(taus, 0.4)["w"].tolist() == [8.0, 0.0, 0.0]
    assert task_vectors.consensus(taus, 0.4, at_least=1)["w"].tolist() == [8.0, 1.1, -4.0]


# --- Concrete -------------------------------------------------------------------------------------------------------


def heads_and_inputs(shape: Shape) -> tuple[list[Weights], list[torch.Tensor]]:
    weights = replicas.initial(shape, [20, 21])
    generator = torch.Generator().manual_seed(0)
    heads = [{name: 3 * weights[name][[task]] for name in replicas.TOP} for task in range(2)]
    return heads, [torch.randint(shape.n_inputs, (30, shape.n_positions), generator=generator) for _ in heads]


def test_a_mask_of_large_or_equal_logits_is_plain_task_arithmetic() -> None:
    base, _, taus = vectors(2)
    tau = task_vectors.task_arithmetic(taus)
    for logit, exact in ((1e4, True), (0.0, False)):
        logits = {name: torch.full(value.shape, logit) for name, value in tau.items()}
        mask = concrete.expected(logits)
        found, wanted = add(base, concrete.masked(tau, mask), 0.3), add(base, tau, 0.3)
        assert not exact or same(found, wanted)
        assert all(torch.allclose(value, wanted[name], atol=1e-7, rtol=0) for name, value in found.items())
        assert all(value.mean() == pytest.approx(1.0 if exact else 0.5) for value in mask.values())
    uneven = {name: torch.linspace(-2, 2, value.numel()).view(value.shape) for name, value in tau.items()}
    assert not same(add(base, concrete.masked(tau, concrete.expected(uneven)), 0.3), wanted)


def test_the_expected_mask_is_the_mean_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for logit in (-1.0, 0.5, 2.0):
        x = torch.full((200_000,), logit)
        drawn = concrete.draw(x, generator).double()
        error = float(drawn.std()) / len(x) ** 0.5
        assert abs(float(concrete.expected({"w": x[:1]})["w"]) - float(drawn.mean())) < 4 * error + 1e-4


def test_entropy_is_that_of_the_predictions_and_training_lowers_it() -> None:
    shape = replace(SHAPE, n_blocks=2)
    base, _, taus = vectors(2, shape)
    tau, (heads, inputs) = task_vectors.task_arithmetic(taus), heads_and_inputs(shape)

    def entropy(update: Weights) -> float:
        total = 0.0
        for head, own in zip(heads, inputs, strict=True):
            log_p = replicas.log_probabilities(shape, add(base, update) | head, own)[0]
            total += float(-(np.exp(log_p) * log_p).sum(-1).mean())
        return total

    found = concrete.mean_entropy(shape, add(base, tau), replicas.join(heads), torch.stack(inputs))
    assert float(found.sum()) == pytest.approx(entropy(tau), rel=1e-5)
    before = replicas.digest(base), replicas.digest(replicas.join(heads))
    options: dict[str, Any] = {"scale": 1.0, "steps": concrete.Steps(steps=40, rate=0.1, batch=30), "seed": 0}
    logits, trace = concrete.masks(shape, base, tau, heads, inputs, **options)
    assert len(trace) == 40 and trace[-5:].mean() < trace[:5].mean()
    assert entropy(concrete.masked(tau, concrete.expected(logits))) < entropy(tau)
    assert entropy(concrete.by_block(shape, base, tau, heads, inputs, **options)[0]) < entropy(tau)
    assert entropy(concrete.by_task(shape, base, taus, heads, inputs, **options)[0]) < entropy(tau)
    assert before == (replicas.digest(base), replicas.digest(replicas.join(heads)))


def test_no_step_changes_nothing() -> None:
    shape = replace(SHAPE, n_blocks=2)
    base, _, taus = vectors(2, shape)
    tau, (heads, inputs) = task_vectors.task_arithmetic(taus), heads_and_inputs(shape)
    options: dict[str, Any] = {"scale": 0.5, "steps": concrete.Steps(steps=0), "seed": 0}
    logits, _ = concrete.masks(shape, base, tau, heads, inputs, **options)
    assert all((value == 0).all() for value in logits.values())
    assert same(concrete.by_block(shape, base, tau, heads, inputs, **options)[0], tau)
    by_task = concrete.by_task(shape, base, taus, heads, inputs, **options)[0]
    assert same(add(base, by_task), add(base, tau, 0.5))


def test_a_shuffled_mask_keeps_each_mean_and_the_profile_reads_blocks() -> None:
    _, _, (tau,) = vectors(1)
    generator = torch.Generator().manual_seed(0)
    mask = {name: torch.rand(value.shape, generator=generator, dtype=torch.float64) for name, value in tau.items()}
    mixed = concrete.shuffled(mask, 0)
    for name, value in mask.items():
        assert sorted(value.flatten().tolist()) == sorted(mixed[name].flatten().tolist())
    assert not same(mask, mixed)
    found = concrete.profile(tau, mask, 12).set_index("block")
    assert list(found.index) == ["embedding", *map(str, range(12))]
    names = ["10.qkv", "10.out", "10.mlp_in", "10.mlp_out"]
    assert found.mean_mask["10"] == pytest.approx(float(torch.cat([mask[name].flatten() for name in names]).mean()))
    assert found.update_ratio["10"] > 1, "weights of mean 1 that differ have a mean square above 1"


# --- the experiment -------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "pretrain": Recipe(steps=20, batch=8, rate=3e-3), "tune": Recipe(steps=10, batch=8, rate=3e-3),
    "probe": Recipe(steps=5, batch=8, rate=1e-2), "splits": 2, "seeds": 2, "groups": 3, "n_blocks": 2, "d_model": 8,
    "scales": (0.3, 1.0), "alphas": (1.0, 0.0), "adapt": concrete.Steps(steps=3, batch=2), "validation_per_class": 4,
    "unlabelled_per_class": 4, "test_per_class": 5, "sizes": {"train_per_class": 20},
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> Result:
    return merging.run(gate=0.0, resume=False, progress=False, **TINY)


def test_tables(result: Result, tmp_path: Path) -> None:
    table = result.table
    assert list(table) == ["split", "seed", "gate", "task", "method", "metric", "value"]
    wanted = {first for pairs in merging_statistics.MERGED.values() for pair in pairs for first in pair}
    assert set(table.method) == wanted
    assert (table.groupby(["method", "metric"]).size() == 2 * 2 * 3).all(), "two splits, two seeds, three tasks"
    wide = table.pivot(index=["split", "seed", "task"], columns=["metric", "method"], values="value")
    own = wide["accuracy"]["own"]
    for method in wanted:
        pd.testing.assert_series_equal(wide["normalised"][method], wide["accuracy"][method] / own, check_names=False)
    tuned = result.tables["chosen"].query("method != 'frozen'")
    assert tuned.evaluations.eq(2).all(), "equally many evaluations for everything that is tuned"
    levels = result.tables["levels"]
    assert {"frozen", "lines_alpha_0"} <= set(levels[levels.part == "single"].method)
    assert set(result.tables) == {
        *("levels", "single", "single_scores", "chosen", "gate", "mask_profile", "adaptation", "collapse"),
    }
    loaded = Result.load(result.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(loaded.summary, result.summary)
    for name, frame in result.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], frame)


def test_summary_is_the_paired_difference_of_the_table(result: Result) -> None:
    wide = result.table.query("metric == 'normalised'").pivot(
        index=["split", "seed", "task"], columns="method", values="value"
    )
    means = (wide["ties_lines"] - wide["ties_reversed"]).groupby("split").mean()
    rows = result.summary.query("part == 'merge' and metric == 'normalised'").set_index("comparison")
    row = rows.loc["ties_lines - ties_reversed"]
    reach = 12.706205 * means.std() / 2**0.5  # Student's t with 1 degree of freedom
    assert row.estimate == pytest.approx(means.mean())
    assert (row.low, row.high) == pytest.approx((means.mean() - reach, means.mean() + reach), rel=1e-5)
    family = rows[rows.family == "lines"]
    np.testing.assert_allclose(family.p_holm, statistics.holm(family.p.to_numpy()))
    assert len(family) == 12 and family.n_clusters.eq(2).all(), "seeds share a base: splits are the units"


def test_controls_of_a_merge_have_its_length_or_its_factors() -> None:
    _, _, (tau,) = vectors(1)
    plain, permuted = merging._controls(tau, 0.2, 0.8, [tuple(range(12))[::-1], (1, 0, *range(2, 12))], 12)
    scaled = lines(tau, 12, 0.2, 0.8)
    assert task_vectors.norm(plain) == pytest.approx(task_vectors.norm(scaled))
    factors = [float((one[f"{block}.qkv"] / tau[f"{block}.qkv"]).mean()) for one in permuted for block in range(12)]
    ramp = line(12, 0.2, 0.8)
    assert factors == pytest.approx([*ramp[::-1], ramp[1], ramp[0], *ramp[2:]])
    for one in permuted:
        assert torch.allclose(one["embedding"], 0.2 * tau["embedding"]), "outside of the blocks as in LiNeS"


def test_heads_stay_and_frozen_blocks_stay() -> None:
    """A body is tuned below a head that was fitted on the base, with none, one, ... of its first blocks left alone."""
    chosen = replace(merging.PRESETS["quick"], **{**TINY, "n_blocks": 3})
    task = merging._make(chosen, "near", 0)
    shape, parts, _ = merging._parts(task, chosen, 0)
    base = body(0, shape)
    models, by_frozen = merging._tune(shape, base, parts["train"], chosen, 0, [0], False)
    assert len(by_frozen) == 2
    for place, nets in enumerate(by_frozen):
        for name, value in nets.items():
            if name in replicas.TOP:
                assert torch.equal(value, models[name]), "one head for all"
            else:
                still = name in ("embedding", "positions") or int(name.split(".")[0]) <= place
                assert torch.equal(value, base[name].expand_as(value)) == still, name
    for name in replicas.below(shape, 3):
        assert not torch.equal(models[name], base[name].expand_as(models[name])), name


def test_single_scores_are_those_of_the_tasks(result: Result) -> None:
    single, scores = result.tables["single"], result.tables["single_scores"]
    where = ["split", "seed", "target", "method"]
    by_role = single.groupby([*where, "role"]).normalised.mean().unstack()
    wide = scores.pivot(index=where, columns="metric", values="value")
    np.testing.assert_allclose(wide.target, by_role.target)
    np.testing.assert_allclose(wide.control, by_role.control)
    np.testing.assert_allclose(wide.objective, 2 * wide.target + wide.control)
    tuned = wide.xs("tuned", level="method")
    assert tuned.target.eq(1).all() and wide.xs("base", level="method").control.eq(1).all()
    ones = single.query("alpha == 1").groupby(["split", "seed", "target", "task"]).accuracy.nunique()
    assert ones.eq(1).all(), "alpha = 1 is the tuned model, whatever the ramp"


def test_a_failed_gate_is_said_and_left_out(capsys: pytest.CaptureFixture) -> None:
    failed = merging.run(gate=0.99, resume=False, progress=False, **{**TINY, "splits": 1, "seeds": 1})
    assert failed.summary.empty and failed.table.gate.str.startswith("own models failed: task 0 0.").all()
    assert "split 0, seed 0: own models failed: task 0 0." in capsys.readouterr().out


def test_finished_splits_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    options = {**TINY, "splits": 1, "seeds": 1}
    first = merging.run(gate=0.0, progress=False, **options)
    monkeypatch.setattr(replicas, "train", None)
    again = merging.run(gate=0.0, progress=False, **options)
    pd.testing.assert_frame_equal(first.table, again.table)
    pd.testing.assert_frame_equal(first.summary, again.summary)


def test_parts_of_the_data_are_apart() -> None:
    chosen = replace(merging.PRESETS["quick"], **TINY)
    task = merging._make(chosen, "near", 0)
    shape, parts, classes = merging._parts(task, chosen, 0)
    assert shape.n_classes == 6 and len(classes) == 3
    rows = {name: {tuple(row) for inputs, _ in part for row in inputs.tolist()} for name, part in parts.items()}
    assert all(not rows[one] & rows[two] for one, two in itertools.combinations(rows, 2))
    assert [len(labels) for _, labels in parts["test"]] == [30, 30, 30]
    assert [sorted(set(labels.tolist())) for _, labels in parts["train"]] == [list(range(6))] * 3


def test_orders_are_all_but_the_straight_one() -> None:
    rng = np.random.default_rng(0)
    assert set(merging._orders(3, 24, rng)) == set(itertools.permutations(range(3))) - {(0, 1, 2)}
    assert len(merging._orders(4, 24, rng)) == 23 and len(set(merging._orders(4, 6, rng))) == 6
    many = merging._orders(8, 20, rng)
    assert len(set(many)) == 20 and tuple(range(8)) not in many


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "preset='huge': choose one of quick, standard, full"),
        ({"depth": 3}, "no size depth; sizes are"),
        ({"groups": 11}, "groups=11: give a whole number from 2 to 10"),
        ({"targets": 5}, "targets=5: give a whole number from 1 to 4, the number of groups"),
        ({"splits": 0}, "splits=0: give a whole number, at least 1"),
        ({"alphas": (0.0, 1.0)}, "pass them falling, from 1 to 0"),
        ({"distance": "middle"}, "task S has no distance 'middle'"),
    ],
)
def test_what_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merging.run(progress=False, **arguments)


def test_published_numbers() -> None:
    found = merging_statistics.published()
    assert set(found.known_from) == {"review", "repository"} and not found.isna().any(axis=None)
    clip = found[found.setting == "CLIP ViT-B/32, 8 tasks"].set_index("method").value
    assert clip["concrete"] - clip["task_arithmetic (lambda 0.3)"] == pytest.approx(8.3)
    assert clip["concrete"] - clip["task_arithmetic (lambda 0.2)"] == pytest.approx(7.1)
