"""The price of a configuration of blocks, in nats on held-out text, at the cost of the blocks that it changes. Exact.

A change in block l leaves every state below l as it was. So configurations are taken in an order in which neighbours share
their first blocks, and each runs from the first block that differs from the one before, on states that are kept. This walks
the tree of all shared beginnings once: removing every pair of 30 blocks takes about 4,000 block runs in place of 13,050.

    search, report = texts_of(model, "prose", sizes=(12, 24))
    found = Evaluator(model, report.ids)([{}, {5: SKIP}, {5: Bits(3), 6: Bits(3)}])
    found.nll  # [configuration text]

What the logits d of a change do is had from the states h after the final norm: logits are W h, so the mean square of the
centred difference is (h' - h) M (h' - h) with M = W'CW / vocabulary, and KL needs one more sum over the vocabulary.
"""

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, require
from lab.depth_budget.changes import Change, FixedNorms, Skip
from lab.identity import identity
from lab.interventions import block_matrices, reweighted, rewritten
from lab.lenses import unembed
from lab.states import require_finite
from lab.texts import tokenize

Configuration = Mapping[int, Any]  # layer to `changes.Change`
_ROWS = 512  # positions whose logits are held at once: 100 MB at 50,000 words
_HELD = 10**9  # bytes of changed weights
_EVERY = 20  # seconds of work that an interruption may cost


@dataclass(frozen=True)
class Texts:
    """Texts cut to one length: `table` has a row each (example, group, genre)."""

    ids: Int[torch.Tensor, "text position"]
    table: pd.DataFrame

    @property
    def groups(self) -> np.ndarray:
        return self.table.group.astype(str).to_numpy()


class Measured(NamedTuple):
    """Means over the scored positions: loss in nats, KL(intact || changed) in nats, mean square of the centred logits'
    difference (over the vocabulary, too)."""

    nll: Float[np.ndarray, "configuration text"]
    kl: Float[np.ndarray, "configuration text"]
    distortion: Float[np.ndarray, "configuration text"]


def texts_of(
    model: TransformerBridge, data: str | pd.DataFrame, *, sizes: Sequence[int], n_tokens: int = 32, seed: int = 0
) -> list[Texts]:
    """Disjoint sets of texts, no group in two of them, each cut to its first `n_tokens` tokens; drawn at random, genres in
    turn, so in another order than they came: `Texts.table` says which is which.

    Args:
        data: a name of prose, or a table with a column `text`, and perhaps `group` and `genre`.
        sizes: how many texts each set has.

    Raises:
        ValueError: too few texts, or one of those that were drawn is too short.
    """
    sizes, n_tokens = require.wholes("sizes", sizes, 2, None, twice=True), require.whole("n_tokens", n_tokens, 3)
    frame = datasets.load(data) if isinstance(data, str) else data
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"data is a {type(data).__name__}: give the name of a data set, or a table with a column text")
    if "text" not in frame:
        raise ValueError(f"data has no column text, it has {list(frame)}")
    frame = datasets.as_prose(frame).drop_duplicates("group")
    frame = frame.sample(frac=1, random_state=require.seed(seed))
    frame = frame.iloc[np.argsort(frame.groupby("genre").cumcount(), kind="stable")]  # genres in turn
    if len(frame) < sum(sizes):
        raise ValueError(
            f"sizes={tuple(sizes)} need {sum(sizes)} texts of different groups, and there are {len(frame)}"
        )
    frame = frame.head(sum(sizes)).reset_index(drop=True)
    words = re.compile(rf"(?:\s*\S+){{1,{n_tokens}}}")  # hold as many tokens at least; whole documents may be too long
    tokens = tokenize(model, [words.match(text)[0] for text in frame.text])  # type: ignore[index]
    if (tokens.lengths < n_tokens).any():
        short = int(np.flatnonzero(tokens.lengths < n_tokens)[0])
        raise ValueError(
            f"{frame.text[short][:40]!r} ({frame.example[short]}) has {tokens.lengths[short]} tokens; n_tokens={n_tokens} needs "
            "longer ones"
        )
    ids, ends = tokens.ids[:, :n_tokens].to(model.cfg.device), np.cumsum([0, *sizes])
    table = frame[["example", "group", "genre"]]
    return [Texts(ids[a:b], table[a:b].reset_index(drop=True)) for a, b in zip(ends, ends[1:], strict=False)]


class Evaluator:
    """Measures configurations on the same texts; what was measured once is remembered.

    Args:
        ids: texts of one length. first: the first position whose next token is scored (all later ones are, too).
        folder: where measurements are kept every few seconds, so that an interrupted run goes on; None keeps none.
        beside: another evaluator of this model, whose changed weights it shares (a gigabyte of them is held at most).

    intact: loss [text] of the unchanged model. passes, full: block runs so far, and what they would have been if every
    configuration had run from the first block on.
    """

    def __init__(
        self,
        model: TransformerBridge,
        ids: Int[torch.Tensor, "text position"],
        *,
        first: int = 8,
        folder: Path | None = None,
        progress: bool = True,
        beside: "Evaluator | None" = None,
    ) -> None:
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise ValueError(f"ids is {type(ids).__name__}: give ids [text position], such as texts_of(...)[0].ids")
        self.model, self.ids, self.progress = model, ids, progress
        self.n, self.first = model.cfg.n_layers, require.whole("first", first, 0, ids.shape[1] - 2)
        self.passes = self.full = 0
        self._held: OrderedDict[tuple[int, str], list[torch.Tensor]] = beside._held if beside else OrderedDict()
        self._fits: set[tuple[int, int]] = set()  # layers and sizes of groups that are known to go together
        self._inputs: list[torch.Tensor | None] = [None] * self.n  # of each block, in the configuration that ran last
        self._last: tuple[Change | None, ...] | None = None
        self._hidden = self._run((None,) * self.n)
        self._linear = _is_linear(model)
        self._expected, self._base = self._of_intact()
        self._metric = _centred_metric(model) if self._linear else None
        self._folder, self._memo, self._saved = folder, {}, time.monotonic()  # type: ignore[var-annotated]
        self._read()

    @property
    def intact(self) -> Float[np.ndarray, " text"]:
        return self([{}]).nll[0]

    def __call__(self, configurations: Sequence[Configuration]) -> Measured:
        """Measurements in the order asked for.

        Raises:
            ValueError: a layer that the model has not, or groups that do not divide a matrix; before anything runs.
            FloatingPointError: a loss that is not finite; the configuration is named.
        """
        if isinstance(configurations, Mapping):
            raise ValueError("give a list of configurations, such as [{5: SKIP}], not one")
        wanted = [self._key(one) for one in configurations]
        todo = sorted({key for key in wanted if repr(key) not in self._memo}, key=_place)
        for key in tqdm(todo, desc="configurations", disable=not self.progress or len(todo) < 8, leave=False):
            self._memo[repr(key)] = self._compare(self._run(key), key)
            if time.monotonic() - self._saved > _EVERY:
                self._write()
        if todo:
            self._write()
        found = np.array([self._memo[repr(key)] for key in wanted]).reshape(len(wanted), 3, len(self.ids))
        return Measured(found[:, 0], found[:, 1], found[:, 2])

    def products(
        self, configurations: Sequence[Configuration]
    ) -> Float[np.ndarray, "text configuration configuration"]:
        """Inner products of the centred logits' differences: the diagonal is the distortion, the rest what adding misses."""
        if self._metric is None:
            raise ValueError("this model caps or shifts its logits: their differences cannot be had from its states")
        wanted = [self._key(one) for one in configurations]
        apart = torch.empty(len(wanted), *self._hidden.shape)
        for place in sorted(range(len(wanted)), key=lambda i: _place(wanted[i])):
            apart[place] = self._run(wanted[place]) - self._hidden
        flat = apart.double()
        return torch.einsum("itpd,de,jtpe->tij", flat, self._metric, flat).cpu().numpy() / flat.shape[2]

    def _key(self, configuration: Configuration) -> tuple[Change | None, ...]:
        layers = require.wholes("layers", list(configuration), 0, self.n - 1, least=0)
        for layer, change in zip(layers, configuration.values(), strict=True):
            if not isinstance(change, Change):
                raise ValueError(f"layer {layer} gets {change!r}: give Bits(...), Pruned(...), Noise(...) or SKIP")
            size = getattr(getattr(change, "like", change), "group_size", 1)
            for weight, linear in block_matrices(self.model, layer) if (layer, size) not in self._fits else ():
                if weight.shape[1 if linear else 0] % size:
                    raise ValueError(f"group_size={size} does not divide a matrix of layer {layer}; try 16 or 32")
            self._fits.add((layer, size))  # looking for matrices takes longer than running a block
        return tuple(configuration.get(layer) for layer in range(self.n))

    def _run(self, key: tuple[Change | None, ...]) -> torch.Tensor:
        """States after the final norm at the scored positions; blocks below the first difference are not run."""
        last = self._last
        start = next((i for i in range(self.n) if last is None or last[i] != key[i]), self.n - 1)
        self._last = None  # until this one is through: an interruption must not leave a mixture behind
        programs: dict[int, Any] = {layer: lambda x, step: x for layer in range(start)}

        def program(layer: int) -> Any:
            def run(x: torch.Tensor, step: Any) -> torch.Tensor:
                x = self._inputs[start] if layer == start and start else x  # type: ignore[assignment]
                self._inputs[layer] = x
                return x if isinstance(key[layer], Skip) else step(x)

            return run

        programs |= {layer: program(layer) for layer in range(start, self.n)}
        weights = {i: self._weights(i, key[i]) for i in range(start, self.n) if hasattr(key[i], "weights")}
        with ExitStack() as stack:
            for one in (
                torch.inference_mode(),
                reweighted(self.model, weights),
                rewritten(self.model, programs, whole=True),
            ):
                stack.enter_context(one)
            for layer in range(start, self.n):
                if isinstance(change := key[layer], FixedNorms):
                    stack.enter_context(change.entered(self.model, layer))
            out = self.model.original_model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        self._last = key
        self.passes, self.full = self.passes + self.n - start, self.full + self.n
        return out[:, self.first : -1].clone()

    def _weights(self, layer: int, change: Any) -> Any:
        """The change as `reweighted` takes it, made once while there is room: rounding takes as long as a third of a block."""
        name, held = (layer, repr(change)), self._held

        def changed(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
            if name in held:
                held.move_to_end(name)
            else:
                held[name] = change.weights(matrices)
                sizes = [sum(one.nbytes for one in made) for made in held.values()]
                while sum(sizes) > _HELD and len(sizes) > 1:
                    held.popitem(last=False)
                    sizes.pop(0)
            return held[name]

        return changed

    def _logits(self, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and their log-normaliser, some rows at once: many, since each time all of the unembedding is read."""
        for rows in hidden.flatten(0, 1).split(_ROWS):
            logits = unembed(self.model, rows).float()
            yield logits, torch.cat([some.logsumexp(-1) for some in logits.split(64)])  # what a processor's cache holds

    def _of_intact(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Expected unembedding [row d_model] under the intact model's words, and its log-normaliser [row]."""
        expected, base = [], []
        with torch.inference_mode():
            for logits, top in self._logits(self._hidden):
                base.append(top)
                if self._linear:
                    expected.append((logits - top[:, None]).exp() @ _matrix(self.model))
        return torch.cat(expected) if expected else None, torch.cat(base)

    def _compare(self, hidden: torch.Tensor, key: Any) -> np.ndarray:
        """[loss, KL, distortion; text]."""
        targets, nll, tops, kl, square = self.ids[:, self.first + 1 :].flatten(), [], [], [], []
        with torch.inference_mode():
            for part, (logits, top) in enumerate(self._logits(hidden)):
                rows = slice(part * _ROWS, part * _ROWS + len(top))
                nll.append(top - logits.gather(-1, targets[rows, None])[:, 0])
                tops.append(top)
                if not self._linear:
                    before = unembed(self.model, self._hidden.flatten(0, 1)[rows]).double()
                    after = logits.double()
                    kl.append((before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1))
                    square.append((after - before).var(-1, correction=0))
            if self._linear:
                assert self._expected is not None and self._metric is not None
                apart = (hidden - self._hidden).flatten(0, 1).double()
                kl = [torch.cat(tops).double() - self._base - (self._expected * apart).sum(-1)]
                square = [((apart @ self._metric) * apart).sum(-1)]
        found = torch.stack([torch.cat(one).double().reshape(hidden.shape[:2]).mean(1) for one in (nll, kl, square)])
        require_finite(found.T, lambda text, _: f"the loss of text {text} with {_named(key)}")
        return found.cpu().numpy()

    # --- what is kept ---

    def _path(self) -> Path:
        assert self._folder is not None
        about = f"{self.first} {identity(self.model)}".encode()
        known = hashlib.sha256(self.ids.cpu().numpy().tobytes() + about).hexdigest()[:12]
        return Path(self._folder) / f"evaluations-{known}.json"

    def _read(self) -> None:
        if self._folder is not None and self._path().exists():
            self._memo = {key: np.array(value) for key, value in json.loads(self._path().read_text()).items()}

    def _write(self) -> None:
        self._saved = time.monotonic()
        if self._folder is not None:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".partial.json")
            aside.write_text(json.dumps({key: value.tolist() for key, value in self._memo.items()}))
            aside.replace(path)


def _matrix(model: TransformerBridge) -> torch.Tensor:
    return model.original_model.get_output_embeddings().weight


def _is_linear(model: TransformerBridge) -> bool:
    """Whether logits are W h, or that and a constant, so that differences of states tell differences of logits.

    Not in half precision, where the model's own logits are rounded."""
    with torch.inference_mode():
        state = torch.linspace(-50, 50, model.cfg.d_model, device=model.cfg.device, dtype=model.cfg.dtype)[None]
        none, one = (unembed(model, size * state) for size in (0, 1))
        apart = (one - none - state @ _matrix(model).T).abs().max()  # caps, shifts and scales leave a difference
    return model.cfg.dtype.itemsize >= 4 and bool(apart <= 1e-4 * (one - none).abs().max())


def _centred_metric(model: TransformerBridge) -> torch.Tensor:
    """M [d_model d_model]: d M d is the mean square over the vocabulary of the centred logits that a state's change d makes."""
    weight = _matrix(model).detach()
    mean, square = torch.zeros(weight.shape[1]).double(), torch.zeros(weight.shape[1], weight.shape[1]).double()
    for part in weight.split(8192):
        mean += part.double().sum(0).cpu()
        square += (part.double().T @ part.double()).cpu()
    mean /= len(weight)
    return (square / len(weight) - torch.outer(mean, mean)).to(weight.device)


def _place(key: tuple[Change | None, ...]) -> tuple[str, ...]:
    """Where a configuration stands in the walk: shared beginnings side by side, unchanged blocks first, as they ran already."""
    return tuple("" if change is None else repr(change) for change in key)


def _named(key: Any) -> str:
    return ", ".join(f"{change} in layer {layer}" for layer, change in enumerate(key) if change) or "no change"
