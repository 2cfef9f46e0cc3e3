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
# # Concept depth: at which layer does a fact, a feeling, an inference become readable?
#
# **Paper.** Jin et al., "Exploring Concept Depth: How Large Language Models Acquire Knowledge and Concept at Different
# Layers?", COLING 2025, [arXiv 2404.07066](https://arxiv.org/abs/2404.07066). We repeat its experiment on a model that
# runs on a laptop, put the published numbers beside ours, and add what the paper lacks: controls, nulls and intervals.
#
# **You need** lessons 0 and 1 (states, hooks, probes, the split by group).
#
# **It takes** less than a minute to open: its results come with the kit. `recompute = True` measures them anew (about nine
# minutes on two processor cores, 3 GB of memory, no network once the default model is on this machine). `quick = True` is a
# smoke test with a few statements, and says so over every figure.

# %% tags=["parameters"]
model_name = "smollm2-135m"
second_model = None  # for example "gemma3-270m": compared with the first in section 7
accept_license = False  # Gemma has terms of its own: see the README
seed = 0
n = 600  # statements of each data set in sections 4 to 7
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with few statements and data sets

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import lab
from lab.concept_depth import accuracy
from lab.shipped import Results

pd.options.display.max_colwidth = 160  # sentences in tables, whole
results_of = Results(
    "01_concept_depth",
    recompute=recompute,
    quick=quick,
    model_name=model_name,
    second_model=second_model,
    seed=seed,
    n=n,
)
n = 160 if quick else n
model = lab.load(model_name, accept_license=accept_license)
health = lab.check(model)
assert health.ok.all(), "a check failed: look at the table before you trust a number"
health

# %% [markdown]
# ## 1. One fact
#
# Statements such as "The city of Lyon is in France." (true) and "The city of Lyon is in Peru." (false). After every
# block, a **linear probe** (logistic regression) tries to tell them apart from the state of the last token. It learns on
# 60 % of the cities and is tested on the other 40 %, ten times over.
#
# **What do you expect?** The model has 30 blocks (if you kept the default). Where does the curve leave one half?
#
# - (a) At once, in the first three blocks: "France" is right there, one token back.
# - (b) About a third of the way.
# - (c) In the last blocks, where the next word is chosen.

# %%
look = results_of(
    "look",
    lambda: accuracy.run(
        model, "cities", limit=n if quick else 320, repeats=5, sites=("resid",), null=False, seed=seed
    ),
)
figure = look.plot()

# %% [markdown]
# That was a first look, at some of the cities. Now all of them, with ten splits
# instead of five, both readings of the state (ours, and the paper's: what the MLP reads), and the same model with random
# weights.

# %%
cities = results_of("cities", lambda: accuracy.run(model, "cities", limit=n if quick else None, seed=seed))
figure = cities.plot()

# %% [markdown]
# **Things to notice**
#
# - (b) is what happens. (a) is tempting because the words are near; but the probe must know whether *this* country goes
#   with *that* city, and that takes a look-up. (c) is tempting because we are used to thinking of layers as a queue that
#   ends in an answer. Reading is not saying.
# - *What the probe must beat.* The **majority** (always say the more frequent label) and a **bag of words** (the same
#   classifier on word counts) are flat lines. They are at one half by construction: in this data set each city and each
#   country occurs as often in a true as in a false statement.
# - *Two nulls.* With **shuffled labels** the probe finds nothing on new cities. With **random weights** the same
#   architecture carries nothing either: what is read was learnt in training, and does
#   not come free with many dimensions.
# - *Bands* are 95 % intervals over splits, with the correction for splits that share data (Nadeau and Bengio 2003). They
#   cover how these statements fall into training and test, not other statements. The null is one random initialisation.
# - With the default model there is a small step to about 0.55 before the jump. Compare it with the shuffled labels' band
#   before you make anything of it.
# - The three markers at the bottom are the subject of the next section.

# %% [markdown]
# ## 2. From a curve to a number
#
# The paper sums a curve up in two numbers. With accuracy a(i) at layer i of d:
#
# - **jump point**: the first i/d with a(i) / a(i - 1) at least 1.1;
# - **converging point**: the first i/d after the last change by 3 % or more.
#
# Toy numbers first, which you can check by hand:

# %%
toy = np.array([0.50, 0.51, 0.60, 0.80, 0.90, 0.91, 0.90, 0.91])
print(
    "jump point      ", lab.statistics.jump_point(toy), "= layer 3 of 8: 0.60 / 0.51 is the first ratio of 1.1 or more"
)
print("converging point", lab.statistics.converging_point(toy), "= layer 6 of 8: the last big change is into layer 5")

# %% [markdown]
# **Exercise 1.** Change one value of the toy curve by at most 0.03 so that the converging point becomes 1.0. Give the
# position in the array (0 to 7) and the new value. There is more than one way.

# %% tags=["exercise"]
your_change = None  # for example (2, 0.63)


# %% tags=["check"]
def check_change(change):
    if change is None:
        return print("No answer yet: put (position, value) into your_change.")
    if not (isinstance(change, tuple | list) and len(change) == 2):
        return print("Two numbers in brackets, please: (position, value).")
    position, value = change
    if position not in range(8):
        return print("The toy curve has positions 0 to 7.")
    if abs(value - toy[position]) > 0.0300001:
        return print(f"That moves the curve by {abs(value - toy[position]):.3f}; at most 0.03 is allowed.")
    changed = toy.copy()
    changed[position] = value
    point = lab.statistics.converging_point(changed)
    if point < 1:
        return print(f"The converging point is {point}. It looks for the LAST change by 3 %: where must that be?")
    print("Yes: a change near the end that no eye would notice moves the number to the end of the model.")
    return True


check_change(your_change)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_change((7, 0.93))

# %% [markdown]
# So we put two numbers beside these. The **onset** is the first depth from which on accuracy stays above what shuffled labels
# reach by chance: where reading *begins*. The **readable depth** is the first depth whose accuracy is within one standard
# error of the peak: where the *plateau* begins. And every number gets an interval: the cities are drawn again and again with replacement (whole
# groups of statements, because statements about one city are not independent), and the number is computed anew.

# %%
points = cities.tables["points"].query("site == 'resid' and weights == 'trained'").set_index("point")
points.loc[
    ["onset", "readable_depth", "jump_point", "converging_point"], ["estimate", "low", "high", "n_groups"]
].round(2)

# %% [markdown]
# Read the widths: the ones to quote are those that stay where they are when the cities change. With the default model the
# converging point's interval may reach to the end of the model. (The probes are not fitted again
# in these draws, so the intervals say which cities were tested, not which were learnt from.) And the height of the curve: the maximum over depths is
# too high, because chance helps to choose it. Chosen on one half of the cities and read on the other, it is a little lower:

# %%
points.loc[["peak_naive", "peak_crossfit"], ["estimate"]].rename(columns={"estimate": "accuracy"}).round(3)

# %% [markdown]
# ## 3. Which statements? Easy and hard cities
#
# The data set's difficulty levels are sizes of city. **What do you expect**: does a city that is seldom written about
# become readable *later*, or just *less*?

# %%
per_statement = (
    cities.tables["examples"]
    .query("site == 'resid'")
    .merge(cities.tables["statements"][["example", "difficulty", "template"]], on="example")
)
names = {1: "over a million", 2: "300,000 to a million", 3: "100,000 to 300,000"}
with lab.figures.classroom():
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    looks = [(lab.figures.BLUE, "-"), (lab.figures.ORANGE, "--"), (lab.figures.GREEN, "-."), (lab.figures.RED, ":")]
    for ax, by in zip(axes, ("difficulty", "template"), strict=True):
        for (level, rows), (color, dash) in zip(per_statement.groupby(by), looks, strict=False):
            ax.plot(rows.groupby("depth").share_right.mean(), color=color, ls=dash, label=names.get(level, level))
        ax.axhline(0.5, color=lab.figures.BLACK, lw=1, ls=":")
        ax.set(xlabel="depth", title={"difficulty": "inhabitants of the city", "template": "wording"}[by])
        ax.legend(loc="upper left")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy on unseen cities")

# %% [markdown]
# **Things to notice.** On the left, smaller cities are read less well; whether also later, these curves are too noisy to say.
# On the right is the larger effect: the headline curve is a mean over four wordings, and with the default model one of
# them stays near chance while another is far above the mean. One probe has to serve them all. A curve on a single wording,
# as in the published work, hides this. The next cell puts intervals on it, at the readable depth.

# %%
depth = round(points.loc["readable_depth", "estimate"] * model.cfg.n_layers)
rows = []
for wording, part in per_statement.query("depth == @depth").groupby("template"):
    mean, low, high = lab.statistics.cluster_bootstrap(part.share_right.to_numpy(), part.group.to_numpy(str), seed=seed)
    rows.append({"wording": wording, "accuracy": mean, "low": low, "high": high, "statements": len(part)})
pd.DataFrame(rows).round(2)

# %% [markdown]
# These are means of single statements at one depth, resampled by group.

# %% [markdown]
# ## 4. Facts, feelings, inferences
#
# The paper's main claim is an order: simple concepts become readable in shallow layers, complex ones deeper. These data
# sets come with the kit, at three levels:

# %%
chosen = ["cities", "reviews", "coin_flips"] if quick else [name for name in lab.datasets.names() if "/" not in name]
cards = [lab.datasets.load(name).attrs["card"] for name in chosen]
pd.DataFrame(cards)[["domain", "name", "n", "groups", "classes", "licence"]].sort_values(["domain", "name"])

# %%
for name in chosen:
    frame = lab.datasets.load(name)
    pair = frame[frame.group == frame.group.iloc[0]].groupby("label").text.first()
    print(f"{name:16} 1: {pair.get(1, '(in another group)')}\n{'':16} 0: {pair.get(0, '(in another group)')}")

# %% [markdown]
# **What do you expect?** Write down an order before you run the next cell (it takes the longest in this notebook): which
# becomes readable first, which last, which not at all in a model of this size?

# %%
results = {
    name: results_of(
        f"sets/{name}", lambda name=name: accuracy.run(model, name, limit=n, sites=("resid",), null=False, seed=seed)
    )
    for name in chosen
}
figure = lab.concept_depth.figures.concept_curves(list(results.values()))


# %%
def overview(result):
    points = result.tables["points"].query("site == 'resid' and weights == 'trained'").set_index("point")
    baseline = result.summary.query("probe == 'bag_of_words' and metric == 'accuracy'")["mean"].item()

    def depth(point):
        found = points.loc[point]
        return f"{found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})" if clear and found.estimate >= 0 else ""

    rows = result.summary.query("site == 'resid' and metric == 'accuracy' and labels == 'shuffled'")
    clear = points.loc["peak_crossfit", "estimate"] > rows.high.mean()  # above what shuffled labels reach by chance
    return {
        "data set": result.parameters["dataset"],
        "statements": result.parameters["n_examples"],
        "bag of words": round(baseline, 2),
        "peak (other groups)": round(points.loc["peak_crossfit", "estimate"], 2),
        "above the control": "yes" if clear else "no",
        "onset": depth("onset"),
        "readable depth": depth("readable_depth"),
        "jump point": round(points.loc["jump_point", "estimate"], 2),
        "converging point": round(points.loc["converging_point", "estimate"], 2),
    }


pd.DataFrame([overview(result) for result in results.values()]).sort_values("onset")

# %% [markdown]
# **Things to notice**
#
# - Look at the height before the depth. A set whose peak does not clear the control has no onset and no readable depth, so
#   none is shown. Read the onset first: feelings and facts begin early or late by it. The readable depth comes late for a curve that
#   rises slowly to the end, however early it began. The published numbers have no such rule: look at the jump and converging points of those rows. A flat curve
#   "converges" at once, or at its last wiggle.
# - *Sentiment words* is the easy set: one word decides, and no word of the test set was in the training set. A bag of words
#   is at chance there by construction, so what is read is a meaning that different words share.
# - *Reviews* are pairs of nearly the same words with opposite verdicts, so words alone say nothing. Compare depth and height.
# - *Coin flips* and *comparisons*: with the default model nothing is readable, at no depth. *Syllogisms* are, late. (Their
#   card names a flaw to keep in mind.)
# - So is the paper's order there? Compare the onsets and their intervals, not the points, and say which sets are never readable in a
#   model of this size.

# %% [markdown]
# **Exercise 2.** *Selectivity* is accuracy on the task minus accuracy on shuffled labels (Hewitt and Liang 2019). Give the
# selectivity of `cities` at the middle depth of this model, to two digits, from `cities.summary`.

# %% tags=["exercise"]
your_selectivity = None


# %% tags=["check"]
def check_selectivity(answer):
    rows = cities.summary.query("site == 'resid' and weights == 'trained' and metric == 'accuracy'")
    middle = rows[rows.depth == model.cfg.n_layers // 2].set_index("labels")["mean"]
    right = lab.statistics.selectivity(np.array([middle["task"]]), np.array([middle["shuffled"]])).item()
    if answer is None:
        return print("No answer yet. The columns you need are site, weights, metric, depth, labels and mean.")
    if abs(answer - middle["task"]) < 0.006:
        return print(
            "That is the accuracy itself. What does the probe reach when there is nothing to find? Subtract that."
        )
    if abs(answer - (middle["task"] - 0.5)) < 0.002 and abs(right - answer) > 0.006:
        return print("You subtracted one half. The control is measured, too: take its value at this depth.")
    if abs(answer - right) > 0.006:
        return print(
            "Not yet. Take metric == 'accuracy' at depth n_layers // 2, weights == 'trained', site == 'resid'."
        )
    print(f"Yes: {middle['task']:.3f} - {middle['shuffled']:.3f} = {right:.3f}.")
    return True


check_selectivity(your_selectivity)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
rows = cities.summary.query("site == 'resid' and weights == 'trained' and metric == 'accuracy'")
task, shuffled = (
    rows.query(f"depth == {model.cfg.n_layers // 2} and labels == '{kind}'")["mean"].item()
    for kind in ("task", "shuffled")
)
assert check_selectivity(task - shuffled)

# %% [markdown]
# ## 5. Noise, and weights with fewer bits
#
# The paper glues the letters "aaa" or "bbb" in front of each text, and loads the models with 8-bit weights. Both are
# arguments here. Bits are rounded to nearest, in groups of 64 weights. (The offline SmolLM2 comes from a 4-bit file with
# groups of 32: with just those settings nothing would change.)
#
# **What do you expect?**
#
# - (a) Fewer bits lower the whole curve a little, step by step.
# - (b) Nothing happens down to some number of bits, and then it breaks.
# - (c) Noise in front moves the jump deeper: the model has to get past it first.

# %%
conditions = [{"bits": None}, {"bits": 4}, {"bits": 2}] if quick else [{"bits": b} for b in (None, 8, 4, 3, 2)]
common = {"limit": n, "sites": ("resid",), "null": False, "seed": seed}
quantised = [
    results_of(f"bits/{c['bits']}", lambda c=c: accuracy.run(model, "cities", **common, **c)) for c in conditions
]
figure = lab.concept_depth.figures.concept_curves(quantised, by="bits")

# %%
noisy = results_of("noise", lambda: accuracy.run(model, "cities", **common, noise=True))
figure = lab.concept_depth.figures.concept_curves([quantised[0], noisy], by="noise")

# %% [markdown]
# Two curves with overlapping bands may still differ: they are about the same statements, so the difference can be
# *paired*. Each city is its own control.

# %%
change = accuracy.compare(noisy, quantised[0], seed=seed)
figure = lab.concept_depth.figures.difference(change, a="with noise", b="without")

# %% [markdown]
# **Things to notice.**
#
# - *Bits*: (b). Rounding errors add up slowly and hurt suddenly. (a) is tempting because the number of levels falls step by step.
# - *Noise*: the difference is paired, so its interval is narrower than the two bands suggest. Where it leaves zero, noise costs
#   something at that depth. (c) would show as a dip at the jump and none later. It holds for each depth by itself: with
#   this many depths, one or two may leave zero by chance.

# %% [markdown]
# ## 6. Published numbers beside ours
#
# Curves recovered from the paper's figures, for models of 7 billion parameters:

# %%
published = lab.datasets.published_curves()
figure = lab.concept_depth.figures.published_curves(published)

# %%
theirs = lab.datasets.published_points()


def ours(result, point, site="resid"):
    rows = result.tables["points"].query(f"site == '{site}' and weights == 'trained' and point == '{point}'")
    return rows.iloc[0]


def span(values):
    return f"{min(values):.2f} to {max(values):.2f}"


facts = theirs.query("dataset == 'Cities'")
facts.assign(**{"converging point": facts.converging_point.round(2)}).drop(columns="converging_point")

# %% [markdown]
# And the verdicts, computed from the tables of this notebook. *Published* is the span over the paper's six models that
# could be recovered; intervals are ours.

# %%
point, height = ours(cities, "converging_point", "mlp_in"), ours(cities, "peak_crossfit", "mlp_in").estimate
best = cities.summary.query("site == 'mlp_in' and weights == 'trained' and labels == 'task' and metric == 'accuracy'")
found = best.low.max() > 0.5
inside = point.low <= facts.converging_point.median() <= point.high
flips = theirs.query("dataset == 'Coinflip'")
flips_read = ours(results["coin_flips"], "peak_crossfit").estimate > 0.55
bits = accuracy.compare(quantised[1], quantised[0], seed=seed)
off = ((bits.low > 0) | (bits.high < 0)).mean()
verdicts = [
    ("truth of a city statement is readable at some depth", "yes, in all models", f"{found}, at 135 million parameters"
     if model_name == "smollm2-135m" else str(found), "agrees" if found else "differs", "the reading is the paper's"),
    ("peak accuracy, cities", span(facts.peak), f"{height:.2f}", "not comparable",
     "other size of model; our cities are rarer, in four wordings, and no name says anything"),
    ("converging point, cities", span(facts.converging_point), f"{point.estimate:.2f} ({point.low:.2f} to {point.high:.2f})",
     "agrees" if inside else "differs", "is the published median in our interval? Look how wide it is"),
    ("coin flips: peak", span(flips.peak), f"{ours(results['coin_flips'], 'peak_crossfit').estimate:.2f}",
     "agrees" if flips_read else "differs", "theirs count flips in one wording; ours ask for heads and for tails, which cancels shortcuts"),
    ("coin flips converge after cities", f"{span(flips.converging_point)}, cities {span(facts.converging_point)}",
     "readable" if flips_read else "never readable", "agrees" if flips_read else "not comparable", "no depth without a height"),
    ("fewer bits change little", "8 bits: yes", f"{conditions[1]['bits']} bits: at most {bits.difference.abs().max():.2f}, "
     f"interval off zero at {off:.0%} of depths", "not comparable", "theirs: another 8-bit format, from full precision; ours: from 4 bits"),
]  # fmt: skip
columns = ["question", "published", "ours", "verdict", "why, or what to bear in mind"]
results_of.judged(pd.DataFrame(verdicts, columns=columns))

# %% [markdown]
# With the published Cities file (it has no licence, so it does not come with the kit; `lab.datasets.load("published/cities")`
# fetches it from the authors) the same code gives a higher curve. Try it: it is one line, `accuracy.run(model, "published/cities")`.

# %% [markdown]
# ## 7. Two models on one axis
#
# Depth as a fraction makes models of different size comparable, statement by statement. With `second_model = None` the
# second "model" is the first one with 3-bit weights.
#
# **What do you expect**: a difference everywhere, or only from the jump on?

# %%
if second_model:
    second = lab.load(second_model, accept_license=accept_license)
    print(lab.check(second).to_string())
    other = results_of("second", lambda: accuracy.run(second, "cities", **common))
    label, by = second_model, "model"
else:
    other = results_of("second", lambda: accuracy.run(model, "cities", **common, bits=3))
    label, by = f"{model_name}, 3 bits", "bits"
lab.concept_depth.figures.concept_curves([quantised[0], other], by=by)
figure = lab.concept_depth.figures.difference(accuracy.compare(other, quantised[0], seed=seed), a=label, b=model_name)

# %% [markdown]
# **Things to notice.** Before the jump there is nothing to lose: both are at chance. A difference there would be noise, so
# the part left of the jump shows how large noise gets.

# %% [markdown]
# ## 8. What the published code really does
#
# Reading code is part of reading a paper. All of this was found in the authors' repository or in their plotted values.
#
# **8.1 A majority rate that looks like understanding.** Eight of nine published curves on CommonClaim were tested on items of
# which 74.3 % have one label. A classifier that always says that label is right 74.3 % of the time at every layer:

# %%
claims = theirs.query("dataset == 'Common'")[["model", "peak", "converge_layer", "layers"]]
claims.assign(**{"peak minus majority rate": claims.peak - 0.743}).round(3)

# %% [markdown]
# "Converges in the third layer" then means: no change of 3 % anywhere, and at most two or three points above the majority.
#
# **8.2 One late wiggle.** This published curve is flat from layer 5 on. Its converging point:

# %%
flat = published.query("model == 'LLaMA-7B' and dataset == 'HateEval'").accuracy.to_numpy()
print("published curve:                 ", lab.statistics.converging_point(flat))
print("without its very last layer:     ", round(lab.statistics.converging_point(flat[:-1]), 2))
print(
    "largest change after layer 5:    ",
    round(np.abs(flat[5:] / flat[4:-1] - 1).max(), 3),
    "(the rule's threshold is 0.03)",
)

# %% [markdown]
# **8.3 Few test items.** Every plotted accuracy is a whole number of right answers over the number of items, so the number
# of items can be read off. For Gemma-7B on Cities all values are whole hundredths:

# %%
gemma = published.query("model == 'Gemma-7B' and dataset == 'Cities'").accuracy
llama = published.query("model == 'LLaMA-7B' and dataset == 'Cities'").accuracy
for name, curve in (("Gemma-7B", gemma), ("LLaMA-7B", llama)):
    items = next(m for m in range(50, 1000) if np.allclose(curve * m, np.round(curve * m), atol=m * 6e-6))
    half = 1.96 * np.sqrt(0.95 * 0.05 / items)
    print(f"{name}: {items} tested statements (or a multiple); half width of a 95 % interval at 0.95: {half:.3f}")

# %% [markdown]
# **8.4 Twins on both sides.** The published split is random over statements, 60 to 40. Each city stands in a true and in a
# false one, so 60 % of the tested statements have their twin in the training set.
#
# **What do you expect** at depths where nothing about truth can be read yet: accuracy above one half, at, or *below*?

# %%
single = lab.datasets.load("cities").assign(group=lambda frame: frame.example)  # each statement its own group
single.attrs["card"] = {**lab.datasets.load("cities").attrs["card"], "name": "cities, twins split"}
pairs = cities.tables["statements"].example
single = single[single.example.isin(set(pairs))].reset_index(drop=True)
split_twins = results_of("split_twins", lambda: accuracy.run(model, single, sites=("resid",), null=False, seed=seed))
figure = lab.concept_depth.figures.concept_curves([cities, split_twins])

# %% [markdown]
# **Things to notice.** Where the states say *which* city and country but not whether they belong together, the probe learns
# "this city: true" from the twin in the training set, and is wrong about the other. That is a likely reason why some
# published curves run below one half:

# %%
published.groupby(["model", "dataset"]).accuracy.agg(["first", "min"]).query("min < 0.48").round(2)

# %% [markdown]
# Where truth can be read, the two pull against each other, and with our data the curve stays too low. An accuracy clearly
# below chance is usually a message about the split.
#
#
# **8.5 More.** The published `main.py` overwrites every data set's instruction by the one for sentiment. The input for
# StrategyQA contains the reasons for the right answer. Class numbers follow the order of reading, so F1 is often that of
# *false*. There is no baseline, control or interval. And the published probe may take 100 steps and no more (`solver="sklearn"`
# does that here); ours is solved to the end. Is 100 too few? Count the probes that were still under way at step 100, for both readings:

# %%
import warnings

import sklearn
from sklearn.linear_model import LogisticRegression

from lab.states import collect_states

some = lab.datasets.load("cities").head(n)
train = np.random.default_rng(seed).random(len(some)) < 0.6
print(f"scikit-learn {sklearn.__version__}, {len(some)} statements")
for site, states in collect_states(model, some.text.tolist(), sites=accuracy.SITES, progress=False).items():
    with warnings.catch_warnings(record=True):  # it warns at each probe that we count
        fits = [LogisticRegression().fit(x[train], some.label[train]) for x in states.values.transpose(1, 0, 2)]
    steps = np.array([fit.n_iter_[0] for fit in fits])
    print(
        f"{site:7} {(steps >= 100).sum():2} of {len(steps)} probes stopped at 100 steps; median {np.median(steps):.0f}"
    )

# %% [markdown]
# So it depends on what the probe reads. `mlp_in`, the paper's reading, has been normed, and there a probe seldom needs 100 steps. (On the
# authors' Cities file, with their prompt and split, few layers do under scikit-learn 1.3, the release of their time, and none under 1.9,
# whose lbfgs takes fewer steps.) The raw stream `resid`, which the paper does not read, has a few huge dimensions.

# %% [markdown]
# **Exercise 3.** In 8.4 both curves use the same states. Someone says: "without groups the probe has more data about each
# city, so it must be better everywhere." Give the depth (0 to L) at which the *difference* split twins minus grouped is most
# negative, using both summaries.

# %% tags=["exercise"]
your_depth = None


# %% tags=["check"]
def mean_by_depth(result):
    rows = result.summary.query(
        "site == 'resid' and weights == 'trained' and metric == 'accuracy' and labels == 'task'"
    )
    return rows.set_index("depth")["mean"].sort_index()


def check_depth(answer):
    if answer is None:
        return print("No answer yet. Build the two curves (mean by depth), subtract, look for the minimum.")
    gap = mean_by_depth(split_twins) - mean_by_depth(cities)
    if answer not in range(model.cfg.n_layers + 1):
        return print(
            f"A depth is a whole number from 0 to {model.cfg.n_layers}; the plots show depth / {model.cfg.n_layers}."
        )
    if gap[answer] >= gap.max() - 1e-9:
        return print(
            "There it is largest. Subtract the grouped curve from the one with split twins, not the other way."
        )
    if gap[answer] > gap.min() + 1e-9:
        return print(f"There the difference is {gap[answer]:+.3f}. Somewhere it is lower.")
    print(
        f"Yes: {gap[answer]:+.3f} at depth {answer}. More data about a city make it worse when the twin has the opposite label."
    )
    return True


check_depth(your_depth)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_depth(int((mean_by_depth(split_twins) - mean_by_depth(cities)).idxmin()))

# %% [markdown]
# ## 9. Explore
#
# Choose a data set, a metric, noise and bits; move along the depth, and read which statements the probe is most and least
# certain of. What is not computed yet is computed on a button.

# %%
from lab.concept_depth.explorer import concept_explorer


def compute(data_set, name, noise, bits):
    own = name == cities.parameters["model"]
    chosen_model = model if own else lab.load(name, accept_license=accept_license)
    return accuracy.run(
        chosen_model, data_set, limit=n, sites=("resid",), null=False, noise=noise, bits=bits, seed=seed
    )


concept_explorer(
    [*results.values(), *quantised[1:], noisy],
    data_sets=[name for name in lab.datasets.names() if "/" not in name],
    models=[second_model] if second_model else [],
    compute=compute,
)

# %% [markdown]
# The explorer's first view as a fixed picture, for paper and for pages without widgets:

# %%
figure = results["cities"].plot()

# %% [markdown]
# ## What this does and does not show
#
# - A probe shows that something *can be read* from a state by a straight cut. It does not show that the model reads it.
#   For that one has to change the state and look at what happens (study 02 does).
# - What is read goes with the label in *this* data. Shuffled labels, a bag of words and random weights rule out three
#   cheap explanations, not all.
# - A readable depth belongs to a model, a data set, a position (here: the last token) and a probe. Change one and it moves.
# - The offline models come from 4-bit files that were read back to float32. For full-precision weights, give a hub name.

# %% [markdown]
# **Keep what you made.** A saved result holds its tables and all parameters; every figure can be drawn again from it,
# without a model.

# %%
import os
from pathlib import Path

folder = Path(os.environ.get("LAB_OUT", "depth-lab-out")) / "concept_depth_cities"
cities.save(folder)
again = lab.Result.load(folder)
print(f"{len(again.table)} measurements in {folder.name}, made with {again.parameters['versions']}")
