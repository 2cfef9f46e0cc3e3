"""What a change of one layer does to the layers after it and to the output, at the price of those layers alone. Exact.

A variant of a prompt leaves everything as it was up to some depth and has other states there: skipping layer s is depth
s + 1 with the states of depth s. So all variants are rows of one batch, and a row joins at its own depth: L(L-1)/2 layer
passes for L skipped layers instead of L^2. With a cut (only positions before it are changed) the states before the cut
are those of the variant without a cut, by causality: their keys and values are kept, and only the positions from the
cut on are run.

    run = clean_run(model, ids, sublayers=True)
    found = global_effects(model, run, *skipped(model, run, "layer"), cuts=[None, 16])

Axis words: `row` (a variant), `layer` (whose contribution is measured), `position`, `depth` (blocks passed, 0..L).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge
from transformers.cache_utils import DynamicCache

from lab import lenses, require
from lab.models import CACHE, SITES, depth_hook, hooked
from lab.runs import CleanRun
from lab.states import require_finite

KINDS = ("layer", "attn", "mlp")
_LEAST = 1e-6  # a contribution's norm is taken as at least this, as published
_READ = 256  # states whose distributions over the vocabulary are held at once


@dataclass(frozen=True)
class Effects:
    """Effects of all rows under one cut.

    contribution: |c_l - c'_l| / |c_l| for c_l = what layer l adds, c' in the variant; 0 in layers that a row skips past.
    floor: the same for a row that was not changed: rounding alone.
    output: |y - y'|, L2 over the vocabulary, between next-token distributions (0 to sqrt 2).
    first: the position of column 0; with a cut it is the cut.
    read: the positions of `output`.
    """

    contribution: Float[np.ndarray, "row layer position"]
    floor: Float[np.ndarray, "layer position"]
    output: Float[np.ndarray, "row read"]
    first: int
    read: tuple[int, ...]


def skipped(model: TransformerBridge, run: CleanRun, kind: str) -> tuple[list[int], torch.Tensor]:
    """Depths [row] and states [row position d_model] of the variants that skip each layer, or its attention or MLP.

    Position 0 is never skipped, as published: it is often an attention sink, and its loss breaks everything.
    """
    kind = require.one_of("kind", kind, KINDS)
    if run.mlp_out is None:
        raise ValueError("this run has no sublayers: make it with clean_run(model, ids, sublayers=True)")
    if kind == "layer":
        states = run.states[:-1].clone()
    elif kind == "mlp":
        states = run.states[1:] - run.mlp_out
    else:
        states = _without_attention(model, run)
    states[:, 0] = run.states[1:, 0]
    return list(range(1, run.n_layers + 1)), states


def global_effects(
    model: TransformerBridge, run: CleanRun, depths: Sequence[int] | Int[np.ndarray, " row"],
    states: Float[torch.Tensor, "row position d_model"], *, cuts: Sequence[int | None] = (None,),
    read: Sequence[int] | None = None, reuse: bool = True, batch_tokens: int = 8192,
) -> list[Effects]:  # fmt: skip
    """Effects that go on through all later layers.

    Args:
        depths, states: for each row the depth at which its states are put in, 0..L, and those of all positions there.
        cuts: None changes all positions and measures at all; t changes those before t and measures from t on.
        read: positions whose output is compared (those from the cut on count); None is the last one.
        reuse: False runs whole sequences for each cut (see `lab.runs.why_plain`).
        batch_tokens: rows times positions in one pass; memory grows with it, and with the layers (keys and values).

    Returns:
        One `Effects` a cut. With L rows that skip one layer each: `contribution` is E, `output` O of Csordas et al. (arXiv
        2505.13898), section 2 of their method, before any maximum; but for the diagonal of E, which is 0 here (theirs: what the
        skipped layer itself still adds). An effect that is not finite raises a FloatingPointError that names the layer.
    """
    at, last = np.array(require.wholes("depths", depths, 0, run.n_layers, twice=True)), len(run.ids) - 1
    read = require.wholes("read", [last] if read is None else read, 0, last, twice=True)

    def feed(depth: int, state: torch.Tensor, rows: np.ndarray, cut: int | None, start: int) -> torch.Tensor:
        mine = rows[at[rows] == depth]
        if not len(mine):
            return state
        new = run.states[depth, start:].to(state).repeat(len(mine), 1, 1)
        if not start:
            new[:, :cut] = states[mine, :cut].to(state)
        return torch.cat([state, new])

    return _in_batches(model, run, states, at, feed, cuts, read, reuse, batch_tokens)


def local_effects(
    model: TransformerBridge, run: CleanRun, layers: Sequence[int] | Int[np.ndarray, " row"],
    removed: Float[torch.Tensor, "row position d_model"], *, cuts: Sequence[int | None] = (None,),
    reuse: bool = True, batch_tokens: int = 8192,
) -> list[Effects]:  # fmt: skip
    """Effects of taking one layer's contribution out of the input of each later layer, one layer at a time.

    What layer l adds when its input is h_l - c_s (s < l), not propagated. The paper's formula subtracts h_s; its code, which
    this follows, c_s. `output` is nan: nothing reaches it.

    Args:
        layers: s of each row.
        removed: what is taken out of every later input, c_s, or a sublayer's part of it; zero it at position 0.
        cuts, reuse, batch_tokens: as in `global_effects`.
    """
    source = np.array(require.wholes("layers", layers, 0, run.n_layers - 1, twice=True))

    def rebuild(depth: int, state: torch.Tensor, rows: np.ndarray, cut: int | None, start: int) -> torch.Tensor:
        mine = rows[source[rows] < depth]
        if depth == run.n_layers or not len(mine):
            return state[:1]
        new = run.states[depth, start:].to(state).repeat(len(mine), 1, 1)
        if not start:
            new[:, :cut] -= removed[mine, :cut].to(state)
        return torch.cat([state[:1], new])

    return _in_batches(model, run, removed, source, rebuild, cuts, (), reuse, batch_tokens)


def probabilities(
    model: TransformerBridge, states: Float[torch.Tensor, "... d_model"]
) -> Float[torch.Tensor, "... d_vocab"]:
    """Next-token distributions of states before the final norm (`lenses.readout`)."""
    return lenses.readout(model, states, kind="probs")


def replaced_outputs(
    model: TransformerBridge, run: CleanRun, position: int, states: Float[torch.Tensor, "depth d_model"],
    read: Sequence[int], *, reuse: bool = True,
) -> Float[np.ndarray, "depth read"]:  # fmt: skip
    """|y - y'| at some positions (0 before the replaced one) when the state of one position is replaced, at each depth 0..L in
    turn. Only positions and depths from the replaced one on are run."""
    position = require.whole("position", position, 0, len(run.ids) - 1)
    read = require.wholes("read", read, 0, len(run.ids) - 1, twice=True)
    start = position if reuse else 0

    def join(depth: int, state: torch.Tensor) -> torch.Tensor:
        new = run.states[depth, start:][None].to(state).clone()
        new[:, position - start] = states[depth].to(state)
        return torch.cat([state, new])

    past = dict(enumerate(zip(run.keys, run.values, strict=True))) if start else None
    found, _ = _pass(model, run, start, join, past, measured=position, read=read, n_rows=run.n_layers + 1)
    output = np.zeros((run.n_layers + 1, len(read)), np.float32)
    later = [j for j, where in enumerate(read) if where >= position]
    output[:, later] = found.output
    return output


def gradients_at(
    model: TransformerBridge, run: CleanRun, site: str, layer: int,
    values: Float[torch.Tensor, "row position d_model"], tokens: Sequence[int], positions: Sequence[int],
) -> tuple[Float[torch.Tensor, " row"], Float[torch.Tensor, "row position d_model"]]:  # fmt: skip
    """Summed probability of some tokens at some positions, for rows of one site's states, and its gradient in them.

    Args:
        site: "resid" (after the layer), "attn_out", "mlp_out".
        values: what stands there, for each row.
        tokens, positions: probability of tokens[j] is read at positions[j].

    Raises:
        FloatingPointError: a state, a probability or a gradient that is not finite.
    """
    layer = require.whole("layer", layer, 0, run.n_layers - 1)
    positions = require.wholes("positions", positions, 0, len(run.ids) - 1, twice=True)
    tokens = require.wholes("tokens", tokens, 0, model.cfg.d_vocab - 1, twice=True)
    point, n = values.clone().to(run.states).requires_grad_(True), run.n_layers
    final: dict[str, torch.Tensor] = {}
    where = depth_hook(layer + 1, n) if site == "resid" else SITES[site].format(layer=layer)
    hooks: list[tuple[str, Any]] = [(where, lambda state, hook: point)]
    if site != "resid":  # the residual stream that it is added to must have as many rows
        hooks.append((depth_hook(layer, n), lambda state, hook: state.expand(len(values), -1, -1)))
    hooks.append((SITES["resid_post"].format(layer=n - 1), lambda state, hook: final.update(state=state)))
    with torch.enable_grad(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None], use_cache=False)
        at, wanted = final["state"][:, positions], torch.as_tensor(tokens)
        total = lenses.readout(model, at, kind="probs", tokens=wanted, gradients=True)[..., 0].sum(-1)
        (slope,) = torch.autograd.grad(total.sum(), point)
    require_finite(slope, lambda row, position, _: f"the gradient at {site} of layer {layer}, position {position},")
    return total.detach(), slope


# --- one pass, its rows fed in depth by depth -----------------------------------------------------------------------


class _Rows(DynamicCache):
    """Keys and values of the rows; before them, where a pass starts late, those that the same rows had earlier on (or,
    where one prefix serves all of them, its own)."""

    def __init__(self, run: CleanRun, start: int, past: dict[int, tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        super().__init__()
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.past, self.start = past, start
        for layer in range(run.n_layers if past else 0):  # how long the prefix is: asked of the cache for the mask
            super().update(run.keys[layer][:, :, :start], run.values[layer][:, :, :start], layer)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.past is None:
            self.own[layer_idx] = (key_states, value_states)
            return key_states, value_states
        both = zip(self.past[layer_idx], (key_states, value_states), strict=True)
        return tuple(torch.cat([old[:, :, : self.start].expand(len(new), -1, -1, -1), new], 2) for old, new in both)


def _pass(
    model: TransformerBridge, run: CleanRun, start: int, feed: Callable[[int, torch.Tensor], torch.Tensor],
    past: Any, *, measured: int, read: Sequence[int], n_rows: int,
) -> tuple[Effects, Any]:  # fmt: skip
    """One forward pass from position `start` on. Row 0 of the batch is the clean prompt; `feed` adds the others.

    Returns the effects from position `measured` on, and the rows' keys and values.
    """
    n_layers, before = run.n_layers, torch.empty(0)
    contribution = np.zeros((n_rows, n_layers, len(run.ids) - measured), np.float32)
    floor = np.zeros(contribution.shape[1:], np.float32)

    def enter(state: torch.Tensor, hook: Any, depth: int) -> torch.Tensor:
        nonlocal before
        before = feed(depth, state)
        return before

    def leave(state: torch.Tensor, hook: Any, layer: int) -> None:
        clean = (run.states[layer + 1] - run.states[layer])[measured:]
        added = (state - before)[:, measured - start :]
        ratio = ((added - clean).norm(dim=-1) / clean.norm(dim=-1).clamp_min(_LEAST)).float().cpu()
        require_finite(ratio, lambda *_: f"what layer {layer} adds")
        floor[layer], contribution[: len(ratio) - 1, layer] = ratio[0].numpy(), ratio[1:].numpy()
        if layer == n_layers - 1:
            enter(state, hook, n_layers)  # rows of the last depth join here

    hooks: list[tuple[str, Any]] = []
    for layer in range(n_layers):
        hooks += [(SITES["resid_pre"].format(layer=layer), partial(enter, depth=layer)),
                  (SITES["resid_post"].format(layer=layer), partial(leave, layer=layer))]  # fmt: skip
    cache = _Rows(run, start, past)
    with torch.inference_mode(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None, start:], **{CACHE: cache}, use_cache=True)
    at = tuple(position for position in read if position >= measured)
    output = np.full((n_rows, len(at)), np.nan, np.float32)
    if at:
        wanted, some = torch.as_tensor(at), max(1, _READ // len(at))
        clean = probabilities(model, run.states[-1, wanted])
        for first in range(0, n_rows, some):
            part = before[1 + first : 1 + first + some, wanted - start]
            output[first : first + len(part)] = (probabilities(model, part) - clean).norm(dim=-1).cpu().numpy()
    return Effects(contribution, floor, output, measured, at), cache.own


def _in_batches(
    model: TransformerBridge, run: CleanRun, states: torch.Tensor, at: np.ndarray, feed: Callable[..., torch.Tensor],
    cuts: Sequence[int | None], read: Sequence[int], reuse: bool, batch_tokens: int,
) -> list[Effects]:  # fmt: skip
    """Some rows at a time, sorted by depth; for each batch first the pass without a cut, which the others build on."""
    length, wanted = len(run.ids), (len(at), *run.states.shape[1:])
    if states.shape != wanted:
        raise ValueError(f"states have shape {tuple(states.shape)}; wanted [row position d_model] = {wanted}")
    given = require.listed("cuts", cuts, "positions, None for all of them", least=1)
    cuts = [None if cut is None else require.whole("a cut", cut, 1, length - 1) for cut in given]
    size = max(1, require.whole("batch_tokens", batch_tokens, 1) // length)

    def one(rows: np.ndarray, cut: int | None, past: Any) -> tuple[Effects, Any]:
        start = cut if cut and reuse else 0
        own = partial(feed, rows=rows, cut=cut, start=start)
        return _pass(model, run, start, own, past if start else None, measured=cut or 0, read=read, n_rows=len(rows))

    order = np.argsort(at, kind="stable")
    parts: list[list[Effects]] = [[] for _ in cuts]
    for rows in np.split(order, range(size, len(order), size)):
        whole, past = one(rows, None, None) if reuse or None in cuts else (None, None)
        for some, cut in zip(parts, cuts, strict=True):
            some.append(whole if cut is None and whole else one(rows, cut, past)[0])
    back = np.argsort(order, kind="stable")
    return [
        Effects(
            np.concatenate([e.contribution for e in some])[back], np.max([e.floor for e in some], 0),
            np.concatenate([e.output for e in some])[back], some[0].first, some[0].read,
        )
        for some in parts
    ]  # fmt: skip


def _without_attention(model: TransformerBridge, run: CleanRun) -> torch.Tensor:
    """[layer position d_model]: what each layer would give from its clean input if its attention added nothing.

    One pass: a second row gets the clean input again at every layer, and its attention is set to zero.
    """
    found: list[torch.Tensor] = []

    def again(state: torch.Tensor, hook: Any, depth: int) -> torch.Tensor:
        return torch.cat([state[:1], run.states[depth][None].to(state)])

    def silence(state: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([state[:1], torch.zeros_like(state[1:])])

    def keep(state: torch.Tensor, hook: Any) -> None:
        found.append(state[1].clone())

    hooks: list[tuple[str, Any]] = []
    for layer in range(run.n_layers):
        hooks += [(depth_hook(layer, run.n_layers), partial(again, depth=layer)),
                  (SITES["attn_out"].format(layer=layer), silence), (SITES["resid_post"].format(layer=layer), keep)]  # fmt: skip
    with torch.inference_mode(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None], use_cache=False)
    return torch.stack(found)
