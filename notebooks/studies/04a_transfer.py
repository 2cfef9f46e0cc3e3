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
# # Transfer, part a: what is a layer good for elsewhere?
#
# **Paper.** Yosinski, Clune, Bengio, Lipson, "How transferable are features in deep neural networks?", NIPS 2014,
# [arXiv 1411.1792](https://arxiv.org/abs/1411.1792). Its answer for an image network of 8 layers: the first layers are general, the last ones
# specific to their task; cutting a net in its middle hurts even on its own task; and a net that starts from another task's
# features ends up better than one that starts fresh. We ask the same of small transformers and of a language model, and add what
# the work lacks: every difference **paired**, with an **interval**, at **equal training**, beside **random** features.
#
# **You need** lesson 4 (frozen and tuned copies, a paired difference).
#
# **It takes** about a minute to open: its results come with the kit. `recompute = True` measures them anew (14 minutes on one
# processor core, a little less on two, 4.5 GB of memory, no network). `quick = True` is a smoke test, and says so over every figure.

# %% tags=["parameters"]
model_name = "smollm2-135m"
accept_license = False  # for Gemma, which has terms of its own: see the README
seed = 0
preset = "quick"  # for task D in section 3: quick, standard or full
rerun_sources = (
    False  # True: train section 4's nets again here (task S, standard: about half an hour for each distance)
)
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with small numbers

# %%
import pandas as pd

import lab
from lab import transfer
from lab.shipped import Results
from lab.transfer import figures, pretrained, statistics
from lab.transfer import tuned as transfer_tuned

pd.options.display.max_colwidth = 120
results_of = Results("04a_transfer", recompute=recompute, quick=quick, model_name=model_name, seed=seed, preset=preset)

# %% [markdown]
# ## 1. Take half a net along
#
# Two tasks A and B: the two halves of a set of classes. A net is trained on each (*base*). Then the first n layers of one of them are
# copied, what is above is made afresh, and the whole is trained on B:
#
# | name | first n layers from | and then |
# |---|---|---|
# | BnB | the base of B itself | frozen |
# | AnB | the base of A | frozen |
# | BnB+, AnB+ | the same | trained on, with the rest |
#
# The paper's nets tell images of 500 classes from each other (random halves of ImageNet). Its authors published the logs of their
# training, so we can draw every run.
#
# **What do you expect**, as n goes from 1 to 7 of 8 layers, for *BnB*: own layers, frozen, fresh ones above?
#
# - (a) The same accuracy as the base: the copied layers solved this very task.
# - (b) Worse and worse.
# - (c) Worse in the middle, and the same again at the end.

# %%
published = statistics.published()
curves = statistics.curves(published)
n_star = float(statistics.n_star(curves).n_star.iloc[0])
figure = figures.transfer_curves(curves, title="Published runs, ImageNet: 4 splits, n of 8 layers", n_star=n_star)

# %% [markdown]
# **Things to notice**
#
# - (c). *Co-adaptation*: at n = 4 and 5 the layers above cannot find again what the cut-off ones had worked out together with those below.
# - *Specificity* is AnB against BnB **for the same target and the same n**. Both are cut, so what is left is whose features they are.
#   It is about 0 up to n = 3, and then grows: later layers are about their own classes.
# - Compare heights at one n, not points along one line: a larger n also means fewer trained layers.
# - *Boost*, the paper's best known finding, is missing: in the logs there are no two runs AnB+ and BnB+ with the same target. What did the
#   paper compare, then?

# %% [markdown]
# ## 2. A mean of what?
#
# Half of the fine-tuned runs left no log. The paper draws those that did against the mean of *all* bases. Small numbers for the
# head: target half P is easy (base 0.64), target Q hard (0.60). Two runs with copied layers have a log:

# %%
toy = pd.DataFrame(
    {"treatment": ["AnB+", "BnB+"], "target": ["P", "Q"], "accuracy": [0.65, 0.61], "own base": [0.64, 0.60]}
)
toy["against the mean base"] = toy.accuracy - (0.64 + 0.60) / 2
toy["against its own base"] = toy.accuracy - toy["own base"]
toy.round(3)

# %% [markdown]
# Against the mean base, AnB+ gains three points and BnB+ loses one. Against their own bases both gain one point: what looked like a
# difference of treatments was a difference of halves. (AnB+ and BnB+ at each n, averaged over n:)

# %%
gains = statistics.paired_and_unpaired(published)
figure = figures.paired_and_unpaired(gains)

# %% [markdown]
# **Things to notice.** 7 of the 10 AnB+ runs have target 0B, the easiest half of all; 7 of the 10 BnB+ runs have 0A, the hardest. Paired with
# their own base, features of *another* task (AnB+) and of the *same* task (BnB+) gain the same. Nothing in these logs points to
# other data as the cause. One or two runs a point cannot refute it, either.
#
# **Exercise 1.** `runs` holds the AnB+ runs of the paper with the accuracy of their own base. Compute the paired gain averaged
# over n: first the mean at each n, then the mean of these. (In percentage points.)

# %%
base = published.query("treatment == 'base'").set_index(["split", "target"]).value.rename("base")
runs = published.query("treatment == 'AnB_plus'").join(base, on=["split", "target"])[
    ["split", "target", "n", "value", "base"]
]
runs.round(4)

# %% tags=["exercise"]
your_gain = None


# %% tags=["check"]
def check_gain(given):
    own = runs.value - runs.base
    if given is None:
        return print(
            "No answer yet. Subtract the column base, group by n, take means, and the mean of the means; times 100."
        )
    if abs(given - 100 * (runs.groupby("n").value.mean().mean() - base.mean())) < 0.006:
        return print(
            "That is the gain against the mean of ALL bases, as it was drawn. Subtract each run's own base first."
        )
    if abs(given - 100 * own.mean()) < 0.001 and abs(own.mean() - own.groupby(runs.n).mean().mean()) > 1e-5:
        return print("Nearly: some n have two runs. Average within n first, so that each n counts once.")
    if abs(given - own.groupby(runs.n).mean().mean()) < 1e-4:
        return print("Right, as a fraction. In percentage points: times 100.")
    if abs(given - 100 * own.groupby(runs.n).mean().mean()) > 0.006:
        return print("Not yet. Each run minus its own base; then means.")
    print(f"Yes: {given:+.2f} points, against +1.67 unpaired. And BnB+ gains +0.94.")
    return True


check_gain(your_gain)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_gain(100 * (runs.value - runs.base).groupby(runs.n).mean().mean())

# %% [markdown]
# ## 3. The same, live: digits
#
# Now our own nets, trained here: transformers of 6 blocks that read a small image as 16 patches. Classes are digits, A and B are random
# halves of the ten. Treatments differ in what was copied and in whether it stays frozen; fresh weights, steps and the order of
# batches are the same. (The base itself began from other weights: n = 0 shows what that alone does.)
#
# Depth n = number of copied blocks. The embedding travels with them; **E** is the embedding alone, and n = 0 copies nothing: the same
# recipe from other random weights.
#
# **What do you expect** for specificity at n = 6 of 6 blocks: the other half's net, frozen, with only a fresh classifier on top?
#
# - (a) About 0: strokes are strokes.
# - (b) A few points. (c) Tens of points.

# %%
small = {"splits": 2, "n": [2, 6], "embedding_only": False} if quick else {}
digits = results_of("digits", lambda: transfer.run("D", preset, seed=seed, **small))
figure = digits.plot()

# %%
figure = figures.transfer_levels(digits)

# %% [markdown]
# The same as numbers (fractions), and what the columns mean. *recovery* is BnB+ - BnB; Holm's correction makes p larger, because several n are
# tested at once.

# %%
columns = ["curve", "part", "n", "estimate", "low", "high", "p_holm", "n_clusters"]
lab.statistics.rounded(digits.summary.query("metric == 'accuracy' and curve in @figures.FOUR")[columns])

# %%
digits.columns().query("table == 'summary'")[["column", "meaning"]]

# %% [markdown]
# **Things to notice**
#
# - In our runs (c); with two splits (`quick`) the interval is too wide to say. But look at the second figure before you say "specific": what do **random**, frozen blocks reach?
#   (Those of *matched size* write updates as large as the learnt blocks'.)
#   A residual stream hands its input on, so a fresh classifier above random blocks still sees the image. AnB says something
#   about *learnt* features only where it differs from them.
# - Is there a dip of co-adaptation in the middle? One reason why there may be none: later blocks read the same stream as before the cut.
#   Is that so? See "Without the residual stream" below.
# - Intervals are Student's t over splits, and wide: five splits are five numbers. `boot_low` and `boot_high` in the summary hold the
#   usual bootstrap, which with five clusters is too narrow (95 % intervals cover about 85 %).
# - *Boost* compares AnB+ with BnB+: both had as many steps, and both started from features. More training alone is base2: the base itself, trained
#   for as many steps again.
#
# Each row of the next table is one net minus another: *transfer_gain* = AnB+ - base, *self_gain* = BnB+ - base, *transfer_gain_over_base2* =
# AnB+ - base2, *more_training* = base2 - base, *over_random* = AnB - random blocks, *over_random_matched* = AnB - random blocks of matched size.

# %%
named = [
    "transfer_gain",
    "self_gain",
    "boost",
    "transfer_gain_over_base2",
    "more_training",
    "over_random",
    "over_random_matched",
]
lab.statistics.rounded(
    digits.summary.query("metric == 'accuracy' and curve in @named and part != 'embedding'")[columns]
)

# %% [markdown]
# **Exercise 2.** n\* is the first n from which on specificity stays above 0: its interval at n *and at all larger n*. Write it.

# %%
specificity = digits.summary.query("metric == 'accuracy' and curve == 'specificity' and part == 'blocks'")
specificity = specificity.sort_values("n")[["n", "estimate", "low", "high"]].reset_index(drop=True)
specificity.round(3)


# %% tags=["exercise"]
def your_n_star(table):
    """First n whose `low` is above 0, at this n and all larger ones; None if there is none."""
    return None


# %% tags=["check"]
def check_n_star(function):
    cases = {
        "rises": ([1, 2, 4], [-0.1, 0.1, 0.2], 2),
        "falls back": ([1, 2, 4], [0.1, -0.1, 0.2], 4),
        "never": ([1, 2, 4], [-0.1, -0.1, -0.2], None),
        "from the start": ([1, 2, 4], [0.1, 0.1, 0.2], 1),
    }
    tables = {name: (pd.DataFrame({"n": n, "low": low}), right) for name, (n, low, right) in cases.items()}
    said = {name: function(table) for name, (table, _) in tables.items()}
    if all(value is None for value in said.values()):
        return print("No answer yet. Which rows have low > 0? From the end backwards, where does that stop?")
    if said["falls back"] == 1:
        return print("You took the first n above 0. At n = 2 it is not above 0 again: all LARGER n must be, too.")
    if said["rises"] == 4:
        return print("You took the last n above 0. Wanted is the first from which on all are.")
    wrong = [name for name, (_, right) in tables.items() if said[name] != right]
    if wrong:
        return print(f"Not yet: the case '{wrong[0]}' gives {said[wrong[0]]}, wanted {tables[wrong[0]][1]}.")
    print(f"Yes. Here: n* = {function(specificity)}. With Holm's correction over n: see the table below.")
    return True


check_n_star(your_n_star)


# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
def solution(table):
    found = None
    for row in table.sort_values("n", ascending=False).itertuples():
        if not row.low > 0:
            break
        found = row.n
    return found


assert check_n_star(solution)

# %%
results_of.judged(digits.tables["n_star"], "n_star", "n_star_holm")

# %% [markdown]
# **Without the residual stream.** The paper's nets have none: a layer sees what the one below wrote, and nothing else. Here are nets of three
# blocks in which attention and MLP *replace* the stream instead of adding to it (six layers in a row), beside nets of three ordinary
# blocks. Without the stream they learn less, so both have a lower *gate* here: a split counts only if
# its bases reach this accuracy (0.6).
#
# **What do you expect** without the stream?
#
# - (a) The dip of co-adaptation appears. (b) Random blocks become worthless. (c) Both.

# %%
few = {
    "n_blocks": 3,
    "n": [2] if quick else [1, 2, 3],
    "splits": 2 if quick else 10,
    "embedding_only": False,
    "gate": 0.6,
}
nets = {
    name: results_of(f"stream/{name}", lambda skip=skip: transfer.run("D", seed=seed, skip=skip, **few))
    for name, skip in (("with", True), ("without", False))
}
pairs = {"base - BnB": ("base", "BnB"), "base - random": ("base", "random"), "BnB - AnB": ("BnB", "AnB")}
gaps = [
    statistics.differences(statistics.passed(net.table), pairs).assign(treatment=name) for name, net in nets.items()
]
paired = pd.concat(gaps).query("metric == 'accuracy'").rename(columns={"difference": "value", "curve": "what"})
rows = []
for what, part in paired.groupby("what", sort=False):
    each = statistics.levels(part).assign(curve=lambda found: found.treatment)
    apart = statistics.curves(part, {"without - with": ("without", "with")})
    for row in pd.concat([each, apart]).itertuples():
        points = f"{100 * row.estimate:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
        rows.append({"difference": what, "n": row.n, "net": row.curve, "points": points})
print("splits that passed the gate:", paired.groupby("treatment").split.nunique().to_dict())
pd.DataFrame(rows).pivot(index=["difference", "n"], columns="net", values="points")

# %% [markdown]
# **Things to notice.** (a) would show as *base - BnB* above 0 at n = 1 or 2 without the stream only, (b) as a much larger *base - random*. The last
# column holds the difference of the differences, paired by split. In our run (seed 0, ten splits):
#
# - Not (a). A small loss from cutting is there *with* the stream (2.9 points at n = 1) and not without it: the stream is not what hides the dip
#   here.
# - (b) is where the stream matters: at n = 1 and 2 frozen random blocks cost 12 to 19 points more without it (17 against 5, 30 against 11).
# - Features are more specific without the stream, by 10 to 18 points at n = 1 and 2: what a block cannot hand on unread, it must rewrite, and
#   it does so for its own classes.

# %% [markdown]
# ## 4. How far is the other task?
#
# The paper also splits ImageNet into man-made and natural things: halves that are *far*. Our analogue: which of 20 sources wrote a sequence
# of 32 tokens? Sources are chains (next token by chance, from the last two) or rules (repeats, mirrors, brackets). **Near**: each half has ten
# of each. **Far**: A has all chains, B all rules.
#
# Four splits, both targets, every n: too long for a lesson. What follows was run once with
# `transfer.run("S", "standard", distance=...)` and comes with the kit, run by run; `rerun_sources = True` trains them again here.

# %%
distances = ["near", "far"]
if rerun_sources:
    sources = {distance: transfer.run("S", "standard", distance=distance, seed=seed).table for distance in distances}
else:
    shipped = statistics.measured()
    sources = {distance: shipped[shipped.distance == distance] for distance in distances}
passing = {distance: statistics.passed(table).query("metric != 'train_loss'") for distance, table in sources.items()}
found = {distance: statistics.curves(table) for distance, table in passing.items()}
stars = {distance: statistics.n_star(table).query("metric == 'accuracy'") for distance, table in found.items()}

# %% [markdown]
# **First claim: no block is general, near or far.** *Specificity* is BnB - AnB: what own blocks are worth over those of the other half.

# %%
tasks = {"near": "near: chains and rules in both halves", "far": "far: chains against rules"}
by_task = {tasks[distance]: found[distance] for distance in distances}
figure = figures.over_n_by_task(by_task, ["specificity"])
print(
    "n*, the first n from which on specificity stays above 0:", {d: float(stars[d].n_star.iloc[0]) for d in distances}
)

# %% [markdown]
# **Things to notice** (in the numbers that come with the kit; intervals over four splits). Near, it rises from 11 percentage points at n = 1 to 31 at
# n = 4, far from 27 to 56, and no interval comes near 0: n\* is 1. Only the embedding alone (E) nearly is general. So the paper's general
# first layers are not found here.
#
# **Second claim: what another task's blocks are worth depends on the distance, and on which random net is the null.** The curves are AnB minus
# random blocks, of ordinary size and of *matched* size (their updates as large as the learnt ones').

# %%
figure = figures.over_n_by_task(by_task, ["over_random_matched", "over_random"])

# %% [markdown]
# **Things to notice.** Near, the first two blocks of another half are not shown to be worth more than ordinary random ones, but more than
# matched ones, by 5 and 9 points. Far, they are worth **less** than either at n = 1 to 3: blocks tuned to one family lose what the other
# needs. (*Far* has one partition only: its four splits draw new chains and motifs, not new halves.)
#
# All other curves (*boost*: negative, near and far; no dip of co-adaptation, near) are rows of `found["near"]` and `found["far"]`.

# %% [markdown]
# ## 5. A language model's first n blocks
#
# There is no "half B" of a pretrained model. But one can ask what its first n blocks, frozen, are worth for a small task, by what is put
# above them: the model's own other blocks (K), the same number of fresh ones (R), two fresh ones (S), or a read-out alone (P).
#
# **What do you expect** near the end, at n = 24 to 30 of 30 blocks?
#
# - (a) K is best: the model's own blocks know how to use these states.
# - (b) P is as good as any: by then the answer can be read off.
# - (c) R is worst: fresh blocks have to be learnt from a hundred texts.

# %%
model = lab.load(model_name, accept_license=accept_license)
fewer = {"limit": 40, "steps": 4, "n": [model.cfg.n_layers - 3, model.cfg.n_layers]} if quick else {}
tuned = results_of("first_blocks", lambda: pretrained.run(model, "sentiment_words", seed=seed, **fewer))
figure = tuned.plot()

# %%
lab.statistics.rounded(tuned.tables["differences"])

# %%
tuned.summary.query("weights != 'none'").pivot(index=["weights", "treatment"], columns="n", values="train_loss").round(
    2
)

# %% [markdown]
# **Things to notice**
#
# - The right panel is the null: the same blocks with random weights. The dashed line is a bag of words. What the pretrained blocks are worth is
#   the distance to *both*.
# - The table pairs by text. Where the interval of K - R or K - P holds 0, the figure's order of lines means nothing. Intervals hold the noise
#   of the test texts only (one seed of the fresh weights); p_holm is corrected over n.
# - The last table is the loss on training texts (nats; a guess has 0.69). A treatment that hardly trained, as fresh blocks may in so few steps,
#   does not show what the frozen blocks are worth.
# - K and R train millions of weights, P about two thousand (`trained_weights` in the summary); S the same number at every n.
#
# **AnB and BnB of a language model.** A pretrained model has no half B, but something close can be made: tune the whole model on a task A, or on
# B itself. Then freeze the first n blocks, put the untouched model's other blocks behind them, and train those on B. Here A is telling true from false
# statements about cities, as far from feelings as the kit's data go.

# %%
one_task = {"limit": 40, "steps": 4, "n": [model.cfg.n_layers]} if quick else {}
carried = results_of("tuned", lambda: transfer_tuned.run(model, "sentiment_words", ["cities"], seed=seed, **one_task))
figure = carried.plot()

# %%
carried.tables["sources"].round(3)

# %%
lab.statistics.rounded(carried.tables["differences"])

# %% [markdown]
# **Things to notice**
#
# - The first table is the gate: a source that was not learnt cannot show what learning it does to the blocks, and is left out below.
# - *own_tuning* is BnB minus untouched. Where its interval holds 0, nothing shows that tuning on the target changed what the first n blocks are
#   worth; a specificity near 0 then says nothing either.
# - *over_untouched* asks what tuning on the other task did to them: below 0, it cost something that the target needs.
# - With half of the blocks trained on the target everything is near the ceiling here, and a few dozen texts are tested: only large differences
#   could show. Few of the kit's tasks can be learnt from a hundred texts at all (try "reviews" or "numbers" as the source).

# %% [markdown]
# ## 6. Explore
#
# Choose two treatments and n. Left the curve, right the pairs behind the marked point: does one split carry it? Below: digits that one net
# gets right and the other wrong.

# %%
from lab.transfer.explorer import transfer_explorer

transfer_explorer(
    digits,
    compare=lambda first, second: transfer.compare(digits, first, second),
    flips=lambda first, second: statistics.flips(digits.tables["items"], first, second),
    task_of=lambda split, seed: transfer.task_of(digits, split, seed),
)

# %% [markdown]
# As a fixed picture: own half's blocks against the other half's, all six.

# %%
items = digits.tables["items"].query("split == 0 and target == 'B' and seed == @seed")
flipped = items[(items["BnB@6"] == items.label) != (items["AnB@6"] == items.label)]
figure = figures.flipped_digits(transfer.task_of(digits).sides["B"], flipped, ["BnB@6", "AnB@6"])

# %% [markdown]
# ## 7. Published beside ours
#
# Points of accuracy; intervals here are not corrected for their number. The rules: *agrees* where the whole interval of ours is on the published side of 0 (for "no difference":
# within 2 points of it), *differs* where it is on the other, *open* otherwise.


# %%
last = {"digits": max(digits.parameters["n"]), "near": 4, "far": 4}
there = [n for n in digits.parameters["n"] if n]
at_digits = {"last": max(there), "first": min(there), "middle": 4 if 4 in there else min(there)}
rows = []
for claim, curve, paper, side, layer in (
    ("late features are specific", "specificity", "+8.2 at n = 7 of 8", 1, "last"),
    ("early features are general", "specificity", "-0.2 at n = 1 of 8", 0, "first"),
    ("cutting in the middle hurts", "co_adaptation", "+1.9, +3.0 at n = 4, 5 of 8", 1, "middle"),
    ("other features help in the end", "boost", "+1.6 unpaired, 0.0 paired (our reading of the logs)", 1, "last"),
):
    for data, table in {"digits": digits.summary, **found}.items():
        n = {"last": last[data], "first": 1, "middle": 2}[layer] if data != "digits" else at_digits[layer]
        at_n = table[(table.curve == curve) & (table.n == n)]
        row = at_n.query("metric == 'accuracy' and part == 'blocks'").iloc[0]
        mean, low, high = 100 * row.estimate, 100 * row.low, 100 * row.high
        text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] at n = {n} of {last[data]}"
        rows.append((claim, data, paper, text, statistics.verdict(side, low, high, margin=2.0)))
results_of.judged(pd.DataFrame(rows, columns=["claim", "ours on", "published", "ours", "verdict"]))

# %% [markdown]
# ## What this does and does not show
#
# - "General" and "specific" are relative to the two halves, their distance, and the number of examples. No feature is specific as such.
# - A net that reaches its ceiling hides all of it: task D has noise and few images for that reason, and a task whose bases fail
#   their gate is reported as failed (`digits.tables["gate"]`).
# - A residual stream passes inputs on. Random blocks are the baseline to beat, not chance.
# - A few splits, one seed each, one small architecture. The intervals are over splits; other sizes are not covered.
#
# Part b, [04b_merging](04b_merging.py), turns to what one does with that: merging tuned models layer by layer, probes across data sets,
# and stitching one model's states into another.

# %%
import os
from pathlib import Path

folder = Path(os.environ.get("LAB_OUT", "depth-lab-out")) / "transfer"
digits.save(folder)
again = lab.Result.load(folder)
print(f"{len(again.table)} rows in {folder.name}, made with {again.parameters['versions']}")
