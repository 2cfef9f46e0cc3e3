"""Depth efficiency: which layers still compute, for whom, and how far down, beside nulls.

After Csordas et al., "Do Language Models Use Their Depth Efficiently?" (arXiv 2505.13898). Per prompt: what layers add
(section 1 of the method), what skipping a layer changes later on (2 and 3), what the logit lens reads (4), and whether harder
prompts use deeper layers (5a). Added: the headline is the mean over tokens, then prompts, with intervals (the paper
takes maxima); position 0, often an attention sink, is left out and shown beside; a model with random weights, pushes of
equal size, another prompt's update and the mean update stand beside each skip; an unchanged row gives the rounding floor.

What it does not show: a layer that is not missed when skipped may still compute something that others also compute.
"""

import hashlib
import time
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
from lab.results import Result, for_executor, keep, run_shards, versions
from lab.runs import CleanRun, clean_run, why_plain
from lab.texts import first_tokens, tokenize

TREATMENTS = {
    "skip": "the layer adds nothing (published)",
    "random": "it adds a random vector of the same norm",
    "other": "it adds what it added in another prompt",
    "mean": "it adds its mean over the other prompts",
    "push": "it works as usual, and the state is pushed at random by a fixed fraction of its norm",
}
CUT_STEP, CUT_MARGIN = 8, 4  # cuts come from 8, 16, 24, ... below T - 4, as published
_EPSILON = 1e-6
_LENS_STATES = 256  # whose distributions over the vocabulary are held at once


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame = "word_problems",
    *,
    seed: int = 0,
    n: int = 12,
    kinds: Sequence[str] = KINDS,
    treatments: Sequence[str] = tuple(TREATMENTS),
    local: bool = True,
    null: bool = True,
    n_cuts: int = 4,
    n_read: int = 12,
    push: float = 0.1,
    max_tokens: int = 96,
    resume: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
) -> Result:
    """Contributions, effects of skipping, and the logit lens, for n prompts and for the same model with random weights.

    Args:
        data: a name from `lab.datasets.names(kind="prompts")` or `kind="prose"`, or a table with a column `text`, or
            `prompt` and `solution`; `group` says which prompts share a story (else each is its own).
        n: prompts, drawn with the seed.
        kinds: what is skipped: "layer", "attn", "mlp". Treatments but "skip" are tried on whole layers.
        treatments: of `TREATMENTS`.
        local: also the effects that are not propagated.
        null: also for random weights (layers skipped, globally).
        n_cuts: cuts a prompt (only positions before a cut are changed, effects are measured from it on); the same cuts in
            all parts.
        n_read: positions a prompt at which output and lens are read (the last one among them).
        push: size of the random push, as a fraction of the state's norm.
        max_tokens: longer prompts are cut off there.
        resume, executor, progress: as in `concept_depth.run`.

    Returns:
        Result with
        `.table`: example, group, weights, treatment, kind, mode (global, local), scope (all, future), skipped_layer, effect
            (e_s, mean over later layers and measured tokens), effect_max (with the maximum over tokens), output (mean over
            read positions), output_max.
        `.summary`: `statistics.summary`: ED_50, ED_90, ED_cos, ED_KL, ED_ov with intervals over prompts.
        `.tables["pairs"]`: E: as `.table`, with layer, mean, median, p95, max over measured tokens.
        `.tables["contributions"]`: example, group, weights, layer, position_0 (with it?), quantity, value, largest.
        `.tables["lens"]`: example, group, weights, depth, position_0, kl (nats, KL(p_l || y)), overlap (of the top 5).
        `.tables["floor"]`: example, weights, scope, layer, mean, max: effects where nothing was changed.
        `.tables["against_null"]`, `.tables["against_treatments"]`: differences of the statistics, paired by prompt.
            The second: treatment, scope, measure, statistic, skip, other (with the treatment), difference, low, high.
        `.tables["claims"]`: `statistics.claims`, trained and random weights.

    Raises:
        ValueError: an unknown kind or treatment or an empty list of them, a prompt too short for its cuts or no text, an
            example named twice, a missing group, prompts of one group only: all before the model runs.
        FloatingPointError: states that are not finite, named by prompt and layer.
    """
    seed, n, max_tokens = require.seed(seed), require.whole("n", n, 2), require.whole("max_tokens", max_tokens, 1)
    kinds, treatments = require.some_of("kinds", kinds, KINDS), require.some_of("treatments", treatments, TREATMENTS)
    n_cuts, n_read = require.whole("n_cuts", n_cuts, 1), require.whole("n_read", n_read, 1)
    push, (local, null) = require.number("push", push, above=0), require.flags(local=local, null=null)
    for site in ("attn_out", "mlp_out"):
        models.require_site(model, site)
    frame, name = prompts(data)
    chosen = frame.sample(n=min(n, len(frame)), random_state=seed).reset_index(drop=True)
    _check_groups(chosen, name)
    ids = _ids(model, chosen.text, max_tokens)
    needed = CUT_STEP + CUT_MARGIN + 1
    short = [i for i, row in enumerate(ids) if len(row) < needed]
    if short:
        raise ValueError(
            f"prompt {chosen.example[short[0]]!r} has {len(ids[short[0]])} tokens; cuts at {CUT_STEP}, {2 * CUT_STEP}, ... need "
            f"{needed} at least. Take longer prompts ({len(short)} of {len(ids)} are too short)"
        )
    own, sent = identity(model), for_executor(model, executor)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "n": len(chosen), "seed": seed, "kinds": kinds,
        "treatments": treatments, "local": local, "null": null, "n_cuts": n_cuts, "n_read": n_read, "push": push,
        "max_tokens": max_tokens, "reuse": not why_plain(model), "versions": versions(),
    }  # fmt: skip
    kept = keep(_Worker.__call__, {"model": own}, resume=resume)
    known = {**parameters, "texts": chosen.to_csv()}
    shards = []
    for weights in ("trained", "random") if null else ("trained",):
        for i in range(len(chosen)):
            here = dict(parameters) if weights == "trained" else {**parameters, "kinds": ["layer"], "local": False,
                                                                    "treatments": ["skip"]}  # fmt: skip
            shards.append({"weights": weights, "queries": chosen, "which": i, "parameters": here,
                           "key": kept.key({**known, "part": [weights, i]})})  # fmt: skip
    missing = [s for s in shards if not kept.has(s["key"])]
    if progress and missing:
        _print_estimate(model, ids, parameters, missing)
    done = run_shards(
        _Worker(sent), shards, folder=kept.folder, executor=executor, describe="prompts", progress=progress
    )
    names = ("pairs", "contributions", "lens", "floor")
    tables = {key: pd.concat([part.tables[key] for part in done], ignore_index=True) for key in names}
    table = pd.concat([part.table for part in done], ignore_index=True)
    measured = (table, tables["lens"], tables["contributions"])
    tables["against_null"] = statistics.against(*measured, seed=seed)
    others = [
        statistics.against(*measured, seed=seed, column="treatment", base="skip", other=treatment)
        .rename(columns={treatment: "other"})
        .assign(treatment=treatment)
        for treatment in treatments
        if treatment != "skip" and "skip" in treatments
    ]
    tables["against_treatments"] = pd.concat(others, ignore_index=True) if others else pd.DataFrame()
    if "skip" in treatments and "layer" in kinds:
        tables["claims"] = statistics.claims(*measured, seed=seed)
    tables["queries"] = chosen
    return Result("depth_efficiency", table, statistics.summary(*measured, seed=seed), parameters, tables)


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
    if "group" not in frame:
        frame["group"] = frame.example
    return frame, name


def _check_groups(chosen: pd.DataFrame, name: str) -> None:
    if chosen.group.nunique() < 2:
        raise ValueError(
            f"{name}: all {len(chosen)} prompts drawn are of the group {chosen.group.iloc[0]!r}, and intervals are over "
            "groups: give prompts of two at least, or no column group (then each is its own)"
        )


def contributions(run: CleanRun, *, parallel: bool = False) -> pd.DataFrame:
    """What each layer adds, relative to what it is added to, and in which direction; means and maxima over tokens.

    Quantities: attn_norm |a|/|h|, mlp_norm |m|/|h + a| (in parallel blocks |m|/|h|), block_norm |c|/|h|, and the cosines
    attn_cosine(a, h), mlp_cosine(m, h + a), block_cosine(c, h), state_cosine(h_l+1, h_l). A negative cosine erases.

    Args:
        run: with its sublayers.
        parallel: whether attention and MLP read the same state.

    Returns:
        Columns layer, position_0 (whether position 0 counts), quantity, value (mean over tokens), largest.
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
    rows = []
    for name, value in found.items():
        for with_0 in (False, True):
            part = value[:, 0 if with_0 else 1 :]
            rows += [{"layer": layer, "position_0": with_0, "quantity": name, "value": float(mean), "largest": float(top)}
                     for layer, (mean, top) in enumerate(zip(part.mean(1), part.amax(1), strict=True))]  # fmt: skip
    return pd.DataFrame(rows)


def lens(model: TransformerBridge, run: CleanRun, positions: Sequence[int]) -> pd.DataFrame:
    """KL(p_l || y) in nats and overlap of the top five tokens, for the logit lens at each depth; means over positions.

    The direction is the published one (the tuned lens uses the reverse). Early values also measure that early states are
    written in another basis than the last ones, not only that nothing has been decided.
    """
    positions = require.wholes("positions", positions, 0, len(run.ids) - 1, twice=True)
    kl, overlap = _lens(model, run, positions)
    return pd.DataFrame({"depth": range(len(kl)), "kl": kl.mean(1), "overlap": overlap.mean(1)})


def _lens(model: TransformerBridge, run: CleanRun, positions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """KL and overlap, [depth position] each; some depths at a time, as the lens's set-up costs as much as a few states."""
    final = probabilities(model, run.states[-1, list(positions)])
    top, at_once = final.topk(5).indices, max(1, _LENS_STATES // len(positions))
    kl, overlap = [], []
    for states in run.states[:, list(positions)].split(at_once):
        here = probabilities(model, states)
        kl.append((here * (here.clamp_min(1e-38).log() - final.clamp_min(1e-38).log())).sum(-1))
        overlap.append((here.topk(5).indices[..., None] == top[:, None]).any(-1).double().mean(-1))
    return torch.cat(kl).double().cpu().numpy(), torch.cat(overlap).cpu().numpy()


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
    ids = _ids(model, [text], model.cfg.n_ctx)[0]
    if len(ids) < 2:
        raise ValueError("the text has one token; give at least two, so that there is something to predict")
    runs = [_clean(model, ids, text[:40])]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(skip(model, layer, first=1))
        runs.append(_clean(model, ids, text[:40]))
    with torch.inference_mode():
        chances = [probabilities(model, run.states[-1]) for run in runs]
    tokens = [model.tokenizer.decode([int(i)]) for i in ids]
    loss = [-chance[:-1].gather(1, ids[1:, None])[:, 0].clamp_min(1e-38).log() for chance in chances]
    best = list(dict.fromkeys(torch.cat([chance[-1].topk(top).indices for chance in chances]).tolist()))
    added = [run.states[1:, 1:] - run.states[:-1, 1:] for run in runs]
    change = ((added[0] - added[1]).norm(dim=-1) / added[0].norm(dim=-1).clamp_min(_EPSILON)).mean(1)
    next_token = pd.DataFrame({"token": [model.tokenizer.decode([i]) for i in best],
                               "whole": chances[0][-1, best].tolist(), "without": chances[1][-1, best].tolist()})  # fmt: skip
    return {
        "next_token": next_token.sort_values("whole", ascending=False, ignore_index=True),
        "loss": pd.DataFrame({"position": range(1, len(ids)), "token": tokens[1:], "whole": loss[0].tolist(),
                              "without": loss[1].tolist()}),
        "later": pd.DataFrame({"layer": range(n), "off": [layer in set(layers) for layer in range(n)],
                               "change": change.tolist()}),
    }  # fmt: skip


def cuts_of(length: int, n_cuts: int, seed: Any) -> list[int]:
    """Up to n cuts of a prompt: of 8, 16, 24, ... below T - 4, drawn without replacement."""
    n_cuts = require.whole("n_cuts", n_cuts, 0)
    allowed = np.arange(CUT_STEP, length - CUT_MARGIN, CUT_STEP)
    return sorted(np.random.default_rng(seed).permutation(allowed)[:n_cuts].tolist())


def depth_scores(
    model: TransformerBridge,
    data: str | pd.DataFrame = "chains",
    *,
    seed: int = 0,
    n_per_level: int = 20,
    levels: Sequence[int] | None = None,
    prompt_column: str = "prompt",
    known: bool = True,
    progress: bool = True,
) -> Result:
    """Do harder prompts use deeper layers? Skip each layer before the position that predicts the answer, measure there.

    The published score measures after that position, where the answer is already in the input, and takes maxima over as many
    tokens as there are. Here one token is measured at every level: the one whose output is the answer's first token.

    Args:
        data: a name from `lab.datasets.names(kind="prompts")`, or a table with prompt, level, answer (and group).
        n_per_level: prompts of each level, drawn with the seed.
        levels: None takes all.
        prompt_column: where the prompts are; "prompt_padded" of the word problems has one length at every level.
        known: whether to ask each hop by itself (data with hop_prompts), to tell known from unknown questions.

    Returns:
        Result with
        `.table`: example, group, level, tokens, right (the answer's first token is said), measure (effect, output), score
            (depth score, in layers), ed_50; and known (every hop is, asked by itself), where that was asked. right and
            known are missing where an answer's first token says nothing of it (`texts.first_tokens`).
        `.summary`: measure, level, n, n_readable (those whose right is not missing), right (their share), score, low, high;
            and for each measure the slope of the score on the level (`.tables["slopes"]`: measure, questions (all, right,
            known), covariate (none, tokens), slope, low, high, n, n_groups).
        `.tables["profiles"]`: example, level, skipped_layer, effect, output.

    Raises:
        ValueError: no column level or answer, a level that is not there, prompts of fewer than three tokens, what
            `lab.datasets.check_prompts` refuses, prompts of one group only: all before the model runs.
        FloatingPointError: states that are not finite, named by prompt and layer.
    """
    frame, name = prompts(data)
    if absent := [column for column in (prompt_column, "level", "answer") if column not in frame]:
        raise ValueError(
            f"data has no column {', '.join(absent)}, it has {list(frame)}: depth scores need {prompt_column} and level (hops, "
            "steps, terms), and answer"
        )
    seed, n_per_level = require.seed(seed), require.whole("n_per_level", n_per_level, 1)
    (known,) = require.flags(known=known)
    datasets.check_prompts(frame, name=name)
    datasets.check_texts(frame, (prompt_column,), name=name)
    there = sorted(frame.level.unique().tolist())
    wanted = there if levels is None else require.listed("levels", levels, "levels")
    if not wanted or any(level not in there or isinstance(level, bool) for level in wanted):
        raise ValueError(f"levels={wanted}: choose from {there}")
    wanted = [there[there.index(level)] for level in wanted]
    parts = [part.sample(n=min(n_per_level, len(part)), random_state=seed)
             for level, part in frame.groupby("level") if level in wanted]  # fmt: skip
    chosen = pd.concat(parts, ignore_index=True)
    _check_groups(chosen, name)
    known = known and "hop_prompts" in chosen
    if known:  # before anything runs: what is too long or has no answer
        if "hop_answers" not in chosen:
            raise ValueError(f"{name} has hop_prompts and no hop_answers: give both, or known=False")
        _ids(model, [prompt for hops in chosen.hop_prompts for prompt in hops], model.cfg.n_ctx)
    prompted = _ids(model, chosen[prompt_column], model.cfg.n_ctx)
    for example, ids in zip(chosen.example, prompted, strict=True):
        if len(ids) < 3:
            raise ValueError(f"prompt {example!r} has {len(ids)} tokens; a depth score needs at least 3")
    answers = [first_tokens(model, prompt, [query.answer, *(getattr(query, "aliases", None) or [])])
               for query, prompt in zip(chosen.itertuples(), chosen[prompt_column], strict=True)]  # fmt: skip
    rows, profiles = [], []
    for i, (query, ids, first) in enumerate(zip(chosen.itertuples(), prompted, answers, strict=True)):
        clean = _clean(model, ids, query.example)
        cut = len(ids) - 1
        depths, states = skipped(model, clean, "layer")
        with _named(query.example):
            # one cut: a pass before it, whose keys could be kept, would cost as much as the whole
            (found,) = global_effects(model, clean, depths, states, cuts=[cut], read=[cut], reuse=False)
        effect = statistics.effect_profile(found.contribution[:, :, 0].astype(float))
        output = found.output[:, 0].astype(float)
        said = int(clean.logits.argmax())
        right = (said in first) if first else pd.NA
        where = {"example": query.example, "group": query.group, "level": query.level}
        profiles += [
            {**where, "skipped_layer": s, "effect": effect[s], "output": output[s]} for s in range(len(effect))
        ]
        for measure, profile in (("effect", effect), ("output", output)):
            rows.append({**where, "tokens": len(ids), "right": right, "measure": measure,
                         "score": float(statistics.depth_score(profile)),
                         "ed_50": float(statistics.effective_depth(profile, 0.5))})  # fmt: skip
        if progress and (i + 1) % max(1, len(chosen) // 4) == 0:
            print(f"{i + 1} of {len(chosen)} prompts scored.")
    table = pd.DataFrame(rows).astype({"right": "boolean"})
    if progress and table.right.isna().any():
        print(f"{table.example[table.right.isna()].nunique()} of {len(chosen)} answers begin with a token that says nothing of "
              "them: right is missing there.")  # fmt: skip
    if known:
        table = table.merge(_known(model, chosen), on="example")
    summary, slopes = _scores_summary(table, seed)
    parameters = {**models.facts(model), "dataset": name, "n_per_level": n_per_level, "levels": wanted, "seed": seed,
                  "prompt_column": prompt_column, "versions": versions()}  # fmt: skip
    tables = {"profiles": pd.DataFrame(profiles), "slopes": slopes}
    return Result("depth_scores", table, summary, parameters, tables)


# --- one prompt -----------------------------------------------------------------------------------------------------


class _Worker:
    """Works on one prompt; holds the model (or in another process where it came from) and its random twin."""

    def __init__(self, model: TransformerBridge | dict[str, Any]) -> None:
        self.given = model
        self.loaded: dict[tuple[str, int], TransformerBridge] = {}  # by weights and seed
        self.means: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "loaded": {}, "means": {}}

    def model(self, weights: str, parameters: dict[str, Any]) -> TransformerBridge:
        key = (weights, parameters["seed"] if weights == "random" else 0)
        if key not in self.loaded:
            model = self.given
            if isinstance(model, dict):
                model = models.received(model)
            self.loaded[key] = model if weights == "trained" else models.random_twin(model, seed=parameters["seed"])
        return self.loaded[key]

    def __call__(
        self, *, weights: str, queries: pd.DataFrame, which: int, parameters: dict[str, Any], key: str
    ) -> Result:
        model = self.model(weights, parameters)
        ids = _ids(model, queries.text, parameters["max_tokens"])
        query = queries.iloc[which]
        clean = _clean(model, ids[which], query.example)
        changed = {}
        for kind in parameters["kinds"]:
            changed["skip", kind] = skipped(model, clean, kind) if "skip" in parameters["treatments"] else None
        needs = set(parameters["treatments"]) & {"other", "mean"}
        others = self._others(model, weights, ids, which, queries) if needs else (None, None)
        for treatment in parameters["treatments"]:
            if treatment != "skip":
                changed[treatment, "layer"] = _treated(clean, treatment, others, parameters, query.example)
        length, reuse = len(clean.ids), parameters["reuse"]
        seeds = [parameters["seed"], _number(query.example)]
        cuts = cuts_of(length, parameters["n_cuts"], seeds)
        drawn = np.random.default_rng([*seeds, 1]).permutation(np.arange(1, length - 1))[: parameters["n_read"] - 1]
        read = sorted([*drawn.tolist(), length - 1])
        where = {"example": query.example, "group": query.group, "weights": weights}
        rows: list[dict[str, Any]] = []
        pairs: list[pd.DataFrame] = []
        floors: list[dict[str, Any]] = []
        for (treatment, kind), variants in changed.items():
            if variants is None:
                continue
            with _named(query.example):
                found = global_effects(model, clean, *variants, cuts=[None, *cuts], read=read, reuse=reuse)
            about = {**where, "treatment": treatment, "kind": kind, "mode": "global"}
            _reduce(found, about, rows, pairs, floors if (treatment, kind) == ("skip", "layer") else None)
            if parameters["local"] and treatment == "skip":
                part = {"layer": clean.states[1:] - clean.states[:-1], "attn": clean.attn_out, "mlp": clean.mlp_out}[
                    kind
                ]
                part = part.clone()  # type: ignore[union-attr]
                part[:, 0] = 0
                with _named(query.example):
                    found = local_effects(model, clean, range(clean.n_layers), part, cuts=[None, *cuts], reuse=reuse)
                _reduce(found, {**about, "mode": "local"}, rows, pairs, None)
        parallel = models.facts(model)["parallel_blocks"]
        kl, overlap = _lens(model, clean, [0, *read])
        read_from_0 = pd.concat([pd.DataFrame({"depth": range(len(kl)), "kl": kl[:, first:].mean(1),
                                               "overlap": overlap[:, first:].mean(1), "position_0": not first})
                                 for first in (1, 0)])  # fmt: skip
        tables = {
            "pairs": pd.concat(pairs, ignore_index=True),
            "contributions": contributions(clean, parallel=parallel).assign(**where),
            "lens": read_from_0.assign(**where),
            "floor": pd.DataFrame(floors, columns=[*where, "scope", "layer", "mean", "max"]),
        }
        return Result("depth_efficiency", pd.DataFrame(rows), pd.DataFrame(), {}, tables)

    def _others(self, model: Any, weights: str, ids: Any, which: int, queries: pd.DataFrame) -> tuple[Any, Any]:
        """What the layers add in the next prompt, and the mean over all other prompts (position 0 left out)."""
        key = (
            id(model),
            tuple(tuple(row.tolist()) for row in ids),
        )  # `loaded` keeps the model, so its id stays its own
        if key not in self.means:
            sums = []
            for row, name in zip(ids, queries.example, strict=True):
                states = _clean(model, row, name).states
                added = states[1:] - states[:-1]
                sums.append((added[:, 1:].sum(1), added.shape[1] - 1))
            self.means[key] = sums
        sums = self.means[key]
        rest = [part for i, part in enumerate(sums) if i != which]
        mean = sum(total for total, _ in rest) / sum(count for _, count in rest)
        donor = (which + 1) % len(ids)
        states = _clean(model, ids[donor], queries.example.iloc[donor]).states
        return states[1:] - states[:-1], mean


def _treated(
    clean: CleanRun, treatment: str, others: tuple[Any, Any], parameters: dict[str, Any], example: str
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
        at = [1 + (position - 1) % (length - 1) for position in range(before.shape[1])]
        states = before + others[0][:, at]
    states[:, 0] = after[:, 0]
    return list(range(1, clean.n_layers + 1)), states


def _reduce(
    found: list[Effects],
    about: dict[str, Any],
    rows: list[dict[str, Any]],
    pairs: list[pd.DataFrame],
    floors: list[dict[str, Any]] | None,
) -> None:
    """Tokens of all positions, or of all cuts together, reduced to mean, median, 95th percentile and maximum."""
    everywhere, *future = found
    for scope, some in (("all", [everywhere]), ("future", future)):
        first = 1 if scope == "all" else 0  # position 0 is not changed
        tokens = np.concatenate([e.contribution[:, :, first:] for e in some], 2).astype(float)
        stats = {"mean": tokens.mean(2), "median": np.median(tokens, 2), "p95": np.quantile(tokens, 0.95, axis=2),
                 "max": tokens.max(2)}  # fmt: skip
        n_rows, n_layers = stats["mean"].shape
        grid = {"skipped_layer": np.repeat(np.arange(n_rows), n_layers), "layer": np.tile(np.arange(n_layers), n_rows)}
        pairs.append(pd.DataFrame({**grid, **{key: value.ravel() for key, value in stats.items()}})
                     .assign(**about, scope=scope))  # fmt: skip
        output = np.concatenate([e.output for e in some], 1).astype(float)
        profile, largest = (statistics.effect_profile(stats[key]) for key in ("mean", "max"))
        for s in range(n_rows):
            heard = output[s].size > 0
            rows.append({**about, "scope": scope, "skipped_layer": s, "effect": profile[s], "effect_max": largest[s],
                         "output": output[s].mean() if heard else np.nan,
                         "output_max": output[s].max() if heard else np.nan})  # fmt: skip
        if floors is not None:
            noise = np.concatenate([e.floor[:, first:] for e in some], 1)
            floors += [{**{key: about[key] for key in ("example", "group", "weights")}, "scope": scope, "layer": layer,
                        "mean": float(noise[layer].mean()), "max": float(noise[layer].max())}
                       for layer in range(n_layers)]  # fmt: skip


def _clean(model: TransformerBridge, ids: torch.Tensor, example: str) -> CleanRun:
    with _named(example):
        return clean_run(model, ids, sublayers=True)


@contextmanager
def _named(example: str) -> Iterator[None]:
    """What is not finite in a variant of a prompt is reported with that prompt's name."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"prompt {example!r}: {error}") from None


def _ids(model: TransformerBridge, texts: Any, max_tokens: int) -> list[torch.Tensor]:
    tokens = tokenize(model, list(texts))
    return [row[:length][:max_tokens] for row, length in zip(tokens.ids, tokens.lengths.tolist(), strict=True)]


def _number(text: str) -> int:
    return int(hashlib.sha256(str(text).encode()).hexdigest()[:8], 16)


def _known(model: TransformerBridge, chosen: pd.DataFrame) -> pd.DataFrame:
    """Whether each hop, asked by itself, begins as one of its answers does; missing where that says nothing."""
    rows = []
    for query in chosen.itertuples():
        fine: Any = True
        for prompt, names in zip(query.hop_prompts, query.hop_answers, strict=True):
            names = [names] if isinstance(names, str) else names
            wanted = first_tokens(model, prompt, names)
            said = int(clean_run(model, _ids(model, [prompt], model.cfg.n_ctx)[0]).logits.argmax())
            hit = said in wanted if wanted else pd.NA
            fine = fine & hit  # one miss is enough, whatever cannot be read
        rows.append({"example": query.example, "known": fine})
    return pd.DataFrame(rows).astype({"known": "boolean"})


def _scores_summary(table: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, slopes = [], []
    for measure, part in table.groupby("measure"):
        for level, some in part.groupby("level"):
            if some.group.nunique() > 1:
                interval, _ = statistics.of_mean(
                    some.score.to_numpy(float), some.group.astype(str).to_numpy(), lambda mean: mean, seed=seed
                )
                rows.append({"measure": measure, "level": level, "n": len(some), "n_readable": some.right.count(),
                             "right": some.right.astype(float).mean(),
                             "score": interval.estimate, "low": interval.low, "high": interval.high})  # fmt: skip
        for questions in ("all", "right", *(["known"] if "known" in part else [])):
            some = part if questions == "all" else part[part[questions].fillna(False)]
            if some.level.nunique() < 2 or some.group.nunique() < 4:
                continue
            for covariate in (None, "tokens"):
                design = np.column_stack([np.ones(len(some)), some.level, some.tokens]).astype(float)
                if covariate and np.linalg.matrix_rank(design) < 3:
                    continue  # length follows from the level: the two cannot be told apart
                found = statistics.slope(some, seed=seed, covariate=covariate)
                slopes.append({"measure": measure, "questions": questions, "covariate": covariate or "none",
                               "slope": found.estimate, "low": found.low, "high": found.high, "n": len(some),
                               "n_groups": some.group.nunique()})  # fmt: skip
    columns = [
        "measure",
        "questions",
        "covariate",
        "slope",
        "low",
        "high",
        "n",
        "n_groups",
    ]  # also where no slope can be fitted
    return pd.DataFrame(rows), pd.DataFrame(slopes, columns=columns)


def _print_estimate(
    model: TransformerBridge, ids: list[torch.Tensor], parameters: dict[str, Any], missing: list[dict[str, Any]]
) -> None:
    """One plain pass is timed; a variant costs about half a pass without a cut, and a quarter for each cut."""
    row = ids[0]
    clean_run(model, row)
    started = time.perf_counter()
    clean_run(model, row)
    one = (time.perf_counter() - started) / len(row)
    seconds = 0.0
    for shard in missing:
        about = shard["parameters"]
        sweeps = len(about["kinds"]) * (2 if about["local"] else 1) + len(about["treatments"]) - 1
        passes = sweeps * model.cfg.n_layers * (0.5 + 0.25 * about["n_cuts"])
        seconds += passes * one * len(ids[shard["which"]]) * 0.6  # rows side by side are cheaper than one by one
    print(f"{len(missing)} prompts to run (trained and random weights counted apart): about {seconds / 60:.0f} min.")
