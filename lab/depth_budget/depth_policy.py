"""Is it worth choosing, for each example, the depth at which a probe reads?

    result = depth_policy.run(model, "cities")  # most of the time goes into the states

After the stochastic skip connection of UGround (rui-qian/UGround at 19e3d71): a softmax over depths from <w_l, h_l>. Ours chooses
among probes of every depth, with the exact gradient of the expected accuracy where the published code samples. The oracle, which
is right where any depth is, is an upper bound and no method: it's near 1 for shuffled labels too.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, probes, require
from lab.identity import identity
from lab.nets.training import one_thread
from lab.results import Result, joined, keep, study, versions
from lab.states import collect_states
from lab.statistics import corrected_interval

READERS = {
    "fixed": "the depth that is best on training groups, for all examples",
    "policy": "the depth that the policy finds likeliest for this example",
    "policy_sampled": "a depth drawn from the policy (expected accuracy, what it is trained for)",
    "policy_mix": "all depths' probabilities, weighted by the policy",
    "policy_others": "control: as policy, which is shown the states of another example",
    "softmax_mix": "all depths' probabilities with learned weights, the same for all examples",
    "mean_mix": "all depths' probabilities with equal weights",
    "random": "a depth drawn at random (expected accuracy)",
    "last": "the last depth",
    "majority": "no depth: the more frequent label of the training groups",
    "oracle": "no method: right where any depth is right",
    "oracle_shuffled": "control: the same for shuffled labels",
}
DECAYS = (0.1, 1.0, 10.0)  # of the policy's weights
COLUMNS = {
    "dataset": "name of the data set; planted: made so that half of the examples can be read at one depth, half at another",
    "split": "number of the split; groups are never on both sides",
    "reader": "which depth is read: see READERS",
    "accuracy": "share of tested examples read rightly",
    "depth": "for fixed: the depth chosen",
    "decay": "for the policy: weight decay chosen on training groups",
    "mean": "mean accuracy over splits",
    "low": "lower end of the 95 % interval: corrected resampled t (`lab.statistics.corrected_interval`)",
    "high": "upper end of that interval",
    "difference": "mean over splits of the accuracy minus that of fixed, on the same split",
    "difference_low": "lower end of its 95 % interval, corrected resampled t",
    "difference_high": "upper end of that interval",
    "n_splits": "number of splits",
}


def run(
    model: TransformerBridge, data: str = "cities", *, seed: int = 0, repeats: int = 10, test_fraction: float = 0.4,
    folds: int = 5, components: int = 32, limit: int | None = None, resume: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Accuracy of probes read at a depth that a policy chooses for each example, beside what it must beat (`READERS`).

    Probes of every depth are fitted on training groups. What chooses a depth learns from training rows that their probes did not
    see (`folds`, whole groups), so that no reader looks at test rows. A planted set shows that the policy finds what is there.

    Args:
        data: name of a set of the kit. limit: only so many examples, in whole groups.
        repeats, test_fraction: number of splits, and the share of groups tested in each.
        components: the policy sees so many principal components of each depth's state, scaled to unit variance; a departure,
            as the whole state has more numbers than there are examples.
    """
    data, seed = require.one_of("data", data, datasets.names()), require.seed(seed)
    frame = _limited(datasets.load(data), None if limit is None else require.whole("limit", limit, 20), seed)
    known = {
        "dataset": data, "seed": seed, "repeats": require.whole("repeats", repeats, 2),
        "test_fraction": require.fraction("test_fraction", test_fraction), "folds": require.whole("folds", folds, 2),
        "components": require.whole("components", components, 1), "n_examples": len(frame),
        "n_groups": int(frame.group.nunique()),
    }  # fmt: skip
    own = identity(model)
    kept = keep(work, {"model": own}, resume=resume)
    shared = {"frame": frame, "known": known, "progress": progress}
    found = study(
        work, [{"part": data}], kept=kept, known=known, shared=shared, models={"model": model}, progress=progress
    )
    table = joined(found)[0]
    parameters = {
        **models.facts(model),
        "identity": str(own),
        **known,
        "interval": "corrected resampled t",
        "versions": versions(),
    }
    return Result("depth_policy", table, _summarise(table, test_fraction), parameters).described(COLUMNS)


def work(
    *, model: TransformerBridge, part: str, frame: pd.DataFrame, known: dict[str, Any], progress: bool, scratch: Any
) -> Result:
    """The set's states and the planted ones, through the same readers."""
    options = {name: known[name] for name in ("seed", "repeats", "test_fraction", "folds", "components")}
    states = collect_states(model, frame.text.tolist(), folder=scratch, progress=progress)["resid"].values
    found = read(states, frame.label.to_numpy(), frame.group.to_numpy(str), **options)
    control = read(*planted(known["seed"]), **options)
    table = pd.concat([found.assign(dataset=part), control.assign(dataset="planted")], ignore_index=True)
    return Result("depth_policy", table, pd.DataFrame(), {})


def planted(
    seed: int, n_groups: int = 150
) -> tuple[Float[np.ndarray, "example depth d_model"], np.ndarray, np.ndarray]:
    """States, labels and groups of four: by a flag in every state the label stands at depth 1 or 3, else there is noise."""
    rng = np.random.default_rng([seed, 7])
    labels, flags = np.tile([0, 0, 1, 1], n_groups), np.tile([0, 1], 2 * n_groups)
    values = rng.normal(size=(len(labels), 5, 16))
    values[:, :, 0] = 4 * flags[:, None] - 2 + 0.1 * values[:, :, 0]
    for depth, flag in ((1, 0), (3, 1)):
        values[flags == flag, depth, 1] += 8 * labels[flags == flag] - 4
    return values, labels, np.repeat(np.arange(n_groups), 4).astype(str)


def read(
    values: Float[np.ndarray, "example depth d_model"], labels: Int[np.ndarray, " example"],
    groups: Shaped[np.ndarray, " example"], *, seed: int, repeats: int, test_fraction: float, folds: int, components: int,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of every reader on every split."""
    splits = probes.group_splits(labels, groups, repeats=repeats, test_fraction=test_fraction, seed=seed)
    rng, rows = np.random.default_rng([seed, 8]), []
    fold = np.full(splits.shape, -1)  # of training rows
    for row, test in zip(fold, splits, strict=True):
        for number, names in enumerate(np.array_split(rng.permutation(np.unique(groups[~test])), folds)):
            row[np.isin(groups, names)] = number
    shuffled = np.stack([rng.permutation(labels) for _ in splits])
    whole, unseen, control = _decisions(values, labels, shuffled, splits, fold)
    for split, test in enumerate(splits):
        states = _components(values, ~test, components)
        decided = whole[split], unseen[split], control[split]
        found = _readers(states, decided, labels, shuffled[split], test, fold[split], rng)
        rows += [{"split": split, "reader": name, **cells} for name, cells in found.items()]
    return pd.DataFrame(rows, columns=["split", "reader", "accuracy", "depth", "decay"])


def _decisions(
    values: np.ndarray, labels: np.ndarray, shuffled: np.ndarray, splits: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-odds [split example depth]: of probes of all training rows, of probes that did not see the row, of shuffled labels."""
    folds = range(fold.max() + 1)
    train = np.concatenate([~splits, *(~splits & (fold != number) for number in folds), ~splits])
    problems = np.concatenate([np.tile(labels, (len(train) - len(splits), 1)), shuffled])
    found = np.stack([
        probes.fit_batched(np.asarray(values[:, depth], float), problems.T, train.T).T for depth in range(values.shape[1])
    ], -1)  # fmt: skip
    whole, *parts, control = np.split(found, len(folds) + 2)
    unseen = np.zeros_like(whole)
    for number, part in zip(folds, parts, strict=True):
        unseen[fold == number] = part[fold == number]
    return whole, unseen, control


def _components(
    values: np.ndarray, train: np.ndarray, components: int
) -> Float[torch.Tensor, "example depth component"]:
    """Principal components of each depth's states with variance 1, both of the training rows; all divided by sqrt(components)."""
    found = []
    for depth in range(values.shape[1]):
        states = torch.as_tensor(values[:, depth] - values[train, depth].mean(0), dtype=torch.float32)
        axes = torch.linalg.svd(states[train], full_matrices=False)[2][:components]
        scores = states @ axes.T
        spread = scores[train].std(
            0
        )  # the last token of the embedding may be the same in all texts: no spread, nothing to see
        scores = torch.where(spread > 1e-4 * states[train].norm(dim=1).mean() + 1e-6, scores / spread, 0.0)
        found.append(functional.pad(scores, (0, components - len(axes))))
    return torch.stack(found, 1) / components**0.5


def _readers(
    states: torch.Tensor, decided: tuple[np.ndarray, np.ndarray, np.ndarray], labels: np.ndarray, shuffled: np.ndarray,
    test: np.ndarray, fold: np.ndarray, rng: np.random.Generator,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy of each reader on the test rows of a split."""
    train, one = ~test, labels[:, None] == 1
    whole, unseen, control = decided
    learned, right = (unseen > 0) == one, ((whole > 0) == one)[test]
    sure, rows = torch.sigmoid(torch.as_tensor(whole)).numpy()[test], np.arange(test.sum())
    best = int(learned[train].mean(0).argmax())

    def mixed(weights: np.ndarray) -> float:
        return float((((sure * weights).sum(-1) > 0.5) == one[test, 0]).mean())

    policy, decay = _policy(states, learned, train, fold)
    blind = _policy(states[torch.as_tensor(rng.permutation(len(labels)))], learned, train, fold)[0][test]
    policy = policy[test]
    mix = _softmax_mix(unseen[train], labels[train])
    most = labels[train].mean() >= 0.5
    found = {
        "fixed": right[:, best].mean(), "policy": right[rows, policy.argmax(1)].mean(),
        "policy_sampled": (policy * right).sum(1).mean(), "policy_mix": mixed(policy),
        "policy_others": right[rows, blind.argmax(1)].mean(), "softmax_mix": mixed(mix),
        "mean_mix": mixed(np.full_like(mix, 1 / len(mix))), "random": right.mean(),
        "last": right[:, -1].mean(), "majority": (labels[test] == most).mean(),
        "oracle": right.any(1).mean(), "oracle_shuffled": ((control > 0) == (shuffled[:, None] == 1))[test].any(1).mean(),
    }  # fmt: skip
    cells = {name: {"accuracy": float(value)} for name, value in found.items()}
    cells["fixed"]["depth"], cells["policy"]["decay"] = best, decay
    return cells


def _policy(
    states: Float[torch.Tensor, "example depth component"], right: Bool[np.ndarray, "example depth"],
    train: Bool[np.ndarray, " example"], fold: Int[np.ndarray, " example"],
) -> tuple[Float[np.ndarray, "example depth"], float]:  # fmt: skip
    """Probabilities of depths, softmax of <w_l, h_l> + b_l, and the weight decay: best on even folds, trained on odd."""
    reward, odd = torch.as_tensor(right, dtype=torch.float32), torch.as_tensor(fold % 2 == 1)
    even, scores = torch.as_tensor(train) & ~odd, []
    for decay in DECAYS:
        chosen = _trained_policy(states, reward, odd & torch.as_tensor(train), decay)
        scores.append(float((chosen * reward)[even].sum(1).mean()))
    decay = DECAYS[int(np.argmax(scores))]
    return _trained_policy(states, reward, torch.as_tensor(train), decay).numpy(), decay


def _trained_policy(
    states: torch.Tensor, reward: torch.Tensor, rows: torch.Tensor, decay: float, steps: int = 200
) -> torch.Tensor:
    """Ascends the expected share of right answers on some rows, all at once; probabilities [example depth] for every row."""
    weights = torch.zeros(states.shape[1:], requires_grad=True)
    offsets = torch.zeros(states.shape[1], requires_grad=True)
    groups = [{"params": [weights], "weight_decay": decay}, {"params": [offsets], "weight_decay": 0.0}]
    optimizer, seen, aim = torch.optim.AdamW(groups, lr=0.02), states[rows], reward[rows]
    with one_thread():
        for _ in range(steps):
            loss = -(((seen * weights).sum(-1) + offsets).softmax(-1) * aim).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            return ((states * weights).sum(-1) + offsets).softmax(-1)


def _softmax_mix(decisions: np.ndarray, labels: np.ndarray, steps: int = 200) -> Float[np.ndarray, " depth"]:
    """One weight a depth, softmax of logits that minimise the loss of the mixed probabilities."""
    sure, wanted = (
        torch.sigmoid(torch.as_tensor(decisions, dtype=torch.float64)),
        torch.as_tensor(labels, dtype=torch.float64),
    )
    logits = torch.zeros(sure.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        loss = functional.binary_cross_entropy((sure * logits.softmax(-1)).sum(1).clamp(1e-9, 1 - 1e-9), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1).numpy()


def _limited(frame: pd.DataFrame, limit: int | None, seed: int) -> pd.DataFrame:
    """At most so many examples, in whole groups drawn at random."""
    if limit is None or limit >= len(frame):
        return frame
    sizes = frame.groupby("group").size()
    drawn = sizes.iloc[np.random.default_rng([seed, 9]).permutation(len(sizes))]
    return frame[frame.group.isin(drawn.index[drawn.cumsum() <= limit])].reset_index(drop=True)


def _summarise(table: pd.DataFrame, test_fraction: float) -> pd.DataFrame:
    rows = []
    for name, part in table.groupby("dataset", sort=False):
        runs = part.pivot(index="split", columns="reader", values="accuracy")
        for reader in READERS:
            difference = corrected_interval((runs[reader] - runs.fixed).to_numpy(), test_fraction)
            rows.append(
                (name, reader, *map(float, (*corrected_interval(runs[reader].to_numpy(), test_fraction), *difference)))
            )
    names = ["dataset", "reader", "mean", "low", "high", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=names).assign(n_splits=table.split.nunique())
