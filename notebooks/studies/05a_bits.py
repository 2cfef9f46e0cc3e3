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
# # Depth budget, part a: which blocks need their bits, and which their weights?
#
# **Papers.** Layer-Wise Quantization, [arXiv 2406.17415](https://arxiv.org/abs/2406.17415): score the blocks, and give the important ones
# more bits. Layer-adaptive pruning, [arXiv 2308.10438](https://arxiv.org/abs/2308.10438): measure what each layer loses, and find the best
# split of a budget by a dynamic programme, which is right if losses *add*. Both promise that depth is a place to save. We ask: **does any score
# beat a random order of the same blocks, and do losses add?**
#
# **You need** [lesson 5](../lessons/05_depth_budget.py): rounding by hand, the loop over blocks, the random orders.
#
# **It takes** about 20 seconds to open: its results come with the kit. `recompute = True` measures them anew (two or three hours; not
# timed on quiet cores; no network). `quick = True` is a smoke test, and says so over every figure.
#
# Contrary evidence, to keep in mind: how far a block turns the state is a poor stand-in for the damage of its removal
# ([arXiv 2605.14075](https://arxiv.org/abs/2605.14075)); the calibration text can matter more than the search
# ([arXiv 2604.24938](https://arxiv.org/abs/2604.24938)); below 4 bits layers interact ([arXiv 2509.15455](https://arxiv.org/abs/2509.15455)).

# %% tags=["parameters"]
model_name = "smollm2-135m"
accept_license = False  # for Gemma, which has terms of its own: see the README
seed = 0
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with small numbers

# %%
import pandas as pd

import lab
from lab.depth_budget import additivity, bits_figures, changes, pruning, pruning_figures, quantisation
from lab.shipped import Results

pd.options.display.max_colwidth = 120
results_of = Results("05a_bits", recompute=recompute, quick=quick, model_name=model_name, seed=seed)
model = lab.load(model_name, accept_license=accept_license)
small = {"step": 10, "n_random": 2, "most": 2, "sizes": (3, 4, 3), "n_tokens": 16} if quick else {}

# %%
bits = results_of("bits", lambda: quantisation.run(model, pairs=((8, 4),), seed=seed, **small))
figure = bits.plot()

# %% [markdown]
# That is the picture that this study is about: one block after the other goes from 8 to 4 bits, in four orders, before a band of random ones. Sections 2 and
# 3 say what the orders are and what to read in it.
#
# ## 1. What a bit is, and what it costs
#
# Each row of a matrix is cut into groups of 64 neighbouring weights. A group keeps its smallest step and its zero point, and every weight becomes
# one of 2^b numbers. So b bits are not all: 16 bits for the step and b for the zero point come on top, shared by the group. All averages below
# count them.

# %%
shown = pd.DataFrame({"bits": [8, 4, 3, 2]})
for group_size in (32, 64, 192):
    shown[f"bits a weight, groups of {group_size}"] = [changes.bits_a_weight(b, group_size) for b in shown.bits]
shown.round(3)

# %% [markdown]
# One warning. The offline model comes from a file with 4 bits in groups of 32. What we call the intact model has 16 levels in such a group. With
# the same groups and a free offset, "rounding to 4 bits" would change nothing at all. Our groups hold 64 weights, and zero lies on a step.
# That matters: in lesson 5 the levels begin at the least weight of a group, and block 11 is ruined by 3 bits; here small weights become exactly zero, and it loses nothing.
#
# **Exercise 1.** Half of the 30 blocks get 4 bits, half get 2, in groups of 64. What does a weight of these blocks cost on average, all told?

# %% tags=["exercise"]
your_average = None


# %% tags=["check"]
def check_average(given):
    high, two = changes.bits_a_weight(4, 64), changes.bits_a_weight(2, 64)
    if given is None:
        return print("No answer yet. The table has both prices for groups of 64; half of the weights pay each.")
    if abs(given - 3) < 1e-6:
        return print("That is what the names say. A group also keeps its step and its zero point: see the table.")
    if abs(given - (high + two) / 2) > 0.006:
        return print("Not yet: (price at 4 bits + price at 2 bits) / 2, both from the column of groups of 64.")
    print(f"Yes, {(high + two) / 2:.3f}: as much as 3 bits everywhere, so that the two can be compared (section 4).")
    return True


check_average(your_average)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_average((4 + 20 / 64 + 2 + 18 / 64) / 2)

# %% [markdown]
# ## 2. Scores of blocks
#
# *LIM*: how much a block turns the state, minus the cosine of what goes in and what comes out. *ZD*: the share of a block's weights that are large,
# z > 1. It needs no text. The sources disagree about both, so we have every reading. *damage* is measured: only this block is lowered. *rescue*: all
# blocks are lowered, but this one.
#
# **What do you expect?** Which score agrees with the measured damage?
#
# - (a) LIM: a block that turns the state is a block that is needed.
# - (b) ZD: large weights suffer most. (c) Neither.

# %%
few = small if quick else {"step": 6}  # fewer points where a step costs more
pairs = ((4, 2),) if quick else ((4, 3), (4, 2), (3, 2))
low = results_of("bits_low", lambda: quantisation.run(model, pairs=pairs, controls=False, seed=seed, **few))
agreement = bits.tables["agreement"].query("target == 'damage'").drop(columns="target")
lab.statistics.rounded(agreement.sort_values(["blocks", "rho"], ascending=[True, False]))

# %% [markdown]
# **Things to notice**
#
# - *rho* is Spearman's: 1 where the two order all blocks alike; p by permuting blocks, and `p_holm` for as many scores. (Neighbouring blocks are alike, so
#   these p are a little too small.)
# - (c), nearly. From 8 to 4 bits only *rescue*, which is measured itself, agrees beyond doubt. LIM, flattened without the first token, comes next: with that
#   token, the sink's large state hides all others from block 12 on, and the cosines of 16 blocks are all near 1. ZD says nothing of it.
# - Damage measured on other texts agrees with itself only weakly. At 4 bits most blocks lose next to nothing, and their order is noise.
#
# ## 3. Lower one block after the other
#
# The blocks are sorted, the least important first, and lowered from the higher to the lower bits. The curves are measured on texts that sorted nothing.
# The grey band holds 20 random orders. An order that does not leave the band is no news, and neither is one that does not beat both depth
# orders.
#
# **What do you expect?** How many blocks of this small model can go from 8 to 4 bits before 0.05 nats are lost?
#
# - (a) A quarter to a half, as published for large models. (b) Less. (c) None.

# %%
orders = ["damage", "LIM, flattened, no first", "ZD, above, matrix", "first to last"]
figure = bits.plot(orders=orders)

# %%
figure = low.plot(pair="4/2", orders=orders)

# %%
areas = pd.concat([bits.tables["areas"], low.tables["areas"]], ignore_index=True)
columns = ["sweep", "order", "ratio", "ratio_low", "ratio_high", "below", "p_holm", "beats_depth"]
areas = areas[areas.kind.isin(["score", "depth"])]  # reverses and single random orders are in there, too
results_of.judged(lab.statistics.rounded(areas[columns]), "beats_depth")

# %% [markdown]
# *ratio*: the area under the curve, relative to the mean of the random orders. *below*: the share of random orders with a larger area.

# %%
columns = ["sweep", "order", "lowerable", "lowerable_low", "lowerable_high", "lowerable_more"]
lab.statistics.rounded(areas.loc[areas.sweep.isin(["8/4", "4/3"]), columns])

# %% [markdown]
# *lowerable*: blocks that can be lowered, in steps of the curve, before the loss has risen by 0.05 nats over the intact model. *lowerable_more* counts
# from the model with all blocks at the higher bits.
#
# **Things to notice**
#
# - From 8 to 4 bits: (a), just. By measured damage nine of 30 blocks can be lowered, by LIM up to twelve, by a random order about four. But the intervals are wide (6 to
#   15 blocks), so (b) is not ruled out. The paper's larger models gain more, and it says so.
# - From 4 bits on there is nothing to lower: all blocks at 4 bits cost 0.3 nats already.
# - Measured damage and LIM without the first token leave the band of random orders in every pair. ZD hardly does.
# - Do they beat both depth orders? From 4 to 2 bits all do, ZD too, but there both depth orders are *worse* than the random mean. From 3 to 2
#   bits measured ones and LIM do, ZD does not. From 4 to 3 only damage and rescue, from 8 to 4 none beyond doubt. So "beats the depth orders" alone is a weak claim, and "beats random orders" alone is one, too.
#
# ## 4. The essential control
#
# Half of the blocks at 4 bits and half at 2 cost as much as all at 3. Is two levels better than one? And what does the exact programme find, which may
# give every block 2, 3, 4 or 8 bits?

# %%
figure = bits_figures.bits_control(bits)

# %%
columns = ["method", "bits", "rise", "low", "high", "difference", "difference_low", "difference_high", "predicted"]
lab.statistics.rounded(bits.tables["controls"].query("kind != 'random'")[columns])

# %% [markdown]
# **Things to notice**
#
# - Two levels lose clearly to *one*: at the same average, half of the blocks at 2 bits cost far more than the other half gains at 4. Damage grows faster than bits
#   fall. A method that is only compared with random two-level orders looks good here, and is worse than no method.
# - The programme by KL is a little better than uniform bits, and its interval leaves 0. By the loss itself, it is not clear: single losses are noisier than single KL.
# - Black marks compare like with like, on the texts that chose: a cross is what adding single damages predicts, a ring what is measured. For uniform bits they agree. For the
#   two levels it hurts more together. Blue dots further right are other texts: what was chosen for some texts fits them best.
#
# ## 5. Two bits, or no block at all?

# %%
figure = bits_figures.prune_or_quantise(bits)

# %%
lab.statistics.rounded(bits.tables["prune"])

# %% [markdown]
# **Things to notice.** Up to six blocks it makes no difference that we can see; from seven on, leaving them *out* costs less than keeping them at 2 bits. That
# agrees with the paper: lower bits beat pruning, but not at 2 bits.
#
# ## 6. Weights instead of bits
#
# Now the least weights of a block are set to zero. D(r) is the *distortion* when a share r of one block goes: the mean square by which the logits move,
# after a shift that all words share is taken out. The programme takes the shares whose curves add up to least.

# %%
few = {"sizes": (3, 4, 3), "n_tokens": 16, "rates": [0.3, 0.7, 1.0], "matrix_rates": [1.0]} if quick else {}
fewer = {"budgets": [0.2], "n_random": 2, "n_swaps": 2} if quick else {}
pruned = results_of("pruning", lambda: pruning.run(model, seed=seed, **few, **fewer))
figure = pruned.plot()

# %%
pd.Series(pruning.METHODS, name="what it does").to_frame()

# %%
figure = pruning_figures.verdict(pruned)

# %%
than = ["than_uniform", "than_uniform_low", "than_uniform_high"]
lab.statistics.rounded(pruned.summary[["budget", "method", "rise", "low", "high", *than, "measured"]])

# %%
figure = pruning_figures.shares_by_matrix(pruned)

# %%
others = pruned.summary.query("method in ['programme, other texts', 'programme by matrix']")
than = ["than_programme", "than_programme_low", "than_programme_high"]
lab.statistics.rounded(others[["budget", "method", *than, "kl", "distortion"]])

# %% [markdown]
# **Things to notice**
#
# (*Clearly* means that the 95 % interval over texts, paired where two are compared, leaves 0.)
#
# - 10 % can go for nothing: no method's loss clearly rises (its interval holds 0 or less), and for five it falls a little on these texts. There is nothing to win, and the programme is 0.04 nats *worse*
#   than the same share everywhere.
# - At 30 and 50 % the exact programme is clearly better than the same share everywhere, than LAMP, and than all 20 random splits: 0.16 and 1.2 nats less
#   than uniform. A local search from there (*swaps*) gains 0.14 nats more at 50 %; at 30 % that is not clear.
# - From 30 % on, uniform shares and LAMP are better than nearly all random splits. That is no high bar: those take from nothing to twice the share from a block. Global magnitude is not clearly different from uniform
#   at 30 %, and at 50 % clearly worse (1.1 nats).
# - At 10 % the prediction holds (measured / predicted 1.04, the median over splits). At 30 and 50 % the measured distortion is a fifth *less* than the sum, for the programme's own split 4 and 16 per cent.
# - The order of *all* splits is kept (rank correlation 0.96, 0.97, 0.88), so the programme finds a good one. Among the best it is not: swaps find splits with a larger sum and less measured distortion.
# - With one share a block, blocks 11 and 29 keep nearly all of their weights: the sink's and the last one. The shares of single matrices show that in block 11 it is the way out of the MLP alone (*down_proj*).
# - *programme, other texts*: curves from twelve other texts choose nearly the same at 10 %. At 30 and 50 % single blocks differ much (the one removes 40 % of block 17, the other all of it), and the loss
#   cannot be told apart. Several splits are about equally good.
# - *programme by matrix*: a share for each of the 210 matrices, by the same programme. Its distortion is a quarter of the other's at 10 %, six tenths at 30 %,
#   nine tenths at 50 %, also on texts that chose nothing. It takes least from the values (*v_proj*: 2 % of them go at 30 %), which are 3 % of a block's weights.
# - But its *loss* is not clearly lower (-0.04 [-0.13, 0.04] nats at 30 %, -0.05 [-0.20, 0.10] at 50 %). At 10 % it is even higher than with one share a block, where pruning happens to
#   help on these texts: this one simply stays closest to the intact model. Distortion is what the programme makes small, and it is not the loss.
#
# ## 7. Do losses add?
#
# The programme is right if D of several changed blocks is the sum of their single D. For two blocks rho = D(ij) / (D(i) + D(j)). The argument in the paper:
# the changes are small, have mean zero, and do not go together. Then rho = 1. So we change blocks in four ways: weights pruned, weights rounded, random noise of the
# same size (the case that the argument is about), and blocks left out.
#
# **What do you expect** for neighbouring blocks?
#
# - (a) 1: they are as independent as others. (b) Above 1. (c) Below 1.

# %%
few = {"n_texts": 3, "n_tokens": 16, "n_pairs": 4, "n_sets": 2, "kinds": ["left out"]} if quick else {}
sums = results_of("additivity", lambda: additivity.run(model, seed=seed, **few))
figure = sums.plot()

# %%
figure = pruning_figures.additivity_by_size(sums)

# %%
pairwise = sums.summary[sums.summary["where"].str.contains("pairs") & (sums.summary.measure == "distortion")]
lab.statistics.rounded(pairwise.drop(columns="measure"))

# %% [markdown]
# **Things to notice**
#
# - For *pairs* the distortion adds: the median of rho is within four per cent of 1 for random pairs of every kind, also for whole blocks left out, where nothing was argued. For
#   neighbours it is 1.05 to 1.09 where large rounding or noise meets large. So (a), and a little (b).
# - The argument holds where it was made: at small changes the two differences stand at right angles (cosine near 0). At large changes cosines of single pairs lie between -0.7 and 0.5, and rho still lies near 1. There the
#   argument fails and the conclusion stands, for a reason that we have not found.
# - For *many* blocks it does not add. All 30 blocks pruned by 40 % give three quarters of the sum, by 90 % a half; all blocks left out three times the sum.
# - No level came near 0.5 nats for the median block, not even at 90 % pruned or 2 bits (the table `levels`): one block's damage is small, and what hurts is their sum.
# - So the programme of section 6 stands on firm ground at small budgets, and at large ones it keeps the order of allocations and not their size.

# %% [markdown]
# ## 8. Another model
#
# Gemma 3 270M has 18 blocks, and was trained by other people on other text. Is what we found a fact about language models, or about one of them? (Its results come
# with the kit, too. To measure them anew, accept its terms: `accept_license = True`.)

# %%
beside = Results("05a_bits", recompute=recompute and accept_license, model_name="gemma3-270m", seed=seed)
gemma = beside(
    "gemma_bits",
    lambda: quantisation.run(
        lab.load("gemma3-270m", accept_license=accept_license),
        pairs=((8, 4), (4, 3), (4, 2)),
        step=6,
        sizes=(8, 12, 8),
        seed=seed,
    ),
)
figure = gemma.plot()

# %%
some = gemma.tables["areas"].query("kind in ['score', 'depth']")
columns = ["sweep", "order", "ratio", "ratio_low", "ratio_high", "below", "p_holm", "beats_depth", "lowerable_more"]
lab.statistics.rounded(some[columns])

# %%
figure = bits_figures.bits_control(gemma)

# %%
figure = bits_figures.prune_or_quantise(gemma)

# %% [markdown]
# **Things to notice**
#
# - From 8 to 4 and from 4 to 3 bits no score beats both depth orders, measured damage neither. LIM, the better of the published scores above, is no better than a random order from 8 to 4
#   bits. From 4 to 2 bits measured damage beats them, and LIM by tokens narrowly; ZD is *worse* than all random orders.
# - The essential control comes out the same: two levels lose to one by 1.8 nats. The programme by KL finds nothing better than uniform bits and chooses them; by the loss, it chooses worse than that.
# - Two bits against no block: here two bits are better at each number of blocks (the last figure), and left out, two blocks of this model cost 8 and 13 nats by themselves.
# - So which score works is a fact about a model. That two levels lose to one held for both.
