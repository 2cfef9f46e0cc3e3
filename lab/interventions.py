"""Change what a model computes: patch, skip, ablate, block attention, quantise.

Always context managers; nothing outlives the block. They nest, and may be left in any order: what was entered later acts on
top of what was entered before, and leaving one takes back that one alone.

    with patch(model, "resid_pre", layer=4, value=state, position=7):
        logits = model(ids)

Reading a site and writing it are two claims. In TransformerLens 4.3 a write to `hook_resid_mid` reaches the MLP branch
only, not the stream, so `resid_mid` is set here by writing `attn_out = wanted - resid_pre` instead.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge
from transformers.cache_utils import Cache

from lab import require
from lab.models import SITES, alone, hooked, require_site

Reweight = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # of a block's matrices: see `reweighted`
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
        value: `[d_model]`, or with a position `[example d_model]`, without one `[example position d_model]`.
        position: a token position; None replaces all of them.
    """
    layer = _check(model, site, layer)
    position = None if position is None else require.whole("position", position, 0)
    if value.shape[-1] != model.cfg.d_model:
        raise ValueError(f"value ends in {value.shape[-1]} numbers, and this model's d_model is {model.cfg.d_model}")
    if value.ndim not in ((1, 3) if position is None else (1, 2)):
        wanted_shape = "[example position d_model]" if position is None else "[example d_model]"
        raise ValueError(
            f"value has shape {tuple(value.shape)}; with position={position} give [d_model] or {wanted_shape}"
        )
    stream: dict[str, torch.Tensor] = {}

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
    with alone(model), _input_kept(model, layer, stream), hooked(model, hooks):
        yield


@contextmanager
def skip(model: TransformerBridge, layer: int, *, first: int = 0) -> Iterator[None]:
    """Leave a block out: its output is its input (`resid_post = resid_pre`), exactly; from position `first` on.

    With `first=1` the first token, which many models use as an attention sink, passes the block as usual.
    """
    layer, first = _check(model, "resid_post", layer), require.whole("first", first, 0)
    stream: dict[str, torch.Tensor] = {}

    def replace(state: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([state[:, :first], stream["pre"][:, first:]], 1) if first else stream["pre"]

    hooks: list[tuple[str, Any]] = [(SITES["resid_post"].format(layer=layer), replace)]
    with alone(model), _input_kept(model, layer, stream), hooked(model, hooks):
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
    """Cut attention of one prompt position to others in some layers: their scores are set to the least number.

    Args:
        query: the position that must not look; generated positions look as before.
        keys: positions that it must not look at, none after it; it must keep one to look at.
    """
    require_site(model, "attn_out")
    layers = require.wholes("layers", layers, 0, model.cfg.n_layers - 1, least=0, twice=True)
    query = require.whole("query", query, 0)
    keys = require.wholes("keys", keys, 0, query, twice=True, hint=", positions up to the query's own")
    mine = {layer: (query, set(keys)) for layer in layers}
    for layer in layers:
        others = [one[layer][1] for one in _open(model, "blocked") if layer in one and one[layer][0] == query]
        if len(set(keys).union(*others)) > query:
            raise ValueError(f"position {query} would have nothing left to look at: leave it at least one key")

    def cut(scores: torch.Tensor, hook: Any) -> torch.Tensor:  # [example head query key]
        if scores.shape[-2] <= query:
            return scores  # a later pass, over generated positions only
        new = scores.clone()
        new[:, :, query, keys] = torch.finfo(new.dtype).min
        return new

    hooks: list[tuple[str, Any]] = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in layers]
    with _entered(model, "blocked", mine), hooked(model, hooks):
        yield


@contextmanager
def rewritten(model: TransformerBridge, programs: Mapping[int, Program], *, whole: bool = False) -> Iterator[None]:
    """Run other functions in the place of some blocks: a step twice, in another order, of another size.

    A program gets the block's input x and `step(x, attn=1, mlp=1, layer=None)`: x plus `attn` times what attention adds to x,
    plus `mlp` times what the MLP then adds; of this block or another one. MLP before attention:

        with rewritten(model, {3: lambda x, step: step(step(x, attn=0), mlp=0)}):
            logits = model(ids, use_cache=False)  # two steps of one layer: there are no keys and values to keep

    Inside another `rewritten`, a step of a block is what that one made of it. whole: all steps are of size 1, which parallel
    blocks can take, too.

    Raises:
        ValueError: a layer out of range, parallel blocks; when the model runs, steps whose keys and values cannot be kept.
    """
    if not whole:
        require_site(model, "resid_mid")
    programs = {_check(model, "resid_post", layer): program for layer, program in programs.items()}
    scale = {"attn_out": 1.0, "mlp_out": 1.0}

    def scaled(site: str) -> Any:
        return lambda added, hook: added if scale[site] == 1 else added * scale[site]

    def program(layer: int) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def step(x: torch.Tensor, attn: float | int = 1, mlp: float | int = 1, layer: int = layer) -> torch.Tensor:
                ran.append(layer)
                if ran != [own] and any(isinstance(one, Cache) for one in (*args, *kwargs.values())):
                    raise ValueError(  # a cache has one place for the keys and values of each layer
                        f"the program of layer {own} ran the attention of layers {ran}, and keys and values can be kept only "
                        "for one step, of the layer itself: call the model with use_cache=False"
                    )
                scale.update(attn_out=attn, mlp_out=mlp)
                try:
                    out = below(layer)(x, *args, **kwargs)
                finally:
                    scale.update(attn_out=1.0, mlp_out=1.0)
                outs["tuple"] = isinstance(out, tuple)
                return out[0] if isinstance(out, tuple) else out

            outs: dict[str, bool] = {}
            own, ran = layer, []  # type: ignore[var-annotated]
            state = programs[layer](hidden_states, step)
            return (state,) if outs.get("tuple") else state

        return forward

    blocks = [block.original_component for block in model.blocks]  # what the Bridge's block wraps
    sites = [(SITES[site].format(layer=i), scaled(site)) for site in scale for i in range(model.cfg.n_layers)]
    mine = {layer: program(layer) for layer in programs}

    def below(layer: int) -> Any:
        """What stands in a block's place without this context and those entered after it."""
        stack = _open(model, "rewritten")
        before = stack[: next(i for i, one in enumerate(stack) if one is mine)]
        found = [one[layer] for one in before if layer in one]
        own = vars(blocks[layer])
        return (found or [own.get("_lab_forward", own.get("forward"))])[-1] or _class_forward(blocks[layer])

    def put() -> None:
        """The programs of the innermost open context that has some for a block; without one, what was there before."""
        for layer in mine:
            block, found = vars(blocks[layer]), [one[layer] for one in _open(model, "rewritten") if layer in one]
            if found:
                block.setdefault("_lab_forward", block.get("forward"))  # another library's, or None: the class's own
                block["forward"] = found[-1]
            elif (before := block.pop("_lab_forward", None)) is None:
                block.pop("forward", None)
            else:
                block["forward"] = before

    with alone(model):
        try:
            with _entered(model, "rewritten", mine):
                put()
                with hooked(model, sites):
                    yield
        finally:
            put()


@contextmanager
def fixed_norms(
    model: TransformerBridge, layer: int, squares: Mapping[str, Float[torch.Tensor, " channel"]], *, first: int = 0
) -> Iterator[None]:
    """RMS norms of one block divide by a fixed size, in place of each token's own, from position `first` on.

    squares: mean square of what goes into a norm, by its name: "ln1" before attention, "ln2" before the MLP; `[d_model]` for
        each channel by itself, `[1]` for one number. Its gain stays as it is.
    """
    layer, first = _check(model, "resid_post", layer), require.whole("first", first, 0)
    if model.cfg.normalization_type != "RMS":
        raise ValueError(f"this model's norms are {model.cfg.normalization_type}; fixed_norms takes RMS norms")
    own: dict[str, torch.Tensor] = {}

    def enter(name: str) -> Any:
        return lambda x, hook: own.update({name: x.float().square().mean(-1, keepdim=True)})

    def leave(name: str) -> Any:
        def write(out: torch.Tensor, hook: Any) -> torch.Tensor:
            ratio = ((own.pop(name) + model.cfg.eps) / (squares[name].to(out.device) + model.cfg.eps)).sqrt()
            return torch.cat([out[:, :first], (out * ratio.to(out))[:, first:]], 1)

        return write

    hooks = [
        (f"blocks.{layer}.{name}.hook_in", enter(name)) for name in require.some_of("squares", squares, ("ln1", "ln2"))
    ]
    hooks += [(f"blocks.{layer}.{name}.hook_out", leave(name)) for name in squares]
    with alone(model), hooked(model, hooks):
        yield


@contextmanager
def reweighted(model: TransformerBridge, changes: Mapping[int, Reweight]) -> Iterator[None]:
    """Other weights in the matrices of some blocks inside the block of code, and the very same ones after it.

    changes: for a layer a function of its matrices, in the order of its modules, each `[output input]`, that returns as many
        of the same shapes (new tensors). Embeddings, norms and biases stay.
    """
    changes = {_check(model, "resid_post", layer): change for layer, change in changes.items()}
    matrices = [(layer, block_matrices(model, layer)) for layer in changes]
    before: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def put() -> None:
        before.clear()
        for layer, found in matrices:
            for (weight, linear), new in zip(found, changes[layer](_values(found)), strict=True):
                if new.shape != (weight.shape if linear else weight.T.shape):
                    raise ValueError(
                        f"a matrix of layer {layer} came back with shape {tuple(new.shape)}: keep its shape"
                    )
                before.append((weight, weight.data))
                weight.data = (new if linear else new.T).to(weight)

    def undo() -> None:
        for weight, old in reversed(before):
            weight.data = old
        before.clear()

    mine = (put, undo)
    with _entered(model, "reweighted", mine) as stack:
        try:
            put()
            yield
        finally:  # contexts that were entered inside this block and are still open are taken back first, and put again
            later = stack[stack.index(mine) + 1 :]
            for _, its_undo in reversed(later):
                its_undo()
            undo()
            for its_put, _ in later:
                its_put()


@contextmanager
def quantized(
    model: TransformerBridge, bits: int, *, group_size: int = 64, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Weights of blocks' matrices rounded to `bits` bits inside the block of code, and back to the bit after it.

    Round to nearest on 2^bits levels between the least and the greatest of each group of `group_size` neighbouring inputs
    (embeddings, norms and biases stay). layers: None is all. The offline SmolLM2 comes with 4 bits and groups of 32 (Q4_1):
    there these settings change nothing.
    """
    require_groups(model, bits, group_size=group_size)
    every = range(model.cfg.n_layers)
    layers = require.wholes("layers", every if layers is None else layers, 0, every[-1], least=0)

    def rounded(weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [_round_to_grid(weight, bits, group_size) for weight in weights]

    with reweighted(model, dict.fromkeys(layers, rounded)):
        yield


def require_groups(model: TransformerBridge, bits: int, *, group_size: int) -> None:
    """A ValueError for bits or groups that `quantized` would not take."""
    bits, group_size = require.whole("bits", bits, 2, 8), require.whole("group_size", group_size, 1)
    for layer in range(model.cfg.n_layers):
        for weight in _values(block_matrices(model, layer)):
            if weight.shape[1] % group_size:
                raise ValueError(
                    f"group_size={group_size} does not divide a matrix's input width {weight.shape[1]}; try 16 or 32"
                )


def block_matrices(model: TransformerBridge, layer: int) -> list[tuple[torch.nn.Parameter, bool]]:
    """The matrices of a block, each with whether it is stored `[output input]`; GPT-2's Conv1D holds `[input output]`."""
    mine = {id(module) for module in model.blocks[layer].modules()}
    found = [m for m in model.original_model.modules() if _is_matrix(m) and id(m) in mine]
    return [(matrix.weight, isinstance(matrix, torch.nn.Linear)) for matrix in found]


def _values(matrices: Sequence[tuple[torch.nn.Parameter, bool]]) -> list[torch.Tensor]:
    """As `[output input]`."""
    return [weight.data if linear else weight.data.T for weight, linear in matrices]


def _round_to_grid(weight: Float[torch.Tensor, "output input"], bits: int, group_size: int) -> torch.Tensor:
    groups = weight.reshape(weight.shape[0], -1, group_size)
    groups = groups.to(torch.promote_types(weight.dtype, torch.float32))  # half precision would round the steps, too
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(groups.dtype).tiny)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape).to(weight.dtype)


def _is_matrix(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _check(model: TransformerBridge, site: str, layer: int) -> int:
    """The layer as a plain number."""
    if not isinstance(site, str) or site not in WRITABLE:
        raise ValueError(f"site {site!r} cannot be written; sites that can are {', '.join(WRITABLE)}")
    require_site(model, site)
    return require.whole("layer", layer, 0, model.cfg.n_layers - 1)


# --- contexts in contexts -------------------------------------------------------------------------------------------


def _open(model: TransformerBridge, kind: str) -> list[Any]:
    """The contexts of one kind that were entered on this model and not yet left, the innermost last."""
    return vars(model).get(f"_lab_{kind}", [])


@contextmanager
def _entered(model: TransformerBridge, kind: str, mine: Any) -> Iterator[list[Any]]:
    with alone(model):
        stack = vars(model).setdefault(f"_lab_{kind}", [])
        stack.append(mine)
        try:
            yield stack
        finally:  # not `pop`: a context that was entered later may still be open
            stack[:] = [one for one in stack if one is not mine]


@contextmanager
def _input_kept(model: TransformerBridge, layer: int, stream: dict[str, torch.Tensor]) -> Iterator[None]:
    """The block's input in `stream["pre"]` as the block gets it, after all hooks, also those set later than this."""

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream["pre"] = args[0] if args else kwargs["hidden_states"]

    handle = model.blocks[layer].original_component.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _class_forward(block: torch.nn.Module) -> Any:
    return functools.partial(type(block).forward, block)
