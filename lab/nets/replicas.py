"""Many small transformers of one shape, trained side by side as one batched model: R models cost as many operations as one.

    weights = initial(Shape(n_blocks=4, d_model=64, n_heads=2, n_positions=32, n_classes=20, n_inputs=32), seeds=[0, 1, 2])
    trained = train(shape, weights, inputs, labels, order, Recipe(steps=300))    # every weight: [replica, ...]

Replicas share shape and recipe, and nothing else. No sum runs over them (so the gradient is not clipped): training one with
others changes it by rounding only. Pre-norm blocks; norms in blocks have no weights (a gain could be folded into the matrix
behind it), matrices no biases; ReLU; learned positions; the class is read at the last position, after a norm with gain and bias.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch.nn import functional
from tqdm.auto import tqdm

from lab import require

Weights = dict[str, torch.Tensor]  # each [replica, ...]
IN_BLOCK = ("qkv", "out", "mlp_in", "mlp_out")
TOP = ("norm_gain", "norm_bias", "head", "head_bias")  # final norm and classifier
_NO_DECAY = ("norm_gain", "norm_bias", "head_bias")
_INPUT_STD = 0.2
_EXAMPLES = 256  # scored at once, of every replica


@dataclass(frozen=True)
class Shape:
    """What all replicas of a batch have in common.

    n_inputs: number of tokens, or with `patches` numbers in a patch. causal: a position sees itself and earlier ones, else
    all. skip: attention and MLP add to the stream; False: they replace it, as in the nets of arXiv 1411.1792.
    """

    n_blocks: int
    d_model: int
    n_heads: int
    n_positions: int
    n_classes: int
    n_inputs: int
    patches: bool = False
    causal: bool = True
    skip: bool = True

    def __post_init__(self) -> None:
        sizes = ("n_blocks", "d_model", "n_heads", "n_positions", "n_classes", "n_inputs")
        vars(self).update({name: require.whole(name, getattr(self, name), 1 + (name == "n_classes")) for name in sizes})
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")


@dataclass(frozen=True)
class Recipe:
    """How every replica is trained: AdamW (betas 0.9, 0.98), the rate rising over `warmup` steps and falling to 0 linearly.

    decay: of matrices and embeddings, not of the final norm and biases. There is one recipe for all replicas.
    """

    steps: int
    batch: int = 8
    rate: float = 1e-3
    decay: float = 0.01
    warmup: float = 0.1  # share of the steps

    def __post_init__(self) -> None:
        vars(self).update(
            steps=require.whole("steps", self.steps, 0), batch=require.whole("batch", self.batch, 1),
            rate=require.number("rate", self.rate, above=0), decay=require.number("decay", self.decay, 0),
            warmup=require.number("warmup", self.warmup, 0, 1),
        )  # fmt: skip

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, 0..steps-1."""
        rising = self.warmup * self.steps
        return self.rate * min((step + 1) / max(rising, 1), (self.steps - step) / max(self.steps - rising, 1))


@dataclass(frozen=True)
class Trained:
    """Weights after the last step, and each replica's mean loss (nats) over the last tenth of the steps."""

    weights: Weights
    loss: Float[np.ndarray, " replica"]


# --- weights --------------------------------------------------------------------------------------------------------


def initial(shape: Shape, seeds: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Weights:
    """Fresh weights, one replica a seed, whatever its neighbours.

    Normal with standard deviation 1 / sqrt(fan-in), the two matrices that write to the stream divided by sqrt(2 n_blocks)
    besides: with a fixed small one deep random layers pass nothing on, and a frozen random net fails for that alone (the
    trap of random-n in arXiv 1411.1792). Tokens and positions enter with 0.2, about what a block writes.
    """
    seeds = require.wholes("seeds", seeds, 0, 2**63 - 1, twice=True, hint=", one for each replica")
    d, wide = shape.d_model, 2 * shape.d_model
    sizes = {
        "embedding": (shape.n_inputs, d, _INPUT_STD * (shape.n_inputs**-0.5 if shape.patches else 1.0)),
        "positions": (shape.n_positions, d, _INPUT_STD),
        "head": (d, shape.n_classes, d**-0.5),
    }
    write = (2 * shape.n_blocks) ** -0.5
    for block in range(shape.n_blocks):
        sizes |= {f"{block}.qkv": (d, 3 * d, d**-0.5), f"{block}.out": (d, d, d**-0.5 * write)}
        sizes |= {f"{block}.mlp_in": (d, wide, d**-0.5), f"{block}.mlp_out": (wide, d, wide**-0.5 * write)}
    drawn: dict[str, list[torch.Tensor]] = {name: [] for name in sizes}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for name, (rows, columns, std) in sizes.items():
            drawn[name].append(std * torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    weights = {name: torch.stack(values).to(dtype) for name, values in drawn.items()}
    n, classes = len(seeds), shape.n_classes
    weights |= {"norm_gain": torch.ones(n, d, dtype=dtype), "norm_bias": torch.zeros(n, d, dtype=dtype)}
    return weights | {"head_bias": torch.zeros(n, classes, dtype=dtype)}


def matrices_of(weights: Weights, block: int) -> list[torch.Tensor]:
    """The four matrices of a block."""
    return [weights[f"{block}.{part}"] for part in IN_BLOCK]


def below(shape: Shape, n: int) -> list[str]:
    """Names of the weights of the first n blocks, with the embedding and positions in front."""
    n = require.whole("n", n, 0, shape.n_blocks)
    return ["embedding", "positions", *(f"{block}.{part}" for block in range(n) for part in IN_BLOCK)]


def pick(weights: Weights, replicas: Sequence[int]) -> Weights:
    """A copy of some replicas, in the given order; one may be taken several times."""
    rows = require.wholes("replicas", replicas, 0, None, least=0, twice=True)
    return {name: values[rows].clone() for name, values in weights.items()}


def join(parts: Sequence[Weights]) -> Weights:
    """Replicas of several batches as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def digest(weights: Weights) -> str:
    """Hash of all weights, to the bit."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


# --- forward --------------------------------------------------------------------------------------------------------


def embed(
    shape: Shape, weights: Weights, inputs: Shaped[torch.Tensor, "replica example position *patch"]
) -> torch.Tensor:
    """The stream before the first block, [replica, example * position, d_model]."""
    embedding, positions = weights["embedding"], weights["positions"]
    replicas, examples, length = inputs.shape[:3]
    if shape.patches:
        stream = torch.bmm(inputs.reshape(replicas, examples * length, -1), embedding)
    else:  # the tables of all replicas as one, so that a look-up is one operation
        ids = inputs + torch.arange(replicas).mul_(shape.n_inputs)[:, None, None]
        stream = functional.embedding(ids, embedding.reshape(-1, shape.d_model))
    stream = stream.view(replicas, examples, length, -1) + positions[:, None]
    return stream.view(replicas, examples * length, -1)


def run_block(
    shape: Shape, stream: Float[torch.Tensor, "replica row d_model"], matrices: Sequence[torch.Tensor], last: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block: the stream after it, and what attention and MLP added. The last block only serves the last position."""
    qkv, out, mlp_in, mlp_out = matrices
    replicas, length, heads = len(stream), shape.n_positions, shape.n_heads
    width = shape.d_model // heads
    normed = functional.layer_norm(stream, (shape.d_model,))
    q, k, v = torch.bmm(normed, qkv).view(-1, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    if last:
        q = q[:, :, -1:]
        stream = stream.view(replicas, -1, length, shape.d_model)[:, :, -1]
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal and not last)
    attention = torch.bmm(mixed.transpose(1, 2).reshape(replicas, -1, shape.d_model), out)
    stream = stream + attention if shape.skip else attention
    hidden = functional.relu(torch.bmm(functional.layer_norm(stream, (shape.d_model,)), mlp_in))
    mlp = torch.bmm(hidden, mlp_out)
    return stream + mlp if shape.skip else mlp, attention, mlp


def classify(weights: Weights, stream: Float[torch.Tensor, "replica example d_model"]) -> torch.Tensor:
    """Logits [replica, example, class] from the stream at the last position: final norm, then the classifier."""
    normed = functional.layer_norm(stream, stream.shape[-1:])
    normed = torch.addcmul(weights["norm_bias"][:, None], normed, weights["norm_gain"][:, None])
    return torch.baddbmm(weights["head_bias"][:, None], normed, weights["head"])


def log_probabilities(
    shape: Shape, weights: Weights, inputs: Shaped[torch.Tensor, "example position *patch"]
) -> Float[np.ndarray, "replica example class"]:
    """Log-probability (nats) of each class, of all replicas on the same examples."""
    _check_inputs(shape, inputs)
    replicas, parts = len(weights["head"]), []
    with torch.inference_mode():
        for batch in inputs.split(_EXAMPLES):
            stream = embed(shape, weights, batch.expand(replicas, *batch.shape))
            for block in range(shape.n_blocks):
                stream = run_block(shape, stream, matrices_of(weights, block), block == shape.n_blocks - 1)[0]
            parts.append(classify(weights, stream).log_softmax(-1))
    return torch.cat(parts, 1).numpy()


def match_sizes(
    shape: Shape, weights: Weights, like: Weights, inputs: Shaped[torch.Tensor, "example position *patch"]
) -> Weights:
    """Weights scaled so that embedding, attention and MLP of each block write updates of the same size as in `like`.

    Size = root mean square over examples, positions and dimensions (the last block's at the last position). Block by block:
    each sees what the scaled ones below it give. The control for "it is only the scale of random layers that differs".
    """
    _check_inputs(shape, inputs)
    weights, batch = dict(weights), inputs.expand(len(weights["head"]), *inputs.shape)

    def ratio(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return (wanted.square().mean((1, 2)) / found.square().mean((1, 2))).sqrt()[:, None, None]

    with torch.inference_mode():
        wanted, found = embed(shape, like, batch), embed(shape, weights, batch)
        scale = ratio(wanted, found)
        weights |= {name: weights[name] * scale for name in ("embedding", "positions")}
        found = found * scale
        for block in range(shape.n_blocks):
            last = block == shape.n_blocks - 1
            wanted, *updates = run_block(shape, wanted, matrices_of(like, block), last)
            for place, name in enumerate(("out", "mlp_out")):
                ours = run_block(shape, found, matrices_of(weights, block), last)[1 + place]
                weights[f"{block}.{name}"] = weights[f"{block}.{name}"] * ratio(updates[place], ours)
            found = run_block(shape, found, matrices_of(weights, block), last)[0]
    return {name: values.clone() for name, values in weights.items()}  # out of inference mode


# --- training -------------------------------------------------------------------------------------------------------


def train(
    shape: Shape, weights: Weights, inputs: Shaped[torch.Tensor, "example position *patch"],
    labels: Int[torch.Tensor, " example"], order: Int[torch.Tensor, "replica step batch"], recipe: Recipe, *,
    frozen_blocks: Sequence[int] | None = None, trained_rows: Bool[torch.Tensor, "replica input"] | None = None,
    trained_top: bool = True, at_once: int = 12, progress: bool = False, describe: str = "training",
) -> Trained:  # fmt: skip
    """Train every replica by cross-entropy on its own examples in its own order, from `weights`, which are not changed.

    Frozen weights are constants: no gradient, no decay, equal to the last bit afterwards. Blocks in front of the first
    trained weight are run forward only, which saves two thirds of their cost.

    Args:
        inputs, labels: one pool for all replicas; `order` holds indices into it: what each replica sees at each step.
        frozen_blocks: for each replica how many blocks, from the first, stay as they are; None: none.
        trained_rows: for each replica which rows of the embedding train; None: all. Positions train where all rows do.
        trained_top: final norm and classifier train; False: they stay as they are, in all replicas.
        at_once: replicas in one batch (time against memory); changes results by rounding only.

    Raises:
        ValueError: shapes that do not fit each other, an index outside the pool, blocks outside 0..n_blocks.
        FloatingPointError: a loss that is not finite, with the replica's number.
    """
    replicas = len(weights["head"])
    given = [0] * replicas if frozen_blocks is None else frozen_blocks
    blocks = np.array(require.wholes("frozen_blocks", given, 0, shape.n_blocks, least=replicas, twice=True))
    at_once = require.whole("at_once", at_once, 1)
    rows = torch.ones(replicas, shape.n_inputs, dtype=torch.bool) if trained_rows is None else trained_rows
    _check_training(shape, replicas, inputs, labels, order, recipe, blocks, rows)
    if not trained_top and not rows.any() and blocks.min() == shape.n_blocks:
        raise ValueError("every block, every row and the top are frozen: nothing is left to train")
    by_frozen = np.argsort(-blocks, kind="stable")  # frozen ones first, so that each block's replicas are neighbours
    result = {name: values.clone() for name, values in weights.items()}
    loss, late = np.zeros(replicas), max(1, recipe.steps // 10)
    groups = np.array_split(by_frozen, -(-replicas // at_once))
    with tqdm(total=len(groups) * recipe.steps, desc=describe, disable=not progress, leave=False) as bar:
        for group in groups:
            mine = torch.as_tensor(group)
            part = {name: values[mine] for name, values in weights.items()}
            run = _Run(shape, part, blocks[group], rows[mine], recipe, trained_top)
            for number, seen in enumerate(order[mine].transpose(0, 1)):
                losses = run.step(inputs[seen], labels[seen], recipe.rate_at(number))
                if number >= recipe.steps - late:
                    loss[group] += losses / late
                bar.update(10 * (number % 10 == 9))
            if not np.isfinite(loss[group]).all():
                bad = int(group[~np.isfinite(loss[group])][0])
                raise FloatingPointError(
                    f"the loss of replica {bad} is not finite; try a smaller rate than {recipe.rate}"
                )
            for name, values in run.weights().items():
                result[name][mine] = values
    return Trained(result, loss)


def descend(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], loss: torch.Tensor, rate: float | None = None
) -> None:
    """One step down a loss, at this rate or at the optimizer's own; no gradient is kept for another step."""
    for group in optimizer.param_groups if rate is not None else ():
        group["lr"] = rate
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


class _Run:
    """One group of replicas in training, those with more frozen blocks first."""

    def __init__(
        self, shape: Shape, weights: Weights, frozen_blocks: np.ndarray, rows: torch.Tensor, recipe: Recipe, top: bool
    ) -> None:
        self.shape, self.constant, self.rows = shape, weights, rows[:, :, None]
        self.frozen = [int((frozen_blocks > block).sum()) for block in range(shape.n_blocks)]  # replicas, by block
        whole = rows.all(1)
        self.whole = whole[:, None, None]
        leaves = {name: weights[name] for name in TOP} if top else {}
        if rows.any():
            leaves["embedding"] = weights["embedding"]
        if whole.any():
            leaves["positions"] = weights["positions"]
        for block, frozen in enumerate(self.frozen):
            if frozen < len(rows):
                leaves |= {f"{block}.{part}": weights[f"{block}.{part}"][frozen:] for part in IN_BLOCK}
        self.leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        small = [self.leaves[name] for name in self.leaves if name in _NO_DECAY]
        large = [self.leaves[name] for name in self.leaves if name not in _NO_DECAY]
        groups = [{"params": large, "weight_decay": recipe.decay}, {"params": small, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
        self.parameters = large + small

    def bottom(self) -> Weights:
        """Embedding and positions with their frozen rows put back."""
        found = {name: self.constant[name] for name in ("embedding", "positions")}
        for name, mask in (("embedding", self.rows), ("positions", self.whole)):
            if name in self.leaves:
                found[name] = torch.where(mask, self.leaves[name], self.constant[name])
        return found

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, rate: float) -> np.ndarray:
        """One step of all replicas; the losses before it, [replica]."""
        stream = embed(self.shape, self.bottom(), inputs)
        still, moving = stream.split([self.frozen[0], len(stream) - self.frozen[0]])
        if not self.rows[: len(still)].any():  # nothing below their frozen blocks trains: no way back is needed
            still = still.detach()
        for block, frozen in enumerate(self.frozen):
            if frozen < len(still):  # these train from here on
                still, joining = still.split([frozen, len(still) - frozen])
                moving = torch.cat([joining, moving])
            last = block == self.shape.n_blocks - 1
            if len(still):
                still = run_block(self.shape, still, [one[:frozen] for one in matrices_of(self.constant, block)], last)[
                    0
                ]
            if len(moving):
                moving = run_block(self.shape, moving, matrices_of(self.leaves, block), last)[0]
        stream = torch.cat([part for part in (still, moving) if len(part)])
        logits = classify({name: self.leaves.get(name, self.constant[name]) for name in TOP}, stream)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view(labels.shape).mean(1)
        descend(self.optimizer, self.parameters, losses.sum(), rate)
        return losses.detach().numpy()

    def weights(self) -> Weights:
        """All weights now: what trained over what did not."""
        now = {name: values.clone() for name, values in self.constant.items()} | self.bottom()
        now |= {name: self.leaves[name] for name in TOP if name in self.leaves}
        for name in [name for name in self.leaves if name.partition(".")[2] in IN_BLOCK]:
            now[name][self.frozen[int(name.split(".")[0])] :] = self.leaves[name].detach()
        return {name: values.detach() for name, values in now.items()}


def orders(
    examples: Sequence[Int[np.ndarray, " example"]], seeds: Sequence[int], recipe: Recipe
) -> Int[torch.Tensor, "replica step batch"]:
    """Order of training: for each replica its examples (indices into the pool) in passes, each pass shuffled anew."""
    found, needed = [], recipe.steps * recipe.batch
    for own, seed in zip(examples, seeds, strict=True):
        rng = np.random.default_rng(seed)
        passes = [rng.permutation(own) for _ in range(-(-needed // len(own)))]
        found.append(np.concatenate(passes)[:needed].reshape(recipe.steps, recipe.batch))
    return torch.as_tensor(np.stack(found))


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_inputs(shape: Shape, inputs: torch.Tensor) -> None:
    wanted = (shape.n_positions, shape.n_inputs) if shape.patches else (shape.n_positions,)
    if tuple(inputs.shape[1:]) != wanted or not len(inputs):
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}; this shape of model takes [example, {wanted}]")
    if not shape.patches and (inputs.min() < 0 or inputs.max() >= shape.n_inputs):
        raise ValueError(f"tokens run from {inputs.min()} to {inputs.max()}: pass 0 to {shape.n_inputs - 1}")


def _check_training(
    shape: Shape, replicas: int, inputs: torch.Tensor, labels: torch.Tensor, order: torch.Tensor, recipe: Recipe,
    blocks: np.ndarray, rows: torch.Tensor,
) -> None:  # fmt: skip
    _check_inputs(shape, inputs)
    if tuple(order.shape) != (wanted := (replicas, recipe.steps, recipe.batch)):
        raise ValueError(f"order has shape {tuple(order.shape)}; wanted [replica step batch] = {wanted}")
    if order.min() < 0 or order.max() >= len(inputs):
        raise ValueError(f"order holds indices {order.min()} to {order.max()}; the pool has 0 to {len(inputs) - 1}")
    if len(labels) != len(inputs) or labels.min() < 0 or labels.max() >= shape.n_classes:
        raise ValueError(f"labels: pass one of 0 to {shape.n_classes - 1} for each of the {len(inputs)} inputs")
    if len(blocks) != replicas:
        raise ValueError(f"frozen_blocks={blocks.tolist()}: pass {replicas} numbers from 0 to {shape.n_blocks}")
    if tuple(rows.shape) != (replicas, shape.n_inputs):
        raise ValueError(f"trained_rows has shape {tuple(rows.shape)}; wanted {(replicas, shape.n_inputs)}")
