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
# # Depth budget, part b: which blocks can go?
#
# **Papers.** SortedNet, [arXiv 2309.00255](https://arxiv.org/abs/2309.00255): train so that the first n blocks are a model by themselves.
# Super-network search, [arXiv 2202.12954](https://arxiv.org/abs/2202.12954): look for the best sets of blocks with an evolutionary search.
# Submodular reinforcement learning, [arXiv 2307.13372](https://arxiv.org/abs/2307.13372): when greedy choice comes with a guarantee. Macaron,
# [arXiv 1906.02762](https://arxiv.org/abs/1906.02762), and third-order attention, [arXiv 2310.04064](https://arxiv.org/abs/2310.04064): other
# layers in the place of more layers. We measure **how robust one fixed, pretrained model is to losing blocks**: it was not trained for it, so this is no test of
# those papers' trained networks. Where training is the claim, small nets are trained (section 6).
#
# **You need** [lesson 3](../lessons/03_depth_efficiency.py) (a block left out) and [lesson 5](../lessons/05_depth_budget.py).
#
# **It takes** about 40 seconds to open: its results come with the kit. `recompute = True` measures them anew (two or three hours; not
# timed on quiet cores; no network; it needs pymoo). `quick = True` is a smoke test, and says so over every figure.

# %% tags=["parameters"]
model_name = "smollm2-135m"
accept_license = False  # for Gemma, which has terms of its own: see the README
seed = 0
recompute = False  # True: measure everything anew, instead of reading the results that come with the kit
quick = False  # True: a smoke test with small numbers

# %%
import pandas as pd

import lab
from lab.depth_budget import depth_policy, exits, macaron, nested, pairs, search, submodularity, triples
from lab.shipped import Results

pd.options.display.max_colwidth = 120
results_of = Results("05b_blocks", recompute=recompute, quick=quick, model_name=model_name, seed=seed)
model = lab.load(model_name, accept_license=accept_license)

# %% [markdown]
# ## 1. End early
#
# Keep the first n blocks, and read them with the model's own final norm and unembedding. Other sets of n blocks stand beside them.
#
# **What do you expect** of the first 15 of 30 blocks?
#
# - (a) Half of the way from guessing to the full model. (b) As bad as guessing. (c) Worse than guessing.

# %%
few = {"n_texts": 4, "n_tokens": 16, "n_random": 2, "step": 10} if quick else {}
early = results_of("exits", lambda: exits.prefix_exits(model, seed=seed, **few))
figure = early.plot()

# %%
summary = early.summary.pivot_table(index="n_blocks", columns="way", values="rise")
lab.statistics.rounded(summary.iloc[::3], 2)

# %% [markdown]
# **Things to notice**
#
# - (c). Up to 25 blocks, ending early is *worse than guessing*: worse than if all words were equally likely. The states are not ready to be read.
# - From 9 to 24 blocks the first n lose to nearly all sets of as many blocks drawn at random. A random set often holds some of the last blocks.
# - The first n - 2 blocks *and the last two*: from 27 blocks on they lose least of the four ways with a rule (a good part of the random sets loses less). The last two blocks
#   do much of the work of making a state readable.
# - So "the model is nearly done after two thirds" does not follow from a lens. Whoever wants to exit early has to train for it (section 6.1).

# %% [markdown]
# ## 2. Norms that do not look at the token
#
# A norm divides each token's state by its size. What if it divides by one fixed size, measured on other texts? SLAB
# ([arXiv 2405.11582](https://arxiv.org/abs/2405.11582)) does so with training, for speed. Its one question about depth is: *where* does the size of the single
# token matter? The two norms of one block at a time are fixed. Nothing is trained.

# %%
few = {"n_texts": 4, "n_calibration": 2, "n_tokens": 16, "layers": [0, 15, 29]} if quick else {}
fixed = results_of("norms", lambda: exits.norms(model, seed=seed, **few))
figure = fixed.plot()

# %% [markdown]
# **Things to notice**
#
# - From block 12 on, one size for all tokens but the first costs next to nothing (0.03 nats in the last block). There all tokens have much the same size.
# - Before, it costs 0.04 to 0.3 nats, and about 2 in block 8. But look at the control: in blocks 3 to 9 a size that belongs to *another* block does no worse, and in block 8 much better (0.2).
#   That other size is larger. So it is not the mean that matters here, but a few tokens with large states, which a size that is too small for them blows up: in
#   block 8 ten texts of 24 lose 2.6 nats and more, and the median text 0.15.
# - The size of a *typical* token, which is smaller than the mean, is therefore worse (blocks 3 to 7).
# - If the first token gets that size, too, nearly every block costs something. It is the attention sink of lesson 3, with a size of its own.
# - One size a *channel* breaks the model in every block but the first. Its gains were trained for the norm that it has: without training, this is another function.

# %% [markdown]
# ## 3. Two blocks at once
#
# h(R) is the rise of the loss without the blocks R. If h(ij) were h(i) + h(j), the table of single blocks would tell everything. The *second
# difference* h(ij) - h(i) - h(j) says by how much it is not. Above 0: the two back each other up, and losing both hurts more than the sum. Below 0: once one is
# gone, the other is missed less.
#
# **Exercise 1.** Without block 3 the loss rises by 0.1, without block 4 by 0.2, without both by 0.5 nats. What is the second difference?

# %% tags=["exercise"]
your_difference = None


# %% tags=["check"]
def check_difference(given):
    if given is None:
        return print("No answer yet. h(ij) - h(i) - h(j), with the three rises.")
    if abs(given + 0.2) < 1e-6:
        return print("The other way round: what both cost comes first.")
    if abs(given - 0.3) < 1e-6 or abs(given - 0.4) < 1e-6:
        return print("Take away both single rises, not one of them.")
    if abs(given - 0.2) > 1e-6:
        return print("Not yet: 0.5 - 0.1 - 0.2.")
    print("Yes, 0.2: above 0, so the two back each other up. Each alone is missed less than its share of both.")
    return True


check_difference(your_difference)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_difference(0.2)

# %% [markdown]
# **What do you expect** for neighbours?
#
# - (a) Above 0: they do similar work. (b) Below 0: they work on the same thing, one after the other. (c) Both, near 0 on average.

# %%
few = {"sizes": (3, 4), "n_tokens": 16, "blocks": [3, 11, 14, 20], "permutations": 50} if quick else {}
table = results_of("pairs", lambda: pairs.pair_table(model, seed=seed, **few))
figure = table.plot()

# %%
signs = table.tables["signs"]
lab.statistics.rounded(signs[(signs.text_set == "report") & (signs.by != "distance")])

# %%
lab.statistics.rounded(table.tables["community_test"])

# %% [markdown]
# **Things to notice**
#
# - Mostly above 0: about two thirds of the pairs, and in the last third of the blocks eight of ten. Damages add up to less than the truth.
# - The strongest cells are in rows 0, 1, 11, and among the last blocks. Block 11 makes the attention sink: without block 8 or 9 it is missed less (they prepare it), and
#   without block 1 or 2 it is missed more.
# - (c) for neighbours: the mean is above 0, but it comes from a few pairs.
# - Communities: none. The matrix is *less* modular than its null (p near 1), because a few blocks interact with all others. Without the strongest blocks it is the
#   same. A cluster picture of this matrix would have been a picture of nothing. (That the two sets of texts agree on the partition shows that it is stable, not that it is more than chance.)

# %% [markdown]
# ## 4. Search for the best sets
#
# Each method may measure as many sets of blocks, on the search texts. What it found is measured again on the report texts.
#
# **What do you expect** to win?
#
# - (a) The evolutionary search: it looks at whole sets. (b) Greedy removal: one block after the other. (c) It makes no difference.

# %%
few = (
    {"evaluations": 8, "seeds": 1, "most": 2, "window": 2, "shift": 1, "population": 4}
    if quick
    else {"evaluations": 300, "seeds": 3}
)
found = results_of("search", lambda: search.block_search(model, table, **few))
figure = found.plot()

# %%
lab.statistics.rounded(found.summary)

# %%
lab.statistics.rounded(found.tables["regret"])

# %% [markdown]
# **Things to notice**
#
# - *Greedy removal* wins, if it may measure 255 sets. But *one-shot removal* (measure each block once, leave out those that cost least) comes within 2.2 per cent of its hypervolume
#   with 39, and within one per cent on the report texts. LIM, which needs no loss at all, comes within four per cent with 10.
# - (a), NSGA-II with 300 sets, lies between LIM and one-shot removal; the predictor does as well as one-shot removal, and windows a little better. All do better than random
#   sets of the same sizes. In a trained super-network, with thousands of evaluations, this may be otherwise.
# - Greedy with swaps finds no better sets than greedy up to five blocks, and has then spent its 300: the hypervolume counts what is missing beyond.
# - The control, blocks in plain order, is far below all of them: the first and the last blocks are the ones that are needed. To beat it is no feat here.
# - *regret*: the loss above the best of all single blocks, or all pairs. On the report texts the best pair of the search texts is itself beaten by another one: the winner's curse. Greedy and
#   one-shot have a regret near 0 at one and two blocks.
# - The predictor orders sets that it never saw (tau 0.8), and still 0.7 among sets of one size.

# %% [markdown]
# ### What a block saves in time
#
# Fronts above count blocks. Does a pass without a tenth of the blocks take a tenth less time? On your machine, each set in turn, 20 times; *time* is the
# median share of the whole model's pass, *low* and *high* are quartiles:

# %%
ids = lab.depth_budget.texts_of(model, "prose", sizes=(2,), seed=seed)[0].ids
fewer = [(20,), (10, 15, 20), (5, 10, 15, 20, 25, 27)]
lab.statistics.rounded(search.latency(model, ids, fewer, repeats=2 if quick else 20))

# %% [markdown]
# **Things to notice.** It saves less than the share of blocks. The unembedding costs as much as eight blocks of this small model, at each position, and stays: without three of 30 blocks
# about 3 of 38 parts go, so one expects 8 per cent and not 10. Of a large model it is a smaller part.

# %% [markdown]
# ### All triples
#
# Three blocks of 30: 4,060 sets, each measured on fewer texts (four that choose, eight that report). How far from the best of all are the
# methods?

# %%
few = {"sizes": (3, 4), "n_tokens": 16, "blocks": [3, 11, 14, 20]} if quick else {"sizes": (4, 8)}
effort = {"evaluations": 8, "seeds": 1, "population": 4} if quick else {"evaluations": 90, "seeds": 5}


def all_triples():
    every = pairs.pair_table(model, largest=3, seed=seed, permutations=50, **few)
    return search.block_search(model, every, most=3, **effort)


three = results_of("triples_out", all_triples)
regret = three.tables["regret"]
lab.statistics.rounded(regret[regret.n_removed == 3].drop(columns="n_removed"))

# %% [markdown]
# **Things to notice**
#
# - The best triple of the search texts is not the best of the report texts (regret 0.05, and its interval holds 0): the winner's curse again, with four texts that choose.
# - The predictor comes within 0.05 nats of the best on the search texts with each of five seeds, and meets the best itself with two; NSGA-II with one. Greedy removal is 0.004 above the
#   best there, and 0.17 on the report texts: so few texts choose badly, whoever looks.
# - One-shot removal loses 0.07 against the best where it searched, LIM 0.3. Greedy with swaps had spent its 90 evaluations in the middle of the third step.

# %% [markdown]
# ## 5. Is greedy choice safe?
#
# The value of a set of blocks is minus its loss. If every block is worth less the more others are there (*diminishing returns*, or *submodular*), greedy
# choice has a guarantee. In the pair table a second difference above 0 is a diminishing return. Elsewhere we draw chains of sets.

# %%
few = {"n_chains": 3, "n_sets": 2} if quick else {"n_chains": 150}
null = lab.models.random_twin(model)
chains = results_of("submodularity", lambda: submodularity.run(model, table, null=null, seed=seed, **few))
figure = chains.plot()

# %%
lab.statistics.rounded(chains.summary)

# %%
lab.statistics.rounded(chains.tables["gamma"])

# %% [markdown]
# **Things to notice**
#
# - No. Far from the full model about three chains in ten violate diminishing returns beyond noise, where chance would give one in forty: blocks are worth *more* when others are there. With
#   random weights it is 2 to 8 per cent.
# - With few blocks, adding one often makes the loss rise (beyond noise one time in five). So the value is not even monotone there.
# - gamma, the least ratio of single gains to their joint gain, is 0.5 in this sample of sets: greedy choice would reach 39 per cent of the best. But the least of a sample is above the true
#   one, and in another sample of as many sets we found -0.9, which guarantees nothing. (The interval is over texts, for the one set that was the least.)
# - Near the full model it is otherwise: two thirds of the pairs have diminishing returns, and greedy removal finds the best pair or one that cannot be told from it. So greedy
#   *removal* has evidence behind it, greedy *addition* none beyond two blocks. No learning of a policy is needed for either.

# %% [markdown]
# ## 6. When training is the claim: four small comparisons
#
# ### 6.1 Nested training
#
# One small net, trained so that each prefix of its layers is a model (*sorted*), against one net for each depth (*separate*), and against one standard net that
# is cut. Characters of the kit's prose; five seeds; the same number of characters for each net, and then the same amount of computing in all.

# %%
few = {"seeds": [0, 1], "steps": 20, "n_layers": 3, "d_model": 16} if quick else {"steps": 400}
sorted_nets = results_of("nested", lambda: nested.run(**few))
figure = sorted_nets.plot()

# %%
lab.statistics.rounded(sorted_nets.summary)

# %% [markdown]
# **Things to notice**
#
# - One sorted net stands in for six: up to four layers its prefixes are as good as nets of that depth, with as many characters for each net and a fifth of the computing in all.
# - The price is at the full depth: 0.03 nats a character more than the standard net. With as much computing as that net (*sorted_longer*), it is below it at every depth.
# - Six nets for the price of one (*separate_shared*) are all worse. A standard net that is cut breaks, as SmolLM2 does in section 1.
# - Nesting is what was trained: other layers than the first n do worse in the sorted net, while in the standard net some other set of two to four layers beats the prefix.
# - These nets are small and not trained to the end; depth itself is worth 0.08 nats here. So this shows that nesting works, not what it costs a large model.
#
# ### 6.2 The Macaron layer
#
# Half a feed-forward net before attention and half behind it, in the place of one behind it. Three variants of the same size tell apart what could be
# the reason: two feed-forward nets, their place, or the halves.

# %%
few = (
    {"seeds": [0, 1], "steps": 20, "rates": [4e-3], "n_layers": 2}
    if quick
    else {"steps": 300, "rates": [4e-3, 8e-3, 1.6e-2, 3.2e-2]}
)
layers = results_of("macaron", lambda: macaron.run(**few))
figure = layers.plot()

# %%
lab.statistics.rounded(layers.summary)

# %% [markdown]
# **Things to notice**
#
# - No gain here, but a loss, by five paired seeds: the Macaron layer (*F128/2 A F128/2*) is 0.07 nats a character above the usual one, and its two controls with a
#   feed-forward net before attention are as bad. Two feed-forward nets behind attention make no difference that we can see.
# - So at this size it is the *place* of the feed-forward net that counts, not its halves. Nets of four layers, trained for 300 steps, say nothing about the published ones.
# - Each variant chose its own learning rate out of four on other text. All chose the same one, and it lies inside the range (`at_edge`).
#
# ### 6.3 Attention over pairs of tokens
#
# Does one layer that looks at *pairs* of tokens do what several usual layers do not? Task Match3: is there a pair of numbers that, with this one, adds up to 0?
# Match2, with one other number, is the control that every net should solve.

# %%
few = {"seeds": [0, 1], "steps": 20, "tested": 50, "nets": ["triples 1", "pairs 1"]} if quick else {}
thirds = results_of("triples", lambda: triples.run(**few))
figure = thirds.plot()

# %%
lab.statistics.rounded(thirds.summary)

# %% [markdown]
# **Things to notice**
#
# - All nets solve Match2, so no training has failed. On Match3 one layer over pairs of tokens is right always. One, two and three usual layers are right three times in four
#   (75 to 77 per cent), all of one size. Three layers that train three times as long reach 79.
# - More layers add next to nothing here. Only eight numbers below 53 were tried, with one learning rate. In theory one usual layer cannot do it for long inputs; for several layers that is a conjecture, and a small net might learn short inputs by
#   heart. So this is a gap in *training*, no impossibility. The price: n squared pairs for each token.
#
# ### 6.4 A depth for each example
#
# A probe reads at one depth. Would it read better if a small policy chose the depth for each example? UGround's stochastic skip
# does so inside a model. The *oracle* is right where any depth is right: an upper bound, and no method.

# %%
few = {"repeats": 2, "limit": 80} if quick else {}
policy = results_of("policy", lambda: depth_policy.run(model, "cities", seed=seed, **few))
figure = policy.plot()

# %%
lab.statistics.rounded(policy.summary)

# %% [markdown]
# **Things to notice**
#
# - A null: on real statements the policy does no better than the best fixed depth, and no better than when it is shown another example's states.
# - It is no broken policy: on the *planted* set, where half of the examples can be read at one depth and half at another, it gains 0.2.
# - The oracle is right nearly always, for *shuffled labels* too. With 31 depths, one of them is right by chance. An oracle's share is no promise.
# - To mix all depths may help a little more than to choose one; its interval still holds 0.

# %% [markdown]
# ## 7. Another model
#
# Gemma 3 270M, 18 blocks: early exits, and blocks two at a time. (Its results come with the kit, too. To measure them anew, accept its terms:
# `accept_license = True`.)

# %%
beside = Results("05b_blocks", recompute=recompute and accept_license, model_name="gemma3-270m", seed=seed)


def gemma():
    return lab.load("gemma3-270m", accept_license=accept_license)


early = beside("gemma_exits", lambda: exits.prefix_exits(gemma(), seed=seed))
figure = early.plot()

# %%
other = beside("gemma_pairs", lambda: pairs.pair_table(gemma(), sizes=(6, 12), seed=seed))
figure = other.plot()

# %%
signs = other.tables["signs"]
lab.statistics.rounded(signs[(signs.text_set == "report") & (signs.by != "distance")])

# %% [markdown]
# **Things to notice**
#
# - Ending early is another story here: from ten of 18 blocks on it is better than guessing, while SmolLM2 needed 26 of 30. The first n blocks do about as well as random sets of n. To keep the last two
#   helps from 14 blocks on, as above.
# - Two blocks rule the matrix: 1 and 5, which cost 8 and 13 nats by themselves. Without block 5, blocks 10 and 11 are missed much less; without 0, block 1 is missed more.
# - Diminishing returns are no law: here about half of the pairs lie above 0, and the mean is below it. In the last third of the blocks most lie above 0, as in SmolLM2.
# - Communities: none here, either.
