"""Small models of characters whose layers are any list of sublayers.

    shape = Shape.of("A F256", n_layers=4, n_tokens=59)             # attention, then a feed-forward net of 256 units
    shape = Shape.of("F128/2 A F128/2", n_layers=4, n_tokens=59)    # the Macaron layer (arXiv 1906.02762)
    weights = train(shape, text, Recipe(steps=600, rate=4e-3), seed=0)

A sublayer adds to the stream: x += scale * sublayer(norm(x)). Norms have a gain, matrices no biases; ReLU; learned positions;
causal. There is one final norm and one head for all depths, so that the stream after any layer can be read (arXiv 2309.00255).
One net at a time: with 512 characters a step, five nets as one batched model cost as much as five nets.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.nn import functional
from tqdm.auto import tqdm

from lab import require
from lab.nets.replicas import Recipe, Weights
from lab.nets.training import one_thread

_EXAMPLES = 64  # stretches that are scored at once
_SUBLAYER = re.compile(r"(?:A|F([1-9]\d*))(/2)?")


@dataclass(frozen=True)
class Sublayer:
    """width: hidden units of a feed-forward net; 0: attention. scale: of what is added to the stream."""

    width: int
    scale: float


@dataclass(frozen=True)
class Shape:
    """The sublayers of a layer, all layers alike, and sizes."""

    sublayers: tuple[Sublayer, ...]
    n_layers: int
    n_tokens: int
    d_model: int = 64
    n_heads: int = 4
    length: int = 64

    @classmethod
    def of(cls, layer: str, **sizes: int) -> "Shape":
        """A shape from a layer in words: "A" attention, "F256" a feed-forward net of 256 units; "/2" adds only half.

        >>> Shape.of("A F256", n_layers=4, n_tokens=59).parameters
        208832
        """
        found = [_SUBLAYER.fullmatch(word) for word in layer.split()]
        if not found or None in found:
            raise ValueError(f"layer={layer!r}: give sublayers such as 'A F256' or 'F128/2 A F128/2'")
        return cls(tuple(Sublayer(int(one[1] or 0), 0.5 if one[2] else 1.0) for one in found if one), **sizes)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight."""
        d = self.d_model
        found: dict[str, tuple[int, ...]] = {"embedding": (self.n_tokens, d), "positions": (self.length, d)}
        for layer in range(self.n_layers):
            for place, one in enumerate(self.sublayers):
                found[f"{layer}.{place}.norm"] = (d,)
                found[f"{layer}.{place}.in"] = (d, one.width or 3 * d)
                found[f"{layer}.{place}.out"] = (one.width or d, d)
        return found | {"norm": (d,), "head": (d, self.n_tokens)}

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(int(np.prod(size)) for size in self.sizes().values())

    @property
    def layer_cost(self) -> int:
        """Multiplications by weights that one layer needs for a character."""
        return sum(2 * self.d_model * one.width if one.width else 4 * self.d_model**2 for one in self.sublayers)

    @property
    def head_cost(self) -> int:
        """Those of one reading of the stream."""
        return self.d_model * self.n_tokens


def initial(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Fresh weights of size 1 / sqrt(inputs); what writes to the stream is smaller the more writers there are."""
    generator, write = torch.Generator().manual_seed(seed), (shape.n_layers * len(shape.sublayers)) ** -0.5
    found = {}
    for name, size in shape.sizes().items():
        if name.endswith("norm"):
            found[name] = torch.ones(*size, dtype=dtype)
        else:
            std = (
                0.2 if name in ("embedding", "positions") else size[0] ** -0.5 * (write if name.endswith("out") else 1)
            )
            found[name] = (std * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)
    return found


def normed(stream: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Layer norm with a gain."""
    return functional.layer_norm(stream, stream.shape[-1:], gain)


def run_layer(
    shape: Shape, weights: Weights, layer: int, stream: Float[torch.Tensor, "example position d_model"]
) -> Float[torch.Tensor, "example position d_model"]:
    """The stream after one layer."""
    for place, one in enumerate(shape.sublayers):
        norm, into, out = (weights[f"{layer}.{place}.{part}"] for part in ("norm", "in", "out"))
        read = normed(stream, norm) @ into
        if one.width:
            read = functional.relu(read)
        else:
            q, k, v = (part.unflatten(-1, (shape.n_heads, -1)).transpose(1, 2) for part in read.chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            read = mixed.transpose(1, 2).flatten(2)
        stream = stream + one.scale * (read @ out)
    return stream


def exits(
    shape: Shape, weights: Weights, ids: Int[torch.Tensor, "example position"], layers: Sequence[int]
) -> Iterator[Callable[[], torch.Tensor]]:
    """After each of these layers, which run in this order, a function that reads the stream: its mean loss in nats.

    ids hold one character more than the model reads, the last one to predict. Only what is read costs a head.
    """
    stream = functional.embedding(ids[:, :-1], weights["embedding"]) + weights["positions"][: ids.shape[1] - 1]
    for layer in layers:
        stream = run_layer(shape, weights, layer, stream)

        def read(stream: torch.Tensor = stream) -> torch.Tensor:
            logits = normed(stream, weights["norm"]) @ weights["head"]
            return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        yield read


def score(
    shape: Shape, weights: Weights, stretches: Int[torch.Tensor, "example position"], layers: Sequence[int],
    *, every: bool = False,
) -> Float[np.ndarray, " read"]:  # fmt: skip
    """Mean loss (nats a character) read after the last of these layers, or after every one of them."""
    total = np.zeros(len(layers) if every else 1)
    with one_thread(), torch.inference_mode():
        for part in stretches.split(_EXAMPLES):
            reads = list(exits(shape, weights, part, layers))
            total += len(part) * np.array([read().item() for read in (reads if every else reads[-1:])])
    return total / len(stretches)


def train(
    shape: Shape, text: Int[torch.Tensor, " character"], recipe: Recipe, *, seed: int,
    prefixes: Callable[[np.random.Generator], Sequence[int]] | None = None, progress: bool = False,
    describe: str = "training",
) -> Weights:  # fmt: skip
    """A net trained on random stretches of a text, `recipe.batch` a step, by AdamW on one thread.

    Args:
        seed: of weights and stretches: nets of one seed see the same text, however their layers look.
        prefixes: draws which prefixes (numbers of layers) learn at a step. The gradients of their losses, on the same
            stretches, add up, and one update follows; layers beyond the longest do not run. None: the whole net.
    """
    if len(text) <= shape.length:
        raise ValueError(f"{len(text)} characters to train on are too few for stretches of {shape.length}")
    weights = {name: value.requires_grad_() for name, value in initial(shape, seed).items()}
    small, large = ([v for name, v in weights.items() if name.endswith("norm") == which] for which in (True, False))
    groups = [{"params": large, "weight_decay": recipe.decay}, {"params": small, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    rng, drawn = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    window = torch.arange(shape.length + 1)
    with one_thread():
        for step in tqdm(range(recipe.steps), desc=describe, disable=not progress, leave=False):
            starts = torch.as_tensor(rng.integers(len(text) - shape.length, size=recipe.batch))
            learning = [shape.n_layers] if prefixes is None else prefixes(drawn)
            reads = list(exits(shape, weights, text[starts[:, None] + window], range(max(learning))))
            loss = torch.stack([reads[prefix - 1]() for prefix in learning]).sum()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if not np.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is not finite; try a smaller rate than {recipe.rate}")
    return {name: value.detach() for name, value in weights.items()}


# --- characters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Characters:
    """Documents as characters, in three parts that share no document: to train on, to choose by, to report on."""

    n_tokens: int
    train: Int[torch.Tensor, " character"]
    choose: Int[torch.Tensor, "stretch position"]
    report: Int[torch.Tensor, "stretch_r position"]


def characters(documents: Sequence[str], *, seed: int, held: int = 15, length: int = 64) -> Characters:
    """Documents in a random order, twice `held` of them held out; a line end closes each. Stretches hold `length` + 1."""
    held = require.whole("held", held, 1, (len(documents) - 1) // 2, hint=f" (there are {len(documents)} documents)")
    codes = {character: code for code, character in enumerate(sorted({"\n"}.union(*documents)))}
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    choose, report, train = (
        torch.tensor([codes[character] for i in part for character in documents[i] + "\n"])
        for part in np.split(order, [held, 2 * held])
    )
    if min(len(choose), len(report), len(train)) <= length:
        raise ValueError(
            f"the documents are too short for stretches of {length} characters: hold out more, or give more"
        )
    whole = (part[: len(part) // (length + 1) * (length + 1)].view(-1, length + 1) for part in (choose, report))
    return Characters(len(codes), train, *whole)
