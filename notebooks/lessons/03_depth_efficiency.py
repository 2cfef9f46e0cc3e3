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
# # Lesson 3: take a layer out. Who notices?
#
# | | |
# |---|---|
# | **Question** | If a [layer](../glossary.md#layer) can go, was it useless? |
# | **Time** | 20 minutes of class, 30 minutes of exercises |
# | **You will be able to** | leave out, swap and repeat layers with [hooks](../glossary.md#hook); find what a layer is for; spot a [control](../glossary.md#control) that cannot fail |
# | **You need** | [lesson 0](00_watch_a_model_think.py): [state](../glossary.md#state), hook, [depth](../glossary.md#depth) |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** Opening 3 minutes; step 1 with exercises 1 and 2 and the prediction, 17; step 2 with exercise 3, 9; step 3
# with exercises 4 and 5, 13; step 4 with exercise 6 and play, 8. Short of time: leave out exercise 6. The longest waits: the thirty runs
# behind exercise 2 and the two curves of step 3; let them write down a reason for their guess meanwhile.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", or a local folder; the text speaks of the first
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %%
import lab
from lab import lessons
from lab.lessons import depth_efficiency as check
from lab.lessons import layer_figures as figures
from lab.lessons import layers

lessons.start(class_mode=class_mode)
model = lab.load(model_name, accept_license=accept_license)
figure = figures.without_each(layers.one_out(model))

# %% [markdown]
# Each bar is the same model without one of its 30 layers (the [blocks](../glossary.md#block) of lesson 0).
# Without layer 24 it says *Cast* (Castile?), without layer 11 *not*. And without some layers it is *more* sure of
# Madrid than with all of them.
#
# This [prompt](../glossary.md#prompt) was chosen because it shows so much. You will use eight ordinary texts.

# %% [markdown]
# ## Step 1: a layer that does nothing
#
# A layer reads the state of each [token](../glossary.md#token) and adds something to it. To
# [skip](../glossary.md#skip) a layer, take what went in, and put it in the place of what comes out.
#
# ### Exercise 1: skip a layer
#
# ●●○ difficulty, ●●● importance, 8 minutes, code. A hook that **returns** something
# replaces the state.


# %% tags=["exercise"]
def without(layer, positions=slice(None)):
    """The hooks that leave a layer out at some positions (at all, if none are given)."""
    before = {}

    def remember(state, hook):  # what goes in: [text, position, d_model]
        before["state"] = ...

    def put_back(state, hook):  # what comes out: [text, position, d_model]
        ...  # three lines: copy it; at `positions`, overwrite the copy with what went in; return the copy

    return [(f"blocks.{layer}.hook_resid_pre", remember), (f"blocks.{layer}.hook_resid_post", put_back)]


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `state.clone()` is a copy. The first axis is the text, the second the position: `new[:, positions] = ...`.
# </details>

# %% tags=["check"]
without = check.without(without, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def without(layer, positions=slice(None)):
#     before = {}
#
#     def remember(state, hook):
#         before["state"] = state
#
#     def put_back(state, hook):
#         new = state.clone()
#         new[:, positions] = before["state"][:, positions]
#         return new
#
#     return [(f"blocks.{layer}.hook_resid_pre", remember), (f"blocks.{layer}.hook_resid_post", put_back)]
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 8 minutes.** Draw one layer with its two places; the first hook keeps, the second gives back.
# - **Wrong:** writing into `state` itself: “who else reads it?” `new[positions]`: “what is the first axis?” No return: “then nothing is replaced.”
# - **Expect:** in the figure behind exercise 2 the loss rises by more than 0.5 without layers 0, 1, 2, 11, 28 and 29: by 7.5, 3.0, 0.5, 2.6, 1.3
# and 0.9 (0.1 up or down; layer 2 is on the border).

# %% [markdown]
# ### Exercise 2: the loss
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code. The [loss](../glossary.md#loss) says how surprised a model
# is: minus the logarithm of the probability that it gave to the token that really came. Its unit is the
# [nat](../glossary.md#nat).

# %%
import torch


# %% tags=["exercise"]
def loss(model, ids, hooks=()):
    """ids: [text, position]. Return [text, position - 1]: the surprise at each token but the first."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        log_p = model(ids, use_cache=False).log_softmax(-1)  # [text, position, d_vocab]
    right = log_p.gather(...)  # what each position but the last gave to the token that came after it
    return -right


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# At position i the model predicts token i + 1: `log_p[:, :-1]` belongs to `ids[:, 1:]`. To pick along the last axis:
# `.gather(-1, index[:, :, None]).squeeze(-1)`.
# </details>

# %% tags=["check"]
loss = check.loss(loss, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def loss(model, ids, hooks=()):
#     with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
#         log_p = model(ids, use_cache=False).log_softmax(-1)
#     right = log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
#     return -right
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 5 minutes.** Write five tokens on the board, and under each what the model says there: one place off.
# - **Wrong:** `ids[:, :-1]`: “that asks how likely the token is that it just read.” A sign: “can a surprise be below zero?”
# - **Expect:** the mean of `whole` is 4.52 nats (0.05 up or down). The texts start in the middle of nothing, so it is high.

# %% tags=["prediction"]
guess = lessons.predict(
    "30 layers, one left out at a time. Without how many of them does the loss rise by more than half a nat?",
    ["Most: 20 or more", "About half", "Eight or fewer"],
)
guess

# %%
n_layers = model.cfg.n_layers
texts = lab.datasets.load("prose").text.str.slice(0, 150).tolist()[:8]
ids = lab.texts.tokenize(model, texts).ids[:, :24].to(model.cfg.device)  # eight texts, the first 24 tokens of each
whole = loss(model, ids)


def rise_without(layer, positions=slice(None)):
    """How much the loss rises, for each text."""
    return (loss(model, ids, without(layer, positions)) - whole).mean(1).cpu()


rises = torch.stack([rise_without(layer) for layer in range(n_layers)])  # [layer, text]
guess.then(lambda: figures.rise(rises))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Most*: each layer was trained to be where it is. *About half*: a fair guess. *Eight or fewer*: yes. The first layers
# and the last ones are missed, and one in the middle. A layer only adds to a state: without it the state is a little different,
# not broken.
# </details>
#
# ## Step 2: the odd one out
#
# Layer 11 stands alone in the middle. What is it for?

# %%
odd = 5 + int(rises[5:-5].mean(1).argmax())  # the most missed layer, ends left aside
norms = lab.runs.clean_run(model, ids[0]).states.norm(dim=-1)  # [depth, position]
print(f"layer {odd} takes the first token's state from length {norms[odd, 0]:.0f} to {norms[odd + 1, 0]:.0f};")
print(f"other tokens: from {norms[odd, 1:].median():.0f} to {norms[odd + 1, 1:].median():.0f}")

# %% tags=["prediction"]
guess = lessons.predict(
    "Layer 11 is left out at ONE token only. At which token does the loss of the text rise most?",
    ["At the first token", "At each token about the same", "At the latest ones, which know most"],
)
guess

# %% [markdown]
# ### Exercise 3: who looks at the first token?
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code. [Attention](../glossary.md#attention): each token spreads a share of 1
# over itself and the tokens before it. `hook_pattern` has the shares.


# %% tags=["exercise"]
def watch_first(layer, shares):
    def hook_fn(pattern, hook):  # [text, head, who looks, at whom]
        ...  # one line: shares[layer] = mean share that goes to token 0, over texts, heads and all later tokens

    return hook_fn


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Token 0 itself can look nowhere else: let "who looks" begin at 1. `.mean()` without an axis takes the mean of all.
# </details>

# %% tags=["check"]
watch_first = check.watch_first(watch_first, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def watch_first(layer, shares):
#     def hook_fn(pattern, hook):
#         shares[layer] = pattern[:, :, 1:, 0].mean()
#
#     return hook_fn
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 5 minutes.** Ask what token 0 can look at: only itself, with share 1.
# - **Wrong:** `pattern[:, :, :, 0]`: “who is counted there and has no choice?” `[:, :, 0, 1:]`: “who looks, and at whom?”
# - **Expect:** layers 13 to 29 give the first token 0.40 to 0.86 of their attention, without layer 11 at most 0.27 (0.03 up or down). Left out
# at the first token alone it costs 2.4 of the 2.6 nats, at all others 0.1.


# %%
def shares_of_first(hooks=()):
    shares = {}
    watchers = [(f"blocks.{layer}.attn.hook_pattern", watch_first(layer, shares)) for layer in range(n_layers)]
    loss(model, ids, [*hooks, *watchers])
    return {layer: float(share) for layer, share in shares.items()}


places = {"every token": slice(None), "the 1st": [0], "the 2nd": [1], "the 3rd": [2], "the 13th": [12]}
places["all but the 1st"] = slice(1, None)
by_place = {name: rise_without(odd, positions) for name, positions in places.items()}
shares = {"all layers": shares_of_first(), f"without layer {odd}": shares_of_first(without(odd))}
guess.then(lambda: figures.who_needs_it(by_place, shares, odd))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *The same*: that is what "a layer is important" suggests. *The latest*: they have read most. *The first*: yes. That token has
# read no other, so it is not its content that is missed.
# </details>
#
# Shares must add up to 1, so a [head](../glossary.md#head) with nothing to look for needs a place to look at: an
# [attention sink](../glossary.md#attention-sink). Layer 11 makes the first token that place for the layers above. Without it,
# from layer 13 on, tokens look at each other instead, and the loss rises.

# %% [markdown]
# ## Step 3: what do the words after it miss?
#
# [Csordás and others](https://arxiv.org/abs/2505.13898) find that later words hardly need what the second half of a model
# computes at earlier ones. To test it, leave a layer out at early tokens only (2 to 12; the first is spared, you know why), and
# measure after them.
#
# First, a control: a model with [random weights](../glossary.md#random-twin).

# %%
twin = lab.models.random_twin(model)
guessing = loss(twin, ids)
print(
    f"random weights: loss {guessing.mean():.2f}; a guess among all words: {torch.tensor(model.cfg.d_vocab).log():.2f}"
)
for layer in (0, odd):
    print(f"without layer {layer:2}: {(loss(twin, ids, without(layer)) - guessing).mean():+.2f}")

# %% [markdown]
# ### Exercise 4: a good control?
#
# ●○○ difficulty, ●●● importance, 3 minutes, question. With random weights the loss rises nowhere.
#
# (a) Good control: an untrained model's layers do nothing. (b) Bad control: this loss had no room to rise. (c) Bad control: one
# draw of random weights is not enough.

# %% tags=["exercise"]
good_control = ...  # "a", "b" or "c"

# %% tags=["check"]
good_control = check.good_control(good_control)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `good_control = "b"`. A model that guesses cannot get worse. A control must be able to come out either way.
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 3 minutes.** Ask what a loss of pure guessing is, before they read the printed numbers again.
# - **Wrong:** (a): “its layers do change the states; could the loss have shown it?” (c): “would a second draw have room to rise?”
# - **Expect:** b. Random weights 10.91 (0.1 up or down), a guess 10.80; without layers 0 and 11 it changes by 0.03 at most.

# %% [markdown]
# ### Exercise 5: a measure that can move
#
# ●●○ difficulty, ●●● importance, 5 minutes, code. What do **later** layers add? Take the difference between
# what a layer adds now and what it added before, in length, relative to before.


# %% tags=["exercise"]
def change(clean, other):
    """clean, other: states [depth, text, position, d_model]. Return [layer]: the mean over texts and positions."""
    ...  # two lines: what each layer adds, in both; the length of the difference by the length in `clean`


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `clean.diff(dim=0)` is what each layer adds. `.norm(dim=-1)` is a length. At the end, `.mean((1, 2))`.
# </details>

# %% tags=["check"]
change = check.change(change)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def change(clean, other):
#     before, now = clean.diff(dim=0), other.diff(dim=0)
#     return ((now - before).norm(dim=-1) / before.norm(dim=-1)).mean((1, 2))
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 5, 5 minutes.** Two lines. A length of a difference, not a difference of lengths.
# - **Wrong:** states instead of what is added: “take `.diff` first.” Divided by `now`: “relative to which run?” Mean by mean: “for each token first.”
# - **Expect:** 0.73, 0.48, 0.11, 0.19, 0.11, 0.00 for layers 0, 1, 5, 10, 15, 29 (0.02 up or down). Random weights: 0.91, 0.75, 0.36, 0.23, 0.19,
# 0.00 (0.05).


# %%
def states_after(model, ids, hooks=()):
    """States [depth, text, position, d_model] of the tokens from the 13th on."""
    states = []
    places = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    places.append(f"blocks.{n_layers - 1}.hook_resid_post")
    keep = [(place, lambda state, hook: states.append(state[:, 12:])) for place in places]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *keep]):
        model(ids, use_cache=False, logits_to_keep=1)
    return torch.stack(states)


def later_change(model, ids):
    """For each layer left out at tokens 2 to 12: the mean change of all layers after it."""
    clean = states_after(model, ids)
    changes = [change(clean, states_after(model, ids, without(s, slice(1, 12)))) for s in range(n_layers)]
    return [float(found[s + 1 :].mean()) for s, found in enumerate(changes[:-1])] + [0.0]  # none comes after the last


changes = {"trained": later_change(model, ids[:3])}
for layer in (0, 1, 5, 10, 15, n_layers - 1):
    print(f"layer {layer:2} left out: change of {changes['trained'][layer]:.2f} after it")

# %% [markdown]
# The later the layer, the less the words after it miss it. So the claim holds?

# %% tags=["prediction"]
guess = lessons.predict(
    "The same curve with random weights, which have learnt nothing about where to compute what:",
    ["Flat: every layer is missed alike", "Zero everywhere, like the loss", "It falls towards zero, too"],
)
guess

# %%
changes["random weights"] = later_change(twin, ids[:3])
guess.then(lambda: figures.later(changes))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Flat*: nothing tells its layers apart. *Zero*: the loss was. *It falls*: yes. Whatever a late layer adds at an early token reaches
# later tokens only through the few layers above it, and the last layer through none. In **any** such stack the curve ends at zero.
# </details>
#
# So the fall itself is no finding. What training adds is where and how fast: the trained line falls within the first
# three layers, and then runs **below** the untrained one.

# %% [markdown]
# ## Step 4: does the order matter?
#
# ### Exercise 6: run the layers in any order
#
# ●●○ difficulty, ●○○ importance, 4 minutes, code. `body.layers` is the list that the model runs, and
# `body.config.num_hidden_layers` says how many of it. A list may name a layer twice, or not at all.


# %% tags=["exercise"]
def loss_in_order(model, ids, order):
    body = model.original_model.model
    plain = body.layers
    try:
        ...  # three lines: body.layers = a torch.nn.ModuleList of plain[i]; the number; return the loss
    finally:
        body.layers, body.config.num_hidden_layers = plain, len(plain)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.nn.ModuleList([plain[i] for i in order])`, and `len(order)`.
# </details>

# %% tags=["check"]
loss_in_order = check.loss_in_order(loss_in_order, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def loss_in_order(model, ids, order):
#     body = model.original_model.model
#     plain = body.layers
#     try:
#         body.layers = torch.nn.ModuleList([plain[i] for i in order])
#         body.config.num_hidden_layers = len(order)
#         return loss(model, ids)
#     finally:
#         body.layers, body.config.num_hidden_layers = plain, len(plain)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 6, 4 minutes.** The trap is the number: a longer list is cut without a word.
# - **Wrong:** `num_hidden_layers` forgotten: “how many layers does it run?” `plain[order]`: “a list takes one place at a time.”
# - **Expect:** 14 and 15 swapped -0.03, 14 twice +0.10, the ten least missed left out +0.75 (one at a time +0.39 in all), ten backwards +4.4,
# 0 and 1 swapped +5.7, 28 and 29 swapped +4.4 (0.1 up or down each).

# %% tags=["prediction"]
guess = lessons.predict(
    "Which of these hurts most?",
    [
        "Two neighbours in the middle swapped",
        "The ten least missed layers left out together",
        "Layers 10 to 19 run backwards",
    ],
)
guess

# %%
n, m = n_layers, n_layers // 2 - 1  # m: a layer in the middle
least = sorted(rises.mean(1).argsort()[: n // 3].tolist())
orders = {
    f"{m} and {m + 1} swapped": [*range(m), m + 1, m, *range(m + 2, n)],
    f"{m} run twice": [*range(m + 1), *range(m, n)],
    f"without the {len(least)} least missed": [i for i in range(n) if i not in least],
    f"{m - 4} to {m + 5} backwards": [*range(m - 4), *range(m + 5, m - 5, -1), *range(m + 6, n)],
    "0 and 1 swapped": [1, 0, *range(2, n)],
    f"{n - 2} and {n - 1} swapped": [*range(n - 2), n - 1, n - 2],
}
costs = {name: (loss_in_order(model, ids, order) - whole).mean(1).cpu() for name, order in orders.items()}
print(f"{least}, one at a time: {rises[least].mean(1).sum():+.2f} nats in all")
guess.then(lambda: figures.orders(costs))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Swapped*: a program with two lines swapped breaks. These layers are no such lines: each adds to one shared state. *Left out*: a third of the
# model is gone, and it costs less than one might fear. *Backwards*: yes. Neighbours in the middle can change places; ten in a row
# can't, nor the first two, nor the last two.
# </details>
#
# Without the ten together, the loss rises by more than the sum of their single rises: not missed alone is not useless. (They were chosen on these
# texts, which makes the sum a little too small.)

# %% [markdown]
# ## Does the kit see the same?

# %%
from lab.depth_efficiency.effects import global_effects, skipped

few = ids[:2]
swap = {m: lambda x, step: step(x, layer=m + 1), m + 1: lambda x, step: step(x, layer=m)}
engines = {
    "skip": lab.interventions.skip(model, odd),
    "first token spared": lab.interventions.skip(model, odd, first=1),
    f"{m} and {m + 1} swapped": lab.interventions.rewritten(model, swap),
    f"{m} run twice": lab.interventions.rewritten(model, {m: lambda x, step: step(step(x))}),
}
own = {name: loss_in_order(model, few, orders[name]) for name in engines if name in orders}
own |= {"skip": loss(model, few, without(odd)), "first token spared": loss(model, few, without(odd, slice(1, None)))}
gaps = {}
for name, engine in engines.items():
    with engine:
        gaps[name] = loss(model, few) - own[name]
run = lab.runs.clean_run(model, few[0], sublayers=True)
(kit,) = global_effects(model, run, *skipped(model, run, "layer"), cuts=[12])  # [left out, layer, position]
mine = change(states_after(model, few[:1]), states_after(model, few[:1], without(odd, slice(1, 12))))
gaps["later change"] = mine.cpu() - torch.as_tensor(kit.contribution[odd]).mean(1)
for name, gap in gaps.items():
    print(f"{name}: largest difference {gap.abs().max():.1e}")
    assert gap.abs().max() < 1e-3

# %% [markdown]
# ## Play
#
# In pairs: click as many layers off as you can and keep Madrid. (Taking always the one
# that hurts least gets to about twelve.) Then swap two.

# %%
layers.layers(model, ids[:4])

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. Two hooks leave a layer out: remember what goes in, put it back.
# 2. "Not missed" is not "useless", and "missed" can be a matter of one token.
# 3. A control must be able to come out either way; a falling curve means something only beside a random model's.
#
# **Exit question.** Which part of the curve of step 3 would an untrained model show? Write two sentences.
#
# Next: lesson 4, what a layer is worth elsewhere.

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** One point: it falls towards zero, and the last layer is at exactly zero, in any such stack, because
# fewer and fewer layers come after. One point: what an untrained model would **not** show is the steep fall within the first three layers,
# and a line below the untrained one. Wrong: “none of it, it has learnt nothing”.
