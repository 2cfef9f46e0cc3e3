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
# # Lesson 5: where do the bits go?
#
# | | |
# |---|---|
# | **Question** | Which [blocks](../glossary.md#block) need their [bits](../glossary.md#bit), and does a score know it better than [chance](../glossary.md#chance)? |
# | **Time** | 26 minutes of class, 28 minutes of exercises |
# | **You will be able to** | round a model's [weights](../glossary.md#weights) and put them back; trace a damage to one [token](../glossary.md#token) with a [hook](../glossary.md#hook); hold a score against [random orders](../glossary.md#random-order) |
# | **You need** | [lesson 3](03_depth_efficiency.py): [loss](../glossary.md#loss), hooks that replace a [state](../glossary.md#state), and where [attention](../glossary.md#attention) goes |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** Opening 3 minutes; step 1 with exercises 1 and 2, 13; step 2 with exercise 3 and the prediction, 12; step 3
# with exercise 4, 9; step 4 with exercise 5 and two predictions, 11; play, 6. Short of time: leave out exercise 5. The longest waits: the
# thirty runs behind exercise 3, and the forty random orders of step 4; let them write down a reason for their guess meanwhile.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", or a local folder; the text speaks of the first
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %%
import lab
from lab import lessons
from lab.lessons import depth_budget as check
from lab.lessons import layer_figures, spend
from lab.lessons import spend_figures as figures

lessons.start(class_mode=class_mode)
model = lab.load(model_name, accept_license=accept_license)
figure = figures.fewer(*spend.opening(model))

# %% [markdown]
# A weight is a number. With 16 bits it can have 65,536 values, with 3 bits only 8: the grey lines. Each weight moves to the
# nearest one. This is to [quantise](../glossary.md#quantise): the model needs less memory, and it says something else.
#
# Below, all 30 blocks got the same number of bits. But do all of them need the same? (With 8 bits, nothing is lost. At 4 bits
# a little: the kit's file has 4 bits already, in smaller groups than ours.)

# %% [markdown]
# ## Step 1: round
#
# Take 64 neighbouring inputs of one row: a group. Between its least and its greatest value, lay 2^bits levels at equal
# distances. Round each weight to the nearest level.
#
# ### Exercise 1: round to nearest
#
# ●●○ difficulty, ●●● importance, 8 minutes, code.


# %% tags=["exercise"]
def rounded(weight, bits, group_size=64):
    """weight: [output, input]. Return a new matrix, in which each weight is on one of the levels of its group."""
    ...  # four lines: groups, as weight.reshape(weight.shape[0], -1, group_size), so [output, group, input of the group];
    # low and high of each group; the step between two levels; return each weight on its nearest level


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `groups.amin(-1, keepdim=True)` is the least value of each group. 8 levels have 7 steps between them. How many steps does a weight lie
# above `low`? Make that a whole number with `.round()`, and go the way back.
# </details>

# %% tags=["check"]
rounded = check.rounded(rounded)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def rounded(weight, bits, group_size=64):
#     groups = weight.reshape(weight.shape[0], -1, group_size)
#     low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
#     step = (high - low) / (2**bits - 1)
#     return (((groups - low) / step).round() * step + low).reshape(weight.shape)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 8 minutes.** Draw a group of four weights with four levels (2 bits): the least and the greatest stay where they are.
# - **Wrong:** `2**bits` steps: “four levels, how many gaps?” `.amin()` of everything: “whose least value?” No `+ low`: “where does step 0 lie?”
# - **Expect:** at 3 bits a weight moves by a quarter of a step in the mean; “Madrid” is there at 8 and 4 bits, and gone at 3.

# %% [markdown]
# ### Exercise 2: the honest price
#
# ●○○ difficulty, ●●○ importance, 3 minutes, question. To come back from levels to weights, a group must also keep `low` and `step`, 16 bits
# each. With 3 bits and groups of 64: how many bits does a weight cost, these two included?

# %% tags=["exercise"]
price = ...  # bits for each weight

# %% tags=["check"]
price = check.price(price)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `price = 3 + 32 / 64`, so 3.5. Smaller groups fit better and cost more.
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 3 minutes.** Papers often say “3 bits” and mean 3.5 or more: ask which one is compared.
# - **Wrong:** 3: “what does a group keep?” 35: “does each weight have its own low and step?”
# - **Expect:** 3.5, exactly.

# %% [markdown]
# ## Step 2: one block at a time
#
# You lower one block to 3 bits, measure, and put the very same weights back. A block has seven matrices: q, k, v and o of attention; gate, up
# and down of the [MLP](../glossary.md#mlp).
#
# ### Exercise 3: other weights for one run
#
# ●●○ difficulty, ●●● importance, 8 minutes, code. Fill what is left open under `try` and `finally`.

# %%
import torch

n_layers, matrices = model.cfg.n_layers, spend.matrices
prose = lab.datasets.load("prose").text.str.slice(0, 200).tolist()
ids = lab.texts.tokenize(model, prose[:16]).ids[:, :24].to(model.cfg.device)  # the first 24 tokens of each
mine, others = ids[:8], ids[8:]  # texts to choose blocks by, and other ones to report


def loss(model, ids, hooks=()):
    """ids: [text, position]. Return [text]: the surprise at each token but the first, in the mean."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        log_p = model(ids, use_cache=False).log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1).cpu()


# %% tags=["exercise"]
def loss_with(model, ids, new, hooks=()):
    """new: pairs (weight, values): a matrix of the model, and a tensor of its shape. Return the loss with these values; afterwards all weights are what they were."""
    ...  # one line: keep what each weight has now, in a list `before`
    try:
        ...  # three lines: give each weight its values, with weight.data = values; return the loss
    finally:
        ...  # two lines: give each weight what it had


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `for weight, values in new:` goes through the pairs. `before = [weight.data for weight, values in new]`. In the end: `zip(new, before)`. Give `loss` the hooks, too.
# </details>

# %% tags=["check"]
loss_with = check.loss_with(loss_with, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def loss_with(model, ids, new, hooks=()):
#     before = [weight.data for weight, values in new]
#     try:
#         for weight, values in new:
#             weight.data = values
#         return loss(model, ids, hooks)
#     finally:
#         for (weight, values), old in zip(new, before):
#             weight.data = old
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 8 minutes.** Ask what happens to the next block's number if one block stays lowered.
# - **Wrong:** `weight = values`: “that renames the loop's variable.” `weight.copy_(values)`: “and what does `before` hold now?” `return` after the
# `try`: “is the model still lowered there?”
# - **Expect:** block 11 costs 0.53 nats, 29 costs 0.16, 2 and 20 cost 0.1, most others less than 0.05 (0.03 up or down).

# %% tags=["prediction"]
guess = lessons.predict(
    "One block at 3 bits, all others as they are. Which block hurts most?",
    ["One of the first three", "One in the middle", "One of the last three", "All hurt about the same"],
)
guess

# %%
low = {block: [rounded(weight.data, 3) for weight in matrices(model, block)] for block in range(n_layers)}


def lowered(*blocks):
    """Pairs (weight, values at 3 bits) of some blocks."""
    return [pair for block in blocks for pair in zip(matrices(model, block), low[block], strict=True)]


whole = loss(model, mine)
rises = torch.stack([loss_with(model, mine, lowered(block)) - whole for block in range(n_layers)])  # [block, text]
odd = int(rises.mean(1).argmax())
print(f"block {odd} costs {rises[odd].mean():.2f} nats; the median block {rises.mean(1).median():.2f}")
guess.then(lambda: layer_figures.rise(rises, top=1, low=-0.3, by="the block that is lowered to 3 bits"))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *First*: an error made early goes through all that follows. *Last*: nothing comes after it that could repair it; the last block comes second.
# *The same*: all blocks have the same shape, and were rounded alike. *Middle*: yes, one single block.
# </details>
#
# Below zero? With so few texts, a tiny damage can look like a gain.

# %% [markdown]
# ## Step 3: why this one?
#
# What does block 11 do that the others do not? Look for the token at which it matters.
#
# ### Exercise 4: put one state back
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code. The block stays at 3 bits. At some [positions](../glossary.md#position), put the state back that the intact
# block makes.


# %% tags=["exercise"]
def put_back(intact, positions):
    def hook_fn(state, hook):  # what the lowered block makes, [text, position, d_model]; `intact` has the same shape
        ...  # three lines: copy; at `positions`, overwrite the copy with the intact states; return it

    return hook_fn


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# As in lesson 3. `state.clone()` is a copy; the first axis is the text.
# </details>

# %% tags=["check"]
put_back = check.put_back(put_back)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def put_back(intact, positions):
#     def hook_fn(state, hook):
#         new = state.clone()
#         new[:, positions] = intact[:, positions]
#         return new
#
#     return hook_fn
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 5 minutes.** Say what is lowered and what is not: weights of block 11 at 3 bits, one state of one token intact.
# - **Wrong:** `new[positions]`: “what is the first axis?” Writing into `state`: “who else reads it?” The other way round: “which is the intact one?”
# - **Expect:** 0.53 nats, with the first token's state put back 0.0; with all others put back still 0.5 (0.05 up or down). One matrix, `down`, costs
# nearly all of it.

# %% tags=["prediction"]
guess = lessons.predict(
    f"At which token must the intact state of block {odd} be put back, so that most of the damage is undone?",
    ["At the first", "At all but the first", "At all: each has a part of the damage"],
)
guess

# %%
place, kept = f"blocks.{odd}.hook_resid_post", {}
loss(model, mine, [(place, lambda state, hook: kept.update(intact=state))])
places = {"nowhere": [], "at the 1st": [0], "at the 2nd": [1], "at all others": slice(1, None)}
back = {
    name: loss_with(model, mine, lowered(odd), [(place, put_back(kept["intact"], at))]) - whole
    for name, at in places.items()
}
pairs = zip(spend.names(model, odd), lowered(odd), strict=True)
alone = {name: loss_with(model, mine, [pair]) - whole for name, pair in pairs}
guess.then(lambda: figures.where(back, alone, odd))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *All but the first*, *all*: the words are there, and each state of the block was changed. *The first*: yes.
# </details>
#
# One matrix of seven, and one token. You met it in lesson 3: block 11 makes the first token an [attention sink](../glossary.md#attention-sink), a place
# for attention that is not needed elsewhere. The second token's state is the [control](../glossary.md#control): had it helped as much, any
# intact state would do.

# %% [markdown]
# ## Step 4: does a score beat chance?
#
# Now lower 20 of 30 blocks. Which? A score puts blocks in order, and the first 20 go. Yours is the damage of step 2. Another needs
# no text at all: [ZD](../glossary.md#zd), the share of weights with z > 1. Its authors
# ([Dumitru and others](https://arxiv.org/abs/2406.17415)) lower blocks with **large** ZD first.
#
# ### Exercise 5: a score without data
#
# ●●○ difficulty, ●●○ importance, 4 minutes, code. z is a weight minus the mean of its matrix, divided by the matrix's [standard deviation](../glossary.md#standard-deviation).


# %% tags=["exercise"]
def zd(weights):
    """weights: matrices. Return the share of all their weights that have z > 1, with z from their own matrix."""
    ...  # two lines: count z > 1 in all matrices; divide by the number of all weights


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `(w - w.mean()) / w.std()` is z; `(z > 1).sum()` counts; `w.numel()` is the number of weights.
# </details>

# %% tags=["check"]
zd = check.zd(zd)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def zd(weights):
#     above = sum(((w - w.mean()) / w.std() > 1).sum() for w in weights)
#     return float(above) / sum(w.numel() for w in weights)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 5, 4 minutes.** In a bell curve the share is 0.159. Which way round is the score? Larger: less important.
# - **Wrong:** `abs`: “both ends?” One mean for all matrices: “is a small matrix then ever above?” Mean of shares: “does k count as much as up?”
# - **Expect:** damage 0.80, ZD 1.85, first 1.78, last 1.72; 20 random orders 0.97 to 2.05; 20 that spare block 11 0.79 to 1.46, one of
# them better than damage; half of the lead (0.64) is left (0.1 up or down each).

# %% tags=["prediction"]
guess = lessons.predict(
    "20 of 30 blocks at 3 bits. Which score does better than both “first blocks first” and “last blocks first”?",
    ["Both damage and ZD", "Damage alone", "ZD alone", "Neither"],
)
guess

# %%
n, k = n_layers, 2 * n_layers // 3
clean = loss(model, others)  # texts that chose nothing


def rise_of(order):
    """Rise of the loss with the first k blocks of an order at 3 bits."""
    return float((loss_with(model, others, lowered(*order[:k])) - clean).mean())


spread = torch.tensor([zd([weight.data for weight in matrices(model, block)]) for block in range(n)])
orders = {"least damage first": rises.mean(1).argsort().tolist(), "largest ZD first": (-spread).argsort().tolist()}
orders |= {"first blocks first": list(range(n)), "last blocks first": list(range(n))[::-1]}
drawn = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(20)]
found = {name: rise_of(order) for name, order in orders.items()}
chance = {"20 random orders": [rise_of(order) for order in drawn]}
guess.then(lambda: figures.against_chance(found, chance))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Both*, *ZD alone*: published scores ought to work. On this model ZD does not. *Neither*: with so few texts, a fair doubt. *Damage alone*: yes.
# </details>
#
# The two plain orders know nothing, so a score must beat the better one. Damage does. But see how far the random orders spread.

# %% tags=["prediction"]
guess = lessons.predict(
    f"Now the 20 random orders know one thing: never lower block {odd}. How much of damage's lead over chance is left?",
    ["Nearly all", "Between a fifth and two thirds", "Nearly nothing"],
)
guess

# %%
chance[f"20 that spare block {odd}"] = [rise_of([block for block in order if block != odd]) for order in drawn]
lead, left = (sum(values) / 20 - found["least damage first"] for values in chance.values())
print(f"lead over chance: {lead:.2f} nats; over chance that spares block {odd}: {left:.2f}, {left / lead:.0%} of it")
better = [sum(value < found["least damage first"] for value in values) for values in chance.values()]
print(f"random orders that beat damage: {better[0]} of 20; of those that spare block {odd}: {better[1]} of 20")
guess.then(lambda: figures.against_chance(found, chance))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Nearly all*: thirty numbers should say more than one. *Nearly nothing*: one block stood out so much. *In between*: yes, about half; with other
# random orders we saw a fifth. Most random orders that did badly had lowered this block.
# </details>
#
# So a large part of what the score knows is one block. And that block depends on the levels: where zero is one of them, as in study 05a,
# it costs nothing.

# %%
chosen = orders["least damage first"][:k]
together = (loss_with(model, mine, lowered(*chosen)) - whole).mean()
print(f"{k} blocks, your texts: {rises.mean(1)[chosen].sum():+.2f} nats added up, {together:+.2f} together")
print(f"{k} blocks, other texts: {found['least damage first']:+.2f}")

# %% [markdown]
# Single damages do not add up: together they hurt more. On other texts they hurt more still: you took the blocks that looked harmless
# on yours.

# %% [markdown]
# ## Does the kit see the same?
#
# Its rounding beside yours.

# %%
for name, blocks in {"the odd block": [odd], "the chosen blocks": chosen}.items():
    with lab.interventions.quantized(model, 3, group_size=64, layers=blocks):
        gap = (loss(model, others) - loss_with(model, others, lowered(*blocks))).abs().max()
    print(f"{name}: largest difference {gap:.1e}")
    assert gap < 1e-4

# %% [markdown]
# ## Play
#
# Drag the budget. Which rule keeps Madrid with the fewest bits? The
# [dynamic programme](../glossary.md#dynamic-programme) finds the least sum of single damages. Is it the least damage? Then beat it by
# hand: click a block.

# %%
spend.spend(model, ids[4:12])  # four texts measure single blocks, four others report

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. Rounding is four lines. Count the bits of low and step, and put the weights back exactly.
# 2. Damage is not spread evenly: here it is one block, one matrix, one token.
# 3. A score that beats chance may know one block, and nothing more.
#
# **Exit question.** “Our score beats 20 random orders.” Which two controls do you ask for? Write two sentences.

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** One point: the plain orders, first blocks first and last blocks first; a score must beat the better
# one. One point: random orders that spare the one or two blocks that everybody would spare; how much of the lead is left? (Also right: other
# texts to report than those that gave the score.) Wrong: “more random orders”.
