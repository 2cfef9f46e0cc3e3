# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two hops: where is the bridge found, where the answer, and does sending a later state back help?
#
# **Paper.** Biran et al., "Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries",
# EMNLP 2024, [arXiv 2406.12775](https://arxiv.org/abs/2406.12775). "The capital of the country that contains the city of
# Mumbai is" needs two hops: Mumbai → *India* (the **bridge entity**) → *New Delhi*. The paper finds that a model resolves the
# bridge early and sometimes has too few layers left for the second hop. Its cure is **back-patching**: take the state after a
# later layer and put it back after an earlier one. We repeat that on a model that runs on a laptop, and add what the paper
# lacks: controls, intervals, and a use without an oracle.
#
# **You need** lessons 0 and 2 (states, hooks, one patch by hand, its controls).
#
# **It takes** about a minute to open: its results come with the kit. `recompute = True` measures them anew (about 20 minutes,
# 3.5 GB of memory, no network). `quick = True` is a smoke test with a few queries, and says so over every figure.

# %% tags=["parameters"]
model_name = "smollm2-135m"
accept_license = False  # for Gemma, which has terms of its own: see the README
seed = 0
n_asked = 600  # queries that the model is asked in section 2
n_patched = 24  # of those that it should know: back-patched in section 4 (200 take about an hour)
n_stages = 12  # described and cut in section 6
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with a few queries

# %%
import matplotlib.pyplot as plt
import pandas as pd

import lab
from lab.back_patching import patching, statistics, two_hop
from lab.back_patching import stages as hop_stages
from lab.back_patching.answers import Answer
from lab.shipped import Results

pd.options.display.max_colwidth = 160  # sentences in tables, whole
conditions = list(patching.CONDITIONS)  # own and the controls of section 4
results_of = Results("02_back_patching", recompute=recompute, quick=quick, model_name=model_name, seed=seed,
                     n_asked=n_asked, n_patched=n_patched, n_stages=n_stages)  # fmt: skip
if quick:
    n_asked, n_patched, n_stages = 50, 3, 2
    conditions = ["own", "random", "identity"]
model = lab.load(model_name, accept_license=accept_license)
health = lab.check(model)
assert health.ok.all(), "a check failed: look at the table before you trust a number"
health

# %% [markdown]
# ## 1. One query, watched through the depth
#
# The **logit lens** asks each depth: if the model stopped here, what would it say? We follow the rank of two names at two
# places: *t1*, the last token of the entity (Baidu), and *t2*, the last token of the prompt. Rank 1 is what would be said. The query
# is one that SmolLM2 gets right, whole and hop by hop.
#
# **What do you expect?** Which name comes up first, and where?
#
# - (a) The bridge (China) at t1, early; then the answer (Beijing) at t2.
# - (b) Both only in the last third of the layers at t2, where words are chosen.
# - (c) The answer before its bridge.

# %%
prompt, e1, e2, e3 = "The capital of the country of origin of the company Baidu is", "Baidu", "China", "Beijing"
at = patching.places(model, prompt, e1)
ranks = hop_stages.lens(model, prompt, at, {"e2": [e2], "e3": [e3]})
figure = lab.back_patching.figures.lens_strip(ranks, n_layers=model.cfg.n_layers)

# %%
said = two_hop.greedy(
    model, [prompt, "The country of origin of the company Baidu is", "The capital of China is"], progress=False
)
pd.DataFrame({"asked": ["both hops", "first hop", "second hop"], "said": said})

# %%
lens_ranks = ranks.assign(rank=ranks["rank"] + 1, name=ranks.what.map({"e2": e2, "e3": e3}))
top_ten = lens_ranks[lens_ranks["rank"] <= 10].groupby(["name", "position"]).depth.min()  # first depth in the top ten
for (place, name), line in lens_ranks.groupby(["position", "name"], sort=False):
    best, since = line.loc[line["rank"].idxmin()], top_ten.get((name, place))
    print(f"{name} at {place}: in the top ten {f'from depth {since} on' if since else 'at no depth'}; "
          f"best rank {best['rank']} at depth {best.depth}, rank {line['rank'].iloc[-1]} at the last depth")  # fmt: skip
never, third = model.cfg.n_layers + 1, 2 * model.cfg.n_layers / 3
bridge, answered = top_ten.get((e2, "t2"), never), top_ten.get((e3, "t2"), never)
seen = {"(a)": top_ten.get((e2, "t1"), never) < third, "(b)": min(bridge, answered) > third, "(c)": answered < bridge}
print("what was seen fits", ", ".join(option for option, fits in seen.items() if fits) or "no option")

# %% [markdown]
# **Things to notice.** Read these lines beside (a) to (c). With SmolLM2 it is (b): in the lens, both names come up at t2 after the last
# block only, Beijing first and China third, although two hops need China on the way. An answer that comes before its bridge, option (c), has been reported
# ("Layer-Order Inversion", [arXiv 2601.03542](https://arxiv.org/abs/2601.03542)); section 7 counts how often it happens here. A bridge that
# the lens doesn't show at t1 may still be there: a lens reads with the last layer's eyes, and in section 6 we ask in another way. And
# one query is one query: the rest of this notebook counts.

# %% [markdown]
# ## 2. What does the model know?
#
# Before asking *where*, ask *whether*. Each query is asked whole and hop by hop, ten tokens each, as in the paper; and without
# the first hop (entity shortcut: "The capital of the Parthenon is") and without the entity (relation shortcut: "The capital
# of the country is"), because an answer that comes that way needed no hops.
#
# When does an answer count? The published rule takes any alias anywhere in the text, as a substring:

# %%
answer = Answer("United States", ["US", "USA", "America"])
for text in (" Australia.", " the US.", " not known to us.", " home to many Americans"):
    print(
        f"{text!r:26} published rule: {answer.published(text)!s:6} whole words: {answer.word(text)!s:6} said first: {answer.leads(text)}"
    )

# %%
queries = lab.datasets.load("two_hop").query(
    "r2 in ['capital', 'currency', 'language']"
)  # the others are too hard for 135 M
asked = results_of("asked", lambda: two_hop.run(model, queries, limit=n_asked, seed=seed))
figure = asked.plot()

# %% [markdown]
# **Things to notice**
#
# - Four cells, by what is known: **IK** (insufficient knowledge: a hop is wrong, and so is the whole), **IG** (both hops right, the
#   whole wrong: the case that the paper is about), **CM** (all right), **RM** (the whole right although a hop is wrong: by rote, or by
#   luck). The scheme is that of We-Math ([arXiv 2407.01284](https://arxiv.org/abs/2407.01284)).
# - The mark on RM is what it would be if hops and whole had nothing to do with each other. Compare.
# - The rules can differ more where answers are short, and our three relations have few short ones. So here are all nine relations, by
#   the second one: hits of each rule on whole queries and second hops, and those of the published rule that no whole word backs
#   (`not_word`).

# %%
mixed = results_of("mixed", lambda: two_hop.run(model, "two_hop", limit=24 if quick else 300, seed=seed))
mixed_answers = mixed.table.query("prompt in ['composition', 'second_hop']").merge(
    mixed.tables["queries"][["example", "r2"]]
)
by_relation = statistics.inflation(mixed_answers.assign(prompt=mixed_answers.r2))
by_relation[["n", "published", "word", "leading", "not_word"]].rename_axis("second relation")

# %%
sets = asked.tables["queries"].set.value_counts()
print(
    f"correct (hops used, it seems): {sets.get('correct', 0)}, incorrect (both hops known, whole wrong): {sets.get('incorrect', 0)}, "
    f"of {len(asked.tables['queries'])} queries"
)
asked.tables["queries"].query("set == 'incorrect'")[["text", "e2", "e3"]].head(8)

# %% [markdown]
# **Exercise 1.** If being right on the first hop, on the second and on the whole were independent of each other, which share of
# queries would be RM (whole right, at least one hop wrong)? Use the three shares of `asked.summary` for the rule `word`.
# And what would a smaller share than that tell?

# %% tags=["exercise"]
your_rm = None


# %% tags=["check"]
def check_rm(given):
    p = asked.summary.query("rule == 'word'").set_index("prompt").share
    right = p.composition * (1 - p.first_hop * p.second_hop)
    if given is None:
        return print("No answer yet. You need p(whole right), and the chance that not both hops are right.")
    if abs(given - right) < 0.002:
        found = asked.tables["taxonomy"].set_index("cell").share["RM_strict"]
        print(f"Yes: {right:.3f}. Found: {found:.3f}. Fewer than that is what hops would give, and so would easy items, on which "
              "all three are right together: the share alone does not tell which.")  # fmt: skip
        return True
    if abs(given - p.composition * p.first_hop * p.second_hop) < 0.002:
        return print("That is the share with everything right (CM). RM wants at least one hop wrong.")
    if abs(given - p.composition * (1 - p.first_hop) * (1 - p.second_hop)) < 0.002:
        return print("That has both hops wrong. One wrong hop is enough for RM.")
    print("Not yet: p(whole) times one minus p(first) p(second).")


check_rm(your_rm)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
shares = asked.summary.query("rule == 'word'").set_index("prompt").share
assert check_rm(shares.composition * (1 - shares.first_hop * shares.second_hop))

# %% [markdown]
# ## 3. Back-patch one query
#
# Take the state of one position after a *source* layer, and put it in the place of the state after an earlier *target* layer, in
# the same prompt. The model then has the layers in between a second time. All pairs of layers at once:

# %%
incorrect = asked.tables["queries"].query("set == 'incorrect'")
capitals = incorrect.query("r2 == 'capital'")
example = (capitals if len(capitals) else incorrect).iloc[0]
where = patching.places(model, example.text, example.e1)
tries = {name: patching.sweep(model, example.text, [example.e3, *example.e3_aliases], positions=[position])
         for name, position in where.items()}  # fmt: skip
print(f"{example.text} → {example.e2} → {example.e3}")
for name, table in tries.items():
    print(f"{name}: pairs that give the answer: {table.right.sum()}")
place = max(tries, key=lambda name: tries[name].right.sum())  # where more pairs work
figure = lab.back_patching.figures.success_map(tries[place], n_layers=model.cfg.n_layers)

# %% [markdown]
# Colour is the rank of the answer's first token; a dot says that the answer is what the model says first. One of these tries
# by hand (a success if there is one, else the pair that brings the answer nearest):

# %%
best = tries[place].sort_values(["right", "rank"], ascending=[False, True]).iloc[0]
source, target = int(best.source_layer), int(best.target_layer)
print("without a patch:", repr(two_hop.greedy(model, [example.text], progress=False)[0]))
print(
    f"state after layer {source} put after layer {target}:",
    repr(patching.patch_once(model, example.text, position=where[place], source_layer=source, target_layer=target)),
)

# %% [markdown]
# **Exercise 2.** How many tries does the oracle have? Give the number of pairs (source, target) with source after target for a
# model with L layers, for *this* model.

# %% tags=["exercise"]
your_pairs = None


# %% tags=["check"]
def check_pairs(given):
    layers = model.cfg.n_layers
    if given is None:
        return print("No answer yet. For each source, how many targets come before it?")
    if given == layers**2:
        return print("That counts every pair of layers. Only targets before the source are back-patches.")
    if given == layers * (layers + 1) // 2:
        return print("That includes source = target, which changes nothing.")
    if given != layers * (layers - 1) // 2:
        return print("Not yet: add up 0 targets for source 0, 1 for source 1, ...")
    print(
        f"Yes, {given}. 'Some pair works' is the best of {given} tries: what would the best of {given} RANDOM tries give?"
    )
    return True


check_pairs(your_pairs)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_pairs(len(patching.cells(model.cfg.n_layers)))

# %% [markdown]
# ## 4. All queries, and the controls
#
# The paper reports that for up to 57 % (later version: up to 66 %) of the incorrect queries *some* pair gives the answer. It has no
# control. Here are five (with `quick = True` only *random* and *identity*), each with as many tries on the same queries, but for the identity:
#
# - **random**: a Gaussian vector of the same norm, a new one for each pair.
# - **other**: the state of a query with another bridge entity and another answer, same layer and position; one of its two relations
#   may be the same.
# - **same relation**: the state of a query with the same two relations, another bridge entity and another answer.
# - **forward**: the query's own *earlier* state put *later*. **identity**: the state itself, which must change nothing.
#
# As many tries is not as many *independent* ones: the own states are one per layer, put at different depths, while each random vector is
# new. That makes *random* a hard control for *success* (some pair works). So compare *hit_share* (the share of all pairs), too.
#
# **What do you expect** for *random*, of which the model can learn nothing about the query?
#
# - (a) Zero: noise has no answer in it.
# - (b) A little: a few lucky hits among hundreds of tries.
# - (c) As much as the own later state.

# %%
patched = results_of("patched", lambda: patching.run(model, asked, n=n_patched, conditions=conditions, seed=seed))
figure = patched.plot()

# %%
for what, rule in (("the sets", asked.parameters["rule"]), ("a patch's success", patched.parameters["rule"])):
    print(f"rule for {what}: {lab.back_patching.figures.RULES[rule][0]}")
table = patched.summary.query("set == 'incorrect'")
columns = "position condition n n_groups success low high hit_share difference diff_low diff_high p_holm"
lab.statistics.rounded(table[columns.split()])

# %%
patched.columns().query("table == 'summary'")[["column", "meaning"]]

# %% [markdown]
# **Things to notice**
#
# - Two rules are at work, both against back-patching: a query is *incorrect* when no whole word of ten tokens is its answer, and a
#   patch succeeds only when the answer is said first.
# - With fewer than about twenty bridge entities intervals are too narrow, and one without width says only that all few queries agree.
# - A claim that the later state carries the bridge needs own clearly above **other** and **same relation**.
# - Look at the rows *random* for (a) to (c). (a) is tempting because noise knows nothing; but it need not *know*: it only has to
#   disturb what the model would otherwise say ("the city of ..."), and a frequent answer may come out. An oracle over hundreds of tries
#   finds such a disturbance if there is one.
# - *hit_share* (share of all pairs that work) and *success* (some pair works) need not tell the same story. A method that one could
#   use would need the first.
# - The identity must stand at zero. If it didn't, the table would measure something else than the patch.

# %%
shares = table.query("condition in ['own', 'random']").pivot(index="position", columns="condition", values="hit_share")
for place_of, row in shares.iterrows():
    ratio = row.random / row.own if row.own else float("inf")
    print(f"{place_of}: of all pairs {row.own:.2%} work with the own later state, {row.random:.2%} with random vectors: "
          f"{ratio:.1f} times as many")  # fmt: skip

# %% [markdown]
# So an oracle that succeeds need not have found anything: where random vectors work as often, a later state is one of many ways to
# disturb what the model would have said.
#
# Do frequent answers come out more easily? The same success for rare and for frequent answers of each relation:

# %%
try:
    by_share = statistics.by_answer_share(patched.table.query("set == 'incorrect'"), seed=seed)
    by_share = by_share.query("condition in ['own', 'random', 'other', 'same_relation']")
    look = by_share[["answers", "position", "condition", "n", "success", "low", "high", "hit_share"]].round(3)
except ValueError as reason:  # few queries may all have equally frequent answers
    look = print("Nothing to tell apart:", reason)
look

# %% [markdown]
# ## 5. Without an oracle
#
# To use back-patching one would have to fix the pair beforehand. So: choose the best pair on queries of some bridge entities, apply it to
# the queries of others; the correct queries are in, too, because a patch can also break what worked.

# %%
rows = []
for position in patched.parameters["positions"]:
    fixed = patching.fixed_pair(patched, position, folds=2 if quick else 5, seed=seed)
    for measure in ("plain", "fixed", "gain", "naive_gain"):
        rows.append({"position": position, "measure": measure, **fixed.summary.loc[measure].round(3)})
    print(f"{position}: {fixed.wrong_to_right} repaired, {fixed.right_to_wrong} broken, of {len(fixed.examples)}")
pd.DataFrame(rows)

# %% [markdown]
# *gain* is what a fixed pair gives on unseen bridge entities; *naive_gain* is that of the pair that was best on the very queries it is
# reported on. The distance between the two is what choosing and reporting on the same data would add.
#
# And other ways to the answer, on the same queries: ask the first hop, put the model's own answer into the second (**explicit**); put
# the right bridge there (**oracle**); put another query's bridge there (**other**, the control).

# %%
ways = results_of(
    "ways", lambda: patching.compare_methods(model, asked, patched, folds=2 if quick else 5, seed=seed)
).table
figure = lab.back_patching.figures.methods(ways)

# %%
ways.round(2)

# %% [markdown]
# **Things to notice.** *Explicit* and *oracle* are high here by construction: the queries were chosen because the model knows both hops
# (by a laxer rule than the one here, so they need not reach 1). Not by construction is where one fixed back-patch comes to stand, which
# costs about as many tokens as the explicit way. On queries that were *not* chosen, under the same rule:

# %%
some = asked.tables["queries"].example.head(16 if quick else 200).tolist()
rule = patched.parameters["rule"]
all_ways = results_of(
    "all_ways", lambda: two_hop.decomposition(model, asked, examples=some, rule=rule, seed=seed)
).table
print(f"rule of both tables: {lab.back_patching.figures.RULES[patched.parameters['rule']][0]}")
two_hop.shares_of_ways(all_ways, seed=seed).round(2)

# %% [markdown]
# *other* says how often the second relation alone gives the answer away.
#
# One more use: a search that may check the answer. In which order should one try the pairs?

# %%
try:
    cost = pd.concat(
        [
            patching.search_cost(patched, p, folds=2 if quick else 5, seed=seed).assign(position=p)
            for p in patched.parameters["positions"]
        ]
    )
    look = cost[
        ["position", "order", "n", "tries", "low", "high", "difference", "diff_low", "diff_high", "all_tries"]
    ].round(1)
except ValueError as reason:  # in a small run there may be nothing to find
    look = print("No search to compare:", reason)
look

# %% [markdown]
# ## 6. Where are the hops?
#
# Ask the states themselves: put the state of t1 (or t2) into a prompt that asks for a description ("Syria: Syria is a country in the
# Middle East, ..., x") and read which entity the model describes. And cut the attention from t2 to the entity in seven
# neighbouring layers: where does the next word change?

# %%
targets = range(0, model.cfg.n_layers, 15 if quick else 3)
stages = results_of("stages", lambda: hop_stages.run(model, asked, n=n_stages, target_layers=targets, seed=seed))
figure = stages.plot()

# %%
described = hop_stages.against_decoys(stages.tables["descriptions"], seed=seed)
described.round(2)

# %% [markdown]
# *decoy* is the control: the bridge (for e3: the answer) of another query, of the same type, which a description may name by chance.
# Only a *difference* clearly above zero says that a state describes its own.
#
# A description counts here when it says the name first. The published rule wants `": name"` and then a blank, comma, stop or colon, or
# `"name: "`, anywhere in ten tokens, tried for e1, then e2, then e3. Either rule can count what the other doesn't, and all ten tokens
# take about five times as long, so here on a few queries and target layers: queries and pairs of layers that name each, by both rules.

# %%
few_targets = range(0, model.cfg.n_layers, 15)
both_rules = results_of(
    "both_rules",
    lambda: hop_stages.run(
        model, asked, n=max(2, n_stages // 4), target_layers=few_targets, seed=seed, published_rule=True
    ),
)
keys, counted = ["example", "position", "names"], ["resolved", "cells"]
counts = both_rules.tables["published_descriptions"].merge(
    both_rules.tables["descriptions"][keys + counted], on=keys, suffixes=("_published", "_ours")
)
counts = counts.groupby(["position", "names"])[
    ["resolved_published", "resolved_ours", "cells_published", "cells_ours", "both"]
].sum()
counts["cells_differ"] = counts.cells_published + counts.cells_ours - 2 * counts.both
print(f"{len(both_rules.tables['queries'])} queries, {model.cfg.n_layers * 2} pairs of layers each")
counts

# %% [markdown]
# Two rows of the figure ask whether t2 must see the entity. *Ours* cuts attention to all of e1 and looks at the next word. The *published*
# one cuts attention to t1 alone, in the prompt only; it counts when the ten tokens differ and the two texts don't both hold the answer. The
# paper's stage "Info Propagation" is the mean of the first layers of up to three things: that cut; attention's output at t2 with the bridge on
# top; the bridge described at t2. A name's first token counts there in lower case and without a space, too (`published_projections`).

# %%
moved = hop_stages.info_propagation(stages)
moved.groupby("set")[["cut", "projected", "described", "layer"]].agg(["count", "median"])

# %%
tops = pd.concat(
    {"ours": stages.tables["projections"], "published": stages.tables["published_projections"]}, names=["first tokens"]
)
tops = tops.query("what != 'prediction'").assign(top=lambda rows: rows["rank"] == 0)
tops.groupby(["site", "what", "first tokens"]).top.agg(["sum", "size"])  # layers with the name on top, of all queries

# %% [markdown]
# The cut of attention has a control, too: as many tokens as e1 has, right before it. The lines show the next word, so for t1, too, they are
# our judgement.

# %%
cut = stages.tables["knockout"].groupby(["keys", "layer"]).changed.mean().unstack("keys")
with lab.figures.classroom():
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for name, color, dash in (
        ("e1", lab.figures.BLUE, "-"),
        ("t1", lab.figures.ORANGE, "--"),
        ("other", lab.figures.BLACK, ":"),
    ):
        ax.plot(
            cut.index,
            cut[name],
            color=color,
            ls=dash,
            label={"e1": "all of e1", "t1": "t1 only", "other": "as many tokens before e1"}[name],
        )
    ax.set(
        xlabel="middle of the seven layers in which attention is cut",
        ylabel="share whose next word changes",
        ylim=(-0.03, 1.03),
    )
    ax.legend()
    ax.grid(alpha=0.25)

# %% [markdown]
# **Exercise 3.** At which middle layer does cutting attention to e1 change most, *over and above* the control? Use the table `cut`.

# %% tags=["exercise"]
your_layer = None


# %% tags=["check"]
def check_layer(given):
    gap = cut.e1 - cut.other
    if given is None:
        return print("No answer yet. Subtract the column `other` from `e1` and look for the largest difference.")
    if given not in gap.index:
        return print(f"A layer is a whole number from 0 to {model.cfg.n_layers - 1}.")
    if gap[given] < gap.max() - 1e-9:
        best_of_e1 = cut.e1[given] >= cut.e1.max() - 1e-9
        return print(
            "There e1 is largest, but so may be the control."
            if best_of_e1
            else f"There the difference is {gap[given]:.2f}; somewhere it is larger."
        )
    print(f"Yes: {cut.e1[given]:.2f} against {cut.other[given]:.2f} for the control. It is the largest of {len(cut)} differences, "
          "chosen by looking: section 7 takes the middle layer, which is chosen beforehand.")  # fmt: skip
    return True


check_layer(your_layer)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_layer(int((cut.e1 - cut.other).idxmax()))

# %% [markdown]
# The taxonomy once more, now as if the model stopped at each depth (a prompt counts when the lens's top word begins its answer;
# a query is left out where an answer begins with a token that says nothing of it, as a lone space before a number does):

# %%
by_depth = results_of("by_depth", lambda: two_hop.taxonomy_by_depth(model, asked, examples=some, seed=seed)).table
figure = lab.back_patching.figures.taxonomy_by_depth(by_depth)

# %% [markdown]
# ## 7. Published numbers beside ours
#
# The verdicts are computed, by rules that stand before the numbers: a claim *holds* (*agrees*) when the whole interval is where it
# says, *does not hold* (*differs*) when the whole interval is on the other side, and is *undecided* in between or with fewer than
# eight queries. Layers are chosen beforehand (the middle one, the first half), not for their result.

# %%
from lab.statistics import cluster_bootstrap

LEAST = 8  # queries, for a verdict


def judged(interval, n, above, below=float("inf"), words=("holds", "does not hold")):
    """A verdict from (estimate, low, high): is the interval inside `above` .. `below`, outside, or neither?"""
    _, low, high = map(float, interval)
    if n < LEAST:
        return f"undecided (n = {n})"
    return words[0] if above < low and high < below else words[1] if high < above or low > below else "undecided"


def mean_of(values, groups):
    """Mean with its interval over bridge entities; (nan, nan, nan) where fewer than two entities have a value."""
    return cluster_bootstrap(values, groups, seed=seed) if len(set(groups)) > 1 else (float("nan"),) * 3


def written(interval, form="{:+.0%}"):
    return "{} [{}, {}]".format(*(form.format(float(x)) for x in interval))


# %%
rows = []
oracle = patched.summary.query("set == 'incorrect'")
for row in oracle.query("condition == 'own'").itertuples():
    share = (row.success, row.low, row.high)
    rows.append((f"some back-patch at {row.position} rescues an incorrect query", "32 to 66 % over models; abstract: up to 57 % (v1), 66 % (v2)",
                 written(share, "{:.0%}"), judged(share, row.n, 0.32, 0.66, ("agrees", "differs")), "an oracle over all pairs; our rule is stricter"))  # fmt: skip
for row in oracle.query("condition in ['random', 'other', 'same_relation']").itertuples():
    gap = (row.difference, row.diff_low, row.diff_high)
    rows.append((f"... at {row.position} more than by chance: {row.condition}", "no control", written(gap), judged(gap, row.n, 0),
                 f"own minus control; p = {row.p_holm:.2f} (Holm)"))  # fmt: skip
results_of.judged(pd.DataFrame(rows, columns=["claim", "published", "ours", "verdict", "bear in mind"]))

# %%
rows, published = [], {"e2": "yes, in early layers", "e3": "yes, in later layers"}
for row in described.query("(position == 't1' and names == 'e2') or (position == 't2' and names == 'e3')").itertuples():
    gap, what = (row.difference, row.diff_low, row.diff_high), {"e2": "bridge", "e3": "answer"}[row.names]
    rows.append((f"the state at {row.position} describes the {what}", published[row.names], written(gap), judged(gap, row.n, 0),
                 f"share {row.share:.0%} minus decoy {row.decoy:.0%}; greedy instead of three samples, few target layers"))  # fmt: skip
described_at = stages.tables["descriptions"].query("resolved and position == 't1' and names == 'e2'")
half = mean_of(described_at.first_source_layer.to_numpy(float) / model.cfg.n_layers, described_at.group.to_numpy(str))
rows.append(("the bridge is described early: in the first half", "in early layers", written(half, "{:.0%}"),
             judged(half, len(described_at), float("-inf"), 0.5), "mean first source layer, of the queries that reach it, as share of the depth"))  # fmt: skip
middle = stages.tables["knockout"].query("layer == @model.cfg.n_layers // 2")
middle = middle.pivot(index=["example", "group"], columns="keys", values="changed").dropna().astype(float)
gap = mean_of((middle.e1 - middle.other).to_numpy(), middle.index.get_level_values("group").to_numpy(str))
rows.append(("cutting attention from t2 to e1 in the middle changes the next word", "information moves from e1 to t2 (see 8.2)", written(gap), judged(gap, len(middle), 0),
             "share for e1 minus share for as many other tokens"))  # fmt: skip
order = hop_stages.answer_first(stages.tables["lens"])
groups = order.group.to_numpy(str)
share = mean_of(order.answer_first.to_numpy(float), groups)
gap = mean_of(order.answer_first.to_numpy(float) - order.bridge_first.to_numpy(float), groups)
rows.append(("the answer is in the lens's top ten before the bridge", "reported by arXiv 2601.03542", f"{written(share, '{:.0%}')}; more often than after it: {written(gap)}",
             judged(gap, len(order), 0), "first tokens, at t1 or t2; a bridge may never come up"))  # fmt: skip
results_of.judged(pd.DataFrame(rows, columns=["claim", "published", "ours", "verdict", "bear in mind"]))

# %% [markdown]
# An interval is in brackets. Where the column *published* has no number, our source (abstract, text and code) gave none that could be compared with ours.

# %% [markdown]
# ## 8. What the published code really does
#
# **8.1 Substrings.** Section 2 showed the rule. A relation template that does not end in " of {}" is cut by four characters to make the
# relation shortcut, inside a word if it so happens.
#
# **8.2 A knockout that may knock nothing out.** The published code writes the lowest number of the model's precision into a copy of the
# attention mask. That needs a mask of numbers. Which mask does the current library hand to a layer? A tiny random model, and the same
# change of the mask:

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 50}
ids, whole = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.long)
padded = whole.index_fill(1, torch.tensor([0]), 0)  # as if the first token of each were padding


def blind(module, args, kwargs):
    """The last position must not see position 3."""
    kinds.append(getattr(kwargs["attention_mask"], "dtype", None))
    mask = kwargs["attention_mask"].clone()
    mask[..., -1, 3] = torch.finfo(torch.float32).min
    return args, kwargs | {"attention_mask": mask}


rows = []
for attention in ("eager", "sdpa"):
    for batch, seen in (("no padding", whole), ("padding", padded)):
        kinds = []
        tiny = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention).eval()
        with torch.inference_mode():
            before = tiny(input_ids=ids, attention_mask=seen).logits
            for layer in tiny.model.layers:
                layer.self_attn.register_forward_pre_hook(blind, with_kwargs=True)
            try:
                effect = f"logits move by {(tiny(input_ids=ids, attention_mask=seen).logits - before).abs().max():.1g}"
            except AttributeError as error:
                effect = type(error).__name__
        rows.append((attention, batch, str(kinds[0]), effect))
pd.DataFrame(rows, columns=["attention", "batch", "mask", "with the cut"])

# %% [markdown]
# With *eager* attention it works. With *sdpa*, the library's default, an absent mask stops the published code with an `AttributeError`
# (it asks for the mask's `dtype`). In a padded batch the mask is one of booleans, where any number but zero means "may be seen": the result
# is silently the unchanged model. Ours writes into the attention scores, and a test requires an effect. Here, too:

# %%
hop = f"The capital of {e2} is"
word = patching.places(model, hop, e2)["t1"]
effect = hop_stages.knockout(model, hop, [word], window=model.cfg.n_layers)  # a window over all layers
for cut_in, row in (("no layer", effect.iloc[0]), ("all layers", effect.iloc[1])):
    print(f"{hop} ... with attention to {e2} cut in {cut_in}:", repr(model.tokenizer.decode([int(row.token)])))

# %% [markdown]
# **8.3 A generation for every pair.** The published path generates ten tokens for all L² pairs and throws away the half that is no
# back-patch. But a patch at position *t* leaves all earlier positions and all earlier layers as they were. So here one clean run
# serves all pairs, each is a row of one batch, and a row joins it at its own layer (`lab.runs`). The same successes, in seconds.
# How much faster depends on the rule of success. On 20 queries with the default model `tests/benchmarks/benchmark_back_patching.py` gave a
# ratio of 294 under the rule *leading* of section 4, where a try that is decided needs no more tokens, and of 54 under *word*, where
# every try is decoded to its end. Against the published path with 20 queries in a batch the ratios are 38 and 7 (two threads; the
# published paths timed on a sample of pairs and scaled).

# %% [markdown]
# ## 9. Explore
#
# Choose a query or type your own; choose t1 or t2; move source and target; read what the model says with that patch.

# %%
from lab.back_patching.explorer import back_patching_explorer


def sweep_one(text, entity, names, place):
    position = patching.places(model, text, entity)[place]
    return patching.sweep(model, text, names, positions=[position])


def generate_one(text, entity, place, source_layer, target_layer):
    position = patching.places(model, text, entity)[place]
    return patching.patch_once(model, text, position=position, source_layer=source_layer, target_layer=target_layer)


def lens_one(text, entity, bridge_names, answer_names):
    names = {"e2": bridge_names, "e3": answer_names}
    return hop_stages.lens(model, text, patching.places(model, text, entity), {k: v for k, v in names.items() if v})


swept = {(example.text, name): table for name, table in tries.items()}
back_patching_explorer(incorrect, sweep_one, generate=generate_one, lens=lens_one, swept=swept)

# %% [markdown]
# The explorer's first view as a fixed picture, for paper and for pages without widgets:

# %%
figure = lab.back_patching.figures.success_map(tries["t1"], n_layers=model.cfg.n_layers)

# %% [markdown]
# ## What this does and does not show
#
# - That *some* patch brings out the answer does not show that the state carried it. The controls say how often that happens anyway.
# - A description that names the bridge shows that the state *can be made* to name it. Compare with the decoy.
# - One draw of a decoy and of other tokens for each query; a verdict *undecided* asks for more queries, not for another reading.
# - The sets are made from what this model says to these prompts. Another wording makes other sets, and a small model knows few hops.
# - One draw of each control per query (`draws=` takes more). Intervals are over bridge entities, because queries that share one are not
#   independent.
# - The offline models come from 4-bit files that were read back to float32. For full-precision weights, give a hub name.

# %%
import os
from pathlib import Path

folder = Path(os.environ.get("LAB_OUT", "depth-lab-out")) / "back_patching"
patched.save(folder)
again = lab.Result.load(folder)
print(
    f"{len(again.table)} rows and {len(again.tables['hits'])} hits in {folder.name}, made with {again.parameters['versions']}"
)
