"""Small nets on halves of the ten digits, many side by side: data, weights, training, tables.

Every weight has the net as its first axis, so twelve nets train as fast as one; `lab.nets.replicas` does the same for
transformers. A net is a list of matrices [net, in + 1, out], one for each layer; the last row of each is the bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch.nn import functional

from lab.nets.replicas import descend
from lab.transfer import tasks
from lab.transfer.tasks import Task

SPLITS, LAYERS, WIDTH, PIXELS, CLASSES = 12, 6, 64, 64, 5
STEPS, RATE = 150, 3e-3
_TESTED = 140  # test images of each digit; every digit has 144 or more

Net = Sequence[Float[torch.Tensor, "net _ _"]]  # inputs and the bias, outputs: of each layer its own


@dataclass(frozen=True)
class Half:
    """Five digits, of many splits: training and test images, and which of its five classes each is."""

    x: Float[torch.Tensor, "net example pixel"]
    y: Int[torch.Tensor, "net example"]
    x_test: Float[torch.Tensor, "net example_t pixel"]
    y_test: Int[torch.Tensor, "net example_t"]


def tasks_of(splits: int = SPLITS) -> list[Task]:
    """The ten digits in two halves, split at random, so many times (`lab.transfer.tasks`)."""
    return [tasks.make("D", split=split, train_per_class=30, noise=0.7) for split in range(splits)]


def halves(made: Sequence[Task]) -> tuple[Half, Half]:
    """A and B of some tasks, all of one shape."""
    return _half(made, "A"), _half(made, "B")


def _half(made: Sequence[Task], side: str) -> Half:
    train = [task.sides[side].train for task in made]
    test = [task.sides[side].test for task in made]
    rows = [np.concatenate([np.flatnonzero(one.labels == c)[:_TESTED] for c in range(CLASSES)]) for one in test]
    return Half(
        torch.stack([torch.as_tensor(one.inputs).flatten(1) for one in train]),
        torch.stack([torch.as_tensor(one.labels) for one in train]).long(),
        torch.stack([torch.as_tensor(one.inputs[r]).flatten(1) for one, r in zip(test, rows, strict=True)]),
        torch.stack([torch.as_tensor(one.labels[r]) for one, r in zip(test, rows, strict=True)]).long(),
    )


def fresh(seed: int, nets: int = SPLITS) -> list[torch.Tensor]:
    """New nets: random weights of a size at which the signal keeps its own through the layers, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [PIXELS, *[WIDTH] * (LAYERS - 1), CLASSES]
    weights = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        matrix = torch.randn(nets, inputs + 1, outputs, generator=generator) * (2 / inputs) ** 0.5
        matrix[:, -1] = 0
        weights.append(matrix)
    return weights


def forward(weights: Net, x: Float[torch.Tensor, "net example pixel"]) -> Float[torch.Tensor, "net example class"]:
    """What every net says about its own images: logits."""
    *inner, last = weights
    for matrix in inner:
        x = torch.relu(x @ matrix[:, :-1] + matrix[:, -1:])
    return x @ last[:, :-1] + last[:, -1:]


def train(
    weights: Net, x: Float[torch.Tensor, "net example pixel"], y: Int[torch.Tensor, "net example"],
    frozen: int = 0, steps: int = STEPS,
) -> list[torch.Tensor]:  # fmt: skip
    """All layers after training, of which the first `frozen` are as they were."""
    still, moving = list(weights[:frozen]), [one.clone().requires_grad_() for one in weights[frozen:]]
    optimizer = torch.optim.AdamW(moving, lr=RATE, weight_decay=0.01)
    for _ in range(steps):
        logits = forward(still + moving, x)
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        descend(optimizer, moving, loss)
    return still + [one.detach() for one in moving]


def right(weights: Net, half: Half) -> Float[np.ndarray, " net"]:
    """The share of test images that each net gets right."""
    with torch.no_grad():
        return (forward(weights, half.x_test).argmax(-1) == half.y_test).double().mean(1).numpy()


def changed(half: Half, what: str) -> Half:
    """The same images as another task: "pixels" moved, all images alike, or other "names" for the five classes."""
    if what == "names":
        return replace(half, y=(half.y + 1) % CLASSES, y_test=(half.y_test + 1) % CLASSES)
    if what != "pixels":
        raise ValueError(f"what={what!r}: choose pixels or names")
    moved = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(99))
    return replace(half, x=half.x[..., moved], x_test=half.x_test[..., moved])


def table(found: Mapping[tuple[str, int], Float[np.ndarray, " net"]]) -> pd.DataFrame:
    """Shares right by (treatment, n) as a table of runs, as `lab.transfer.statistics` takes it; n = 0: nothing copied."""
    about = {"task": "digits", "distance": "near", "seed": 0, "target": "B", "metric": "accuracy"}
    rows = [
        {**about, "split": split, "treatment": name, "part": "blocks" if n else "none", "n": n, "value": float(value)}
        for (name, n), values in found.items()
        for split, value in enumerate(values)
    ]
    return pd.DataFrame(rows)
