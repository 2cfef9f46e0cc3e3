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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge
from transformers.cache_utils import DynamicCache

from lab import lenses, require
from lab.models import SITES, depth_hook, hooked
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

    Raises:
        ValueError: an unknown kind, or a run without its sublayers.
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


def on_itself(
    run: CleanRun, states: Float[torch.Tensor, "row position d_model"]
) -> Float[torch.Tensor, "row position"]:
    """The diagonal of the published E without a cut: |c_l - c'_l| / |c_l| in the layer that is skipped, or half of it.

    Args:
        states: of `skipped`, one row a layer. For whole layers it is 1; position 0, which is never skipped, has 0. With a
            cut it is 0: from there on the layer works as usual.
    """
    added = run.states[1:] - run.states[:-1]
    return (run.states[1:] - states).norm(dim=-1) / added.norm(dim=-1).clamp_min(_LEAST)


def global_effects(
    model: TransformerBridge,
    run: CleanRun,
    depths: Sequence[int] | Int[np.ndarray, " row"],
    states: Float[torch.Tensor, "row position d_model"],
    *,
    cuts: Sequence[int | None] = (None,),
    read: Sequence[int] | None = None,
    reuse: bool = True,
    batch_tokens: int = 8192,
) -> list[Effects]:
    """Effects that go on through all later layers.

    Args:
        depths: for each row the depth at which its states are put in, 0..L.
        states: for each row the states of all positions there.
        cuts: None changes all positions and measures at all; t changes those before t and measures from t on.
        read: positions whose output is compared (those from the cut on count); None is the last one.
        reuse: False runs whole sequences for each cut (see `lab.runs.why_plain`).
        batch_tokens: rows times positions in one pass; memory grows with it, and with the layers (keys and values).

    Returns:
        One `Effects` a cut. With L rows that skip one layer each: `contribution` is E, `output` O of Csordas et al. (arXiv
        2505.13898), section 2 of their method, before any maximum; but for the diagonal of E, which is 0 here. Without a cut
        the published code has there what the skipped layer itself still adds: `on_itself`.

    Raises:
        ValueError: no rows, a depth, a cut or a read position out of range, states of another shape.
        FloatingPointError: an effect that is not finite, named by layer.
    """
    n_layers, length = run.n_layers, len(run.ids)
    at = np.array(require.wholes("depths", depths, 0, n_layers, twice=True))
    cuts, read = _check(run, states, len(at), cuts, read)
    batch_tokens = require.whole("batch_tokens", batch_tokens, 1)
    order = np.argsort(at, kind="stable")

    def one(rows: np.ndarray, cut: int | None, past: Any) -> tuple[Effects, Any]:
        whole = cut is None or not reuse
        start = 0 if whole else cut or 0

        def grow(depth: int, state: torch.Tensor) -> torch.Tensor:
            mine = rows[at[rows] == depth]
            if not len(mine):
                return state
            new = run.states[depth, start:].to(state).repeat(len(mine), 1, 1)
            if whole:
                new[:, slice(None) if cut is None else slice(0, cut)] = states[mine, :cut].to(state)
            return torch.cat([state, new])

        return _pass(model, run, start, grow, past, measured=cut or 0, read=read, keep=reuse and cut is None)

    found = _in_batches(order, max(1, batch_tokens // length), cuts, one, reuse)
    return _reordered(found, np.argsort(order, kind="stable"))


def local_effects(
    model: TransformerBridge,
    run: CleanRun,
    layers: Sequence[int] | Int[np.ndarray, " row"],
    removed: Float[torch.Tensor, "row position d_model"],
    *,
    cuts: Sequence[int | None] = (None,),
    reuse: bool = True,
    batch_tokens: int = 8192,
) -> list[Effects]:
    """Effects of taking one layer's contribution out of the input of each later layer, one layer at a time.

    What layer l adds when its input is h_l - c_s (s < l), not propagated. The paper's formula subtracts h_s; its code, which
    this follows, c_s. `output` is nan: nothing reaches it.

    Args:
        layers: s of each row.
        removed: what is taken out of every later input, c_s, or a sublayer's part of it; zero it at position 0.
        cuts, reuse, batch_tokens: as in `global_effects`.
    """
    source = np.array(require.wholes("layers", layers, 0, run.n_layers - 1, twice=True))
    cuts, _ = _check(run, removed, len(source), cuts, None)
    batch_tokens = require.whole("batch_tokens", batch_tokens, 1)
    order = np.argsort(source, kind="stable")

    def one(rows: np.ndarray, cut: int | None, past: Any) -> tuple[Effects, Any]:
        whole = cut is None or not reuse
        start = 0 if whole else cut or 0

        def rebuild(depth: int, state: torch.Tensor) -> torch.Tensor:
            mine = rows[source[rows] < depth]
            if depth == run.n_layers or not len(mine):
                return state[:1]
            new = run.states[depth, start:].to(state).repeat(len(mine), 1, 1)
            if whole:
                new[:, :cut] -= removed[mine, :cut].to(state)
            return torch.cat([state[:1], new])

        return _pass(model, run, start, rebuild, past, measured=cut or 0, read=None, keep=reuse and cut is None,
                     n_rows=len(rows))  # fmt: skip

    found = _in_batches(order, max(1, batch_tokens // len(run.ids)), cuts, one, reuse)
    return _reordered(found, np.argsort(order, kind="stable"))


def probabilities(
    model: TransformerBridge, states: Float[torch.Tensor, "... d_model"]
) -> Float[torch.Tensor, "... d_vocab"]:
    """Next-token distributions of states before the final norm (`lenses.readout`)."""
    return lenses.readout(model, states, kind="probs")


def replaced_outputs(
    model: TransformerBridge,
    run: CleanRun,
    position: int,
    states: Float[torch.Tensor, "depth d_model"],
    read: Sequence[int],
    *,
    reuse: bool = True,
) -> Float[np.ndarray, "depth read"]:
    """|y - y'| at some positions when the state of one position is replaced at one depth, for each depth 0..L in turn.

    Only positions from the replaced one on are run, and only the depths from the replaced one on. Positions before it
    do not change: 0.
    """
    position = require.whole("position", position, 0, len(run.ids) - 1)
    read = require.wholes("read", read, 0, len(run.ids) - 1, twice=True)
    start = position if reuse else 0

    def join(depth: int, state: torch.Tensor) -> torch.Tensor:
        new = run.states[depth, start:][None].to(state).clone()
        new[:, position - start] = states[depth].to(state)
        return torch.cat([state, new])

    past = dict(enumerate(zip(run.keys, run.values, strict=True))) if start else None
    found, _ = _pass(model, run, start, join, past, measured=position, read=read, keep=False)
    output = np.zeros((run.n_layers + 1, len(read)), np.float32)
    later = [j for j, where in enumerate(read) if where >= position]
    output[:, later] = found.output
    return output


def gradients_at(
    model: TransformerBridge,
    run: CleanRun,
    site: str,
    layer: int,
    values: Float[torch.Tensor, "row position d_model"],
    tokens: Sequence[int],
    positions: Sequence[int],
) -> tuple[Float[torch.Tensor, " row"], Float[torch.Tensor, "row position d_model"]]:
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
    point = values.clone().to(run.states).requires_grad_(True)
    final: dict[str, torch.Tensor] = {}

    def put(state: torch.Tensor, hook: Any) -> torch.Tensor:
        return point

    def spread(state: torch.Tensor, hook: Any) -> torch.Tensor:
        return state.expand(len(values), -1, -1)

    def keep(state: torch.Tensor, hook: Any) -> None:
        final["state"] = state

    n = run.n_layers
    hooks: list[tuple[str, Any]] = []
    if site == "resid":
        hooks.append((depth_hook(layer + 1, n), put))
    else:  # the residual stream that it is added to must have as many rows
        hooks += [(depth_hook(layer, n), spread), (SITES[site].format(layer=layer), put)]
    hooks.append((SITES["resid_post"].format(layer=n - 1), keep))
    with torch.enable_grad(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None], use_cache=False)
        chosen = lenses.readout(
            model,
            final["state"][:, list(positions)],
            kind="probs",
            tokens=torch.as_tensor(list(tokens)),
            gradients=True,
        )
        total = chosen[..., 0].sum(-1)
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
    model: TransformerBridge,
    run: CleanRun,
    start: int,
    feed: Callable[[int, torch.Tensor], torch.Tensor],
    past: Any,
    *,
    measured: int,
    read: Sequence[int] | None,
    keep: bool,
    n_rows: int | None = None,
) -> tuple[Effects, Any]:
    """One forward pass from position `start` on. Row 0 of the batch is the clean prompt; `feed` adds the others.

    Returns the effects from position `measured` on, and the rows' keys and values if they are to be kept.
    """
    n_layers = run.n_layers
    before: dict[str, torch.Tensor] = {}
    ratios: list[torch.Tensor] = []

    def enter(depth: int) -> Any:
        def hook_in(state: torch.Tensor, hook: Any) -> torch.Tensor:
            before["state"] = feed(depth, state)
            return before["state"]

        return hook_in

    def leave(layer: int) -> Any:
        clean = (run.states[layer + 1] - run.states[layer])[measured:]
        size = clean.norm(dim=-1).clamp_min(_LEAST)

        def hook_out(state: torch.Tensor, hook: Any) -> torch.Tensor:
            added = (state - before["state"])[:, measured - start :]
            ratios.append(((added - clean).norm(dim=-1) / size).float().cpu())
            require_finite(ratios[-1], lambda *_: f"what layer {layer} adds")
            if layer == n_layers - 1:
                before["state"] = feed(n_layers, state)  # rows of the last depth join here
                return state
            return state

        return hook_out

    hooks = [(SITES["resid_pre"].format(layer=layer), enter(layer)) for layer in range(n_layers)]
    hooks += [(SITES["resid_post"].format(layer=layer), leave(layer)) for layer in range(n_layers)]
    cache = _Rows(run, start, past)
    with torch.inference_mode(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None, start:], past_key_values=cache, use_cache=True)
    final = before["state"]
    rows = len(final) - 1 if n_rows is None else n_rows
    contribution = np.zeros((rows, n_layers, len(run.ids) - measured), np.float32)
    for layer, part in enumerate(ratios):
        contribution[: len(part) - 1, layer] = part[1:].numpy()
    at = tuple(position for position in read or () if position >= measured)
    output = np.full((rows, len(at)), np.nan, np.float32)
    if at:
        wanted = torch.as_tensor(at)
        clean = probabilities(model, run.states[-1, wanted])
        for first in range(0, rows, max(1, _READ // len(at))):
            part = final[1 + first : 1 + first + max(1, _READ // len(at)), wanted - start]
            output[first : first + len(part)] = (probabilities(model, part) - clean).norm(dim=-1).cpu().numpy()
    floor = np.stack([part[0].numpy() for part in ratios])
    return Effects(contribution, floor, output, measured, at), cache.own if keep else None


def _in_batches(order: np.ndarray, size: int, cuts: Sequence[int | None], one: Any, reuse: bool) -> list[Effects]:
    """Some rows at a time, sorted by depth; for each batch first the pass without a cut, which the others build on."""
    parts: list[list[Effects]] = [[] for _ in cuts]
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        whole: Any = None
        past = None
        if reuse or None in cuts:
            whole, past = one(rows, None, None)
        for i, cut in enumerate(cuts):
            parts[i].append(whole if cut is None else one(rows, cut, past)[0])
    return [
        Effects(
            np.concatenate([e.contribution for e in some]), np.max([e.floor for e in some], 0),
            np.concatenate([e.output for e in some]), some[0].first, some[0].read,
        )
        for some in parts
    ]  # fmt: skip


def _reordered(found: list[Effects], at: np.ndarray) -> list[Effects]:
    return [Effects(e.contribution[at], e.floor, e.output[at], e.first, e.read) for e in found]


def _without_attention(model: TransformerBridge, run: CleanRun) -> torch.Tensor:
    """[layer position d_model]: what each layer would give from its clean input if its attention added nothing.

    One pass: a second row gets the clean input again at every layer, and its attention is set to zero.
    """
    found: list[torch.Tensor] = []

    def again(depth: int) -> Any:
        def hook_in(state: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.cat([state[:1], run.states[depth][None].to(state)])

        return hook_in

    def silence(state: torch.Tensor, hook: Any) -> torch.Tensor:
        new = state.clone()
        new[1] = 0
        return new

    def keep(state: torch.Tensor, hook: Any) -> None:
        found.append(state[1].clone())

    hooks: list[tuple[str, Any]] = []
    for layer in range(run.n_layers):
        hooks += [(depth_hook(layer, run.n_layers), again(layer)), (SITES["attn_out"].format(layer=layer), silence)]
        hooks += [(SITES["resid_post"].format(layer=layer), keep)]
    with torch.inference_mode(), hooked(model, hooks):
        model.original_model.base_model(input_ids=run.ids[None], use_cache=False)
    return torch.stack(found)


def _check(
    run: CleanRun,
    states: torch.Tensor,
    rows: int,
    cuts: Sequence[int | None],
    read: Sequence[int] | None,
) -> tuple[list[int | None], list[int]]:
    """Cuts and read positions as plain numbers."""
    length, width = run.states.shape[1:]
    if states.shape != (rows, length, width):
        raise ValueError(
            f"states have shape {tuple(states.shape)}; wanted [row position d_model] = {(rows, length, width)}"
        )
    given = require.listed("cuts", cuts, "positions, None for all of them", least=1)
    found = [None if cut is None else require.whole("a cut", cut, 1, length - 1) for cut in given]
    return found, require.wholes("read", [length - 1] if read is None else read, 0, length - 1, twice=True)
