"""Do harder prompts use deeper layers? The depth score by level, after Csordas et al. (arXiv 2505.13898), section 5a."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, models, require
from lab.depth_efficiency import statistics
from lab.depth_efficiency.effects import global_effects, skipped
from lab.depth_efficiency.layers import ids_of, named, prompts, require_groups, run_of
from lab.results import Result, versions
from lab.texts import first_tokens

COLUMNS = {
    "example": "the prompt", "group": "prompts that share a story",
    "level": "hops, steps, terms", "tokens": "tokens of the prompt",
    "right": "the answer's first token is said; missing where that says nothing (`texts.first_tokens`)",
    "known": "every hop is right, asked by itself",
    "measure": "effect on later layers, or on the output",
    "score": "depth score of the profile, in layers", "ed_50": "ED_50 of the profile, a fraction of the layers",
    "skipped_layer": "layer s that is skipped before the position that predicts the answer",
    "effect": "relative change there of what a later layer adds, mean over later layers",
    "output": "L2 change there of the next-token distribution (0 to sqrt 2)",
    "n": "prompts", "n_readable": "prompts whose right is not missing", "summary.right": "share of those that are right",
    "summary.score": "mean over prompts",
    "low": "lower end of the 95 % interval over groups", "high": "upper end", "n_groups": "groups of prompts",
    "questions": "all, those that are right, or those that are known",
    "covariate": "what is held constant: tokens of the prompt, or none", "slope": "layers per level",
}  # fmt: skip


def depth_scores(
    model: TransformerBridge, data: str | pd.DataFrame = "chains", *, seed: int = 0, n_per_level: int = 20,
    levels: Sequence[int] | None = None, prompt_column: str = "prompt", known: bool = True, progress: bool = True,
) -> Result:  # fmt: skip
    """Depth scores of prompts by level: skip each layer before the position that predicts the answer, measure there.

    The published score measures after that position, where the answer is already in the input, and takes maxima over as many
    tokens as there are. Here one token is measured at every level: the one whose output is the answer's first token.

    Args:
        data: a name of prompts, or a table with prompt, level, answer (and group). levels: None takes all.
        n_per_level: prompts of each level, drawn with the seed.
        prompt_column: where the prompts are; "prompt_padded" of the word problems has one length at every level.
        known: whether to ask each hop by itself (data with hop_prompts), to tell known from unknown questions.

    Not shown: depth that a problem needs, where the model cannot solve it; and a longer prompt alone can move a score.
    """
    seed, n_per_level = require.seed(seed), require.whole("n_per_level", n_per_level, 1)
    (known,) = require.flags(known=known)
    chosen, name, wanted = _chosen(data, prompt_column, levels, n_per_level, seed)
    if known := known and "hop_prompts" in chosen:  # before anything runs: what is too long or has no answer
        if "hop_answers" not in chosen:
            raise ValueError(f"{name} has hop_prompts and no hop_answers: give both, or known=False")
        ids_of(model, [prompt for hops in chosen.hop_prompts for prompt in hops], model.cfg.n_ctx)
    prompted = ids_of(model, chosen[prompt_column], model.cfg.n_ctx)
    for example, ids in zip(chosen.example, prompted, strict=True):
        if len(ids) < 3:
            raise ValueError(f"prompt {example!r} has {len(ids)} tokens; a depth score needs at least 3")
    answers = [first_tokens(model, prompt, [query.answer, *(getattr(query, "aliases", None) or [])])
               for query, prompt in zip(chosen.itertuples(), chosen[prompt_column], strict=True)]  # fmt: skip
    rows, profiles = [], []
    queries = tqdm(list(chosen.itertuples()), desc="prompts", disable=not progress, leave=False)
    for query, ids, first in zip(queries, prompted, answers, strict=True):
        found, said = _profile(model, ids, query.example)
        where = {"example": query.example, "group": query.group, "level": query.level}
        profiles.append(pd.DataFrame({**where, "skipped_layer": range(model.cfg.n_layers), **found}))
        right = (said in first) if first else pd.NA
        rows += [{**where, "tokens": len(ids), "right": right, "measure": measure,
                  "score": float(statistics.depth_score(profile)), "ed_50": float(statistics.effective_depth(profile, 0.5))}
                 for measure, profile in found.items()]  # fmt: skip
    table = pd.DataFrame(rows).astype({"right": "boolean"})
    if progress and (unread := table.example[table.right.isna()].nunique()):
        print(
            f"{unread} of {len(chosen)} answers begin with a token that says nothing of them: right is missing there."
        )
    if known:
        table = table.merge(_known(model, chosen), on="example")
    parameters = {**models.facts(model), "dataset": name, "n_per_level": n_per_level, "levels": wanted, "seed": seed,
                  "prompt_column": prompt_column, "versions": versions()}  # fmt: skip
    tables = {"profiles": pd.concat(profiles, ignore_index=True), "slopes": _slopes(table, seed)}
    return Result("depth_scores", table, _by_level(table, seed), parameters, tables).described(COLUMNS)


def _chosen(
    data: str | pd.DataFrame, prompt_column: str, levels: Any, n_per_level: int, seed: int
) -> tuple[pd.DataFrame, str, list[Any]]:
    """Prompts of each level, drawn; the data's name; the levels."""
    frame, name = prompts(data)
    if absent := [column for column in (prompt_column, "level", "answer") if column not in frame]:
        raise ValueError(
            f"data has no column {', '.join(absent)}, it has {list(frame)}: depth scores need {prompt_column} and level (hops, "
            "steps, terms), and answer"
        )
    datasets.check_prompts(frame, name=name)
    datasets.check_texts(frame, (prompt_column,), name=name)
    there = sorted(frame.level.unique().tolist())
    wanted = there if levels is None else require.listed("levels", levels, "levels")
    if not wanted or any(level not in there or isinstance(level, bool) for level in wanted):
        raise ValueError(f"levels={wanted}: choose from {there}")
    wanted = [there[there.index(level)] for level in wanted]
    chosen = pd.concat([part.sample(n=min(n_per_level, len(part)), random_state=seed)
                        for level, part in frame.groupby("level") if level in wanted], ignore_index=True)  # fmt: skip
    require_groups(chosen, name)
    return chosen, name, wanted


def _profile(model: TransformerBridge, ids: torch.Tensor, example: str) -> tuple[dict[str, np.ndarray], int]:
    """Effects of each layer at the last position, and the token that is said there."""
    clean, last = run_of(model, ids, example), len(ids) - 1
    depths, states = skipped(model, clean, "layer")
    with named(example):
        # one cut: a pass before it, whose keys could be kept, would cost as much as the whole
        (found,) = global_effects(model, clean, depths, states, cuts=[last], read=[last], reuse=False)
    effect = statistics.effect_profile(found.contribution[:, :, 0].astype(float))
    return {"effect": effect, "output": found.output[:, 0].astype(float)}, int(clean.logits.argmax())


def _known(model: TransformerBridge, chosen: pd.DataFrame) -> pd.DataFrame:
    """Whether each hop, asked by itself, begins as one of its answers does; missing where that says nothing."""
    rows = []
    for query in chosen.itertuples():
        fine: Any = True
        for prompt, names in zip(query.hop_prompts, query.hop_answers, strict=True):
            wanted = first_tokens(model, prompt, [names] if isinstance(names, str) else names)
            said = int(run_of(model, ids_of(model, [prompt], model.cfg.n_ctx)[0], query.example).logits.argmax())
            fine = fine & (said in wanted if wanted else pd.NA)  # one miss is enough, whatever cannot be read
        rows.append({"example": query.example, "known": fine})
    return pd.DataFrame(rows).astype({"known": "boolean"})


def _by_level(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (measure, level), some in table.groupby(["measure", "level"]):
        if some.group.nunique() > 1:
            scores, groups = some.score.to_numpy(float), some.group.astype(str).to_numpy()
            interval, _ = statistics.of_mean(scores, groups, lambda mean: mean, seed=seed)
            rows.append({"measure": measure, "level": level, "n": len(some), "n_readable": some.right.count(),
                         "right": some.right.astype(float).mean(), "score": interval.estimate, "low": interval.low,
                         "high": interval.high})  # fmt: skip
    return pd.DataFrame(rows)


def _slopes(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Also where no slope can be fitted: then without rows."""
    rows = []
    for measure, part in table.groupby("measure"):
        for questions in ("all", "right", *(["known"] if "known" in part else [])):
            some = part if questions == "all" else part[part[questions].fillna(False)]
            if some.level.nunique() < 2 or some.group.nunique() < 4:
                continue
            for covariate in (None, "tokens"):
                design = np.column_stack([np.ones(len(some)), some.level, some.tokens]).astype(float)
                if covariate and np.linalg.matrix_rank(design) < 3:
                    continue  # length follows from the level: the two cannot be told apart
                found = statistics.slope(some, seed=seed, covariate=covariate)
                rows.append((measure, questions, covariate or "none", found.estimate, found.low, found.high, len(some),
                             some.group.nunique()))  # fmt: skip
    columns = ["measure", "questions", "covariate", "slope", "low", "high", "n", "n_groups"]
    return pd.DataFrame(rows, columns=columns)
