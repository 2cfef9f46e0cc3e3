"""Many patches of one prompt, at the price of the positions and layers that they change. Exact.

A patch at position t leaves every earlier position as it was, and every state below the patched depth. So one clean run
serves all patches of a prompt: its keys and values stand for the positions before t, its states for the depths below.
Each patch is a row of one batch that holds the positions from t on, and a row joins the batch at its own depth:

    run = clean_run(model, ids)
    found = generate(model, run, [t], depths=[3, 3, 4], values=run.states[[7, 8, 9], t][:, None])
    found.texts  # three continuations

Axis words: `row` (a patch), `patched` (the patched positions), `depth` (blocks passed, 0..L), `position`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer

from lab import require
from lab.lenses import unembed
from lab.models import CACHE, SITES, alone, depth_hook, hooked
from lab.states import require_finite
from lab.texts import pad_id

_UNEMBED_WORDS = 4096  # words of the vocabulary whose logits are held at once


@dataclass(frozen=True)
class CleanRun:
    """One forward pass of a prompt without a patch, kept whole."""

    ids: Int[torch.Tensor, " position"]
    states: Float[torch.Tensor, "depth position d_model"]
    keys: list[Float[torch.Tensor, "1 head position d_head"]]  # one a layer; empty where they cannot be reused
    values: list[Float[torch.Tensor, "1 head position d_head"]]
    logits: Float[torch.Tensor, " d_vocab"]  # of the last position
    attn_out: Float[torch.Tensor, "layer position d_model"] | None = None  # what the sublayers add, where asked for
    mlp_out: Float[torch.Tensor, "layer position d_model"] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.states) - 1


@dataclass(frozen=True)
class Generations:
    """What follows each row's patch. `ranks`: rank of the best wanted token as the first one (0 = it is said)."""

    texts: list[str]
    ids: list[list[int]]
    ranks: Int[np.ndarray, " row"]


def clean_run(model: TransformerBridge, ids: Int[torch.Tensor, " position"], *, sublayers: bool = False) -> CleanRun:
    """Run a prompt once and keep its states at every depth, its keys and values, and what the sublayers add if asked."""
    n_layers, cache = model.cfg.n_layers, DynamicCache()
    kept: dict[Any, torch.Tensor] = {}

    def keep(key: Any) -> Any:
        def read(state: torch.Tensor, hook: Any) -> None:
            kept[key] = state[0].clone()

        return read

    hooks = [(depth_hook(depth, n_layers), keep(depth)) for depth in range(n_layers + 1)]
    both = ("attn_out", "mlp_out") if sublayers else ()
    hooks += [(SITES[site].format(layer=i), keep((site, i))) for site in both for i in range(n_layers)]
    ids = ids.to(model.cfg.device)
    with torch.inference_mode(), hooked(model, hooks):
        out = model.original_model.base_model(input_ids=ids[None], **{CACHE: cache}, use_cache=True)
        logits = unembed(model, out.last_hidden_state[:, -1])[0]
    whole = [  # a block that `rewritten` left out has no keys
        layer for layer in cache.layers
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.shape[2] == len(ids)
    ]  # fmt: skip
    keys, values = ([layer.keys for layer in whole], [layer.values for layer in whole])
    if len(whole) != n_layers:  # a recurrent or otherwise unusual memory: see `why_plain`
        keys, values = [], []
    states = torch.stack([kept[depth] for depth in range(n_layers + 1)])
    require_finite(states, lambda depth, position, _: f"the state at depth {depth} of {_text(model, ids)}")
    require_finite(logits, lambda _: f"what is said at depth {n_layers} of {_text(model, ids)}")
    added = {site: torch.stack([kept[site, i] for i in range(n_layers)]) for site in both}
    return CleanRun(ids, states, keys, values, logits, **added)


def generate(
    model: TransformerBridge,
    run: CleanRun,
    positions: Sequence[int],
    depths: Int[np.ndarray, " row"] | Sequence[int],
    values: Float[torch.Tensor, "row patched d_model"],
    *,
    max_new_tokens: int = 10,
    go_on: Callable[[str], bool] | None = None,
    wanted: Sequence[int] = (),
    blocked: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    reuse: bool = True,
    batch_rows: int = 512,
) -> Generations:
    """Patch, once, in the prompt, and decode greedily: one row a patch, all rows side by side.

    Args:
        positions: the patched positions, the same for all rows.
        depths: for each row the depth whose state is replaced, 0..L (a patch "after layer l" is depth l + 1).
        values: the states that are put there.
        go_on: whether a row with this text so far is worth another token; None decodes all. Rows that a rule of success has
            decided need no more, and that is where most of the time goes.
        wanted: token ids; the rank of the best of them as first token is returned for each row.
        blocked: for each row (layers, keys): attention of the last prompt position to these keys is cut in these layers,
            none below the row's depth.
        reuse: False runs the whole prompt in every row and step (see `why_plain`).

    Raises:
        ValueError: a position, depth or shape that does not fit.
        FloatingPointError: a value, or what a row says, that is not finite.
    """
    max_new_tokens, batch_rows = (
        require.whole("max_new_tokens", max_new_tokens, 1),
        require.whole("batch_rows", batch_rows, 1),
    )
    positions = require.wholes("positions", positions, 0, len(run.ids) - 1)
    depths = np.array(require.wholes("depths", depths, 0, run.n_layers, least=0, twice=True), int)
    wanted = require.wholes("wanted", wanted, 0, model.cfg.d_vocab - 1, least=0, twice=True)
    blocked = _check(model, run, positions, depths, values, blocked)
    texts, all_ids, ranks = [""] * len(depths), [[] for _ in depths], np.full(len(depths), -1)  # type: ignore[var-annotated]
    engine = (_Reusing if reuse else _Plain)(model, run, positions)
    waiting: list[list[tuple[np.ndarray, Any]]] = [[] for _ in range(max_new_tokens + 1)]  # by tokens decoded so far
    ends = _end_tokens(model)

    def choose(rows: np.ndarray, hidden: torch.Tensor, wanted: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
        """As `_choose`, but only of what is finite."""

        def name(row: int, *_: int) -> str:
            return f"depth {run.n_layers}, with a state put at depth {depths[rows[row]]} of {_text(model, run.ids)},"

        require_finite(hidden, name)
        token, best, rank = _choose(model, hidden, wanted)
        require_finite(best, name)
        return token, rank

    require_finite(values, lambda row, *_: f"the state that is put at depth {depths[row]} of {_text(model, run.ids)}")

    def say(rows: np.ndarray, token: torch.Tensor) -> np.ndarray:
        """Note each row's next token; which of the rows go on."""
        for row, new in zip(rows, token.tolist(), strict=True):
            all_ids[row].append(new)
        said = model.tokenizer.batch_decode(
            [all_ids[row] for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row, text in zip(rows, said, strict=True):
            texts[row] = text
        goes = [all_ids[row][-1] not in ends and (go_on is None or go_on(texts[row])) for row in rows]
        return np.flatnonzero(np.array(goes, bool) & (len(all_ids[rows[0]]) < max_new_tokens))

    def advance(step: int) -> None:
        """One token more for all rows that wait after `step` tokens."""
        rows = np.concatenate([part for part, _ in waiting[step]])
        memory = engine.join([memory for _, memory in waiting[step]])
        waiting[step] = []
        hidden = engine.step(memory, rows, [all_ids[row] for row in rows])
        going = say(rows, choose(rows, hidden, ())[0])
        if len(going):
            waiting[step + 1].append((rows[going], engine.select(memory, going)))

    def wait_for(step: int, least: int) -> None:
        while sum(len(part) for part, _ in waiting[step]) >= least:
            advance(step)
            wait_for(step + 1, least)

    order = np.argsort(depths, kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), batch_rows):
            rows = order[start : start + batch_rows]
            part = None if blocked is None else [blocked[row] for row in rows]
            hidden = engine.prefill(rows, depths[rows], values[torch.as_tensor(rows)], part)
            token, ranks[rows] = choose(rows, hidden, wanted)
            going = say(rows, token)
            if len(going):  # rows wait until there are enough of them to fill a batch
                waiting[1].append((rows[going], engine.keep(going)))
            wait_for(1, batch_rows)
        for step in range(1, max_new_tokens):
            wait_for(step, 1)
    return Generations(texts, all_ids, ranks)


def greedy_ids(
    model: TransformerBridge,
    ids: Int[torch.Tensor, "example position"],
    mask: Bool[torch.Tensor, "example position"],
    *,
    max_new_tokens: int,
    ends: set[int] | None = None,
    use_cache: bool = True,
) -> Int[torch.Tensor, "example new"]:
    """The argmax of the logits again and again, without a patch, by Hugging Face's own `generate`.

    What a generation_config asks for besides its end tokens (penalties, beams, forced words, ...) is set aside.

    Args:
        ids, mask: padded on the left.
        ends: tokens that end a text; None are the model's own.
    """
    net, width = model.original_model, ids.shape[1]
    ends, said = _end_tokens(model) if ends is None else ends, ids
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=use_cache,
        eos_token_id=sorted(ends) or None, pad_token_id=pad_id(model),
    )  # fmt: skip

    def name(row: int) -> str:
        text = torch.cat([ids[row][mask[row]], said[row, width:].cpu()])
        clean_run(model, text)  # raises, and knows the depth
        return f"depth {model.cfg.n_layers} of {_text(model, text)}, in a batch,"

    def look(so_far: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal said
        said = so_far
        require_finite(logits.amax(-1).to(model.cfg.dtype), name)  # `generate` hands them over in 32 bits
        return logits

    with torch.inference_mode(), alone(model):
        own, net.generation_config = net.generation_config, config
        try:
            said = net.generate(
                input_ids=ids.to(model.cfg.device), attention_mask=mask.long().to(model.cfg.device),
                generation_config=config, logits_processor=LogitsProcessorList([look]),
            )  # fmt: skip
        finally:
            net.generation_config = own
    return said[:, width:].cpu()


def why_plain(model: TransformerBridge) -> str:
    """Why keys and values of a prefix cannot be reused in this model; empty when they can. Tried on four tokens.

    A patched state at the second of four positions must give the logits of a plain hooked forward pass.
    """
    ids = torch.arange(4) + 5
    try:
        run = clean_run(model, ids)
    except FloatingPointError:
        return "its states are not finite"  # the first prompt will say so, by its name
    if not run.keys:
        return "its memory is not keys and values of every position"
    depth = model.cfg.n_layers // 2
    value = run.states[depth, 1][None, None] / 2
    logits = []
    try:
        with torch.inference_mode():
            for kind in (_Reusing, _Plain):
                hidden = kind(model, run, [1]).prefill(np.array([0]), np.array([depth]), value, None)
                logits.append(unembed(model, hidden)[0])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"a batch that starts behind a prefix fails ({type(error).__name__}: {str(error)[:80]})"
    apart, scale = (logits[0] - logits[1]).abs().max().item(), logits[1].std().item()
    return "" if apart <= 1e-3 * scale else f"its logits behind a reused prefix are off by {apart:.2g}"


# --- the two ways to run rows ---------------------------------------------------------------------------------------


class _Branching(DynamicCache):
    """The clean prefix for every row, and each row's own keys and values behind it."""

    def __init__(self, run: CleanRun, start: int) -> None:
        super().__init__()
        self.own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, (keys, values) in enumerate(zip(run.keys, run.values, strict=True)):
            super().update(keys[:, :, :start], values[:, :, :start], layer)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.own[layer_idx] = (key_states, value_states)
        return tuple(
            torch.cat([past.expand(len(new), -1, -1, -1), new], 2)
            for past, new in (
                (self.layers[layer_idx].keys, key_states),
                (self.layers[layer_idx].values, value_states),
            )
        )


class _Reusing:
    """Rows hold the positions from the first patched one on, and join at their depth. A memory is a cache of rows."""

    def __init__(self, model: TransformerBridge, run: CleanRun, positions: Sequence[int]) -> None:
        self.model, self.run, self.start = model, run, min(positions)
        self.local = torch.as_tensor(positions) - self.start

    def prefill(self, rows: np.ndarray, depths: np.ndarray, values: torch.Tensor, blocked: Any) -> torch.Tensor:
        """Hidden states (after the final norm) of the last position; rows come sorted by depth."""
        run, n_layers = self.run, self.run.n_layers

        def join(depth: int) -> Any:
            mine = torch.as_tensor(np.flatnonzero(depths == depth))

            def grow(state: torch.Tensor, hook: Any) -> torch.Tensor:
                new = run.states[depth, self.start :].to(state).repeat(len(mine), 1, 1)
                new[:, self.local] = values[mine].to(state)
                return torch.cat([state, new])

            return grow

        hooks = [(depth_hook(depth, n_layers), join(depth)) for depth in np.unique(depths).tolist()]
        if blocked is not None:
            hooks += _blocking_hooks(blocked, offset=1)  # row 0 of the batch is the clean one, which carries the rest
        self.depths, self.cache = depths, _Branching(run, self.start)
        with hooked(self.model, hooks):
            out = self.model.original_model.base_model(
                input_ids=run.ids[None, self.start :], **{CACHE: self.cache}, use_cache=True
            )
        return out.last_hidden_state[1:, -1]

    def keep(self, rows: np.ndarray) -> DynamicCache:
        """A common cache of some rows of the last prefill: prefix, then their own or, below their depth, the clean."""
        cache = DynamicCache()
        for layer in range(self.run.n_layers):
            joined = torch.as_tensor(self.depths[rows] <= layer)
            at = torch.as_tensor(rows + 1)[joined]
            both = []
            for clean, own in zip((self.run.keys, self.run.values), self.cache.own[layer], strict=True):
                full = clean[layer].repeat(len(rows), 1, 1, 1)
                full[joined, :, self.start :] = own[at]
                both.append(full)
            cache.update(both[0], both[1], layer)
        return cache

    def join(self, memories: list[DynamicCache]) -> DynamicCache:
        """One cache for the rows of several."""
        if len(memories) == 1:
            return memories[0]
        cache = DynamicCache()
        for layer in range(self.run.n_layers):
            keys, values = ([getattr(m.layers[layer], name) for m in memories] for name in ("keys", "values"))
            cache.update(torch.cat(keys), torch.cat(values), layer)
        return cache

    def select(self, memory: DynamicCache, going: np.ndarray) -> DynamicCache:
        """The cache of those rows that go on."""
        if len(going) < memory.layers[0].keys.shape[0]:
            memory.batch_select_indices(torch.as_tensor(going))
        return memory

    def step(self, memory: DynamicCache, rows: np.ndarray, ids: list[list[int]]) -> torch.Tensor:
        """Hidden states after each row's newest token."""
        newest = torch.tensor([[row[-1]] for row in ids], device=self.run.ids.device)
        with alone(self.model):
            out = self.model.original_model.base_model(input_ids=newest, **{CACHE: memory}, use_cache=True)
        return out.last_hidden_state[:, -1]


class _Plain:
    """The same without reuse: whole prompts, all layers, once a token. For models whose memory is not keys and values."""

    def __init__(self, model: TransformerBridge, run: CleanRun, positions: Sequence[int]) -> None:
        self.model, self.run, self.positions = model, run, list(positions)
        self.of_row: dict[int, tuple[int, torch.Tensor, Any]] = {}

    def prefill(self, rows: np.ndarray, depths: np.ndarray, values: torch.Tensor, blocked: Any) -> torch.Tensor:
        for j, row in enumerate(rows):
            self.of_row[row] = (depths[j], values[j], None if blocked is None else blocked[j])
        return self.step(None, rows, [[] for _ in rows])

    def keep(self, rows: np.ndarray) -> None:
        return None

    def join(self, memories: list[None]) -> None:
        return None

    def select(self, memory: None, going: np.ndarray) -> None:
        return None

    def step(self, memory: None, rows: np.ndarray, ids: list[list[int]]) -> torch.Tensor:
        n_layers = self.model.cfg.n_layers
        depths = np.array([self.of_row[row][0] for row in rows])
        values = torch.stack([self.of_row[row][1] for row in rows])  # [row patched d_model]

        def replace(depth: int) -> Any:
            mine = torch.as_tensor(np.flatnonzero(depths == depth))

            def write(state: torch.Tensor, hook: Any) -> torch.Tensor:
                new = state.clone()
                for j, position in enumerate(self.positions):
                    new[mine, position] = values[mine, j].to(state)
                return new

            return write

        hooks = [(depth_hook(depth, n_layers), replace(depth)) for depth in np.unique(depths).tolist()]
        if self.of_row[rows[0]][2] is not None:
            hooks += _blocking_hooks([self.of_row[row][2] for row in rows], offset=0, query=len(self.run.ids) - 1)
        new = torch.tensor(ids, device=self.run.ids.device, dtype=torch.long).reshape(len(rows), -1)
        with hooked(self.model, hooks):
            out = self.model.original_model.base_model(
                input_ids=torch.cat([self.run.ids[None].repeat(len(rows), 1), new], 1), use_cache=False
            )
        return out.last_hidden_state[:, -1]


def _blocking_hooks(
    blocked: Sequence[tuple[Sequence[int], Sequence[int]]], *, offset: int, query: int = -1
) -> list[tuple[str, Any]]:
    """Hooks that cut attention of one query position to some keys, row by row and layer by layer."""

    def cut(layer: int) -> Any:
        def write(scores: torch.Tensor, hook: Any) -> torch.Tensor:  # [row head query key]
            new = scores.clone()
            for row, (layers, keys) in enumerate(blocked):
                if layer in layers and offset + row < len(new):
                    new[offset + row, :, query, list(keys)] = torch.finfo(new.dtype).min
            return new

        return write

    layers = sorted({layer for row_layers, _ in blocked for layer in row_layers})
    return [(f"blocks.{layer}.attn.hook_attn_scores", cut(layer)) for layer in layers]


# --- small parts ----------------------------------------------------------------------------------------------------


def _choose(
    model: TransformerBridge, hidden: torch.Tensor, wanted: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """The likeliest token of each row, its logit, and the rank of the best wanted one (-1 when none is wanted).

    Word by word of the vocabulary in blocks, so that logits are compared while they are still in the processor's cache.
    Logits are compared as the model gives them: a negative scale turns their order round, and a cap makes large ones equal.
    """
    n_words = len(model.original_model.get_output_embeddings().weight)
    best = torch.full((len(hidden),), -torch.inf, device=hidden.device, dtype=hidden.dtype)
    token = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    ids = torch.as_tensor(list(wanted), dtype=torch.long, device=hidden.device)
    if len(ids):
        score = unembed(model, hidden, ids).amax(-1, keepdim=True)
    rank = torch.full((len(hidden),), 0 if len(ids) else -1, device=hidden.device)
    for start in range(0, n_words, _UNEMBED_WORDS):
        logits = unembed(model, hidden, slice(start, start + _UNEMBED_WORDS))
        top, at = logits.max(-1)
        token = torch.where(top > best, at + start, token)
        best = torch.maximum(best, top)
        if len(ids):
            inside = (ids >= start) & (ids < start + len(logits[0]))
            logits[:, ids[inside] - start] = -torch.inf  # a wanted token does not beat the best wanted one
            rank += (logits > score).sum(-1)
    return token, best, rank.cpu().numpy()


def _end_tokens(model: TransformerBridge) -> set[int]:
    """Tokens that end a text: of the generation config; where it names none, of the model's config, then the tokenizer."""
    net = model.original_model
    for source in (net.generation_config, net.config.get_text_config(), model.tokenizer):
        end = getattr(source, "eos_token_id", None)
        if end is not None and end != []:
            return {int(token) for token in (end if isinstance(end, list | tuple) else [end])}
    return set()


def _text(model: TransformerBridge, ids: torch.Tensor) -> str:
    text = model.tokenizer.decode(ids.tolist())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _check(model, run, positions, depths, values, blocked):  # type: ignore[no-untyped-def]
    """What is blocked, as plain numbers."""
    n, length = run.n_layers, len(run.ids)
    if values.shape != (len(depths), len(positions), model.cfg.d_model):
        wanted = (len(depths), len(positions), model.cfg.d_model)
        raise ValueError(f"values has shape {tuple(values.shape)}; wanted [row patched d_model] = {wanted}")
    if blocked is None:
        return None
    if len(blocked) != len(depths):
        raise ValueError(f"{len(blocked)} rows to block for {len(depths)} rows; give one for each")
    found = []
    for (layers, keys), depth in zip(blocked, depths, strict=True):
        layers = require.wholes("blocked layers", layers, 0, n - 1, least=0, twice=True)
        found.append((layers, require.wholes("blocked keys", keys, 0, length - 1, least=0, twice=True)))
        if layers and min(layers) < depth:
            raise ValueError(f"a row that joins at depth {depth} cannot be blocked in layer {min(layers)}, below it")
    return found
