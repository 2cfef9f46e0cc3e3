"""Read a model's hidden states: the `States` container and `collect_states`, the only place that reads hooks.

Axis words: `example`, `depth` (number of blocks passed, 0..L; depth L is before the final norm), `layer` (a block,
0..L-1), `d_model`.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import require
from lab.identity import identity
from lab.models import SITES, depth_hook, hooked, name_of, require_site
from lab.texts import Tokens, last_positions, tokenize


@dataclass(frozen=True)
class States:
    """States of one site at one position of each text.

    `values[i, j]` is the state of text i at `index[j]`: a depth when the site is `resid`, else a layer.
    """

    values: Float[np.ndarray, "example index d_model"]
    index: tuple[int, ...]
    site: str
    model: str

    @property
    def axes(self) -> tuple[str, str, str]:
        return ("example", "depth" if self.site == "resid" else "layer", "d_model")


def collect_states(
    model: TransformerBridge,
    texts: Sequence[str],
    *,
    sites: Sequence[str] = ("resid",),
    positions: Int[np.ndarray, " example"] | None = None,
    index: Sequence[int] | None = None,
    batch_tokens: int = 1024,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, States]:
    """The states of each text at one position, for every depth (or the chosen ones), site by site.

    Texts are batched by length and padded on the right; the unembedding is not computed. Memory is one batch plus the result.

    Args:
        sites: `resid` gives depths 0..L; `resid_mid`, `attn_out`, `mlp_out`, `mlp_in` ... layers 0..L-1. `mlp_in` is what the
            MLP reads: norm(resid_mid) in Llama, Gemma, Qwen, the reading of Jin et al. (arXiv 2404.07066).
        positions: a token position for each text, counted without padding; None is the last token.
        index: which depths or layers; None is all.
        batch_tokens: tokens in one forward pass, padding included.
        folder: keeps the result as memory-mapped files while it grows, so that the same call goes on where it was
            interrupted. Another model than the folder's, or one that no hash can tell, keeps it in memory and says so.

    Returns:
        For each site a `States`, rows in the order of the texts.

    Raises:
        ValueError: unknown or absent site, a depth or position out of range, a text that cannot be read.
        FloatingPointError: states that are not finite, named by text and depth.
    """
    n_layers = model.cfg.n_layers
    sites, batch_tokens = (
        require.some_of("sites", sites, ("resid", *SITES)),
        require.whole("batch_tokens", batch_tokens, 1),
    )
    index = None if index is None else require.listed("index", index, "whole numbers")
    chosen = {site: _check_index(model, site, index) for site in sites}
    tokens = tokenize(model, texts)
    given = last_positions(tokens) if positions is None else positions
    at = np.array(require.wholes("positions", given, None, None, least=0, twice=True), int)
    if at.shape != (len(tokens.texts),):
        raise ValueError(f"{len(tokens.texts)} texts need one position each; got shape {at.shape}")
    outside = np.flatnonzero((at < 0) | (at >= tokens.lengths))
    if outside.size:
        text, length = outside[0], tokens.lengths[outside[0]]
        raise ValueError(f"position {at[text]} of text {text} is out of range: it has positions 0 to {length - 1}")
    counts = {site: len(chosen[site]) for site in sites}
    store = _Store(*_kept(folder, _asked(tokens, at, chosen), model), len(tokens.texts), counts, model.cfg.d_model)

    def hooks_for(rows: torch.Tensor, where: torch.Tensor, keep: dict[str, torch.Tensor]) -> list[tuple[str, Any]]:
        def reader(site: str, j: int) -> Any:
            def read(value: torch.Tensor, hook: Any) -> None:
                keep[site][:, j] = value[rows, where].float()

            return read

        hooks = []
        for site in sites:
            for j, number in enumerate(chosen[site]):
                name = depth_hook(number, n_layers) if site == "resid" else SITES[site].format(layer=number)
                hooks.append((name, reader(site, j)))
        return hooks

    todo = store.missing()
    batches = _batches(tokens.lengths, todo, batch_tokens)
    total = int(tokens.lengths.sum())
    with (
        tqdm(total=total, unit="token", desc="Collecting states", disable=not progress, leave=False) as bar,
        torch.inference_mode(),
    ):
        bar.update(total - int(tokens.lengths[todo].sum()))
        try:
            for batch in batches:
                width = int(tokens.lengths[batch].max())
                keep = {
                    s: torch.empty(len(batch), len(chosen[s]), model.cfg.d_model, device=model.cfg.device)
                    for s in sites
                }
                rows = torch.arange(len(batch), device=model.cfg.device)
                where = torch.as_tensor(at[batch], device=model.cfg.device)
                with hooked(model, hooks_for(rows, where, keep)):
                    _run_blocks(model, tokens, batch, width)
                for site in sites:
                    _check_finite(keep[site], site, chosen[site], batch)
                store.write(batch, {site: keep[site].cpu().numpy() for site in sites})
                bar.update(int(tokens.lengths[batch].sum()))
        finally:  # an interruption keeps what was done
            store.flush()
    return {site: States(store.values[site], chosen[site], site, name_of(model)) for site in sites}


def stream_states(
    model: TransformerBridge,
    tokens: Tokens,
    positions: Sequence[np.ndarray],
    *,
    batches: Sequence[np.ndarray] | None = None,
    batch_tokens: int = 1024,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream at many positions of each text and all depths 0..L, one batch of texts after another; nothing is kept.

    Args:
        tokens: texts, padded on the right.
        positions: for each text the positions to read, counted without padding; may be empty.
        batches: which texts go together, as indices; None groups similar lengths, at most `batch_tokens` with padding.

    Yields:
        The batch, and its states [depth token d_model] in float32: the tokens of its first text, then of the second ...
    """
    if len(positions) != len(tokens.texts):
        raise ValueError(f"{len(tokens.texts)} texts need one array of positions each; got {len(positions)}")
    for text, (at, length) in enumerate(zip(positions, tokens.lengths, strict=True)):
        if len(at) and (min(at) < 0 or max(at) >= length):
            raise ValueError(
                f"positions {min(at)} to {max(at)} of text {text}: it has positions 0 to {length - 1} only"
            )
    if batches is None:
        batches = _batches(tokens.lengths, np.arange(len(tokens.texts)), batch_tokens)
    return _stream(model, tokens, positions, batches)


def _stream(
    model: TransformerBridge, tokens: Tokens, positions: Sequence[np.ndarray], batches: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    n_layers, device = model.cfg.n_layers, model.cfg.device
    depths = tuple(range(n_layers + 1))

    def reader(depth: int, rows: torch.Tensor, where: torch.Tensor, keep: torch.Tensor) -> tuple[str, Any]:
        def read(value: torch.Tensor, hook: Any) -> None:
            keep[depth] = value[rows, where].float()

        return depth_hook(depth, n_layers), read

    for batch in batches:
        counts = [len(positions[text]) for text in batch]
        rows = torch.as_tensor(np.repeat(np.arange(len(batch)), counts), device=device)
        where = torch.as_tensor(np.concatenate([positions[text] for text in batch]).astype(int), device=device)
        keep = torch.empty(len(depths), len(rows), model.cfg.d_model, device=device)
        hooks = [reader(depth, rows, where, keep) for depth in depths]
        with torch.inference_mode(), hooked(model, hooks):
            _run_blocks(model, tokens, batch, int(tokens.lengths[batch].max()))
        if len(rows):
            _check_finite(keep.transpose(0, 1), "resid", depths, np.repeat(batch, counts))
        yield batch, keep.cpu().numpy()


def _run_blocks(model: TransformerBridge, tokens: Tokens, batch: np.ndarray, width: int) -> None:
    """All blocks of the model on some texts, with hooks, without the unembedding (the Bridge's own forward has it)."""
    rows = torch.as_tensor(batch)
    ids, mask = tokens.ids[rows, :width].to(model.cfg.device), tokens.mask[rows, :width].to(model.cfg.device)
    model.original_model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)


def _check_index(model: TransformerBridge, site: str, index: Sequence[int] | None) -> tuple[int, ...]:
    require_site(model, site)
    last = model.cfg.n_layers - (site != "resid")
    hint = f" ({'depths' if site == 'resid' else 'layers'} of {site})"
    return tuple(require.wholes("index", range(last + 1) if index is None else index, 0, last, twice=True, hint=hint))


def require_finite(values: torch.Tensor, name: Callable[..., str]) -> None:
    """A FloatingPointError where a number is infinite or none; `name` says of its indices what it belongs to."""
    if not torch.isfinite(values).all():
        first = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{name(*first)} is not finite; try dtype=torch.float32 or torch.bfloat16 in lab.load (this is {values.dtype})"
        )


def _check_finite(values: torch.Tensor, site: str, index: tuple[int, ...], batch: np.ndarray) -> None:
    what = "depth" if site == "resid" else "layer"
    require_finite(values, lambda i, j, _: f"{site} at {what} {index[j]} of text {int(batch[i])}")


def _asked(tokens: Tokens, at: np.ndarray, chosen: dict[str, tuple[int, ...]]) -> str:
    """What a folder of states holds: the tokens, the positions, the sites with their depths."""
    digest = hashlib.sha256(repr(chosen).encode())
    for array in (tokens.ids.numpy(), tokens.mask.numpy(), at):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _kept(folder: Path | None, asked: str, model: TransformerBridge) -> tuple[Path | None, str]:
    """The folder, unless what is in it, or what would be kept there, is not vouched for; and what belongs to it."""
    if folder is None:
        return None, ""
    folder, own = Path(folder), identity(model)
    belongs = f"{asked}\n{own.digest}"
    if (folder / "run.txt").exists():
        there, _, theirs = (folder / "run.txt").read_text().partition("\n")
        if there != asked:
            raise ValueError(
                f"{folder} holds the states of another run (other texts, positions, sites or depths); give another folder or "
                "delete it"
            )
        if theirs != own.digest and not own.doubt:
            print(f"{folder} holds the states of another model than this is now; these are computed and not kept.")
            return None, ""
    elif strange := [path.name for path in folder.glob("*.npy")]:
        raise ValueError(f"{folder} holds {strange[0]}, which is not ours: give a folder of its own")
    if own.doubt:
        print(
            f"No states are read from {folder} or kept there, as no hash tells what this model computes: {own.doubt}."
        )
        return None, ""
    return folder, belongs


def _batches(lengths: np.ndarray, todo: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Texts of similar length together; longest first, so that a model too large for the memory fails at once."""
    order = todo[np.argsort(-lengths[todo], kind="stable")]
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


class _Store:
    """The growing result: arrays in memory, or memory-mapped files that outlive an interrupted run."""

    def __init__(self, folder: Path | None, belongs: str, n: int, counts: dict[str, int], d_model: int) -> None:
        self.done = np.zeros(n, dtype=bool)
        self.folder, self.flushed = folder, time.monotonic()
        if folder is None:
            self.values = {site: np.empty((n, k, d_model), dtype=np.float32) for site, k in counts.items()}
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "run.txt").exists():
            self.done = np.load(folder / "done.npy")
        else:
            self._save_done()
            aside = folder / "run.partial.txt"
            aside.write_text(belongs)
            aside.replace(folder / "run.txt")
        mode = "r+" if self.done.any() else "w+"
        self.values = {
            site: np.lib.format.open_memmap(folder / f"{site}.npy", mode=mode, dtype=np.float32, shape=(n, k, d_model))
            for site, k in counts.items()
        }

    def missing(self) -> np.ndarray:
        return np.flatnonzero(~self.done)

    def write(self, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for site, array in values.items():
            self.values[site][rows] = array
        self.done[rows] = True
        if time.monotonic() - self.flushed > 5:  # seconds of work that an interruption may cost
            self.flush()

    def flush(self) -> None:
        """Values first, then the list of what is done, so that the list never promises what is not there."""
        self.flushed = time.monotonic()
        if self.folder is None:
            return
        for array in self.values.values():
            array.flush()  # type: ignore[attr-defined]
        self._save_done()

    def _save_done(self) -> None:
        assert self.folder is not None
        aside = self.folder / "done.partial.npy"
        np.save(aside, self.done)
        aside.replace(self.folder / "done.npy")
