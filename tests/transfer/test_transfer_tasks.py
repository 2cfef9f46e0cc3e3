"""Transfer tasks: halves are disjoint, training and test sets too, seeds decide everything, rules hold."""

import numpy as np
import pytest

from lab.transfer import tasks

SMALL = {"S": {"train_per_class": 5, "test_per_class": 3}}


@pytest.mark.parametrize(("name", "distance"), [(n, d) for n, ds in tasks.DISTANCES.items() for d in ds])
def test_made_alike_twice_and_halves_fit_each_other(name: str, distance: str) -> None:
    task = tasks.make(name, distance=distance, **SMALL.get(name, {}))
    again = tasks.make(name, distance=distance, **SMALL.get(name, {}))
    assert task.checksum() == again.checksum()
    for changed in ({"split": 1}, {"seed": 1}):
        assert task.checksum() != tasks.make(name, distance=distance, **changed, **SMALL.get(name, {})).checksum()
    for side in task.sides.values():
        for part in (side.train, side.test):
            assert part.inputs.shape[1] == task.n_positions and len(part.inputs) == len(part.labels)
            assert part.labels.min() >= 0 and part.labels.max() < task.n_classes == len(side.classes)
            assert task.patches or (part.inputs.min() >= 0 and part.inputs.max() < task.n_inputs)


@pytest.mark.parametrize("name", ["D", "S"])
def test_no_test_example_is_trained(name: str) -> None:
    for side in tasks.make(name, **SMALL.get(name, {})).sides.values():
        seen, asked = ({part.inputs[i].tobytes() for i in range(len(part.inputs))} for part in (side.train, side.test))
        assert not seen & asked


def test_digits_have_all_images_of_disjoint_digits() -> None:
    task = tasks.make("D", split=3, train_per_class=20)
    a, b = (set(task.sides[side].classes) for side in "AB")
    assert a | b == set("0123456789") and not a & b
    assert sum(len(part.labels) for side in task.sides.values() for part in (side.train, side.test)) == 1797
    assert np.bincount(task.sides["A"].train.labels).tolist() == [20] * 5
    quiet = tasks.make("D", split=3, train_per_class=20, noise=0.0).sides["A"].train.inputs
    assert (task.sides["A"].train.inputs - quiet).std() == pytest.approx(0.5, abs=0.02)


def test_sources_near_is_balanced_and_far_is_by_family() -> None:
    near = tasks.make("S", **SMALL["S"]).sides
    assert not set(near["A"].classes) & set(near["B"].classes)
    assert [sum(name.startswith("markov") for name in near[side].classes) for side in "AB"] == [10, 10]
    far = tasks.make("S", distance="far", **SMALL["S"]).sides
    assert all(name.startswith("markov") for name in far["A"].classes)
    assert not any(name.startswith("markov") for name in far["B"].classes)


def test_rules_hold_without_noise() -> None:
    side = tasks.make("S", distance="far", token_noise=0.0, train_per_class=20, test_per_class=1).sides["B"]
    for number, name in enumerate(side.classes):
        groups = side.train.inputs[side.train.labels == number] // 8
        kind, size, shift = name.split()[0], int(name.split()[1]), int(name.split()[2])
        if kind == "repeat":
            assert ((groups[:, size:] - groups[:, :-size]) % 4 == shift).all()
        elif kind == "mirror":
            assert ((groups[:, 16:] - groups[:, :16][:, ::-1]) % 4 == shift).all()
        elif kind == "copy":
            assert (groups[:, 16:] == np.roll(groups[:, :16], -size, axis=1)).all()
        else:
            depth = np.cumsum(np.where(groups < 2, 1, -1), axis=1)
            assert depth.min() >= 0 and depth.max() == size and (depth[:, -1] == 0).all()


def test_chains_differ_by_their_weight() -> None:
    chains = tasks._chains(np.random.default_rng(0), 0.25)
    probabilities = np.diff(chains, axis=-1, prepend=0)
    assert chains[..., -1] == pytest.approx(1)
    apart = np.abs(probabilities[0] - probabilities[1]).sum(-1)
    assert 0 < apart.max() <= 2 * 0.25 + 1e-9


def test_own_tokens() -> None:
    sizes = {"train_per_class": 20, "test_per_class": 3}
    few = tasks.make("S", halves=([20, 22], [24, 26]), token_noise=0.0, **sizes)
    seen = {side: {int(token) // 8 for token in half.train.inputs.ravel()} for side, half in few.sides.items()}
    for side, other in ("AB", "BA"):
        wanted = [token for token in range(32) if token // 8 in seen[side] - seen[other]]
        assert few.own_tokens(side).tolist() == wanted
    assert any(len(few.own_tokens(side)) for side in "AB"), "a motif of few groups leaves tokens out"
    assert not len(tasks.make("S", **{**sizes, "train_per_class": 50}).own_tokens("B"))
    assert not len(tasks.make("D").own_tokens("B"))


def test_gate() -> None:
    gate = tasks.Gate(0.8)
    assert gate.verdict({"A": 0.85, "B": 0.9}) == "passed"
    assert gate.verdict({"A": 0.85, "B": 0.7}) == "base failed: B 0.700 is below 0.8"
    assert (
        gate.verdict({"A": 0.99, "B": 0.7})
        == "base failed: B 0.700 is below 0.8; A 0.990 is at the ceiling, above 0.98"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "X"}, "task='X': choose one of D, S"),
        ({"name": "D", "distance": "far"}, "task D has no distance 'far'; it has near"),
        ({"name": "D", "entities": 3}, "task D has no size entities; it has noise, train_per_class"),
        ({"name": "D", "halves": ([0, 1, 2], [2, 3, 4])}, r"classes \[2\] are in both halves"),
        ({"name": "D", "halves": ([0, 1, 2], [3, 4])}, "A has 3 classes and B 2"),
        ({"name": "S", "halves": ([0, 1], [2, 40])}, r"classes \[40\] do not exist: pass numbers from 0 to 39"),
        ({"name": "S", "distance": "far", "halves": ([0, 1], [2, 3])}, "halves= is for D and for S near"),
        ({"name": "D", "train_per_class": 200}, "train_per_class=200: give a whole number from 1 to 150; a digit has"),
    ],
)
def test_what_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.make(arguments.pop("name"), **arguments)
