"""Depth efficiency: which layers still compute, for whom, and how far down, beside nulls.

After Csordas et al., "Do Language Models Use Their Depth Efficiently?" (arXiv 2505.13898), per prompt: what layers add
(section 1 of the method), what skipping a layer changes later on (2 and 3), what the logit lens reads (4), and whether harder
prompts use deeper layers (5a). Added: means over tokens, then prompts, with intervals (the paper takes maxima); position
0, often an attention sink, is left out; random weights, pushes of equal size, another prompt's update and the mean
update stand beside each skip; an unchanged row gives the rounding floor.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, require
from lab.depth_efficiency import statistics
from lab.depth_efficiency.effects import KINDS, Effects, global_effects, local_effects, probabilities, skipped
from lab.identity import identity
from lab.interventions import skip
from lab.results import Result, joined, keep, study, versions
from lab.runs import CleanRun, clean_run, why_plain
from lab.texts import tokenize

TREATMENTS = {
    "skip": "the layer adds nothing (published)",
    "random": "it adds a random vector of the same norm",
    "other": "it adds what it added in another prompt",
    "mean": "it adds its mean over the other prompts",
    "push": "it works as usual, and the state is pushed at random by a fixed fraction of its norm",
}
COLUMNS = {
    "example": "the prompt", "group": "prompts that share a story", "weights": "trained, or random (the null)",
    "treatment": "of `TREATMENTS`; none: nothing is changed", "kind": "what is changed: layer, attn or mlp",
    "mode": "global: the change goes on through later layers; local: it is taken out of each one's input",
    "scope": "all: every position but 0 is changed and measured; future: those before a cut changed, those from it on measured",
    "skipped_layer": "layer s that is changed",
    "effect": "e_s: relative change of what a later layer adds, mean over later layers and measured tokens",
    "effect_max": "the same with the maximum over tokens",
    "output": "L2 change of the next-token distribution (0 to sqrt 2), mean over read positions; nan: not measured",
    "output_max": "the largest of them",
    "layer": "layer l whose contribution is measured",
    "mean": "relative change of what layer l adds, mean over measured tokens", "median": "the same, median",
    "p95": "the same, 95th percentile", "max": "the same, maximum",
    "floor.mean": "the same where nothing was changed: rounding", "floor.max": "its maximum",
    "quantity": "of `contributions`: norms of what is added relative to the stream, cosines with it",
    "position_0": "whether position 0 counts",
    "value": "mean over tokens", "largest": "maximum over tokens",
    "depth": "blocks passed, 0..L", "kl": "KL(lens || output), nats", "overlap": "share of the top 5 tokens in common",
    "measure": "effect (on later layers) or output; kl, overlap, cosine",
    "statistic": "ED_50, ED_90, ED_KL, ED_ov, ED_cos: an effective depth, fraction of the layers (formulas in `statistics`); "
    "second_half: share of the profile",
    "n": "prompts", "n_groups": "groups of prompts, which intervals resample",
    "estimate": "of the mean over prompts", "low": "lower end of the 95 % interval over groups", "high": "upper end",
    "trained": "the statistic with trained weights", "random": "with random weights", "skip": "for skipping",
    "other": "for the treatment", "difference": "the first minus the second, paired by prompt",
    "excludes_zero": "whether the interval of the difference does", "few": "fewer than 8 groups: too narrow to be read",
    "claim": "published claim", "rule": "ours, by which it holds", "claims.n": "groups of prompts",
    "null": "the estimate for random weights", "null_low": "lower end", "null_high": "upper end",
    "difference_low": "lower end", "difference_high": "upper end", "verdict": "of `statistics.verdict`",
    "queries.*": "of the prompts that were drawn, as the data has it",
}  # fmt: skip
CUT_STEP, CUT_MARGIN = 8, 4  # cuts come from 8, 16, 24, ... below T - 4, as published
_EPSILON = 1e-6
_LENS_STATES = 256  # whose distributions over the vocabulary are held at once


def run(
    model: TransformerBridge, data: str | pd.DataFrame = "word_problems", *, seed: int = 0, n: int = 12,
    kinds: Sequence[str] = KINDS, treatments: Sequence[str] = tuple(TREATMENTS), local: bool = True,
    null: bool = True, n_cuts: int = 4, n_read: int = 12, push: float = 0.1, max_tokens: int = 96,
    resume: bool = True, executor: Executor | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Contributions, effects of skipping, and the logit lens, for n prompts and for the same model with random weights.

    Args:
        data: a name of prompts or prose, or a table with a column `text`, or `prompt` and `solution`, and perhaps `group`.
        kinds, treatments: what is skipped; treatments but "skip" are tried on whole layers. local: also `local_effects`.
        null: also for random weights (layers skipped, globally).
        n_cuts: a prompt; the same in all parts. n_read: positions a prompt where output and lens are read, the last among them.
        push: as a fraction of the state's norm. max_tokens: longer prompts are cut off there.

    Source: Csordas et al., arXiv 2505.13898, sections 1 to 4 of the method. Not shown: that a layer which is not missed
    computes nothing; others may compute the same.
    """
    seed, n, max_tokens = require.seed(seed), require.whole("n", n, 2), require.whole("max_tokens", max_tokens, 1)
    kinds, treatments = require.some_of("kinds", kinds, KINDS), require.some_of("treatments", treatments, TREATMENTS)
    n_cuts, n_read = require.whole("n_cuts", n_cuts, 1), require.whole("n_read", n_read, 1)
    push, (local, null) = require.number("push", push, above=0), require.flags(local=local, null=null)
    for site in ("attn_out", "mlp_out"):
        models.require_site(model, site)
    chosen, name = _drawn(model, data, n, seed, max_tokens)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own), "dataset": name, "n": len(chosen), "seed": seed, "kinds": kinds,
        "treatments": treatments, "local": local, "null": null, "n_cuts": n_cuts, "n_read": n_read, "push": push,
        "max_tokens": max_tokens, "reuse": not why_plain(model), "versions": versions(),
    }  # fmt: skip
    parts = [{"weights": w, "which": i} for w in ("trained", "random")[: 1 + null] for i in range(len(chosen))]
    kept, known = keep(work, {"model": own}, resume=resume), {**parameters, "texts": chosen.to_csv()}
    both = {"model": model}
    if not all(kept.has(kept.key({**known, **part})) for part in parts if part["weights"] == "random"):
        both["twin"] = models.random_twin(model, seed=seed)
    shared = {"queries": chosen, "parameters": parameters, "sums": []}
    done = study(work, parts, kept=kept, known=known, shared=shared, models=both, executor=executor, describe="prompts",
                 progress=progress)  # fmt: skip
    table, tables = joined(done)
    measured = (table, tables["lens"], tables["contributions"])
    tables["against_null"] = statistics.against(*measured, seed=seed)
    tables["against_treatments"] = statistics.against_treatments(*measured, treatments=treatments, seed=seed)
    if "skip" in treatments and "layer" in kinds:
        tables["claims"] = statistics.claims(*measured, seed=seed)
    tables["queries"], summary = chosen, statistics.summary(*measured, seed=seed)
    return Result("depth_efficiency", table, summary, parameters, tables).described(COLUMNS)


def _drawn(model: TransformerBridge, data: Any, n: int, seed: int, max_tokens: int) -> tuple[pd.DataFrame, str]:
    """Prompts that are long enough for a cut, and the data's name."""
    frame, name = prompts(data)
    chosen = frame.sample(n=min(n, len(frame)), random_state=seed).reset_index(drop=True)
    require_groups(chosen, name)
    lengths, needed = [len(row) for row in ids_of(model, chosen.text, max_tokens)], CUT_STEP + CUT_MARGIN + 1
    if short := [i for i, length in enumerate(lengths) if length < needed]:
        raise ValueError(
            f"prompt {chosen.example[short[0]]!r} has {lengths[short[0]]} tokens; cuts at {CUT_STEP}, {2 * CUT_STEP}, ... need "
            f"{needed} at least. Take longer prompts ({len(short)} of {len(lengths)} are too short)"
        )
    return chosen, name


def prompts(data: str | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Texts to run, teacher forced: columns example, group, text (and what else the data has), and the data's name.

    Raises:
        ValueError: no such columns or no rows, and what `lab.datasets.check_texts` refuses.
    """
    if not isinstance(data, str | pd.DataFrame):
        raise ValueError(f"data is a {type(data).__name__}; give a data set's name or a table")
    frame = datasets.load(data) if isinstance(data, str) else data.copy()
    name = data if isinstance(data, str) else frame.attrs.get("name", "your prompts")
    if "text" not in frame and "prompt" in frame:
        rest = next((name for name in ("solution", "answer") if name in frame), None)
        datasets.check_texts(frame, ("prompt", rest) if rest else ("prompt",), name=name)
        frame = frame.assign(text=frame.prompt + frame[rest] if rest else frame.prompt)
    if "text" not in frame or not len(frame):
        raise ValueError(
            f"data has columns {list(frame)} and {len(frame)} rows: wanted a column text, or prompt and solution"
        )
    datasets.check_texts(frame, ("text",), name=name)
    frame = frame.reset_index(drop=True)
    if "example" not in frame:
        frame["example"] = [f"prompt {i}" for i in range(len(frame))]
    return frame if "group" in frame else frame.assign(group=frame.example), name


def contributions(run: CleanRun, *, parallel: bool = False) -> pd.DataFrame:
    """What each layer adds, relative to what it is added to, and in which direction; means and maxima over tokens.

    Quantities: attn_norm |a|/|h|, mlp_norm |m|/|h + a| (in parallel blocks |m|/|h|), block_norm |c|/|h|, and the cosines
    attn_cosine(a, h), mlp_cosine(m, h + a), block_cosine(c, h), state_cosine(h_l+1, h_l). A negative cosine erases.

    Args:
        run: with its sublayers.
        parallel: whether attention and MLP read the same state.
    """
    if run.attn_out is None or run.mlp_out is None:
        raise ValueError("this run has no sublayers: make it with clean_run(model, ids, sublayers=True)")
    before, after = run.states[:-1].double(), run.states[1:].double()
    attn, mlp = run.attn_out.double(), run.mlp_out.double()
    middle = before if parallel else before + attn
    pairs = {"attn": (attn, before), "mlp": (mlp, middle), "block": (after - before, before)}
    found = {f"{name}_norm": a.norm(dim=-1) / b.norm(dim=-1).clamp_min(_EPSILON) for name, (a, b) in pairs.items()}
    pairs["state"] = (after, before)
    found |= {f"{name}_cosine": torch.cosine_similarity(a, b, dim=-1) for name, (a, b) in pairs.items()}
    return pd.concat([
        pd.DataFrame({"layer": range(run.n_layers), "position_0": with_0, "quantity": name,
                      "value": value[:, 1 - with_0 :].mean(1).tolist(), "largest": value[:, 1 - with_0 :].amax(1).tolist()})
        for name, value in found.items() for with_0 in (False, True)
    ], ignore_index=True)  # fmt: skip


def without(model: TransformerBridge, text: str, layers: Sequence[int], *, top: int = 8) -> dict[str, pd.DataFrame]:
    """One text with some layers left out together (not at position 0), beside the whole model.

    Returns:
        next_token: token, whole, without (probabilities; the likeliest of either).
        loss: position, token, whole, without (nats, of predicting this token).
        later: layer, off, change (|c - c'| / |c|, mean over tokens, position 0 left out; 1 where the layer is off).

    Raises:
        ValueError: a layer out of range or named twice, a text of one token.
    """
    n = model.cfg.n_layers
    layers, top = require.wholes("layers", layers, 0, n - 1, least=0), require.whole("top", top, 1, model.cfg.d_vocab)
    ids = ids_of(model, [text], model.cfg.n_ctx)[0]
    if len(ids) < 2:
        raise ValueError("the text has one token; give at least two, so that there is something to predict")
    runs = [run_of(model, ids, text[:40])]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(skip(model, layer, first=1))
        runs.append(run_of(model, ids, text[:40]))
    with torch.inference_mode():
        chances = [probabilities(model, run.states[-1]) for run in runs]
    tokens = [model.tokenizer.decode([int(i)]) for i in ids]
    loss = [-chance[:-1].gather(1, ids[1:, None])[:, 0].clamp_min(1e-38).log() for chance in chances]
    best = list(dict.fromkeys(torch.cat([chance[-1].topk(top).indices for chance in chances]).tolist()))
    added = [_added(run)[:, 1:] for run in runs]
    change = ((added[0] - added[1]).norm(dim=-1) / added[0].norm(dim=-1).clamp_min(_EPSILON)).mean(1)
    next_token = pd.DataFrame({"token": [model.tokenizer.decode([i]) for i in best],
                               "whole": chances[0][-1, best].tolist(), "without": chances[1][-1, best].tolist()})  # fmt: skip
    return {
        "next_token": next_token.sort_values("whole", ascending=False, ignore_index=True),
        "loss": pd.DataFrame({"position": range(1, len(ids)), "token": tokens[1:], "whole": loss[0].tolist(),
                              "without": loss[1].tolist()}),
        "later": pd.DataFrame({"layer": range(n), "off": [layer in layers for layer in range(n)], "change": change.tolist()}),
    }  # fmt: skip


# --- one prompt -----------------------------------------------------------------------------------------------------


def work(
    model: TransformerBridge, twin: TransformerBridge | None = None, *, weights: str, which: int,
    queries: pd.DataFrame, parameters: dict[str, Any], sums: list[Any],
) -> Result:  # fmt: skip
    """All tables of one prompt. `sums`: what layers add in every prompt, filled where it is wanted first."""
    kinds, treatments, local = (parameters[name] for name in ("kinds", "treatments", "local"))
    if weights == "random":
        assert twin is not None
        model, kinds, treatments, local = twin, ["layer"], ["skip"], False
    ids, query = ids_of(model, queries.text, parameters["max_tokens"]), queries.iloc[which]
    clean, seeds = run_of(model, ids[which], query.example), [parameters["seed"], _number(query.example)]
    changed = {("skip", kind): skipped(model, clean, kind) for kind in kinds if "skip" in treatments}
    others = _others(model, ids, which, queries.example, sums) if {"other", "mean"} & set(treatments) else None
    changed |= {(treatment, "layer"): _treated(clean, treatment, others, parameters, query.example)
                for treatment in treatments if treatment != "skip"}  # fmt: skip
    length = len(clean.ids)
    cuts: list[int | None] = [None, *_cuts(length, parameters["n_cuts"], seeds)]
    drawn = np.random.default_rng([*seeds, 1]).permutation(np.arange(1, length - 1))[: parameters["n_read"] - 1]
    read, reuse = sorted([*drawn.tolist(), length - 1]), parameters["reuse"]
    where = {"example": query.example, "group": query.group, "weights": weights}
    reduced, floors = [], [pd.DataFrame(columns=[*where, "scope", "layer", "mean", "max"])]
    for (treatment, kind), variants in changed.items():
        with named(query.example):
            found = global_effects(model, clean, *variants, cuts=cuts, read=read, reuse=reuse)
            about = {**where, "treatment": treatment, "kind": kind}
            reduced.append(_reduced(found, {**about, "mode": "global"}))
            if (treatment, kind) == ("skip", "layer"):
                floors = [
                    _floor(found[:1], 1, {**where, "scope": "all"}),
                    _floor(found[1:], 0, {**where, "scope": "future"}),
                ]
            if local and treatment == "skip":
                part = {"layer": _added(clean), "attn": clean.attn_out, "mlp": clean.mlp_out}[kind].clone()  # type: ignore[union-attr]
                part[:, 0] = 0
                found = local_effects(model, clean, range(clean.n_layers), part, cuts=cuts, reuse=reuse)
                reduced.append(_reduced(found, {**about, "mode": "local"}))
    kl, overlap = _lens(model, clean, [0, *read])
    lens = [pd.DataFrame({"depth": range(len(kl)), "kl": kl[:, first:].mean(1), "overlap": overlap[:, first:].mean(1),
                          "position_0": not first}) for first in (1, 0)]  # fmt: skip
    added = contributions(clean, parallel=models.facts(model)["parallel_blocks"])
    table, pairs = (pd.concat(some, ignore_index=True) for some in zip(*reduced, strict=True))
    tables = {"pairs": pairs, "contributions": added.assign(**where), "lens": pd.concat(lens).assign(**where),
              "floor": pd.concat(floors, ignore_index=True)}  # fmt: skip
    return Result("depth_efficiency", table, pd.DataFrame(), {}, tables)


def _cuts(length: int, n_cuts: int, seed: Any) -> list[int]:
    """Up to n cuts of a prompt: of 8, 16, 24, ... below T - 4, drawn without replacement."""
    allowed = np.arange(CUT_STEP, length - CUT_MARGIN, CUT_STEP)
    return sorted(np.random.default_rng(seed).permutation(allowed)[:n_cuts].tolist())


def _others(
    model: Any, ids: Any, which: int, examples: pd.Series, sums: list[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layers add in the next prompt, and the mean over all other prompts (position 0 left out)."""
    if not sums:
        every = (_added(run_of(model, row, name))[:, 1:] for row, name in zip(ids, examples, strict=True))
        sums[:] = [(added.sum(1), added.shape[1]) for added in every]  # one prompt's states at a time
    rest = [part for i, part in enumerate(sums) if i != which]
    mean = sum(total for total, _ in rest) / sum(count for _, count in rest)
    donor = (which + 1) % len(ids)
    return _added(run_of(model, ids[donor], examples.iloc[donor])), mean


def _treated(
    clean: CleanRun, treatment: str, others: Any, parameters: dict[str, Any], example: str
) -> tuple[list[int], torch.Tensor]:
    """Depths and states of the controls: each layer in turn adds something else."""
    before, after = clean.states[:-1], clean.states[1:]
    generator = torch.Generator().manual_seed(_number(f"{parameters['seed']} {treatment} {example}"))
    direction = torch.randn(before.shape, generator=generator).to(before)
    direction /= direction.norm(dim=-1, keepdim=True)
    if treatment == "random":
        states = before + direction * (after - before).norm(dim=-1, keepdim=True)
    elif treatment == "push":
        states = after + parameters["push"] * direction * after.norm(dim=-1, keepdim=True)
    elif treatment == "mean":
        states = before + others[1][:, None]
    else:  # the same position of another prompt; where that is shorter, from its beginning again
        length = others[0].shape[1]
        states = before + others[0][:, [1 + (position - 1) % (length - 1) for position in range(before.shape[1])]]
    states[:, 0] = after[:, 0]
    return list(range(1, clean.n_layers + 1)), states


def _reduced(found: list[Effects], about: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tokens of all positions, or of all cuts together, reduced: a row a changed layer, and a row a pair of layers."""
    rows, pairs = [], []
    for scope, some, first in (("all", found[:1], 1), ("future", found[1:], 0)):  # position 0 is not changed
        tokens = np.concatenate([e.contribution[:, :, first:] for e in some], 2).astype(float)
        stats = {"mean": tokens.mean(2), "median": np.median(tokens, 2), "p95": np.quantile(tokens, 0.95, axis=2),
                 "max": tokens.max(2)}  # fmt: skip
        n_rows, n_layers = stats["mean"].shape
        grid = {"skipped_layer": np.repeat(np.arange(n_rows), n_layers), "layer": np.tile(np.arange(n_layers), n_rows)}
        pairs.append(pd.DataFrame({**grid, **{key: value.ravel() for key, value in stats.items()}})
                     .assign(**about, scope=scope))  # fmt: skip
        output = np.concatenate([e.output for e in some], 1).astype(float)
        output = output if output.size else np.full((n_rows, 1), np.nan)
        rows.append(pd.DataFrame({
            **about, "scope": scope, "skipped_layer": range(n_rows), "effect": statistics.effect_profile(stats["mean"]),
            "effect_max": statistics.effect_profile(stats["max"]), "output": output.mean(1), "output_max": output.max(1),
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True), pd.concat(pairs, ignore_index=True)


def _floor(some: list[Effects], first: int, where: dict[str, Any]) -> pd.DataFrame:
    """Changes in the row that was not changed."""
    noise = np.concatenate([e.floor[:, first:] for e in some], 1)
    return pd.DataFrame({**where, "layer": range(len(noise)), "mean": noise.mean(1).astype(float),
                         "max": noise.max(1).astype(float)})  # fmt: skip


def _lens(model: TransformerBridge, run: CleanRun, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """KL(p_l || y) in nats and overlap of the top five tokens, [depth position] each.

    The direction is the published one (the tuned lens uses the reverse). Early values also measure that early states are
    written in another basis than the last ones. Some depths at a time, as the set-up costs as much as a few states.
    """
    final = probabilities(model, run.states[-1, list(positions)])
    top, at_once = final.topk(5).indices, max(1, _LENS_STATES // len(positions))
    kl, overlap = [], []
    for states in run.states[:, list(positions)].split(at_once):
        here = probabilities(model, states)
        kl.append((here * (here.clamp_min(1e-38).log() - final.clamp_min(1e-38).log())).sum(-1))
        overlap.append((here.topk(5).indices[..., None] == top[:, None]).any(-1).double().mean(-1))
    return torch.cat(kl).double().cpu().numpy(), torch.cat(overlap).cpu().numpy()


def _added(run: CleanRun) -> torch.Tensor:
    return run.states[1:] - run.states[:-1]


def run_of(model: TransformerBridge, ids: torch.Tensor, example: str) -> CleanRun:
    """A clean run with its sublayers; what is not finite is reported with the prompt's name."""
    with named(example):
        return clean_run(model, ids, sublayers=True)


@contextmanager
def named(example: str) -> Iterator[None]:
    """What is not finite in a variant of a prompt is reported with that prompt's name."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"prompt {example!r}: {error}") from None


def ids_of(model: TransformerBridge, texts: Any, max_tokens: int) -> list[torch.Tensor]:
    """Token ids of each text, at most so many."""
    tokens = tokenize(model, list(texts))
    return [row[:length][:max_tokens] for row, length in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]


def _number(text: str) -> int:
    return int(hashlib.sha256(str(text).encode()).hexdigest()[:8], 16)


def require_groups(chosen: pd.DataFrame, name: str) -> None:
    """A ValueError where no interval over groups can be made."""
    if chosen.group.nunique() < 2:
        raise ValueError(
            f"{name}: all {len(chosen)} prompts drawn are of the group {chosen.group.iloc[0]!r}, and intervals are over "
            "groups: give prompts of two at least, or no column group (then each is its own)"
        )
