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
# # Transfer, part b: merging by depth, probes elsewhere, stitching
#
# **Papers.** LiNeS, Wang et al., [arXiv 2410.17146](https://arxiv.org/abs/2410.17146): scale what tuning changed, less in early layers.
# Concrete subspace, [arXiv 2312.06173](https://arxiv.org/abs/2312.06173): learn which weights to merge. LEVI,
# [arXiv 2402.04644](https://arxiv.org/abs/2402.04644): read a large model's layers together with a small model. Geometry of Truth,
# [arXiv 2310.06824](https://arxiv.org/abs/2310.06824): probes carried to other data. LiNeS builds on a claim of part a, that early layers are
# general and late ones specific; in the others depth is a choice or a question. We ask each method one question more: **does it need the depth?** A ramp turned round, factors in
# random order, a mask shuffled, a model with random weights: what is left of the gain?
#
# **You need** part a, [04a_transfer](04a_transfer.py), and for sections 4 and 5 the probes of lesson 1.
#
# **It takes** about a minute to open: its results come with the kit. `recompute = True` measures them anew (16 minutes on one
# processor core, less on two, 5 GB of memory, no network). `quick = True` is a smoke test, and says so over every figure.

# %% tags=["parameters"]
model_name = "smollm2-135m"
accept_license = False  # for Gemma, which has terms of its own: see the README
seed = 0
target = "sentiment_words"  # what the language model is tuned on in section 2, and trained on in section 7
shifted = "reviews"  # the same labels, other texts (section 7)
n_statements = 200  # of each data set (sections 4 and 5)
n_documents = 122  # for stitching (section 6); fewer tokens than one would like, so R2 is a lower bound
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with small numbers

# %%
import numpy as np
import pandas as pd

import lab
from lab.shipped import Results
from lab.transfer import ensemble, merging, merging_figures, probe_transfer, statistics, stitching
from lab.transfer import scaling as tuned_scaling

pd.options.display.max_colwidth = 120
results_of = Results(
    "04b_merging", recompute=recompute, quick=quick, model_name=model_name, seed=seed, target=target, shifted=shifted,
    n_statements=n_statements, n_documents=n_documents,
)  # fmt: skip

# %% [markdown]
# ## 1. What tuning forgets
#
# A picture model (CLIP) was tuned on satellite images. What it could do before, it does worse after: *forgetting*. LiNeS takes the change
# that tuning made, and shrinks it: much in the first block, not at all in the last. The published numbers, of one run:
#
# **What do you expect** of LiNeS on the other tasks?
#
# - (a) Nothing comes back: what is overwritten is lost.
# - (b) Most comes back. (c) It gets better than before tuning.

# %%
figure = merging_figures.published_forgetting(tuned_scaling.published())

# %% [markdown]
# **Things to notice.** (b) for DTD, SUN397 and Cars, about half for RESISC45, (c) for MNIST, GTSRB and SVHN, while the target falls by 1.2 points. But the change became *smaller*, too. Would any
# way to make it smaller have done the same? The figure cannot say: it has no constant factor, no ramp turned round, and no interval.
#
# The factor of block l of L is λ(l) = α + β (l - 1) / (L - 1). With α = 0.25, β = 0.75 and four blocks:

# %%
alpha, beta, n_blocks = 0.25, 0.75, 4
pd.DataFrame(
    [
        [alpha + beta * (block - 1) / (n_blocks - 1) for block in range(1, n_blocks + 1)],
        [alpha + beta * (n_blocks - block) / (n_blocks - 1) for block in range(1, n_blocks + 1)],
    ],
    index=["LiNeS", "reversed (control)"],
    columns=[f"block {block}" for block in range(1, n_blocks + 1)],
)

# %% [markdown]
# **Exercise 1.** A control of *equal size*: one constant for all blocks whose update is as long as that of LiNeS. Let
# t(l) be the length (norm) of what tuning changed in block l; scaled, it has length λ(l) t(l). Lengths of different blocks add in
# squares. With these lengths `t` and the factors of the table's first row, which constant is it?

# %%
t = np.array([3.0, 2.0, 2.0, 1.0])
factors = np.array([0.25, 0.5, 0.75, 1.0])


# %% tags=["exercise"]
your_constant = None


# %% tags=["check"]
def check_constant(given):
    right = np.sqrt(((factors * t) ** 2).sum() / (t**2).sum())
    if given is None:
        return print(
            "No answer yet. Lengths of parts add up in squares: |whole update|^2 = sum of t_l^2. Do so for both updates."
        )
    if abs(given - factors.mean()) < 1e-3:
        return print("That is the mean factor. But block 1 changed three times as much as block 4: weigh by length.")
    if abs(given - (factors * t).sum() / t.sum()) < 1e-3:
        return print("Nearly: you added lengths. The parts are at right angles, so squares add up.")
    if abs(given - right) > 5e-3:
        return print("Not yet: sqrt(sum (lambda_l t_l)^2 / sum t_l^2).")
    print(f"Yes, {right:.3f}: less than the mean factor {factors.mean():.3f}, as the early blocks changed most.")
    return True


check_constant(your_constant)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_constant(np.linalg.norm(factors * t) / np.linalg.norm(t))

# %% [markdown]
# ## 2. The same with a language model
#
# From here on β = 1 - α, so the last block keeps its whole change and α = 1 is plain tuning. All weights of the model are tuned on a small task. Its read-out is one **random** direction that stays fixed, so that tuning has
# something to learn. *Score* is twice the target's accuracy (as a share of the tuned model's) + the controls' (as a share of the untouched
# model's). The control here is ordinary text: does the model still predict the next word? α is chosen by the score on validation texts;
# what is drawn are test texts.
#
# | in the tables | what it is | its α |
# |---|---|---|
# | lines | LiNeS: little of the change in early blocks, all of it in the last | chosen |
# | reversed | the ramp turned round | chosen, among as many values |
# | wise_ft | one constant for all blocks | chosen, among as many values |
# | same_norm | one constant, the update as long as that of LiNeS | given by LiNeS's |
# | permuted | LiNeS's factors, in random order over the blocks | LiNeS's |
# | ramp_only | LiNeS from 0 on | 0 |
# | frozen | tuned once more with the embedding and the first half of the blocks left alone: what LiNeS undoes is not done at all | none |
#
# That same_norm and permuted have nothing chosen for them favours LiNeS a little.

# %%
model = lab.load(model_name, accept_license=accept_license)
fewer = (
    {"grid": [1.0, 0.5, 0.0], "permutations": 1, "steps": 8, "sizes": {"test": 16, "documents": (4, 6)}}
    if quick
    else {}
)
# Seed 1: the rate of learning was chosen with seed 0.
scaled = results_of("scaled", lambda: tuned_scaling.run(model, target, seed=seed + 1, **fewer))
figure = scaled.plot()

# %%
alphas = scaled.tables["grid"].query("chosen").set_index("family").alpha
print("alpha chosen on validation:", alphas.to_dict())
tuned_itself = [family for family in ("reversed", "wise_ft") if alphas.get(family) == 1]
if tuned_itself:
    print(
        f"alpha = 1 is the tuned model itself: no row of its own for {' and '.join(tuned_itself)}; read the row tuned"
    )
shown = scaled.tables["differences"].query("measure in ['target', 'control', 'score'] and other not in @tuned_itself")
lab.statistics.rounded(shown)

# %% [markdown]
# **Things to notice**
#
# - The table holds LiNeS against each control, paired by text; `p_holm` is corrected for their number. Where the interval holds 0, nothing
#   is shown: with a few dozen texts only large differences would be.
# - Look at the chosen α first. Where LiNeS chose 1, it is the tuned model itself, and so are *same_norm* and *permuted*: these rows are 0.
# - *reversed* is the decisive row. If shrinking early blocks were the point, shrinking late ones must be worse on *score*;
#   a smaller update alone keeps more of the controls.
# - *same_norm* and *permuted* ask whether a smaller update is enough; *frozen* asks whether the early blocks had to change at all.

# %% [markdown]
# ## 3. Merge several models
#
# One base, several tuned models, one merged. *Task arithmetic* adds the changes, *TIES* keeps the large ones that agree in sign,
# *Consensus* those that at least two tasks need, *Concrete* learns a mask from unlabelled examples. We do this on
# small nets. Four bases (two in `quick`) are trained, and each is tuned on several groups of classes, below heads that were fitted on the base
# and stay fixed; intervals are over bases, and all choices are made on validation. *Normalised* is accuracy as a share of the own tuned model's; *objective* is the score of section 2 for one tuned model.
#
# Our TIES follows the usual statement. The authors' code keeps one entry more of each model, and where changes cancel exactly it doesn't
# give 0: it takes the sign that most entries of the vector have.
#
# **Exercise 2.** TIES by hand. Three tasks changed one weight by +0.5, +0.3 and -0.9 (all among the largest). The sign is that of the sum;
# then the mean of those that agree. What is the merged change?

# %% tags=["exercise"]
your_change = None


# %% tags=["check"]
def check_ties(given):
    if given is None:
        return print("No answer yet. What is the sign of 0.5 + 0.3 - 0.9? Which of the three have it?")
    if abs(given - 0.4) < 1e-6:
        return print("That goes by majority of signs. TIES goes by the sign of the SUM, where size counts.")
    if abs(given + 0.3) < 1e-6:
        return print("You divided by all three. The mean is over those that agree in sign.")
    if abs(given + 0.1 / 3) < 1e-3 or abs(given + 0.1) < 1e-6:
        return print("That is plain averaging or adding. First the sign of the sum, then only those that agree.")
    if abs(given + 0.9) > 1e-6:
        return print("Not yet: the sum is -0.1, so negative; the mean of the negative ones is ...")
    print("Yes, -0.9: one large change outvotes two smaller ones.")
    return True


check_ties(your_change)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_ties(-0.9)

# %%
merged = results_of("merged", lambda: merging.run(seed=seed, **({"splits": 2} if quick else {})))
figure = merged.plot()

# %%
columns = ["part", "family", "first", "second", "estimate", "low", "high", "p_holm", "verdict"]
shown = merged.summary.query("metric == 'normalised' or part == 'single' and metric == 'objective'")[columns]
results_of.judged(lab.statistics.rounded(shown))

# %% [markdown]
# **Things to notice**
#
# - Read *interference* first: where averaging loses little against the models' own, there is little for a clever merger to win back.
# - *with LiNeS* against *ramp reversed* and *random order* asks whether the depth matters; against *same length*, one constant that makes
#   the update as long, whether anything but the length does; against the plain merger, whether the extra factor helps. (*random order* and
#   *same length* are built from LiNeS's factors and not tuned themselves, which favours LiNeS a little.)
# - *Concrete* against *mask shuffled*: is it *which* weights are kept, or just that some are? Its other controls: as many steps on one number
#   a block (*by_block*) or a task (*by_task*), and one random draw of the mask instead of its mean (*concrete_draw*, as published).
#
# Which weights does Concrete keep, by depth? And does lower entropy mean higher accuracy?

# %%
figure = merging_figures.mask_profile(merged)

# %%
merged.tables["collapse"].groupby("method")[
    ["entropy_before", "entropy_after", "accuracy_before", "accuracy_after", "both_fell"]
].mean().round(3)

# %% [markdown]
# In the figure: left, the share of the weights' change that is kept. Shuffling happens within each matrix, so both lines are the same there; right,
# how long the masked update is against the unmasked one. (Blocks count from 0 here, from 1 in section 1.)
#
# *both_fell*: the share of tasks for which the entropy fell and accuracy fell as well, be it by one example; where the method did nothing to
# accuracy, expect nearly half. An objective without labels cannot see the difference.

# %% [markdown]
# ## 4. Does a probe carry to another data set?
#
# A probe that separates true from false statements about cities: does it read truth, or what is usually said? Trained on one data
# set (rows), tested on another (columns), at a depth chosen on the *trained* one.
#
# **What do you expect** from "Paris is in France" to "Paris is not in France"?
#
# - (a) AUC near 1: the probe reads truth.
# - (b) Near 0.5: it does not carry over.
# - (c) Near 0: it reads which words belong together, and a negation turns it upside down.

# %%
chosen = ["cities", "cities_negated", "numbers"] if quick else list(probe_transfer.DATASETS)
depths = range(0, model.cfg.n_layers + 1, 10) if quick else None
limit = 80 if quick else n_statements
carried = results_of("carried", lambda: probe_transfer.run(model, chosen, depths=depths, limit=limit, seed=seed))
figure = carried.plot()

# %%
carried.tables["negation"].round(2)

# %%
figure = merging_figures.probe_transfer_by_depth(
    carried, pairs=[("cities", "cities"), ("cities", "cities_negated"), ("cities", "numbers")]
)

# %% [markdown]
# **Things to notice**
#
# - (c), where *reading* says "is plausible": the whole interval of the AUC is below 0.5, so the probe is turned upside down. "is true": the whole
#   interval is above.
# - The diagonal is the ordinary probe, on groups that it was not trained on. Off it, a star means: above the *best* of its controls, chosen
#   anew in every draw (bag of words, length, shuffled labels, a random direction).
# - Group splits go across data sets: a city in the training statements is in no test statement, not even in the negated ones.
# - The paper's accuracies are *centred on the target*: the threshold is set with the test statements, which presumes
#   that half of them are true. `accuracy_centred` in the summary is that, `accuracy` uses the source's threshold alone.

# %% [markdown]
# ## 5. And to another depth?
#
# Left: a probe trained at one depth, tested at another, after bringing the tested depth's states to the trained one's mean and scale. Right: the
# cosine of the two directions.

# %%
figure = merging_figures.depth_transfer(carried, dataset="cities")

# %%
figure = merging_figures.depth_transfer(carried, dataset="cities", statistics="training_depth")

# %% [markdown]
# **Things to notice.** Is there a block around the diagonal? Then neighbouring depths share a direction. Where the left square is bright and
# the right one near 0, a probe carries over without a shared direction. To
# transfer from late to early is another question than from early to late, so the square need not be symmetric. In the second pair of
# squares the tested states are standardised by the *trained* depth's statistics: nothing is taken from the tested depth.

# %% [markdown]
# ## 6. Stitching: go on from another model's states
#
# A linear map from the states of model X at depth i to those of model Y at depth j may explain most of the variance. Is it good enough to
# *live on*? Y's states are replaced by mapped ones (all positions but the first), and Y goes on. Here X and Y are the same model at different
# depths, so the map has to do what the blocks in between do.
#
# **What do you expect** for a map with R2 = 0.9?
#
# - (a) Hardly any change: nine tenths are right. (b) The model is lost: what it needs is in the last tenth.

# %%
prose = lab.datasets.load("prose").sample(n=24 if quick else n_documents, random_state=seed)
n_layers = model.cfg.n_layers
wanted = [(n_layers // 2, n_layers // 2 + 2)] if quick else None
texts = [text[:250] if quick else text for text in prose.text]
options = {"groups": prose.group.to_numpy(), "seed": seed}
stitched = results_of("stitched", lambda: stitching.run(model, model, texts, pairs=wanted, **options))
figure = stitched.plot()

# %%
stitched.summary.query("condition in ['mapped', 'clean', 'token_identity', 'unigram'] and metric != 'kl'").round(3)[
    ["source_depth", "target_depth", "condition", "metric", "mean", "low", "high", "r2"]
]

# %% [markdown]
# **Things to notice**
#
# - Look for pairs with a high R2 and a high KL: R2 counts variance, and the directions that decide the next word need not have much.
# - *Y's embedding, mapped* knows which token stands there and nothing else. A map from X that is not far better has found the words, not the
#   computation.
# - *Y's own states* must give exactly 0: the check that replacing itself does nothing.
#
# So far X and Y were one model. Now two nets that share nothing but the text that they were trained on: one of 4 blocks and one of 8, and
# two of 4 blocks, from other random weights and with the text in another order.

# %%
small = {"n_layers": (2, 4), "d_model": 32, "steps": 60} if quick else {"n_layers": (4, 8)}
few, many = small["n_layers"]
depths_x = [few // 2, few] if quick else [1, 2, 3]


def depths_apart():
    shallow, deep = (lab.load(net.folder) for net in lab.nets.language.text_models(**small).values())
    return stitching.run(shallow, deep, texts, pairs=[(i, 2 * i) for i in depths_x], progress=False, **options)


def seeds_apart():
    one = lab.load(lab.nets.language.text_models(**small)[few].folder)
    other = lab.load(lab.nets.language.text_models(**{**small, "n_layers": (few,)}, seed=1)[few].folder)
    return stitching.run(other, one, texts, pairs=[(i, i) for i in depths_x], progress=False, **options)


apart = {
    f"{few} blocks into {many}": results_of("depths_apart", depths_apart),
    "another seed": results_of("seeds_apart", seeds_apart),
}
figure = apart[f"{few} blocks into {many}"].plot()
_ = figure.suptitle(f"X: {few} blocks, Y: {many} blocks, trained on the same text; intervals over test documents")

# %%
figure = apart["another seed"].plot()
_ = figure.suptitle(
    f"X and Y: {few} blocks, trained on the same text from other weights; intervals over test documents"
)

# %%
against_words = pd.concat(one.summary.assign(pair=name) for name, one in apart.items())
columns = "pair source_depth target_depth mean r2 difference difference_low difference_high p_holm".split()
lab.statistics.rounded(against_words.query("condition == 'mapped' and metric == 'kl'")[columns])

# %% [markdown]
# *difference*: KL of the mapped states minus KL of Y's mapped embedding. Below 0, with an interval that stays there, the map carries more than
# which word stands where. Nets of this size do little more than that, so there is not much to find.

# %% [markdown]
# ## 7. An ensemble over layers
#
# LEVI's idea: a large frozen model, read at several depths, beside a small model trained from scratch; together they should fail less
# on *shifted* texts. How the original chooses layers is not known to us, so this is **our own minimal design**. Trained on short
# sentences with one word of feeling, tested on like ones and on reviews in pairs that hold the same words in another order (so a bag of
# words must fail there):

# %%
fewer = {"seeds": 1, "steps": 30, "rates": [3e-3]} if quick else {}
both = results_of("ensemble", lambda: ensemble.run(model, target, shifted, seed=seed, **fewer))
figure = both.plot()

# %%
lab.statistics.rounded(both.tables["differences"])

# %% [markdown]
# **Things to notice.** *random weights* is the null for the large model, *small model alone* and *bag of words* for the words. An ensemble
# that doesn't beat *language model alone, with as many weights* has shown that more weights help, at best.

# %% [markdown]
# ## 8. Explore
#
# Choose what the probe was trained and tested on; move along the depth and read its scores there, the best control beside them.

# %%
from lab.transfer.explorer import probe_transfer_explorer

probe_transfer_explorer(carried)

# %% [markdown]
# As a fixed picture:

# %%
figure = merging_figures.probe_transfer_by_depth(
    carried, pairs=[("cities", "cities_negated"), ("cities_negated", "cities")]
)

# %% [markdown]
# ## 9. Published beside ours
#
# *agrees* where our interval is on the published side of 0 (*yes* where nothing was published), *differs* where it is on the other, *open*
# where it holds 0. Intervals here
# are not corrected for their number; p_holm stands in the tables above. Published Concrete adapts on the test images that it is then
# scored on; ours doesn't.


# %%
scaling = scaled.tables["differences"].set_index(["measure", "other"]).rename(columns={"difference": "estimate"})
merges = merged.summary.query("part == 'merge' and metric == 'normalised'").set_index(["first", "second"])
rows = []
for claim, paper, table, place in (
    ("LiNeS does better than plain tuning (score)", "target 90.5 to 90.3, control 38.0 to 48.0 (CLIP, second-hand)", scaling, ("score", "tuned")),
    ("... than the ramp reversed", "not measured", scaling, ("score", "reversed")),
    ("... than a constant of equal length", "not measured", scaling, ("score", "same_norm")),
    ("LiNeS improves task arithmetic", "+3.1 points (ViT-L/14, 20 tasks, second-hand)", merges, ("task_arithmetic_lines", "task_arithmetic")),
    ("LiNeS improves TIES", "+4.0 points (the same)", merges, ("ties_lines", "ties")),
    ("Concrete improves task arithmetic", "+8.3 points; +7.1 at its best lambda", merges, ("concrete", "task_arithmetic")),
    ("... by which weights it keeps", "not measured", merges, ("concrete", "concrete_shuffled")),
):  # fmt: skip
    row = table.loc[place]
    ours = f"{row.estimate:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
    said = statistics.verdict(1, row.low, row.high)
    if paper == "not measured":
        said = {"agrees": "yes", "differs": "no, the opposite"}.get(said, said)
    rows.append((claim, paper, ours, said))
results_of.judged(pd.DataFrame(rows, columns=["claim", "published", "ours", "verdict"]))

# %% [markdown]
# ## What this does and does not show
#
# - Small nets, a small language model, small tasks: where little interferes, a merger can repair little, and with few bases one cannot
#   even tell which. "open" is no evidence against a method.
# - The published gains come from single runs without intervals. On language several of them are below half a point.
# - A probe's AUC elsewhere is about linear read-out, not about what the model uses.
# - Stitching forgives: the rest of Y may repair what a map gets wrong.

# %%
import os
from pathlib import Path

folder = Path(os.environ.get("LAB_OUT", "depth-lab-out")) / "merging"
merged.save(folder)
again = lab.Result.load(folder)
print(f"{len(again.table)} rows in {folder.name}, made with {again.parameters['versions']}")
