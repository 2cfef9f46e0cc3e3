"""Back-patching: does a later state, sent back to an earlier layer of the same position, bring out the answer?

After Biran et al., "Hopping Too Late" (arXiv 2406.12775), section 6: for each pair source layer > target layer, the state
after the source layer replaces the state after the target layer, once, in the prompt; greedy decoding; success when any
pair gives the answer. That is an oracle over L(L-1)/2 tries, so chance has as many. Added, on by default: five controls,
paired with the back-patch query by query, and an honest use with one pair chosen on other queries. Four controls have as many
tries. They are not equally hard: `random` draws a new vector for each pair, 435 independent ones with 30 layers, while `own`,
`other` and `same_relation` put the same 29 states at different depths. An oracle over more independent tries finds more, so
`random` is a hard control for success; `hit_share` (of all tries) doesn't grow with their number.

Success here: the answer is the first thing said (`answers.Answer.leads`). The published rule (a substring anywhere in
ten tokens) and whole words anywhere can be had with `rule`, at the price of decoding every try to its end.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import lenses, models, require
from lab.back_patching import statistics, two_hop
from lab.back_patching.answers import ARTICLES, Answer
from lab.identity import identity
from lab.results import Result, joined, keep, study, versions
from lab.runs import CleanRun, Generations, clean_run, generate, why_plain
from lab.texts import checked_texts, first_tokens, phrase_positions, tokenize

POSITIONS = ("t1", "t2")  # last token of e1, last token of the prompt
CONDITIONS = {
    "own": "the query's own later state (the published back-patch)",
    "random": "a Gaussian vector of the same norm, drawn anew for each pair",
    "other": "the same layer and position of a query with another bridge, answer and pair of relations (one may be shared)",
    "same_relation": "the same layer and position of a query with the same two relations, another bridge and answer",
    "forward": "the query's own earlier state, sent forward (target above source)",
    "identity": "the state itself: must change nothing",
}
COLUMNS = two_hop.QUERIES | {
    "queries.prompt": "the query as the model got it: in the style and with the examples of its answers",
    "queries.plain": "what the model says without a patch",
    "queries.right": "whether that is right, by the rule of this run",
    "example": "name of the query",
    "group": "queries that belong together (one bridge entity)",
    "set": "correct or incorrect, see queries",
    "position": "which token's state is replaced: t1 (last of e1; all of e1 with e1_tokens) or t2 (last of the prompt)",
    "condition": "own or a control, see `CONDITIONS`",
    "draw": "number of the random vectors or of the donor, from 0",
    "tries": "number of (source, target) pairs that were tried",
    "hits": "number of tries that gave the answer",
    "success": "whether any try did (the oracle)",
    "answer_share": "share of the data's queries of this second relation that have this answer: what guessing it gives",
    "source_layer": "layer after which the state is taken, from 0",
    "target_layer": "layer after which it is put, from 0",
    "said": "what the model says then; by the rule leading, as far as it was decoded",
    "n": "number of queries",
    "n_groups": "number of their groups (bridge entities)",
    "summary.success": "share of queries that any pair answers, 0 to 1, mean over draws",
    "low": "lower end of the 95 % interval, bootstrap over groups; nan for a single group",
    "high": "upper end of that interval",
    "hit_share": "share of the tries that gave the answer, mean over queries",
    "difference": "success of own minus that of the condition, paired by query; nan for own",
    "diff_low": "lower end of the 95 % interval of the difference",
    "diff_high": "upper end of that interval",
    "p": "of the difference: two-sided sign-flip permutation over groups",
    "p_holm": "p, Holm-corrected over the conditions of this set and position",
}


def run(
    model: TransformerBridge,
    data: Result | str | pd.DataFrame = "two_hop",
    *,
    seed: int = 0,
    n: int = 200,
    positions: Sequence[str] = POSITIONS,
    conditions: Sequence[str] = tuple(CONDITIONS),
    draws: int = 1,
    rule: str = "leading",
    limit: int | None = None,
    max_new_tokens: int = 10,
    e1_tokens: str = "last",
    queries_a_part: int = 4,
    resume: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
) -> Result:
    """Success of every (source, target) pair for each query, beside the success of the controls.

    Args:
        model: from `lab.load`, or a Bridge of your own, as it is in memory.
        data: the result of `two_hop.run` on this model, or what it takes (then it is run first).
        n: the first so many queries of the sets correct and incorrect, in the proportion in which they come.
        positions: "t1" (last token of e1), "t2" (last token of the prompt).
        conditions: of `CONDITIONS`; controls are tried on the incorrect set. Donors of `other` and `same_relation` have
            another bridge entity and another answer; queries for which there is none are left out, by name. Those of
            `other` differ in at least one relation: they may share the other one.
        draws: of the random vectors and the donors.
        rule: of success: "leading" (the answer is said first; only tries that can still succeed are decoded on), "word" or
            "published" (anywhere in the tokens; every try is decoded to its end).
        limit: queries of the data that are answered first, to make the sets; None takes four times `n`.
        max_new_tokens: greedy, as published: 10.
        e1_tokens: "last" patches t1 alone, as published; "all" each token of e1 with its own later state.
        queries_a_part: queries in one part, the least that an interruption can lose.
        resume, executor, progress: as in `concept_depth.run`.

    Returns:
        Result with a row for all tries of a query, position, condition and draw, and `statistics.oracle_success` of them as
        summary. `.tables["hits"]`: each try that gave the answer; pairs that are not there failed. `.tables["queries"]`.

    Raises:
        ValueError: unknown position, condition or rule, no queries in the sets, e1 not in the prompt or cut by the
            tokenizer, a query longer than the context: before a patch is tried.
    """
    seed, n, draws = require.seed(seed), require.whole("n", n, 1), require.whole("draws", draws, 1)
    positions = require.some_of("positions", positions, POSITIONS)
    conditions = require.some_of("conditions", conditions, CONDITIONS)
    rule, e1_tokens = _rule(rule), require.one_of("e1_tokens", e1_tokens, ("last", "all"))
    max_new_tokens = require.whole("max_new_tokens", max_new_tokens, 1)
    queries_a_part = require.whole("queries_a_part", queries_a_part, 1)
    if not isinstance(data, Result):
        data = two_hop.run(
            model, data, limit=4 * n if limit is None else limit, seed=seed, resume=resume, progress=progress
        )
    everything, chosen = chosen_queries(model, data, n)
    chosen = _with_donors(everything, chosen, conditions)
    reason = why_plain(model)
    if reason:
        print(f"Keys and values cannot be reused in this model ({reason}): every try runs the whole prompt. Slow.")
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        **{key: data.parameters[key] for key in ("dataset", "style", "shots", "n_queries")},
        "n": len(chosen), "n_correct": int((chosen.set == "correct").sum()), "seed": seed, "positions": positions,
        "conditions": conditions, "draws": draws, "rule": rule, "max_new_tokens": max_new_tokens,
        "e1_tokens": e1_tokens, "reuse": not reason, "versions": versions(),
    }  # fmt: skip
    # the pool: aliases and sets, too, decide what is a hit; which queries it holds, each part says
    known = {
        **{name: value for name, value in parameters.items() if name not in ("n", "n_correct")},
        "pool": everything,
    }
    parts = [{"examples": chosen.example.iloc[i : i + queries_a_part].tolist()}
             for i in range(0, len(chosen), queries_a_part)]  # fmt: skip
    done = study(
        work, parts, kept=keep(work, {"model": own}, resume=resume), known=known, models={"model": model},
        shared={"queries": everything, "parameters": parameters}, executor=executor, progress=progress,
    )  # fmt: skip
    table, tables = joined(done)
    tables = {"hits": tables["hits"], "queries": chosen.merge(tables["plain"], on="example")}
    summary = statistics.oracle_success(table, seed=seed)
    return Result("back_patching", table, summary, parameters, tables).described(COLUMNS)


def cells(n_layers: int, *, condition: str = "own") -> list[tuple[int, int]]:
    """(source_layer, target_layer) pairs: source after target, for `forward` before it, for `identity` the same."""
    layers = range(require.whole("n_layers", n_layers, 1))
    require.one_of("condition", condition, CONDITIONS)
    if condition == "identity":
        return [(layer, layer) for layer in layers]
    if condition == "forward":
        return [(source, target) for source in layers for target in layers if source < target]
    return [(source, target) for source in layers for target in layers if source > target]


def patch_once(
    model: TransformerBridge,
    prompt: str,
    *,
    position: int,
    source_layer: int,
    target_layer: int,
    donor: str | None = None,
    donor_position: int | None = None,
    max_new_tokens: int = 10,
) -> str:
    """What the model says when one state is sent back: the state after `source_layer` put after `target_layer`.

    Args:
        position: of the patched token; `donor_position` that of the state's origin (None: the same).
        donor: a prompt that the state is taken from; None is the prompt itself.

    Raises:
        ValueError: a layer out of range, or a target that is not before the source.
    """
    last = model.cfg.n_layers - 1
    source_layer = require.whole("source_layer", source_layer, 0, last)
    target_layer = require.whole("target_layer", target_layer, 0, last)
    if target_layer >= source_layer:
        raise ValueError(
            f"target_layer {target_layer} is not before source_layer {source_layer}: a back-patch needs target < source"
        )
    ids = [tokenize(model, [text]).ids[0] for text in (prompt, prompt if donor is None else donor)]
    there = position if donor_position is None else donor_position
    (position,), (there,) = (_places(own, [at]) for own, at in zip(ids, (position, there), strict=True))
    clean = clean_run(model, ids[0])
    origin = clean if donor is None else clean_run(model, ids[1])
    value = origin.states[source_layer + 1, there]
    found = generate(
        model, clean, [position], [target_layer + 1], value[None, None], max_new_tokens=max_new_tokens,
        reuse=not why_plain(model),
    )  # fmt: skip
    return found.texts[0]


def sweep(
    model: TransformerBridge,
    prompt: str,
    answer: Sequence[str],
    *,
    positions: Sequence[int],
    rule: str = "leading",
    max_new_tokens: int = 10,
) -> pd.DataFrame:
    """All back-patches of one prompt at one place: for looking at a query. A second or two.

    Args:
        answer: label and aliases. positions: the patched positions, one for the published experiment.

    Returns:
        source_layer, target_layer, said (decoded on while it could still succeed), right, rank (of the answer's first token
        as next token; 0 = it is said; missing where that token says nothing, see `texts.first_tokens`).
        `.attrs["plain"]` is what the model says without a patch.
    """
    rule, answer = _rule(rule), checked_texts(require.listed("answer", answer, "names"), what="name")
    ids = tokenize(model, [prompt]).ids[0]
    positions = _places(ids, positions)
    clean = clean_run(model, ids)
    pairs = cells(clean.n_layers)
    values = torch.stack([clean.states[source + 1][positions] for source, _ in pairs])
    judge = Answer(answer[0], list(answer[1:]), lead_ins=ARTICLES)  # as in `run`, where no type rules out an article
    found = _tries(
        model,
        clean,
        positions,
        pairs,
        values,
        judge,
        first_tokens(model, prompt, answer),
        rule,
        max_new_tokens,
        not why_plain(model),
    )
    right = [two_hop.judge(judge, said, rule) for said in found.texts]
    table = pd.DataFrame(pairs, columns=["source_layer", "target_layer"])
    table = table.assign(said=found.texts, right=right, rank=lenses.as_ranks(found.ranks))
    table.attrs["plain"] = two_hop.greedy(model, [prompt], max_new_tokens=max_new_tokens, progress=False)[0]
    return table


def fixed_pair(result: Result, position: str, *, folds: int = 5, seed: int = 0) -> statistics.FixedPair:
    """One pair for all queries, chosen on other bridge entities: what back-patching gives without an oracle.

    `statistics.fixed_pair` on the condition `own`: gain over no patch on unseen bridge entities, with its interval, and
    the gain of the best pair in hindsight beside it.
    """
    hits, queries, pairs = success_matrix(result, position)
    return statistics.fixed_pair(
        hits, queries.right.to_numpy(bool), queries.group.to_numpy(str), pairs, folds=folds, seed=seed
    )


def search_cost(result: Result, position: str, *, folds: int = 5, seed: int = 0) -> pd.DataFrame:
    """Tries until the first success on the incorrect set, in several orders (`statistics.search_cost`)."""
    hits, queries, pairs = success_matrix(result, position, sets=("incorrect",))
    first = tuple(tries for tries in (1, 3, 10) if tries <= len(pairs))
    return statistics.search_cost(hits, queries.group.to_numpy(str), pairs, first=first, folds=folds, seed=seed)


def compare_methods(
    model: TransformerBridge, answers: Result, result: Result, *, folds: int = 5, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Share right and cost of four ways to ask and of one fixed back-patch for each position, on the same queries.

    `two_hop.decomposition` on the queries of `result`, under its rule of success, beside `fixed_pair`. A back-patch costs a
    run of the prompt first, to have the later state. The oracle over all pairs is no method, so it isn't here.

    Returns:
        method (latent, explicit, oracle, other, back-patch t1 ...), n, share, low, high, difference to latent with its interval
        (paired, bootstrap over bridge entities), tokens (mean, read and written), passes (mean, block runs times positions).
    """
    queries = result.tables["queries"]
    chosen = {at: fixed_pair(result, at, folds=folds, seed=seed).examples for at in result.parameters["positions"]}
    rows = two_hop.decomposition(
        model, answers, examples=queries.example.tolist(), rule=result.parameters["rule"], seed=seed, progress=progress
    )
    lengths = tokenize(model, queries.prompt.tolist()).lengths
    for position, found in chosen.items():
        extra = pd.DataFrame({"example": queries.example, "group": queries.group, "method": f"back-patch {position}",
                              "right": found.fixed.to_numpy(), "tokens": 2 * lengths + 10,
                              "passes": (2 * lengths + 9) * model.cfg.n_layers})  # fmt: skip
        rows = pd.concat([rows, extra], ignore_index=True)
    return two_hop.shares_of_ways(rows, seed=seed)


def success_matrix(
    result: Result,
    position: str,
    *,
    condition: str = "own",
    sets: Sequence[str] = ("correct", "incorrect"),
    draw: int = 0,
) -> tuple[np.ndarray, pd.DataFrame, list[tuple[int, int]]]:
    """Which pair succeeded for which query: bool [example pair], the queries of its rows, the pairs of its columns.

    Its rows are the queries on which the condition was tried: controls are not tried on the correct set.
    """
    sets, draw = require.some_of("sets", sets, ("correct", "incorrect")), require.whole("draw", draw, 0)
    queries, rows = result.tables["queries"], result.table
    tried = rows[(rows.position == position) & (rows.condition == condition) & (rows.draw == draw)].example
    queries = queries[queries.set.isin(sets) & queries.example.isin(tried)].reset_index(drop=True)
    if queries.empty:
        raise ValueError(f"{condition} was not tried at {position} on the sets {' and '.join(sets)} (draw {draw})")
    pairs = cells(result.parameters["n_layers"], condition=condition)
    row, column = {e: i for i, e in enumerate(queries.example)}, {pair: j for j, pair in enumerate(pairs)}
    matrix, hits = np.zeros((len(queries), len(pairs)), bool), result.tables["hits"]
    hits = hits[(hits.position == position) & (hits.condition == condition) & (hits.draw == draw)]
    for example, source, target in zip(hits.example, hits.source_layer, hits.target_layer, strict=True):
        if example in row:
            matrix[row[example], column[int(source), int(target)]] = True
    return matrix, queries, pairs


def places(model: TransformerBridge, prompt: str, e1: str) -> dict[str, int]:
    """t1 and t2 of one prompt, for looking at a query of one's own. Raises what `positions_of` raises."""
    found = positions_of(model, pd.DataFrame({"example": ["it"], "prompt": [prompt], "e1": [e1]})).iloc[0]
    return {"t1": int(found.t1), "t2": int(found.t2)}


def positions_of(model: TransformerBridge, queries: pd.DataFrame) -> pd.DataFrame:
    """t1 (last token of e1), t2 (last token) and the first token of e1 in each prompt.

    Raises:
        ValueError: e1 that is not in its prompt, or whose end lies inside a token.
    """
    tokens = tokenize(model, queries.prompt.tolist())
    t1 = phrase_positions(tokens, queries.e1.tolist())
    starts = [text.rfind(e1) for text, e1 in zip(tokens.texts, queries.e1, strict=True)]
    first = [int(np.flatnonzero(tokens.offsets[i, :, 1] > start)[0]) for i, start in enumerate(starts)]
    return pd.DataFrame({"first": first, "t1": t1, "t2": tokens.lengths - 1}, index=queries.example)


def chosen_queries(model: TransformerBridge, answers: Result, n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All answered queries with the prompt that the model got, and the first n of the sets correct and incorrect."""
    require_answers_of(model, answers)
    n = require.whole("n", n, 1)
    everything = answers.tables["queries"]
    everything = everything.assign(prompt=two_hop.prompts_of(model, answers, "composition"))
    chosen = everything[everything.set.isin(["correct", "incorrect"])].head(n)
    if chosen.empty:
        raise ValueError(
            f"this model has no query in the sets correct and incorrect among {len(everything)}: answer more queries "
            "(limit=), or help it with shots= in two_hop.run"
        )
    positions_of(model, chosen)  # raises
    return everything, chosen


def require_answers_of(model: TransformerBridge, answers: Result) -> None:
    """Raise when `answers` is not the result of `two_hop.run` on this very model."""
    if answers.kind != "two_hop":
        raise ValueError(f"this is a result of {answers.kind}; give one of two_hop.run, or queries")
    theirs, ours = answers.parameters, str(identity(model))
    if theirs.get("identity") != ours:
        raise ValueError(
            f"these answers are those of {theirs['model']} ({theirs.get('identity')}), not of {models.name_of(model)} as it is "
            f"now ({ours}): sets differ by model; run two_hop.run on this one"
        )


def _places(ids: torch.Tensor, positions: Any) -> list[int]:
    return require.wholes("positions", positions, 0, len(ids) - 1, hint=" (the prompt has no others)")


def _rule(rule: Any) -> str:
    return require.one_of("rule", rule, two_hop.RULES)


# --- the work --------------------------------------------------------------------------------------------------------


def work(model: TransformerBridge, queries: pd.DataFrame, examples: list[str], parameters: dict[str, Any]) -> Result:
    """All tries of some queries: rows of the table, the hits, and what is said without a patch."""
    rows, hits, plain = [], [], []
    for example in examples:
        found = _query(model, queries, example, parameters)
        rows += found[0]
        hits += found[1]
        plain.append(found[2])
    columns = ["example", "position", "condition", "draw", "source_layer", "target_layer", "said"]
    whole = {
        "draw": int,
        "source_layer": int,
        "target_layer": int,
    }  # also without a hit: else the joined columns are text
    tables = {"hits": pd.DataFrame(hits, columns=columns).astype(whole), "plain": pd.DataFrame(plain)}
    return Result("back_patching", pd.DataFrame(rows), pd.DataFrame(), {}, tables)


def _query(
    model: TransformerBridge, queries: pd.DataFrame, example: str, about: dict[str, Any]
) -> tuple[list[dict], list[dict], dict]:
    """All tries of one query: rows of the table, its hits, and what it says without a patch."""
    query = queries[queries.example == example].iloc[0]
    answer = two_hop.answer_of(query, "e3")
    rng = np.random.default_rng([about["seed"], int(hashlib.sha256(example.encode()).hexdigest()[:8], 16)])
    clean = clean_run(model, tokenize(model, [query.prompt]).ids[0])
    places = positions_of(model, queries[queries.example == example]).iloc[0]
    conditions = about["conditions"] if query.set == "incorrect" else [c for c in about["conditions"] if c == "own"]
    rows, hits = [], []
    donors = {
        name: [_donor(model, queries, query, name, rng) for _ in range(about["draws"])]
        for name in ("other", "same_relation")
        if name in conditions
    }
    for position in about["positions"] if conditions else ():
        at = [int(places[position])]
        if position == "t1" and about["e1_tokens"] == "all":
            at = list(range(int(places["first"]), int(places["t1"]) + 1))
        jobs, values = [], []
        for condition in conditions:
            pairs = cells(clean.n_layers, condition=condition)
            for draw in range(about["draws"] if condition in ("random", "other", "same_relation") else 1):
                state = clean.states[[source + 1 for source, _ in pairs]][:, at]
                if condition == "random":
                    noise = torch.as_tensor(rng.standard_normal(state.shape), dtype=state.dtype, device=state.device)
                    state = noise * (state.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
                elif condition in donors:
                    donor, donor_places = donors[condition][draw]
                    there = [max(0, int(donor_places[position]) - back) for back in range(len(at))][::-1]
                    state = donor.states[[source + 1 for source, _ in pairs]][:, there]
                jobs.append((condition, draw, pairs))
                values.append(state)
        all_pairs = [pair for _, _, pairs in jobs for pair in pairs]
        found = _tries(
            model, clean, at, all_pairs, torch.cat(values), answer, (), about["rule"], about["max_new_tokens"],
            about["reuse"],
        )  # fmt: skip
        start = 0
        for condition, draw, pairs in jobs:
            said = found.texts[start : start + len(pairs)]
            right = [two_hop.judge(answer, text, about["rule"]) for text in said]
            where = {"example": example, "position": position, "condition": condition, "draw": draw}
            hits += [
                {**where, "source_layer": source, "target_layer": target, "said": text}
                for (source, target), text, hit in zip(pairs, said, right, strict=True)
                if hit
            ]
            rows.append({**where, "group": query.group, "set": query.set, "tries": len(pairs), "hits": sum(right),
                         "success": any(right), "answer_share": query.answer_share})  # fmt: skip
            start += len(pairs)
    unpatched = generate(
        model,
        clean,
        [0],
        [0],
        clean.states[0, 0][None, None],
        max_new_tokens=about["max_new_tokens"],
        reuse=about["reuse"],
    ).texts[0]
    return (
        rows,
        hits,
        {"example": example, "plain": unpatched, "right": two_hop.judge(answer, unpatched, about["rule"])},
    )


def _tries(
    model: TransformerBridge, clean: CleanRun, positions: Sequence[int], pairs: Sequence[tuple[int, int]],
    values: torch.Tensor, answer: Answer, wanted: Sequence[int], rule: str, max_new_tokens: int, reuse: bool,
) -> Generations:  # fmt: skip
    """Decode all pairs of one prompt, each as long as it can still become right, or has just become so."""

    def undecided(text: str) -> bool:
        return answer.can_still_lead(text) and not answer.decided(text)

    return generate(
        model, clean, positions, np.array([target + 1 for _, target in pairs]), values, max_new_tokens=max_new_tokens,
        go_on=undecided if rule == "leading" else None, wanted=wanted, reuse=reuse,
    )  # fmt: skip


def _donor(
    model: TransformerBridge, queries: pd.DataFrame, query: pd.Series, condition: str, rng: np.random.Generator
) -> tuple[CleanRun, pd.Series]:
    """The clean run of another query, and its positions."""
    fits = np.flatnonzero(_fits(queries, query, condition))
    donor = queries.iloc[[int(fits[rng.integers(len(fits))])]]
    run = clean_run(model, tokenize(model, donor.prompt.tolist()).ids[0])
    return run, positions_of(model, donor).iloc[0]


def _fits(queries: pd.DataFrame, query: Any, condition: str) -> np.ndarray:
    """Which queries may lend a state: other bridge and answer; both relations the same, or not both. bool [example]"""
    same = (queries.r1 == query.r1) & (queries.r2 == query.r2)
    of_relation = same if condition == "same_relation" else ~same
    return (of_relation & (queries.group != query.group) & (queries.e3 != query.e3)).to_numpy()


def _with_donors(everything: pd.DataFrame, chosen: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The chosen queries without those that no other query can lend a state to: a control is paired query by query."""
    lent = [name for name in ("other", "same_relation") if name in conditions]
    absent = [column for column in ("r1", "r2") if column not in everything]
    if lent and absent:
        raise ValueError(f"the queries have no column {', '.join(absent)}, which {' and '.join(lent)} need: add it, or "
                         f"choose from the other conditions")  # fmt: skip
    alone = [query.example for query in chosen.itertuples() if query.set == "incorrect"
             and not all(_fits(everything, query, name).any() for name in lent)]  # fmt: skip
    if alone:
        print(f"{len(alone)} of {len(chosen)} queries are left out, because no answered query with another bridge and answer "
              f"fits for {' and '.join(lent)}: {', '.join(alone)}. Answer more queries (limit=).")  # fmt: skip
    if len(alone) == len(chosen):
        raise ValueError("no query is left: answer more queries (limit=), or leave out these conditions")
    return chosen[~chosen.example.isin(alone)]
