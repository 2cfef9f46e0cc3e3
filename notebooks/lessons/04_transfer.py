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
# # Lesson 4: take half a net along
#
# | | |
# |---|---|
# | **Question** | A net has learnt one task. What are its first [layers](../glossary.md#layer) worth for another task? |
# | **Time** | 25 minutes of class, 27 minutes of exercises |
# | **You will be able to** | train a net with [frozen](../glossary.md#freeze) layers; compare nets pair by pair; say which two numbers a [transfer](../glossary.md#transfer) result needs beside it |
# | **You need** | lesson 0 ([hooks](../glossary.md#hook)), and a rough idea of how a net is trained |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** Opening 3 minutes; step 1 with exercise 1 and two predictions, 17; step 2 with exercises 2 and 3, 14; step 3
# with exercise 4, 8; step 4 with exercise 5, 6; play, 4. Short of time: leave out exercise 3. The waits are some seconds each; the
# longest is near the end, where the kit's numbers are held beside theirs.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", a Hugging Face name, or a local folder
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %%
import torch

import lab
from lab import lessons
from lab.lessons import carry, nets
from lab.lessons import transfer as check

lessons.start(class_mode=class_mode)
torch.set_num_threads(1)  # nets as small as these are fastest on one core
splits = nets.tasks_of(12)
figure = carry.digits(splits[0])

# %% [markdown]
# Two tasks: A has five of the ten digits, B the other five. The images are noisy and few, 30 of each digit: so chosen that
# no net gets everything right. We split the digits at random, twelve times. In each split one net learns A and one learns
# B. Then we copy the first n layers of a net, put new layers on top, and train those on B. The copied layers are
# frozen: training does not change them. The names come from
# [Yosinski et al.](https://arxiv.org/abs/1411.1792): **[BnB](../glossary.md#anb-and-bnb)** has layers of B's own net, **AnB** layers of A's net.
#
# ## Step 1: train with frozen layers
#
# A net here is a list of six layers, each a table of [weights](../glossary.md#weights). Twelve nets train side by side, one for each split: the first
# axis of everything is the net.


# %%
def forward(weights, x):
    """x: [net, image, pixel]. What each net says of its own images: [net, image, class]."""
    for layer in weights[:-1]:
        x = torch.relu(x @ layer[:, :-1] + layer[:, -1:])  # the last row is the bias
    return x @ weights[-1][:, :-1] + weights[-1][:, -1:]


def loss_of(logits, y):
    """Mean over the images of a net, summed over nets."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]


# %% [markdown]
# ### Exercise 1: frozen layers
#
# ●●○ difficulty, ●●● importance, 8 minutes, code. Fill the three gaps.


# %% tags=["exercise"]
def train(weights, x, y, frozen=0, steps=150):
    """weights: six layers. Return six layers: the first `frozen` as they were, the others trained."""
    free = ...  # a list: a copy of each layer that may change, which asks for its gradient
    optimizer = torch.optim.AdamW(free, lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        loss = loss_of(forward(..., x), y)  # the frozen layers first, then the free ones
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ...  # all six layers, without gradients


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `weights[frozen:]` may change. A copy that asks for its gradient: `layer.clone().requires_grad_()`. Two lists become one
# with `[*one, *other]`. Without gradients: `layer.detach()`.
# </details>

# %% tags=["check"]
train = check.train(train)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def train(weights, x, y, frozen=0, steps=150):
#     free = [layer.clone().requires_grad_() for layer in weights[frozen:]]
#     optimizer = torch.optim.AdamW(free, lr=3e-3, weight_decay=0.01)
#     for _ in range(steps):
#         loss = loss_of(forward([*weights[:frozen], *free], x), y)
#         optimizer.zero_grad()
#         loss.backward()
#         optimizer.step()
#     return [*weights[:frozen], *(layer.detach() for layer in free)]
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 8 minutes.** Three gaps; the middle one is the point: frozen layers run, too, but do not learn.
# - **Wrong:** no `.clone()`: “which nets start from these weights later?” `weights[:frozen]` trained: “which of them stay?” No `.detach()`:
# “what would the next training pull on?”
# - **Expect:** A 0.85 and B 0.86 right (0.02 up or down), where chance is 0.2.

# %%
a, b = nets.halves(splits)
net_a, net_b = train(nets.fresh(1), a.x, a.y), train(nets.fresh(2), b.x, b.y)
print(
    f"share of test images right, chance 0.2: A {nets.right(net_a, a).mean():.2f}, B {nets.right(net_b, b).mean():.2f}"
)

# %% tags=["prediction"]
guess = lessons.predict(
    "Layers of A's net (AnB) against layers of B's own net (BnB), n = 1 to 5 of 6. What happens on B?",
    [
        "First layers see strokes, and strokes are strokes: no gap until the middle",
        "A gap from the first layer on, and it grows",
        "No gap: the new layers on top learn to use what they get",
    ],
)
guess

# %%
top = nets.fresh(3)  # the new layers: the same in every comparison
found = {("base", 0): nets.right(train(top, b.x, b.y), b)}


def measure(name, source, frozen=True):
    """Share right on B of each split, with the first n layers of `source`."""
    for n in range(1, 6):
        net = train([*source[:n], *top[n:]], b.x, b.y, frozen=n if frozen else 0)
        found[name, n] = nets.right(net, b)


measure("BnB", net_b)
measure("AnB", net_a)
guess.then(lambda: carry.lines(found))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *No gap until the middle*: so first layers are often pictured. *No gap*: the new layers do learn, but they cannot bring back
# what the frozen ones have thrown away. *From the first layer on*: yes, here.
# </details>
#
# At n = 3 AnB still gets about 0.7 right, far above [chance](../glossary.md#chance). So A's features help with B? Ask a [control](../glossary.md#control).

# %% tags=["prediction"]
control = lessons.predict(
    "Now the frozen layers are RANDOM: they have learnt nothing. How much of B is right?",
    [
        "Chance: nothing can be read from random layers",
        "About half way between chance and AnB",
        "A few points less than AnB",
    ],
)
control

# %%
measure("random", nets.fresh(4))
control.then(lambda: carry.lines(found, ["BnB", "AnB", "random"]))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Chance*: random layers do not understand digits, but different images stay different, and the layers on top learn the rest.
# *Half way* gives them too little credit. *A few points*: yes. Frozen random layers lose little more than A's layers do.
# </details>
#
# Most of what AnB gets right is no merit of A. Only AnB minus random is.
#
# ## Step 2: pair by pair
#
# The dots overlap, because some splits are harder than others. So compare within a split: a
# [paired difference](../glossary.md#paired-difference) with its [interval](../glossary.md#interval).
#
# ### Exercise 2: the paired difference
#
# ●●○ difficulty, ●●● importance, 6 minutes, code. The 95 % interval of a mean runs from mean - reach to mean + reach; reach is `T` times the
# [standard deviation](../glossary.md#standard-deviation) (`ddof=1`) of the differences, divided by the root of their number.

# %%
from scipy import stats

T = stats.t.ppf(0.975, len(splits) - 1)  # 2.2 for twelve splits


# %% tags=["exercise"]
def paired(first, second):
    """first, second: shares right [split]. Return (mean, reach) of first - second in points: a share of 0.01 is 1 point."""
    ...


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# First `100 * (first - second)`, one number for each split. Then `.mean()` and `.std(ddof=1)` of that.
# </details>

# %% tags=["check"]
paired = check.paired(paired)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def paired(first, second):
#     points = 100 * (first - second)
#     return points.mean(), T * points.std(ddof=1) / len(points) ** 0.5
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 6 minutes.** Let them subtract split by split first: hard splits are hard for both.
# - **Wrong:** two standard deviations put together: “why are the dots so wide?” 1.96 for `T`: “how many splits are there?” Shares: “times 100.”
# - **Expect:** BnB - AnB 4.1, 9.6, 15.3, 19.4, 24.1 points (reach 1.6 to 2.8), AnB - random 2.2, 5.0, 6.0, 7.1, 6.5 (1.8 to 3.1); on another
# computer each mean may differ by 1.

# %%
gaps = [paired(found["BnB", n], found["AnB", n]) for n in range(1, 6)]
merits = [paired(found["AnB", n], found["random", n]) for n in range(1, 6)]
for n, (gap, merit) in enumerate(zip(gaps, merits, strict=True), start=1):
    print(f"n = {n}: BnB - AnB {gap[0]:+5.1f} +- {gap[1]:.1f}   AnB - random {merit[0]:+5.1f} +- {merit[1]:.1f} points")

# %% [markdown]
# BnB minus AnB is called [specificity](../glossary.md#specificity): what is lost because the layers are A's. [n\*](../glossary.md#n) is the first n from
# which on it stays above 0.
#
# ### Exercise 3: n\*
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code.


# %% tags=["exercise"]
def n_star(lows):
    """lows: lower ends of the intervals for n = 1, 2, ... Return the first n at which, and after which, ALL are above 0, or None."""
    ...


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# For each place, look at the rest of the list: `all(low > 0 for low in lows[place:])`. Places count from 0, n from 1.
# </details>

# %% tags=["check"]
n_star = check.n_star(n_star)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def n_star(lows):
#     for place in range(len(lows)):
#         if all(low > 0 for low in lows[place:]):
#             return place + 1
#     return None
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 5 minutes.** Try -1, 2, -0.5, 1, 3 by hand: the answer is 4.
# - **Wrong:** the first above 0: “and what comes after it?” Counting from 0: “which n does the first entry belong to?” The last above 0: “from **where** on?”
# - **Expect:** 1, exactly. (For AnB - random the first interval just touches 0, so there it is 2 or 1.)

# %%
print("n* =", n_star([mean - reach for mean, reach in gaps]))

# %% tags=["prediction"]
theirs = lessons.predict(
    "Yosinski et al. took halves of ImageNet, 500 classes each, and 8 layers. Their BnB - AnB, by the share of layers copied?",
    ["Like ours: from the first layer on", "Near 0 until the middle, then it rises", "Near 0 everywhere"],
)
theirs

# %%
theirs.then(lambda: carry.published(gaps))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Like ours*: one experiment, another size. *Near 0 until the middle*: yes. Perhaps a million images teach first layers
# what all images share. *Near 0 everywhere*: copying nearly all of the layers costs 8 points.
# </details>
#
# "First layers are general" is no law. It depends on data, layers and tasks; this comparison cannot say on which.
#
# ## Step 3: a language model
#
# May a language model get other first layers? Its [stream](../glossary.md#residual-stream) is one vector for each [token](../glossary.md#token). We
# run a donor, take its stream at some [depth](../glossary.md#depth), and put it into the model: a [graft](../glossary.md#graft), on one
# text. Its [loss](../glossary.md#loss) says how well it still predicts the next words.

# %%
model = lab.load(model_name, accept_license=accept_license)
twin = lab.models.random_twin(model)  # the same shape, random weights

# %% [markdown]
# ### Exercise 4: the graft
#
# ●○○ difficulty, ●●● importance, 4 minutes, code. A hook that returns something puts it in the place of the [state](../glossary.md#state).


# %% tags=["exercise"]
def graft(donor):
    """donor: [position, d_model]. Make a hook that puts the donor's stream in the place of the model's own."""

    def hook_fn(state, hook):  # state: [1, position, d_model]; do not write into it, others may hold it
        ...

    return hook_fn


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Copy with `state.clone()`, write the donor into row 0, and return the copy.
# </details>

# %% tags=["check"]
graft = check.graft(graft, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def graft(donor):
#     def hook_fn(state, hook):
#         new = state.clone()
#         new[0] = donor
#         return new
#
#     return hook_fn
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 4 minutes.** The same three lines as in lesson 2, for all tokens at once.
# - **Wrong:** `state[:] = donor`: “who else holds that state?” `new[0, -1]`: “only the last token?” Own + donor: “it takes the place.”
# - **Expect:** loss 2.29 with nothing put in; itself 8.6 at depth 4, 2.4 to 4.6 at depths 8 to 24, 10.1 at depth 28 (0.1 up or down); random
# weights 9 to 17, where a blind guess has 10.8.

# %% tags=["prediction"]
which = lessons.predict(
    "Two donors: the model itself four blocks earlier (its blocks between are skipped), or a model with random weights.",
    [
        "Both ruin it: a block needs exactly what the one before wrote",
        "Itself costs little in the middle; random ruins it",
        "Both cost little",
    ],
)
which

# %%
ids = lab.texts.tokenize(
    model,
    ["Once upon a time there was a little girl who lived with her mother in a small house at the edge of the forest."],
).ids
own, other = (lab.runs.clean_run(donor, ids[0]).states for donor in (model, twin))  # [depth, position, d_model]


def loss_with(*hooks):
    """Mean loss of the text's next tokens in nats, with these hooks on the model."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        log_p = model(ids)[0].log_softmax(-1)
    return -float(log_p[:-1].gather(1, ids[0, 1:, None]).mean())


depths = range(4, model.cfg.n_layers, 4)
losses = {
    "itself, four blocks earlier": {d: loss_with((f"blocks.{d}.hook_resid_pre", graft(own[d - 4]))) for d in depths},
    "random weights": {d: loss_with((f"blocks.{d}.hook_resid_pre", graft(other[d]))) for d in depths},
}
blind = torch.tensor(float(model.cfg.d_vocab)).log().item()
which.then(lambda: carry.grafts(losses, clean=loss_with(), guess=blind))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Both ruin it*: true at both ends, where a block needs what its neighbour wrote. *Itself costs little*: yes, at most depths
# in the middle. *Both cost little*: so it was with digits, but there the layers on top were trained anew. Here nothing is.
# </details>
#
# ## Step 4: where does new knowledge sit?
#
# B's net learns a new task for a while: the pixels moved, new names for the classes, or the digits of A. Then we go back half
# of the way: the earlier a layer, the more of the change it keeps; or the later, the more. Which of these two nets is
# better, on average over the old task and the new one?
#
# ### Exercise 5: between two nets
#
# ●○○ difficulty, ●●○ importance, 4 minutes, code. Step 0 is the old layer, step 1 the new one.


# %% tags=["exercise"]
def between(old, new, steps):
    """old, new: lists of layers; steps: a number for each layer. Return the list of layers in between."""
    ...


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `old + step * (new - old)`, for each layer: `for x, y, s in zip(old, new, steps)`.
# </details>

# %% tags=["check"]
between = check.between(between)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def between(old, new, steps):
#     return [x + s * (y - x) for x, y, s in zip(old, new, steps)]
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 5, 4 minutes.** One line. Ask where step 0, 1 and one half are on the way.
# - **Wrong:** `old + step * new`: “where do you arrive at step 1?” One step for all: “which step has the third layer?”
# - **Expect:** moved pixels +10.8 points (reach 2.4), digits of A +6.0 (2.2), new names -0.6 (1.1): early is better, better, no difference; on
# another computer each may differ by 1.

# %% tags=["prediction"]
where = lessons.predict(
    "Where should the change be kept?",
    [
        "Late, for every new task: last layers are the specific ones",
        "Early for moved pixels, late for new names",
        "Early for moved pixels; for new names it makes no difference",
    ],
)
where

# %%
early, late = torch.linspace(1, 0, 6), torch.linspace(0, 1, 6)
tasks = {"moved pixels": nets.changed(b, "pixels"), "digits of A": a, "new names": nets.changed(b, "names")}
better = {}
for name, task in tasks.items():
    new = train(net_b, task.x, task.y, steps=60)
    score = [sum(nets.right(between(net_b, new, steps), one) for one in (b, task)) / 2 for steps in (early, late)]
    better[name] = score[0] - score[1]
where.then(lambda: carry.early_late(better))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Late* is a common rule, and the idea behind scaling updates by depth ([study](../studies/04b_merging.py)).
# *Late for new names*: only the last layer would have to change, but training changes all of them. *No difference*: yes, here.
# </details>
#
# ## Does the kit see the same?

# %%
from lab.transfer import statistics

measure("AnB_plus", net_a, frozen=False)
measure("BnB_plus", net_b, frozen=False)
curves = statistics.curves(nets.table(found))
kit = curves.query("curve == 'specificity'").sort_values("n")
with lab.interventions.patch(model, "resid_pre", layer=8, value=own[4][None]):
    patched = loss_with()
difference = max(abs(100 * kit.estimate.to_numpy() - [mean for mean, _ in gaps]))
reaches = max(abs(50 * (kit.high - kit.low).to_numpy() - [reach for _, reach in gaps]))
graft_difference = abs(patched - losses["itself, four blocks earlier"][8])
print(
    f"largest differences: mean {difference:.1e}, reach {reaches:.1e} points, loss with a graft {graft_difference:.1e} nats"
)
assert difference < 1e-6 and reaches < 0.01 and graft_difference < 1e-4
shown = curves[curves.curve.isin(["co_adaptation", "specificity", "over_random", "boost"])]
points = [f"{100 * row.estimate:+.1f} ± {50 * (row.high - row.low):.1f}" for row in shown.itertuples()]
shown.assign(points=points).pivot(index="curve", columns="n", values="points")

# %% [markdown]
# *over_random* is AnB minus random. The paper also has *[co_adaptation](../glossary.md#co-adaptation)* (base minus BnB) above 0 in the middle, and *[boost](../glossary.md#boost)*
# (A's layers trained on, minus B's trained on) above 0. In our nets neither stands out. The [study](../studies/04a_transfer.py) asks what the published boost was.
#
# ## Play
#
# In pairs: choose the five digits of B. Who finds the split with the smallest BnB - AnB? Bet before you press the button.

# %%
carry.carry()

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. Frozen layers from another task: compare with own layers **and** with random ones.
# 2. Compare within a split: what makes it easy or hard then cancels.
# 3. What is general depends on the tasks. So does where new knowledge sits.
#
# **Exit question.** "AnB reaches 0.78." Which two numbers do you ask for, and what would each of them say?
#
# Next: the [study](../studies/04a_transfer.py).

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** One point each, with what the number says. BnB, layers of B's own net cut at the same place: what is
# lost because the layers are A's (here 15 points at n = 3). Random layers: what the new layers on top manage alone, so what A's are worth
# (here 6 points). Both in the same splits, with an interval. Wrong: chance or the whole net alone.
