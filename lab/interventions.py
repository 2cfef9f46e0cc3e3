"""Change what a model computes: patch, skip, ablate, block attention, quantise.

Always context managers; nothing outlives the block.

    with patch(model, "resid_pre", layer=4, value=state, position=7):
        logits = model(ids)

Reading a site and writing it are two claims. In TransformerLens 4.3 a write to `hook_resid_mid` reaches the MLP branch
only, not the stream, so `resid_mid` is set here by writing `attn_out = wanted - resid_pre` instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from lab.models import SITES, require_site

Program = Callable[[torch.Tensor, Any], torch.Tensor]  # of a block's input and a function `step`: see `rewritten`
WRITABLE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@contextmanager
def patch(
    model: TransformerBridge,
    site: str,
    *,
    layer: int,
    value: Float[torch.Tensor, "..."],
    position: int | None = None,
) -> Iterator[None]:
    """Replace a site's state by `value` in every forward pass inside the block.

    Args:
        site: one of `WRITABLE`. Depth d of the residual stream is `resid_pre` of layer d.
        layer: a block, 0..L-1.
        value: `[d_model]`, or with a position `[example d_model]`, without one `[example position d_model]`.
        position: a token position; None replaces all of them.

    Raises:
        ValueError: a site that cannot be written or that this model does not have, a layer or a width out of range.
    """
    _check(model, site, layer)
    if value.shape[-1] != model.cfg.d_model:
        raise ValueError(f"value ends in {value.shape[-1]} numbers, and this model's d_model is {model.cfg.d_model}")
    if value.ndim not in ((1, 3) if position is None else (1, 2)):
        wanted_shape = "[example position d_model]" if position is None else "[example d_model]"
        raise ValueError(
            f"value has shape {tuple(value.shape)}; with position={position} give [d_model] or {wanted_shape}"
        )
    stream: dict[str, torch.Tensor] = {}

    def remember(state: torch.Tensor, hook: Any) -> None:
        stream["pre"] = state

    def write(state: torch.Tensor, hook: Any) -> torch.Tensor:
        new = state.clone()
        wanted = value.to(state)
        if position is None:
            new[:] = wanted - stream["pre"] if site == "resid_mid" else wanted
        elif site == "resid_mid":
            new[:, position] = wanted - stream["pre"][:, position]
        else:
            new[:, position] = wanted
        return new

    hooks: list[tuple[str, Any]] = [(SITES["attn_out" if site == "resid_mid" else site].format(layer=layer), write)]
    if site == "resid_mid":
        hooks.insert(0, (SITES["resid_pre"].format(layer=layer), remember))
    with model.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def skip(model: TransformerBridge, layer: int, *, first: int = 0) -> Iterator[None]:
    """Leave a block out: its output is its input (`resid_post = resid_pre`), exactly; from position `first` on.

    With `first=1` the first token, which many models use as an attention sink, passes the block as usual.
    """
    _check(model, "resid_post", layer)
    if first < 0:
        raise ValueError(f"first={first}: give 0 (all positions) or the first position that is skipped")
    stream: dict[str, torch.Tensor] = {}

    def remember(state: torch.Tensor, hook: Any) -> None:
        stream["pre"] = state

    def replace(state: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([state[:, :first], stream["pre"][:, first:]], 1) if first else stream["pre"]

    names = [SITES["resid_pre"].format(layer=layer), SITES["resid_post"].format(layer=layer)]
    with model.hooks(fwd_hooks=[(names[0], remember), (names[1], replace)]):
        yield


@contextmanager
def ablate(
    model: TransformerBridge, site: str, *, layer: int, mean: Float[torch.Tensor, " d_model"] | None = None
) -> Iterator[None]:
    """Replace what attention or the MLP adds (`attn_out`, `mlp_out`) by zero, or by a mean taken on other texts."""
    if site not in ("attn_out", "mlp_out"):
        raise ValueError(
            f"ablate takes attn_out or mlp_out, the two that add to the stream; got {site!r}. See skip, patch"
        )
    value = torch.zeros(model.cfg.d_model) if mean is None else mean
    with patch(model, site, layer=layer, value=value):
        yield


@contextmanager
def block_attention(
    model: TransformerBridge, layers: Sequence[int], *, query: int, keys: Sequence[int]
) -> Iterator[None]:
    """Cut attention of one position to others in some layers: their scores are set to the least number before softmax.

    Args:
        query: the position that must not look, in the prompt; later (generated) positions look as before.
        keys: the positions that it must not look at, none of them after it.

    Raises:
        ValueError: a layer out of range, no keys, a key after the query, or a query left with nothing to look at.
    """
    for layer in layers:
        _check(model, "attn_out", layer)
    outside = [key for key in keys if not 0 <= key <= query]
    if not len(keys) or outside:
        raise ValueError(f"keys={list(keys)}: give positions from 0 to the query's own, {query}")
    if len(set(keys)) > query:
        raise ValueError(f"position {query} would have nothing left to look at: leave it at least one key")

    def cut(scores: torch.Tensor, hook: Any) -> torch.Tensor:  # [example head query key]
        if scores.shape[-2] <= query:
            return scores  # a later pass, over generated positions only
        new = scores.clone()
        new[:, :, query, list(keys)] = torch.finfo(new.dtype).min
        return new

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in layers]):
        yield


@contextmanager
def rewritten(model: TransformerBridge, programs: Mapping[int, Program]) -> Iterator[None]:
    """Run other functions in the place of some blocks: a step twice, in another order, of another size.

    A program gets the block's input x and `step(x, attn=1, mlp=1, layer=None)`: x plus `attn` times what attention adds to
    x, plus `mlp` times what the MLP then adds; of this block, or of another one at the same place. The block itself is
    `lambda x, step: step(x)`; without it: `lambda x, step: x`; MLP before attention:

        with rewritten(model, {3: lambda x, step: step(step(x, attn=0), mlp=0)}):
            logits = model(ids)

    Raises:
        ValueError: a layer out of range, or a model whose blocks run attention and MLP in parallel.
    """
    require_site(model, "resid_mid")
    for layer in programs:
        _check(model, "resid_post", layer)
    scale = {"attn_out": 1.0, "mlp_out": 1.0}

    def scaled(site: str) -> Any:
        return lambda added, hook: added if scale[site] == 1 else added * scale[site]

    def program(layer: int) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def step(x: torch.Tensor, attn: float | int = 1, mlp: float | int = 1, layer: int = layer) -> torch.Tensor:
                scale.update(attn_out=attn, mlp_out=mlp)
                try:
                    out = plain[layer](x, *args, **kwargs)
                finally:
                    scale.update(attn_out=1.0, mlp_out=1.0)
                outs["tuple"] = isinstance(out, tuple)
                return out[0] if isinstance(out, tuple) else out

            outs: dict[str, bool] = {}
            state = programs[layer](hidden_states, step)
            return (state,) if outs.get("tuple") else state

        return forward

    blocks = [block.original_component for block in model.blocks]  # what the Bridge's block wraps
    plain = [block.forward for block in blocks]
    sites = [(SITES[site].format(layer=i), scaled(site)) for site in scale for i in range(model.cfg.n_layers)]
    try:
        for layer in programs:
            blocks[layer].forward = program(layer)
        with model.hooks(fwd_hooks=sites):
            yield
    finally:
        for layer in programs:
            vars(blocks[layer]).pop("forward", None)  # the class's own comes back


@contextmanager
def quantized(model: TransformerBridge, bits: int, *, group_size: int = 64) -> Iterator[None]:
    """Weights of every block's matrices rounded to `bits` bits inside the block of code, and back to the bit after it.

    Round to nearest on an asymmetric grid of 2^bits levels between the least and the greatest weight of each group of
    `group_size` neighbouring inputs (embeddings, norms and biases stay). The offline SmolLM2 comes from a file in just
    this format with 4 bits and groups of 32 (Q4_1): with those settings nothing changes; take others.

    Raises:
        ValueError: bits outside 2..8, a group size that does not divide a matrix's input width.
    """
    weights = quantizable(model, bits, group_size=group_size)
    before = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, linear in weights:  # GPT-2's Conv1D holds its matrix the other way round: [input output]
                rounded = _round_to_grid(weight if linear else weight.T, bits, group_size)
                weight.copy_(rounded if linear else rounded.T)
        yield
    finally:
        with torch.no_grad():
            for (weight, _), old in zip(weights, before, strict=True):
                weight.copy_(old)


def quantizable(model: TransformerBridge, bits: int, *, group_size: int) -> list[tuple[torch.Tensor, bool]]:
    """The matrices that `quantized` would round, each with whether it is stored `[output input]`; raises what it raises."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits}: give 2 to 8")
    blocks = {id(module) for module in model.blocks.modules()}
    matrices = [m for m in model.original_model.modules() if _is_matrix(m) and id(m) in blocks]
    weights = [(matrix.weight, isinstance(matrix, torch.nn.Linear)) for matrix in matrices]
    for weight, linear in weights:
        width = weight.shape[1 if linear else 0]
        if group_size < 1 or width % group_size:
            raise ValueError(f"group_size={group_size} does not divide a matrix's input width {width}; try 16 or 32")
    return weights


def _round_to_grid(weight: Float[torch.Tensor, "output input"], bits: int, group_size: int) -> torch.Tensor:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def _is_matrix(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _check(model: TransformerBridge, site: str, layer: int) -> None:
    if site not in WRITABLE:
        raise ValueError(f"site {site!r} cannot be written; sites that can are {', '.join(WRITABLE)}")
    require_site(model, site)
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer {layer} is out of range: this model has layers 0 to {model.cfg.n_layers - 1}")
