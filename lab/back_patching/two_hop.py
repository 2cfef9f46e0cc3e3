"""Does a model answer two-hop queries, and each of their hops? The sets that the other two-hop experiments work on.

After Biran et al., "Hopping Too Late" (arXiv 2406.12775), section 3: a query is *correct* when first hop and composition
are right and neither shortcut is; *incorrect* when both hops are right, the composition is wrong and neither shortcut is
right. Added: a rule of success that respects word boundaries, the four-way taxonomy of We-Math (arXiv 2407.01284) with what
independence would give, the same by depth, and intervals over bridge entities.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lab import datasets, lenses, models, require, statistics
from lab.back_patching import statistics as hop_statistics
from lab.back_patching.answers import ARTICLES, Answer
from lab.identity import identity
from lab.results import Result, keep, study, versions
from lab.runs import greedy_ids
from lab.states import collect_states
from lab.texts import checked_texts, tokenize
from lab.texts import first_tokens as first_tokens_behind

PROMPTS = {  # each kind of prompt, and the column that holds its right answer
    "first_hop": "e2",
    "second_hop": "e3",
    "composition": "e3",
    "entity_shortcut": "e3",
    "relation_shortcut": "e3",
}
HOPS = ("first_hop", "second_hop", "composition")
RULES = ("word", "published", "leading")
STYLES = ("base", "chat")
QUERIES = {  # columns of queries, which every experiment on them hands on
    "queries.example": "name of the query",
    "queries.text": "the query, as the data has it",
    "queries.e1": "the entity that the query names",
    "queries.e2": "the bridge: the answer to the first hop",
    "queries.e3": "the answer to the second hop and to the query",
    "queries.e1_aliases": "accepted names of e1, its label among them",
    "queries.e2_aliases": "accepted names of e2",
    "queries.e3_aliases": "accepted names of e3",
    "queries.e1_type": "what e1 is: city, person, ...",
    "queries.e2_type": "what e2 is",
    "queries.e3_type": "what e3 is",
    "queries.r1": "first relation, from e1 to e2",
    "queries.r2": "second relation, from e2 to e3",
    "queries.r1_template": "first relation in words, with {} for e1",
    "queries.r2_template": "second relation in words, with {} for e2",
    "queries.first_hop": "prompt that asks for e2",
    "queries.second_hop": "prompt that names e2 and asks for e3",
    "queries.entity_shortcut": "prompt that asks for the second relation of e1 itself",
    "queries.relation_shortcut": "prompt without e1: the relations alone",
    "queries.group": "name shared by queries that belong together (one bridge entity): intervals resample whole groups",
    "queries.answer_share": "share of the data's queries of this second relation that have this answer: what guessing it gives",
    "queries.set": "correct (first hop and composition right), incorrect (both hops right, composition wrong), neither with "
    "a shortcut right; or other",
    "queries.cell": "IK: a hop and the composition wrong; IG: both hops right, composition wrong; CM: all right; RM: a hop "
    "wrong, composition right",
    "queries.*": "of the query, as the data has it",
}
COLUMNS = QUERIES | {
    "example": "name of the query",
    "group": "queries that belong together (one bridge entity)",
    "prompt": "what was asked: first_hop, second_hop, composition (the query), entity_shortcut or relation_shortcut",
    "said": "what the model says, greedily",
    "published": "whether an accepted name is a substring of it, capitals or not",
    "word": "whether it stands there as whole words",
    "leading": "whether it is the first thing said",
    "rule": "rule of success: word, published or leading",
    "n": "number of prompts asked: shortcuts, only where they decide",
    "share": "share of them that are right, 0 to 1",
    "low": "lower end of the 95 % interval, bootstrap over groups; nan for a single group",
    "high": "upper end of that interval",
    "taxonomy.cell": "strict: IK, IG, CM, RM as in queries; loose: CM with a hop right, RM with none (composition right); "
    "score: CM + half of IG, strict; RM_expected: of RM_strict, were hops and composition independent; RM_minus_expected",
    "taxonomy.n": "number of queries in the cell; of all queries for score and what is expected",
    "taxonomy.share": "share of all queries, 0 to 1; RM_minus_expected: a difference of shares",
    "inflation.n": "number of prompts asked",
    "inflation.published": "number of prompts that the published rule counts as right",
    "inflation.word": "the same by whole words",
    "inflation.leading": "the same by the first thing said",
    "not_word": "number of hits of the published rule that no whole word backs",
    "not_leading": "number of hits of the published rule that are not said first",
    "only_word": "number of hits by whole words that the published rule misses",
    "published_share": "published / n",
    "word_share": "word / n",
    "leading_share": "leading / n",
    "not_word_share": "not_word / published; nan without hits",
    "not_leading_share": "not_leading / published; nan without hits",
}


def run(
    model: TransformerBridge,
    data: str | pd.DataFrame = "two_hop",
    *,
    seed: int = 0,
    limit: int | None = None,
    style: str = "base",
    shots: int = 0,
    max_new_tokens: int = 10,
    rule: str = "word",
    batch_size: int = 128,
    resume: bool = True,
    progress: bool = True,
) -> Result:
    """Answers to each query, its hops and its shortcuts, and what they make of the query.

    Args:
        model: from `lab.load`, or a Bridge of your own, as it is in memory.
        data: "two_hop", "published/two_hop", or a table with columns text, e1, e2, e3 and the one-hop prompts.
        seed: of the bootstrap and of the examples in few-shot prompts.
        limit: only the first so many queries (the shipped set is shuffled: its head is a sample).
        style: "base" gives the prompt as it stands; "chat" puts it into the model's chat template.
        shots: so many answered queries of the same kind with other bridge entities before each prompt.
        max_new_tokens: greedy, as published: 10.
        rule: which rule of success makes the sets (`lab.back_patching.answers`): "word", "published" or "leading".
        batch_size: prompts in one forward pass.
        resume: keep finished parts in the cache folder and read them from there (hash of everything that matters).

    Returns:
        Result with an answer a row. Shortcuts are asked only where they decide: where both hops, or first hop and
        composition, are right. `.tables`: "queries" with their sets, "taxonomy" (`hop_statistics.taxonomy`) and "inflation"
        (`hop_statistics.inflation`).

    Raises:
        ValueError: unknown style or rule, missing columns, an empty alias, a query longer than the context, ...: before
            the model runs.
    """
    seed, style, rule = require.seed(seed), require.one_of("style", style, STYLES), require.one_of("rule", rule, RULES)
    shots, max_new_tokens = require.whole("shots", shots, 0), require.whole("max_new_tokens", max_new_tokens, 1)
    batch_size, limit = require.whole("batch_size", batch_size, 1), None if limit is None else _limit(limit)
    frame, name = load(data, limit=limit)
    absent = [
        column_of(kind) for kind in PROMPTS if column_of(kind) not in frame or frame[column_of(kind)].isna().any()
    ]
    if absent:
        raise ValueError(f"{name} has no (or an incomplete) column {', '.join(absent)}: the sets are made from all of "
                         f"{', '.join(map(column_of, PROMPTS))}")  # fmt: skip
    written = {kind: prompts(model, frame, kind, style=style, shots=shots, seed=seed) for kind in PROMPTS}
    longest = max(int(tokenize(model, written[kind]).lengths.max()) for kind in PROMPTS)  # raises for an empty one
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into this model's context of "
                         f"{model.cfg.n_ctx}: shorten it, or show fewer examples (shots=)")  # fmt: skip
    own = identity(model)
    parameters = {
        **models.facts(model), "identity": str(own),
        "dataset": name, "n_queries": len(frame), "style": style, "shots": shots, "seed": seed,
        "max_new_tokens": max_new_tokens, "rule": rule, "limit": limit, "versions": versions(),
    }  # fmt: skip
    kept = keep(work, {"model": own}, resume=resume)

    def ask(texts: set[str], describe: str) -> dict[str, str]:
        unique = sorted(texts)  # a hop is asked in many queries: answer it once
        parts = [{"texts": unique[i : i + 8 * batch_size]} for i in range(0, len(unique), 8 * batch_size)]
        done = study(
            work, parts, kept=kept, known={"max_new_tokens": max_new_tokens}, models={"model": model}, describe=describe,
            shared={"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}, progress=progress,
        )  # fmt: skip
        return {text: said for part in done for text, said in zip(part.table.text, part.table.said, strict=True)}

    asked = {text for kind in HOPS for text in written[kind]}
    if progress:
        print(f"{len(frame)} queries: {len(asked)} different prompts for hops and compositions.")
    said = ask(asked, "hops and compositions")
    table = _judged(frame, {kind: written[kind] for kind in HOPS}, said)
    # A shortcut decides something only where both hops or the composition are right: elsewhere it isn't asked.
    right = table.pivot(index="example", columns="prompt", values=rule).loc[frame.example]
    asks = ((right.first_hop & right.second_hop) | (right.first_hop & right.composition)).to_numpy(bool)
    shortcuts = {
        kind: [text for text, ask_it in zip(written[kind], asks, strict=True) if ask_it]
        for kind in PROMPTS
        if kind not in HOPS
    }
    said = ask({text for texts in shortcuts.values() for text in texts}, "shortcuts")
    table = pd.concat([table, _judged(frame[asks], shortcuts, said)], ignore_index=True)
    right = (
        table.pivot(index="example", columns="prompt", values=rule).loc[frame.example].reindex(columns=list(PROMPTS))
    )
    right = right.eq(True)  # not asked: not right
    groups = frame.group.to_numpy(str)
    first, second, composition = (right[kind].to_numpy(bool) for kind in HOPS)
    taxonomy = hop_statistics.taxonomy(first, second, composition, groups, seed=seed)
    frame = frame.assign(set=_sets(right).to_numpy(), cell=_cells(right).to_numpy())
    tables = {
        "queries": frame,
        "taxonomy": taxonomy.reset_index(),
        "inflation": hop_statistics.inflation(table).reset_index(),
    }
    return Result("two_hop", table, _shares(table, seed), parameters, tables).described(COLUMNS)


def load(data: str | pd.DataFrame, *, limit: int | None = None) -> tuple[pd.DataFrame, str]:
    """Checked two-hop queries and their name."""
    frame = datasets.load(data) if isinstance(data, str) else datasets.as_two_hop(data)
    name = data if isinstance(data, str) else data.attrs.get("card", {}).get("name", "your data")
    if limit is not None:
        frame = frame.head(_limit(limit))
    datasets.check_two_hop_data(frame, name=name)
    return frame.reset_index(drop=True), name


def prompts(
    model: TransformerBridge,
    frame: pd.DataFrame,
    kind: str,
    *,
    style: str = "base",
    shots: int = 0,
    seed: int = 0,
    last: Sequence[str] | None = None,
) -> list[str]:
    """The texts that a model gets for one kind of prompt: as it stands, in a chat template, with answered examples.

    `last`: other texts to ask, one a row, behind the same examples; None asks the frame's own.
    """
    require.one_of("kind", kind, PROMPTS)
    require.one_of("style", style, STYLES)
    shots = require.whole("shots", shots, 0)
    rng = np.random.default_rng(require.seed(seed))
    answers, groups = frame[PROMPTS[kind]].to_numpy(), frame.group.to_numpy(str)
    if shots and "r2" not in frame:
        raise ValueError(
            f"shots={shots} needs a column r2: examples are taken from queries with the same second relation"
        )
    plain, texts = frame[column_of(kind)].tolist(), []
    for i, text in enumerate(plain if last is None else last):
        lines = []
        if shots:
            others = np.flatnonzero((groups != groups[i]) & (frame.r2 == frame.r2.iloc[i]) & (answers != answers[i]))
            if len(others) < shots:
                raise ValueError(f"shots={shots}, and row {i} has {len(others)} other queries of its kind to show")
            lines = [f"{plain[j]} {answers[j]}." for j in rng.choice(others, shots, replace=False)]
        texts.append("\n".join([*lines, text]))
    if style == "base":
        return texts
    if not model.tokenizer.chat_template:
        raise ValueError('style="chat" needs a model with a chat template; this one has none: use style="base"')
    started = []
    for text in texts:
        ask = [{"role": "user", "content": f"Complete the sentence with the answer only.\n\n{text}"}]
        chat = model.tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        start = model.tokenizer.bos_token if model.cfg.default_prepend_bos else None
        started.append(chat.removeprefix(start) if start else chat)  # `tokenize` puts it there
    return started


def greedy(
    model: TransformerBridge,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 10,
    batch_size: int = 128,
    progress: bool = True,
) -> list[str]:
    """Greedy continuations of texts (`branches.greedy_ids`), in batches of like length, padded on the left."""
    texts = checked_texts(require.listed("texts", texts, "texts"))
    batch_size = require.whole("batch_size", batch_size, 1)
    max_new_tokens = require.whole("max_new_tokens", max_new_tokens, 1)
    order = np.argsort([-len(text) for text in texts], kind="stable")
    said = [""] * len(texts)
    with tqdm(total=len(texts), unit="prompt", desc="Answering", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = tokenize(model, [texts[row] for row in rows], padding_side="left")
            ids = greedy_ids(model, tokens.ids, tokens.mask, max_new_tokens=max_new_tokens)
            new = model.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in zip(rows, new, strict=True):
                said[row] = text
            bar.update(len(rows))
    return said


def prompts_of(model: TransformerBridge, result: Result, kind: str, *, last: Sequence[str] | None = None) -> list[str]:
    """`prompts` for all queries of a result of `run`, as they were asked there: in its style, with its examples."""
    about = result.parameters
    how = {name: about[name] for name in ("style", "shots", "seed")}
    return prompts(model, result.tables["queries"], kind, last=last, **how)


def taxonomy_by_depth(
    model: TransformerBridge,
    result: Result,
    *,
    examples: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The taxonomy if the model stopped at each depth: a prompt counts when the lens's top token begins its answer.

    The lens is TransformerLens's: final norm and unembedding on the last token's state, of the prompts as `run` asked
    them. A first token is less than an answer, so cells are larger here than with generated answers at the same (last)
    depth. Queries with an answer whose first token says nothing (`texts.first_tokens`) are left out.

    Args:
        result: of `run` on this model. examples: which of its queries; None is all.

    Returns:
        depth, relative_depth, cell, n, share, low, high, and not_readable (queries that are left out).

    Raises:
        ValueError: no query is left.
    """
    seed = require.seed(seed)
    queries, rows = _chosen(result, examples)
    asked, ids = {}, {}
    for kind in HOPS:
        written, names = prompts_of(model, result, kind), answers_of(queries, PROMPTS[kind])
        asked[kind] = [written[row] for row in rows]
        ids[kind] = [first_tokens_behind(model, *one) for one in zip(asked[kind], names, strict=True)]
    kept = [i for i in range(len(queries)) if all(ids[kind][i] for kind in HOPS)]
    if not kept:
        raise ValueError(
            f"none of these {len(queries)} queries can be read by a lens: an answer of each begins with a token that says "
            "nothing of it (a lone space before a number, say); take other queries"
        )
    if progress and len(kept) < len(queries):
        left_out = len(queries) - len(kept)
        print(f"{left_out} of {len(queries)} queries are left out: an answer's first token says nothing of it.")
    right = []
    for kind in HOPS:
        states = collect_states(model, [asked[kind][i] for i in kept], progress=progress)["resid"].values
        wanted = [ids[kind][i] for i in kept]
        top = np.stack([lenses.top_tokens(model, states[:, depth]) for depth in range(states.shape[1])], 1)
        right.append(np.array([[token in ids for token in row] for row, ids in zip(top.tolist(), wanted, strict=True)]))
    first, second, composition = right
    groups = queries.group.iloc[kept].to_numpy(str)
    table = hop_statistics.taxonomy_by_depth(first, second, composition, groups, seed=seed)
    return table.assign(relative_depth=table.depth / model.cfg.n_layers, not_readable=len(queries) - len(kept))


def decomposition(
    model: TransformerBridge,
    result: Result,
    *,
    examples: Sequence[str] | None = None,
    rule: str = "word",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Ways to get from query to answer on the same items, with what they cost.

    latent (the query as it stands); explicit (the model's own first-hop answer put into the second hop); oracle (the right
    bridge there); other (another query's bridge there: the control). After DaSLaM (arXiv 2310.18338) in spirit: a fixed
    decomposition, nothing is trained. All in the style and with the examples of `result`; bridges keep their article
    ("of the Netherlands"), the model's own the one that it says.

    Args:
        result: of `run` on this model. examples: which of its queries; None is all.
        rule: of success.

    Returns:
        One row a (example, method): right, tokens (read and written), passes (block runs times positions), prompt, said.
    """
    seed, rule = require.seed(seed), require.one_of("rule", rule, RULES)
    everything = result.tables["queries"]
    queries, rows = _chosen(result, examples)
    own = result.table[result.table.prompt == "first_hop"].set_index("example").said
    own = own.loc[everything.example].map(first_phrase)
    swapped = everything.second_hop.tolist()  # where nobody else shares the relation it isn't asked
    rng, groups, alone = np.random.default_rng(seed), everything.group.to_numpy(str), set()
    for row in rows:
        query = everything.iloc[row]
        others = (
            (everything.r2 == query.r2).to_numpy() & (groups != groups[row]) & (everything.e3 != query.e3).to_numpy()
        )
        if others.any():
            swapped[row] = everything.second_hop.iloc[rng.choice(np.flatnonzero(others))]
        else:
            alone.add(row)
    second = [template[0].upper() + template[1:] + " is" for template in everything.r2_template]
    last = {
        "explicit": [frame.format(bridge) for frame, bridge in zip(second, own, strict=True)],
        "oracle": None,
        "other": swapped,
    }
    written = {"latent": prompts_of(model, result, "composition")}
    written |= {method: prompts_of(model, result, "second_hop", last=texts) for method, texts in last.items()}
    first_hops = prompts_of(model, result, "first_hop")
    asked = sorted({texts[row] for texts in written.values() for row in rows})
    said = dict(zip(asked, greedy(model, asked, progress=progress), strict=True))
    lengths = dict(zip(asked, tokenize(model, asked).lengths.tolist(), strict=True))
    first = dict(zip(rows, tokenize(model, [first_hops[row] for row in rows]).lengths.tolist(), strict=True))
    answers, table = [answer_of(query, "e3") for query in queries.itertuples()], []
    for method, texts in written.items():
        for answer, row in zip(answers, rows, strict=True):
            if method == "other" and row in alone:
                continue
            text = texts[row]
            tokens = lengths[text] + 10 + (first[row] + 10 if method == "explicit" else 0)
            table.append({"example": everything.example.iloc[row], "group": groups[row], "method": method, "prompt": text,
                          "said": said[text], "right": judge(answer, said[text], rule), "tokens": tokens,
                          "passes": (tokens - (2 if method == "explicit" else 1)) * model.cfg.n_layers})  # fmt: skip
    return pd.DataFrame(table)


def shares_of_ways(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Share right and mean cost of each way, with intervals over bridge entities.

    Args:
        rows: of `decomposition`: example, group, method (latent among them), right, tokens, passes.

    Returns:
        method, n, share, low, high, difference to latent on the same queries with its interval, tokens, passes (means).
    """
    seed = require.seed(seed)
    latent = rows[rows.method == "latent"].set_index("example").right.astype(float)
    table = []
    for method, part in rows.groupby("method", sort=False):
        right, groups = part.right.to_numpy(float), part.group.to_numpy(str)
        share = statistics.cluster_bootstrap(right, groups, seed=seed)
        gain = statistics.cluster_bootstrap(right - latent.loc[part.example].to_numpy(), groups, seed=seed)
        table.append({"method": method, "n": len(part), "share": share.estimate, "low": share.low, "high": share.high,
                      "difference": gain.estimate, "diff_low": gain.low, "diff_high": gain.high,
                      "tokens": part.tokens.mean(), "passes": part.passes.mean()})  # fmt: skip
    return pd.DataFrame(table)


# --- small parts that the other two-hop experiments use, too ----------------------------------------------------------


def column_of(kind: str) -> str:
    """The column of the queries that holds a kind of prompt."""
    return "text" if kind == "composition" else kind


def answers_of(queries: pd.DataFrame, column: str) -> list[list[str]]:
    """Label and aliases of e1, e2 or e3 for each query."""
    return [[label, *aliases] for label, aliases in zip(queries[column], queries[f"{column}_aliases"], strict=True)]


def answer_of(query: Any, column: str) -> Answer:
    """e1, e2 or e3 of a query, ready to be looked for. An article may lead where such names take one ("the euro")."""
    plain = getattr(query, f"{column}_type", "") in ("city", "language")
    label, aliases = getattr(query, column), getattr(query, f"{column}_aliases")
    return Answer(label, aliases, lead_ins=frozenset() if plain else ARTICLES)


def first_tokens(model: TransformerBridge, answers: Sequence[str]) -> list[int]:
    """Ids of the first tokens of an answer's names in the middle of a sentence (`texts.first_tokens`)."""
    return first_tokens_behind(model, "It is", answers)


def first_phrase(said: str) -> str:
    """What a generation names first: up to the first line break or mark, with its "the". The own bridge.

    >>> first_phrase(" India.\\n\\nThe city of Mumbai is"), first_phrase(" The Czech Republic, which")
    ('India', 'the Czech Republic')
    """
    phrase = said.strip()
    for mark in ("\n", ". ", ",", ";", ":", "(", '"'):
        phrase = phrase.split(mark)[0]
    phrase = phrase.strip(" .*'“”")
    if phrase.startswith("The "):
        phrase = "t" + phrase[1:]  # it comes into the middle of a sentence
    return phrase or said.strip()[:20]


def judge(answer: Answer, said: str, rule: str) -> bool:
    """Whether a generation counts under a rule (`RULES`)."""
    return {"word": answer.word, "published": answer.published, "leading": answer.leads}[rule](said)


def _chosen(result: Result, examples: Sequence[str] | None) -> tuple[pd.DataFrame, list[int]]:
    """Some of the queries of a result (None: all), in the order given, and their rows in its table."""
    queries = result.tables["queries"]
    wanted = queries.example.tolist() if examples is None else require.listed("examples", examples, "names of queries")
    rows = pd.Index(queries.example).get_indexer(wanted).tolist()
    if -1 in rows:
        raise ValueError(f"{wanted[rows.index(-1)]!r} is not among the {len(queries)} answered queries")
    return queries.iloc[rows].reset_index(drop=True), rows


def _limit(limit: Any) -> int:
    return require.whole("limit", limit, 2, hint=" queries")


def work(model: TransformerBridge, texts: list[str], max_new_tokens: int, batch_size: int, progress: bool) -> Result:
    """What the model says to some prompts."""
    said = greedy(model, texts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    return Result("two_hop", pd.DataFrame({"text": texts, "said": said}), pd.DataFrame(), {})


def _judged(frame: pd.DataFrame, written: dict[str, list[str]], said: dict[str, str]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for kind, texts in written.items():
        for query, text in zip(frame.itertuples(), texts, strict=True):
            answer, new = answer_of(query, PROMPTS[kind]), said[text]
            verdicts = {rule: judge(answer, new, rule) for rule in RULES}
            rows.append({"example": query.example, "group": query.group, "prompt": kind, "said": new, **verdicts})
    return pd.DataFrame(rows)


def _sets(right: pd.DataFrame) -> pd.Series:
    """Biran et al., section 3: by the answers to the five prompts."""
    shortcut = right.entity_shortcut | right.relation_shortcut
    correct = right.first_hop & right.composition & ~shortcut
    incorrect = right.first_hop & right.second_hop & ~right.composition & ~shortcut
    return pd.Series(np.select([correct, incorrect], ["correct", "incorrect"], "other"), right.index)


def _cells(right: pd.DataFrame) -> pd.Series:
    both = right.first_hop & right.second_hop
    return pd.Series(
        np.select([both & right.composition, both, right.composition], ["CM", "IG", "RM"], "IK"), right.index
    )  # strict reading


def _shares(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for kind, part in table.groupby("prompt", sort=False):
        for rule in RULES:
            right, groups = part[rule].to_numpy(float), part.group.to_numpy(str)
            share, low, high = (
                right.mean(),
                np.nan,
                np.nan,
            )  # a shortcut may be asked about one bridge only: no interval
            if part.group.nunique() > 1:
                share, low, high = map(float, statistics.cluster_bootstrap(right, groups, seed=seed))
            rows.append({"prompt": kind, "rule": rule, "n": len(part), "share": share, "low": low, "high": high})
    return pd.DataFrame(rows)
