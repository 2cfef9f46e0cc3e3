"""Where the hops are resolved: descriptions of states, what sublayers write, where attention to the entity matters.

After Biran et al., "Hopping Too Late" (arXiv 2406.12775), sections 4 and 5, and Patchscopes (Ghandeharioun et al., arXiv
2401.06102). Each is a per-query table; `run` puts the layers found into one plot of stages.

Against reading too much into it: decoys (bridge and answer of other queries, of the same type) say how often a description
names one by chance, attention to as many tokens before e1 says how often cutting any attention changes the answer, and
"Layer-Order Inversion" (arXiv 2601.03542) reports answers that appear before their bridge (`answer_first` counts them).

A description counts when it says the name first. The published rule is another one, not a laxer one (`Answer.described`):
": name" or "name: " anywhere, tried for e1, then e2, then e3. So ": the Greek city of Athens" counts here only, and "It is:
Greece, ..." there only. `run` reports other published judgements beside ours, too: tables `published_...`. What it can't give
is the three samples a pair of the paper's descriptions: ours are greedy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab import lenses, models, require, statistics
from lab.back_patching import patching, two_hop
from lab.back_patching.answers import Answer
from lab.identity import identity
from lab.results import Result, joined, keep, study, versions
from lab.runs import clean_run, generate, why_plain
from lab.states import collect_states
from lab.texts import first_tokens, tokenize

# The published description prompt; the state goes to its last token.
DESCRIPTION = (
    "Syria: Syria is a country in the Middle East, Leonardo DiCaprio: Leonardo DiCaprio is an American actor, "
    "Samsung: Samsung is a South Korean multinational corporation, x"
)
STAGES = {
    "bridge at t1": "first hop resolved: the state at t1 describes the bridge",
    "bridge at t2": "the state at t2 describes the bridge",
    "moved": "attention from t2 to e1 matters (ours): cutting all of e1 changes the next word",
    "moved_published": "attention from t2 to t1 matters (published): cutting t1 changes ten tokens, and not both hold the answer",
    "answer at t2": "second hop resolved: the state at t2 describes the answer",
    "prediction": "what is said next is the top word of what a sublayer writes at t2",
}
COLUMNS = two_hop.QUERIES | {
    "queries.prompt": "the query as the model got it: in the style and with the examples of its answers",
    "example": "name of the query",
    "group": "queries that belong together (one bridge entity)",
    "set": "correct or incorrect, see queries",
    "stage": "of `STAGES`",
    "table.layer": "first layer, from 0, at which the stage is reached; of moved and moved_published each centre of a window "
    "whose cut makes the change; prediction counts either sublayer (the paper's, MLPs only)",
    "n": "number of queries of the set",
    "share": "share of them that reach the stage, 0 to 1",
    "low": "lower end of the 95 % interval of the share, bootstrap over groups",
    "high": "upper end of that interval",
    "median_layer": "median of the first layer over the queries that reach the stage",
    "median_low": "lower end of the 95 % interval of the median, bootstrap over groups",
    "median_high": "upper end of that interval",
    "position": "token whose state is read: t1 (last of e1) or t2 (last of the prompt)",
    "names": "what is looked for: e2, e3, or in their place decoy and answer_decoy, those of another query",
    "resolved": "whether any description of the state says this name first, and not e1",
    "published_descriptions.resolved": "whether any names it by the published rule, and neither e1 nor, for e3, e2",
    "first_source_layer": "first layer after which a state is so described, from 0; -1: none",
    "cells": "number of (source, target) pairs of layers whose description counts",
    "both": "number of pairs that count by our rule and by the published one",
    "site": "sublayer whose output at t2 is read through the logit lens: attn_out or mlp_out",
    "layer": "layer of that sublayer, from 0",
    "what": "whose first token: of the prediction (the word said next), e2 or e3",
    "rank": "rank of the best of its first tokens, 0 = top; missing where those say nothing of the name",
    "published_projections.rank": "the same by `published_first_tokens`, a wider net",
    "depth": "blocks passed, 0 to L, before the state is read through the logit lens",
    "knockout.layer": "centre of the layers, l - window .. l + window, in which t2 cannot look at the keys; from 0",
    "published_knockout.layer": "the same; the key is t1",
    "keys": "tokens that t2 cannot look at: e1 (all of it), t1, or other (as many right before e1 as it has, fewer where fewer "
    "stand there, never the prompt's first)",
    "changed": "whether the next word is another one than without the cut",
    "published_knockout.changed": "whether the cut mattered as published: `changed_as_published`, ten tokens",
    "knockout.rank": "rank of the answer's first token as next word with the cut, 0 = top; missing where it says nothing",
}


def run(
    model: TransformerBridge,
    data: Result | str | pd.DataFrame = "two_hop",
    *,
    seed: int = 0,
    n: int = 60,
    target_layers: Sequence[int] | None = None,
    window: int = 3,
    limit: int | None = None,
    queries_a_part: int = 4,
    published_rule: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """The layers of each stage for queries of the sets correct and incorrect.

    Args:
        data: the result of `two_hop.run` on this model, or what it takes.
        n: the first so many queries of the two sets.
        target_layers: of the description prompt; None takes all (published), a few are faster.
        window: attention is cut in layers l - window .. l + window, as published: 3.
        published_rule: also judge the descriptions as published. That needs all ten tokens of each, where our rule mostly
            needs one or two: about five times the time.
        seed, limit, queries_a_part, resume, progress: as in `patching.run`.

    Returns:
        Result with the layers of each stage that a query reached. `.tables`: "descriptions", "projections", "knockout" and
        "lens", and as published "published_knockout" (for t1), "published_projections" and, if asked for,
        "published_descriptions": its names are judged in the order e1, e2, e3; a decoy in the place of what it stands beside.

    Raises:
        ValueError: a layer out of range, a negative window, a model without attn_out or mlp_out, and what
            `patching.run` raises.
    """
    n_layers = model.cfg.n_layers
    for site in ("attn_out", "mlp_out"):
        models.require_site(model, site)
    layers = range(n_layers) if target_layers is None else target_layers
    target_layers = require.wholes("target_layers", layers, 0, n_layers - 1)
    seed, n, window = require.seed(seed), require.whole("n", n, 1), require.whole("window", window, 0)
    queries_a_part, (published_rule,) = (
        require.whole("queries_a_part", queries_a_part, 1),
        require.flags(published_rule=published_rule),
    )
    if not isinstance(data, Result):
        data = two_hop.run(
            model, data, limit=4 * n if limit is None else limit, seed=seed, resume=resume, progress=progress
        )
    everything, chosen = patching.chosen_queries(model, data, n)
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        **{key: data.parameters[key] for key in ("dataset", "style", "shots", "n_queries")},
        "n": len(chosen), "seed": seed, "window": window, "reuse": not why_plain(model), "versions": versions(),
        "target_layers": target_layers, "published_rule": published_rule,
    }  # fmt: skip
    parts = []
    for i in range(0, len(chosen), queries_a_part):
        some = chosen.iloc[i : i + queries_a_part]
        parts.append({"queries": some, "decoys": {name: _decoys(everything, some, name, seed) for name in DECOYS}})
    if progress:
        rows = 2 * n_layers * len(parameters["target_layers"])
        print(f"{len(chosen)} queries; for each, {rows} descriptions and {3 * n_layers} cuts of attention.")
    done = study(
        work, parts, kept=keep(work, {"model": own}, resume=resume), models={"model": model}, shared={"about": parameters},
        known={name: value for name, value in parameters.items() if name != "n"}, progress=progress,
    )  # fmt: skip
    table, tables = joined(done)
    tables = {name: tables[name] for name in _names(parameters)} | {"queries": chosen}
    return Result("hop_stages", table, _summary(table, chosen, seed), parameters, tables).described(COLUMNS)


def describe(
    model: TransformerBridge,
    states: torch.Tensor,
    target_layers: Sequence[int],
    answers: Sequence[Answer],
    *,
    reuse: bool,
    whole: bool = False,
) -> tuple[list[tuple[int, int]], list[str]]:
    """What the description prompt says with each state (after source layer l) at its last token, after each target layer.

    Decoded on while further tokens can change for one of the answers whether it is the first thing said.

    Args:
        states: [depth d_model], depths 0..L of one position.
        whole: decode all ten tokens, which the published rule (`Answer.described`) needs.

    Returns:
        (source_layer, target_layer) pairs and the texts.
    """
    target_layers = require.wholes("target_layers", target_layers, 0, model.cfg.n_layers - 1)
    clean = clean_run(model, tokenize(model, [DESCRIPTION]).ids[0])
    pairs = [(source, target) for source in range(len(states) - 1) for target in target_layers]

    def undecided(text: str) -> bool:
        return any(answer.can_still_lead(text) and not answer.decided(text) for answer in answers)

    found = generate(
        model, clean, [len(clean.ids) - 1], np.array([target + 1 for _, target in pairs]),
        states[[source + 1 for source, _ in pairs]][:, None], go_on=None if whole else undecided, reuse=reuse,
    )  # fmt: skip
    return pairs, found.texts


def lens(
    model: TransformerBridge, prompt: str, positions: Mapping[str, int], names: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Rank of the first token of some names at each depth of one prompt, read through the logit lens.

    Args:
        positions: for example `patching.places(model, prompt, e1)`.
        names: for example {"e2": ["India"], "e3": ["New Delhi", "Delhi"]}.

    Returns:
        position, depth, what, rank (0 = top; missing where no first token of these names says anything of them).
    """
    clean, rows = clean_run(model, tokenize(model, [prompt]).ids[0]), []
    for position, at in positions.items():
        states = clean.states[:, at].float().cpu().numpy()
        for what, spelled in names.items():
            found = lenses.ranks(model, states, [first_tokens(model, prompt, spelled)] * len(states))
            rows += [
                {"position": position, "depth": d, "what": what, "rank": int(rank)} for d, rank in enumerate(found)
            ]
    table = pd.DataFrame(rows)
    return table.assign(rank=lenses.as_ranks(table["rank"]))


def knockout(
    model: TransformerBridge,
    prompt: str,
    keys: Sequence[int],
    *,
    window: int = 3,
    wanted: Sequence[int] = (),
    max_new_tokens: int = 1,
    reuse: bool = True,
) -> pd.DataFrame:
    """What is said next when the last token cannot look at some positions in layers l - window .. l + window.

    Later tokens are not cut off from them, as published: only the prompt is read with the cut.

    Returns:
        layer (the window's centre; -1 is no cut), token (id of the next word), rank (of the best wanted token; missing
        where none is wanted), text (of all new tokens).
    """
    window = require.whole("window", window, 0)
    ids = tokenize(model, [prompt]).ids[0]
    keys = require.wholes("keys", keys, 0, len(ids) - 2, hint=", positions before the last token")
    clean = clean_run(model, ids)
    n_layers, last = clean.n_layers, len(ids) - 1
    cuts = [(list(range(max(0, c - window), min(n_layers, c + window + 1))), keys) for c in range(n_layers)]
    depths = np.array([0] + [layers[0] for layers, _ in cuts])
    found = generate(
        model, clean, [last], depths, clean.states[depths, last][:, None], max_new_tokens=max_new_tokens, wanted=wanted,
        blocked=[([], []), *cuts], reuse=reuse,
    )  # fmt: skip
    tokens = [ids[0] for ids in found.ids]
    return pd.DataFrame(
        {"layer": range(-1, n_layers), "token": tokens, "rank": lenses.as_ranks(found.ranks), "text": found.texts}
    )


def changed_as_published(plain: str, cut: str, answer: Answer) -> bool:
    """Whether a cut of attention mattered, as published: the ten tokens differ, and not both texts hold the answer.

    Of an incorrect query, which did not give the answer before, any other word among the ten will do.

    >>> changed_as_published("Athens.", "Athens, of course", Answer("Athens")), changed_as_published("a", "b", Answer("Athens"))
    (False, True)
    """
    same = plain.strip().replace("\n", " ") == cut.strip().replace("\n", " ")
    return not same and not (answer.published(plain) and answer.published(cut))


def published_first_tokens(model: TransformerBridge, names: Sequence[str]) -> list[int]:
    """First tokens that count as a name in the published projections: of the name also in lower case, also without a space.

    As published, the label and aliases of more than one character. A wider net than that of `.tables["projections"]`: without
    a space, and in lower case, a name breaks into pieces, and its first piece may be the beginning of many other words.
    """
    label, *aliases = names
    spelled = [label, *(alias for alias in aliases if len(alias) > 1)]
    spelled = [space + form for name in spelled for form in (name, name.lower()) for space in ("", " ")]
    first = {model.tokenizer(form, add_special_tokens=False).input_ids[0] for form in spelled}
    return sorted(token for token in first if model.tokenizer.decode([token]).strip())  # a bare space names nothing


def info_propagation(result: Result) -> pd.DataFrame:
    """The paper's stage "Info Propagation": the mean of up to three first layers, of those that a query reaches.

    Returns:
        Index example; group, set; cut (`moved_published`), projected (what attention writes at t2 has a first token of e2 on
        top), described (the state at t2 describes e2; by the published rule if it was asked for), layer (their mean).
    """
    tables = result.tables
    cut, written = tables["published_knockout"], tables["published_projections"]
    said = tables.get("published_descriptions", tables["descriptions"])
    said = said[(said.position == "t2") & (said.names == "e2") & said.resolved]
    written = written[(written.site == "attn_out") & (written.what == "e2") & (written["rank"] == 0)]
    first = tables["queries"].set_index("example")[["group", "set"]].assign(
        cut=cut[cut.changed].groupby("example").layer.min(), projected=written.groupby("example").layer.min(),
        described=said.set_index("example").first_source_layer,
    )  # fmt: skip
    return first.assign(layer=first[["cut", "projected", "described"]].mean(axis=1))


DECOYS = {"e2": "decoy", "e3": "answer_decoy"}


def against_decoys(descriptions: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """How often states describe bridge and answer, and how often a decoy of the same type, paired query by query.

    Args:
        descriptions: of `run`, or its published_descriptions.

    Returns:
        position, names (e2, e3), n, share, low, high; decoy (its share); difference (share - decoy), diff_low, diff_high:
        95 % over bridge entities. pairs: mean number of (source, target) pairs that name it.
    """
    rows = []
    for (position, names), part in descriptions.groupby(["position", "names"], sort=False):
        if names not in DECOYS:
            continue
        control = descriptions[(descriptions.position == position) & (descriptions.names == DECOYS[names])]
        resolved, groups = part.resolved.to_numpy(float), part.group.to_numpy(str)
        decoy = control.set_index("example").resolved.loc[part.example].to_numpy(float)
        share, low, high = statistics.cluster_bootstrap(resolved, groups, seed=seed)
        difference, diff_low, diff_high = statistics.cluster_bootstrap(resolved - decoy, groups, seed=seed)
        rows.append({"position": position, "names": names, "n": len(part), "share": float(share), "low": float(low),
                     "high": float(high), "decoy": decoy.mean(), "difference": float(difference),
                     "diff_low": float(diff_low), "diff_high": float(diff_high), "pairs": part.cells.mean()})  # fmt: skip
    return pd.DataFrame(rows)


def answer_first(lens: pd.DataFrame, *, top: int = 10) -> pd.DataFrame:
    """Which comes up first in the logit lens of each query, the bridge or the answer ("Layer-Order Inversion").

    Args:
        lens: of `run`: example, group, position, depth, what (e2, e3), rank.
        top: a name is there at a depth when its first token is among so many top words, at t1 or t2.

    Returns:
        Index example; group; bridge, answer: the first depth at which it is there (inf: never); answer_first (the answer
        has the smaller depth, also where the bridge never comes) and bridge_first: neither where they come together.
        Queries of which one of the two cannot be read (its rank is missing) are left out.
    """
    readable = lens["rank"].notna().groupby(lens.example, sort=False).transform("all")
    if not readable.all():
        print(f"{lens.example[~readable].nunique()} of {lens.example.nunique()} queries are left out: a first token says "
              "nothing of its name.")  # fmt: skip
    lens = lens[readable]
    there = lens.assign(depth=lens.depth.where(lens["rank"] < top, np.inf))
    first = there.groupby(["example", "group", "what"], sort=False).depth.min().unstack("what").reset_index("group")
    first = first.rename(columns={"e2": "bridge", "e3": "answer"}).rename_axis(columns=None)
    return first.assign(answer_first=first.answer < first.bridge, bridge_first=first.bridge < first.answer)


# --- the work --------------------------------------------------------------------------------------------------------


def work(
    model: TransformerBridge, queries: pd.DataFrame, decoys: dict[str, list[list[str]]], about: dict[str, Any]
) -> Result:
    """All tables of some queries."""
    places = patching.positions_of(model, queries)
    rows: dict[str, list[dict]] = {name: [] for name in _names(about)}
    stages: list[dict] = []
    sites = collect_states(model, queries.prompt.tolist(), sites=("attn_out", "mlp_out"), progress=False)
    said = {}
    for i, query in enumerate(queries.itertuples()):
        where = {"example": query.example, "group": query.group, "set": query.set}
        t1, t2 = int(places.t1.iloc[i]), int(places.t2.iloc[i])
        clean = clean_run(model, tokenize(model, [query.prompt]).ids[0])
        said[query.example] = int(clean.logits.argmax())
        answers = {name: two_hop.answer_of(query, name) for name in ("e1", "e2", "e3")}
        for name, decoy in DECOYS.items():  # judged as what it stands beside
            answers[decoy] = Answer(decoys[name][i][0], decoys[name][i][1:], lead_ins=answers[name].lead_ins)
        for position, at in (("t1", t1), ("t2", t2)):
            pairs, texts = describe(
                model, clean.states[:, at], about["target_layers"], list(answers.values()), reuse=about["reuse"],
                whole=about["published_rule"],
            )  # fmt: skip
            for name in (*DECOYS, *DECOYS.values()):
                # as published, a text that names e1 names e1, also where a name of e2 would fit
                ours = [answers[name].leads(text) and not answers["e1"].leads(text) for text in texts]
                found = [s for (s, _), hit in zip(pairs, ours, strict=True) if hit]
                first = min(found) if found else -1
                rows["descriptions"].append({**where, "position": position, "names": name, "resolved": bool(found),
                                             "first_source_layer": first, "cells": len(found)})  # fmt: skip
                stage = {("t1", "e2"): "bridge at t1", ("t2", "e2"): "bridge at t2", ("t2", "e3"): "answer at t2"}
                if found and (position, name) in stage:
                    stages.append({**where, "stage": stage[position, name], "layer": first})
                if about["published_rule"]:
                    earlier = ("e1", "e2") if name in ("e3", "answer_decoy") else ("e1",)
                    theirs = [answers[name].described(text) and not any(answers[other].described(text) for other in earlier)
                              for text in texts]  # fmt: skip
                    layers = [s for (s, _), hit in zip(pairs, theirs, strict=True) if hit]
                    rows["published_descriptions"].append({
                        **where, "position": position, "names": name, "resolved": bool(layers),
                        "first_source_layer": min(layers, default=-1), "cells": len(layers),
                        "both": sum(map(min, ours, theirs)),
                    })  # fmt: skip
            wanted = {name: first_tokens(model, query.prompt, [getattr(query, name), *getattr(query, f"{name}_aliases")])
                      for name in ("e2", "e3")}  # fmt: skip
            for name, ids in wanted.items():
                by_depth = lenses.ranks(model, clean.states[:, at].float().cpu().numpy(), [ids] * len(clean.states))
                rows["lens"] += [{**where, "position": position, "depth": d, "what": name, "rank": rank}
                                 for d, rank in enumerate(by_depth)]  # fmt: skip
        first = int(places["first"].iloc[i])
        before = list(range(max(1, 2 * first - t1 - 1), first))  # as many as e1 has
        for name, keys in (("e1", list(range(first, t1 + 1))), ("t1", [t1]), *([("other", before)] if before else [])):
            cut = knockout(model, query.prompt, keys, window=about["window"], wanted=wanted["e3"], reuse=about["reuse"],
                           max_new_tokens=10 if name == "t1" else 1)  # fmt: skip
            plain, plain_text = cut.token.iloc[0], cut.text.iloc[0]
            for layer, token, rank, text in cut.iloc[1:].itertuples(index=False):
                changed = bool(token != plain)
                rows["knockout"].append({**where, "layer": layer, "keys": name, "changed": changed, "rank": rank})
                if changed and name == "e1":
                    stages.append({**where, "stage": "moved", "layer": layer})
                if name == "t1":
                    changed = changed_as_published(plain_text, text, answers["e3"])
                    rows["published_knockout"].append({**where, "layer": layer, "changed": changed})
                    if changed:
                        stages.append({**where, "stage": "moved_published", "layer": layer})
        wide = {name: published_first_tokens(model, [getattr(query, name), *getattr(query, f"{name}_aliases")])
                for name in ("e2", "e3")}  # fmt: skip
        for site in ("attn_out", "mlp_out"):
            for table, name, ids in (
                ("projections", "prediction", [said[query.example]]),
                *(("projections", *pair) for pair in wanted.items()),
                *(("published_projections", *pair) for pair in wide.items()),
            ):
                found_ranks = lenses.ranks(model, sites[site].values[i], [ids] * model.cfg.n_layers)
                rows[table] += [{**where, "site": site, "layer": layer, "what": name, "rank": rank}
                                        for layer, rank in enumerate(found_ranks)]  # fmt: skip
        top = [row["layer"] for row in rows["projections"]
               if row["example"] == query.example and row["what"] == "prediction" and row["rank"] == 0]  # fmt: skip
        if top:
            stages.append({**where, "stage": "prediction", "layer": min(top)})
    table = pd.DataFrame(stages, columns=["example", "group", "set", "stage", "layer"])
    tables = {name: pd.DataFrame(part) for name, part in rows.items()}
    for name in ("projections", "published_projections", "knockout", "lens"):
        tables[name]["rank"] = lenses.as_ranks(tables[name]["rank"])
    return Result("hop_stages", table, pd.DataFrame(), {}, tables)


def _names(about: Mapping[str, Any]) -> tuple[str, ...]:
    """Tables of `run`, but for the queries."""
    published = ("published_knockout", "published_projections", "published_descriptions")
    return ("descriptions", "projections", "knockout", "lens", *published[: 2 + about["published_rule"]])


def _decoys(everything: pd.DataFrame, part: pd.DataFrame, name: str, seed: int) -> list[list[str]]:
    """For each query e2 or e3 of another one that has another bridge and answer: what a description may name by chance."""
    column = f"{name}_type"
    kinds = everything[column] if column in everything else pd.Series("", index=everything.index)
    decoys = []
    for query in part.itertuples():
        rng = np.random.default_rng([seed, int(hashlib.sha256(query.example.encode()).hexdigest()[:8], 16)])
        own = getattr(query, column, "")
        fits = everything[(kinds == own) & (everything.e2 != query.e2) & (everything.e3 != query.e3)]
        if fits.empty:
            raise ValueError(f"{query.example} has no decoy: no answered query has another bridge and another answer, its {name} "
                             f"of type {own!r}; answer more queries (limit=)")  # fmt: skip
        decoy = fits.iloc[int(rng.integers(len(fits)))]
        decoys.append([decoy[name], *decoy[f"{name}_aliases"]])
    return decoys


def _summary(table: pd.DataFrame, queries: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for kind, members in queries.groupby("set"):
        if members.group.nunique() < 2:
            continue
        for stage in STAGES:
            layers = table[(table.stage == stage) & (table.set == kind)].groupby("example").layer.min()
            reached = members.example.isin(layers.index).to_numpy(float)
            share = statistics.cluster_bootstrap(reached, members.group.to_numpy(str), seed=seed)
            row = {"set": kind, "stage": stage, "n": len(members), "share": float(share.estimate),
                   "low": float(share.low), "high": float(share.high)}  # fmt: skip
            there = members[members.example.isin(layers.index)]
            if there.group.nunique() > 1:
                median = statistics.cluster_bootstrap(
                    layers.loc[there.example].to_numpy(float), there.group.to_numpy(str), np.median, seed=seed
                )
                row |= {"median_layer": float(median.estimate), "median_low": float(median.low),
                        "median_high": float(median.high)}  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)
