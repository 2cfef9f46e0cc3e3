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
# # Lesson 1: at which depth can a concept be read?
#
# | | |
# |---|---|
# | **Question** | A model reads "The city of Lyon is in Peru." After how many [blocks](../glossary.md#block) can *we* read in its [states](../glossary.md#state) that this is false? |
# | **Time** | 32 minutes of class, 28 minutes of exercises |
# | **You will be able to** | collect the states of many texts with [hooks](../glossary.md#hook); train a [probe](../glossary.md#probe) at each [depth](../glossary.md#depth); tell a finding from a mistake of the split |
# | **You need** | [lesson 0](00_watch_a_model_think.py): hooks, states, depth |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** First figure and step 1 with exercise 1, 18 minutes; step 2 with exercise 2 and the prediction, 12;
# exercises 3 and 4 with the random weights, 14; exercise 5, 6; exercise 6 and play, 10. Short of time: leave out exercise 5.
# The longest waits: the first figure (the prediction before it needs the time anyway) and the twin's states behind exercise 4.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", a Hugging Face name, or a local folder
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %% [markdown]
# The next cell shows three kinds of statements. In the last two, nearly every word stands as often in statements of one
# [label](../glossary.md#label) as of the other: single words give nothing away.
#
# A **probe** is a small classifier. It gets the state of the last
# [token](../glossary.md#token), here mostly the full stop, and learns to tell the labels apart. Then it is tested on statements that it has not seen.

# %% tags=["prediction"]
import numpy as np
import torch
from IPython.display import display

import lab
from lab import lessons
from lab.lessons import concept_depth as check
from lab.lessons import read

lessons.start(class_mode=class_mode)
model = lab.load(model_name, accept_license=accept_license)
n_blocks = model.cfg.n_layers
display(read.examples())
guess = lessons.predict(
    "In which order do the three become readable as depth grows?",
    ["All at the same depth", "The word's feeling, the fact, the verdict", "The fact, the word's feeling, the verdict"],
)
guess

# %%
readings = {name: read.reading(model, name) for name in read.KINDS}  # the figure takes about half a minute
guess.then(lambda: read.three(readings))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *All at the same depth*: in every block the full stop can look at the whole sentence. But what it finds there depends on
# what earlier blocks have written. *The fact first*: it is short. But the model must know where Lyon is; the feeling
# stands in one word. The verdict comes last: it depends on which clause counts.
# </details>

# %%
for name, found in readings.items():
    print(f"{read.KINDS[name][0]:20} half way from one half to its top at depth {found.half_way}")

# %% [markdown]
# These are the **easy** statements of each kind, chosen so that a small model shows something. You will now
# build the curve of the fact yourself.

# %% [markdown]
# ## Step 1: the states of many texts
#
# A [batch](../glossary.md#batch) is a table of tokens. Shorter texts are filled up on the right. No token looks to its right, so the
# filling changes nothing; but in the last column most texts have only filling. `table[[0, 1, 2], [4, 6, 5]]` takes one entry from
# each row.
#
# ### Exercise 1: the last token's state
#
# ●●○ difficulty, ●●● importance, 8 minutes, code. Write the two missing pieces.


# %% tags=["exercise"]
def last_states(model, ids, last):
    """ids: [text, position]; last: [text], where each text ends. Return its states there, [text, depth, d_model]."""
    states = {}

    def keep(depth):
        def hook_fn(state, hook):  # state: [text, position, d_model]
            ...  # 1. store each text's state at its own last position

        return hook_fn

    hooks = ...  # 2. a list of (name, function), "blocks.0.hook_resid_pre" and so on, one for each block
    hooks.append((f"blocks.{n_blocks - 1}.hook_resid_post", keep(n_blocks)))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(ids)
    return torch.stack([states[depth] for depth in range(n_blocks + 1)], 1)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With `rows = torch.arange(len(ids))`, `state[rows, last]` takes one position from each row. A hook of block 3 is
# `("blocks.3.hook_resid_pre", keep(3))`.
# </details>

# %% tags=["check"]
last_states = check.last_states(last_states, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def last_states(model, ids, last):
#     states = {}
#
#     def keep(depth):
#         def hook_fn(state, hook):
#             states[depth] = state[torch.arange(len(ids)), last]
#
#         return hook_fn
#
#     hooks = [(f"blocks.{depth}.hook_resid_pre", keep(depth)) for depth in range(n_blocks)]
#     hooks.append((f"blocks.{n_blocks - 1}.hook_resid_post", keep(n_blocks)))
#     with torch.no_grad(), model.hooks(fwd_hooks=hooks):
#         model(ids)
#     return torch.stack([states[depth] for depth in range(n_blocks + 1)], 1)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 8 minutes.** Draw the table of tokens with its filling; the two pieces are independent of each other.
# - **Wrong:** `state[:, -1]`: “whose token is that in a short text?” `state[:, last]`: “that takes every `last` for every text; pair them.”
# - **Expect:** `states.shape` is 240 x 31 x 576, exactly; later the largest difference to the kit's states is below 0.02 (numbers go up to 640).


# %%
def all_states(model, texts, size=40):
    """The states of many texts, a batch at a time; texts of like length go together: less filling."""
    kept = np.zeros((len(texts), n_blocks + 1, model.cfg.d_model), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), size):
        rows = order[start : start + size]
        tokens = lab.texts.tokenize(model, [texts[i] for i in rows])
        kept[rows] = last_states(model, tokens.ids, torch.as_tensor(tokens.lengths - 1))
    return kept


table = readings["cities"].table
labels, groups = table.label.to_numpy(), table.group.to_numpy(str)
states = all_states(model, table.text.tolist())
states.shape

# %% [markdown]
# ## Step 2: the probe
#
# The probe draws one straight cut through the states: [logistic regression](../glossary.md#logistic-regression). It gives
# [log-odds](../glossary.md#log-odds): above 0 it says "true", and the further from 0, the surer it is.
#
# ### Exercise 2: a probe
#
# ●○○ difficulty, ●●● importance, 5 minutes, code.

# %%
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits


def new_probe():
    """Scaled states, then logistic regression; a small C makes it cautious."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))


# %% tags=["exercise"]
def probe(states, labels, train):
    """states: [text, d_model]; labels: [text]; train: [text], True where the probe may learn. Return log-odds, [text]."""
    ...  # make a new probe, fit it on the training texts, return the log-odds of all texts


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `cut = new_probe()`, `cut.fit(..., ...)`, `cut.decision_function(...)`. `states[train]` are the rows where `train` is True.
# </details>

# %% tags=["check"]
probe = check.probe(probe)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def probe(states, labels, train):
#     cut = new_probe()
#     cut.fit(states[train], labels[train])
#     return cut.decision_function(states)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 5 minutes.** Three lines. The check tries it on made-up data, so it takes no time.
# - **Wrong:** fitted on all texts: “what has it seen before the test?” `.predict`: “that says yes or no; how sure is it?”
# - **Expect:** at the end of the lesson the log-odds differ from the kit's by at most 0.05 (measured: 0.002; the largest is about 5).


# %%
def accuracy(states, labels, tests):
    """tests: [split, text], True = test. Return shares of right answers on test and training texts, each [split, depth]."""
    right = np.zeros((2, len(tests), n_blocks + 1))
    with threadpool_limits(1):  # for small fits one core is faster than two
        for split, depth in np.ndindex(right.shape[1:]):
            test = tests[split]
            hits = (probe(states[:, depth], labels, ~test) > 0) == labels
            right[:, split, depth] = hits[test].mean(), hits[~test].mean()
    return right


at_random = np.stack([np.random.default_rng(seed).random(len(labels)) < 0.4 for seed in range(6)])

# %% [markdown]
# As usual in machine learning, we split at random: 40 % of the statements are kept for the test, six times.

# %% tags=["prediction"]
guess = lessons.predict(
    "At depth 7 the first picture found nothing. Split at random: what share of unseen statements does the probe get right?",
    ["About one half: it has to guess", "Clearly more than one half", "Clearly less than one half"],
)
guess

# %%
random_split, _ = accuracy(states, labels, at_random)
blue, grey = (lab.figures.BLUE, "o", "-"), (lab.figures.GREY, "s", "-")
title = "Is the statement about a city true? (bands of solid lines: 95 %, six splits)"
guess.then(lambda: read.curves({"split at random": random_split}, [blue], title, mark=7, low=0))

# %%
print(f"depth 7: {random_split.mean(0)[7]:.2f} right")
table[groups == groups[0]][["text", "label"]]

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *One half*: this is what guessing gives, and what we should see. *More*: you know about leaks. A leak is the reason, but here
# it leads the probe astray. *Less*: yes. Exercise 3 asks why.
# </details>
#
# ### Exercise 3: worse than guessing
#
# ●●○ difficulty, ●●● importance, 4 minutes, question. The table shows a **group**: two cities with two
# countries, two true and two false. Suppose the first statement is in the test, the other three in training. Why does the probe fail?
#
# (a) The model believes the opposite at depth 7. (b) The probe has learnt by heart which words were false, and the partners
# that share words have the opposite label. (c) By [chance](../glossary.md#chance): six splits are few.

# %% tags=["exercise"]
why_below = ...  # "a", "b" or "c"

# %% tags=["check"]
why_below = check.why_below(why_below)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `why_below = "b"`. Of its three partners, two share a name with the test statement, and both have the other label.
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 4 minutes.** Let them cover the first row of the table and say what a probe learns from the other three.
# - **Wrong:** (a): “who showed the model the labels?” (c): “noise goes up as often as down; count the depths below one half.”
# - **Expect:** b. At depth 7 the share is 0.27 (0.25 to 0.30), and below 0.35 from depth 1 to 9.

# %% [markdown]
# ### Exercise 4: keep partners together
#
# ●●○ difficulty, ●●● importance, 5 minutes, code. [Split](../glossary.md#group-split) so that every group is on one side.


# %% tags=["exercise"]
def by_group(groups, seed):
    """groups: [text], names. Return [text]: True for all texts of 40 % of the groups, drawn at random."""
    ...  # three lines, the first: rng = np.random.default_rng(seed)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `np.unique(groups)` has each name once, `rng.permutation` mixes them. Take the first 40 %; `np.isin(groups, chosen)`.
# </details>

# %% tags=["check"]
by_group = check.by_group(by_group, groups, labels)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def by_group(groups, seed):
#     rng = np.random.default_rng(seed)
#     names = rng.permutation(np.unique(groups))
#     return np.isin(groups, names[: int(0.4 * len(names))])
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 5 minutes.** Ask: what do you draw, texts or names?
# - **Wrong:** a random choice of texts: “can a group stand on both sides?” True for training: “which side is 40 %?”
# - **Expect:** 24 of 60 groups in the test, exactly. By group 0.81 at its top, near depth 14 (0.75 to 0.85, by the draw); random weights 0.50
# (0.03 up or down); split at random, random weights fall to 0.22 (0.19 to 0.24).

# %% tags=["prediction"]
guess = lessons.predict(
    "A model with random weights knows no city. What does a probe of its states reach when we split AT RANDOM?",
    ["One half at every depth", "Less than one half, from depth 1 on", "Like the trained model: low, then high"],
)
guess

# %%
tests = np.stack([by_group(groups, seed) for seed in range(6)])
grouped, _ = accuracy(states, labels, tests)
twin = lab.models.random_twin(model)
twin_states = all_states(twin, table.text.tolist())
twin_random, _ = accuracy(twin_states, labels, at_random)
twin_grouped, _ = accuracy(twin_states, labels, tests)
lines = {"trained, by group": grouped, "random weights, by group": twin_grouped,
         "trained, split at random": random_split, "random weights, split at random": twin_random}  # fmt: skip
looks = [blue, grey, (*blue[:2], "--"), (*grey[:2], "--")]
guess.then(lambda: read.curves(lines, looks, title, low=0))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *One half*: no knowledge, no score; true if the split is by group. *Like the trained model*: then the rise
# would come from the split too. *Less*: yes. Even random weights keep words apart, and words are all that this mistake needs.
# </details>
#
# So the low score was made by **our split**, not by the model. By group, [random weights](../glossary.md#random-twin) stay at one half, and the trained model rises.

# %% [markdown]
# ## Step 3: can the probe learn anything at all?
#
# A probe with hundreds of [weights](../glossary.md#weights) may learn anything. So we ask for nonsense: the same [labels, shuffled](../glossary.md#shuffled-labels).
#
# ### Exercise 5: shuffled labels
#
# ●○○ difficulty, ●●○ importance, 3 minutes, code.


# %% tags=["exercise"]
def shuffled(labels, seed):
    """labels: [text]. Return the same labels in a random order; leave `labels` as it is."""
    ...  # one line


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `np.random.default_rng(seed)` has a method `permutation`, which returns a new array.
# </details>

# %% tags=["check"]
shuffled = check.shuffled(shuffled)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def shuffled(labels, seed):
#     return np.random.default_rng(seed).permutation(labels)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 5, 3 minutes.** One line. Ask what a shuffle must keep: as many of each label.
# - **Wrong:** `rng.shuffle`: “what does it return, and what happened to `labels`?” No seed: “would you get the same curve tomorrow?”
# - **Expect:** shuffled labels 0.83 in training at depth 15 and 0.47 on unseen texts; true labels 0.86 and 0.79 (each 0.04 up or down).

# %% tags=["prediction"]
guess = lessons.predict(
    "Shuffled labels mean nothing. What does the probe reach on the texts it was TRAINED on, and on unseen ones?",
    [
        "One half on both",
        "Much more than one half in training, one half on unseen texts",
        "Much more than one half on both",
    ],
)
guess

# %%
true = accuracy(states, labels, tests)
nonsense = np.stack([accuracy(states, shuffled(labels, s), tests[s : s + 1])[:, 0] for s in range(6)], 1)
lines = {"true labels, unseen texts": true[0], "shuffled labels, unseen texts": nonsense[0],
         "true labels, training texts": true[1], "shuffled labels, training texts": nonsense[1]}  # fmt: skip
orange = (lab.figures.ORANGE, "^", "-")
looks = [blue, orange, (*blue[:2], "--"), (*orange[:2], "--")]
guess.then(lambda: read.curves(lines, looks, title, low=0.2))

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *One half on both*: nonsense cannot be understood. But it can be learnt by heart, as the dashed line shows. *More on both*:
# that would mean that the texts leak. Only the score on unseen groups tells. At small depths nonsense is even learnt better
# than the truth: within a group, the words of true and false statements are the same, so words cannot tell them apart.
# </details>
#
# ### Exercise 6: what follows?
#
# ●●○ difficulty, ●●● importance, 3 minutes, question. At depth 15 the probe is right for most of the unseen statements.
# What follows?
#
# (a) The model uses this when it chooses its next word. (b) The model knows most of the facts. (c) The states of true
# and false statements differ in a way that also holds for other cities.

# %% tags=["exercise"]
what_follows = ...  # "a", "b" or "c"

# %% tags=["check"]
what_follows = check.what_follows(what_follows)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `what_follows = "c"`. Readable is not used: for that, one has to change the states (lesson 2).
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 6, 3 minutes.** The whole course stands on this one: readable is not used.
# - **Wrong:** (a): “did we change anything in the model?” (b): “who knew the labels, the model or the probe?”
# - **Expect:** c. At depth 15 the share on unseen groups is 0.79 (0.04 up or down).

# %% [markdown]
# ## Does the kit see the same?
#
# `lab` collects states and fits all probes of a depth together.

# %%
kit_states = readings["cities"].states
train = ~tests[0]
features = read.scaled(states, train)  # lab.probes fixes C = 1; these features make C = 0.01 of that
kit = lab.probes.probe_depths(features, labels, groups, splits=tests[:1], control=False, progress=False).decisions[0]
with threadpool_limits(1):
    own = np.stack([probe(states[:, depth], labels, train) for depth in range(n_blocks + 1)], 1)
print(
    f"states, largest difference:   {np.abs(kit_states - states).max():.2g} (largest number {np.abs(states).max():.0f})"
)
print(f"log-odds, largest difference: {np.abs(kit - own).max():.2g} (largest {np.abs(own).max():.1f})")
assert np.allclose(kit_states, states, rtol=1e-3, atol=2e-2)
assert np.allclose(kit, own, atol=5e-2)
try:
    lab.probes.probe_depths(states, labels, groups, splits=at_random)
except ValueError as error:
    print("Split at random, the kit refuses:", error)

# %% [markdown]
# ## Play
#
# In pairs. Probe for *a word's feeling*: from which depth on does "not" count? Then move the depth slider, and read what
# the probe is **sure of and wrong** about. Type your own, such as *The capital of France is Berlin.* for the fact. Find a true
# statement that no depth believes. (The examples that stand there were chosen because they work.)

# %%
read.read(model, readings)

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. A probe says at which depth something can be read with a straight cut. Readable is not used.
# 2. Statements that belong together stay on one side. A score below one half is a message about the split.
# 3. A curve needs its [controls](../glossary.md#control): random weights, and shuffled labels on unseen texts.
#
# **Exit question.** A colleague finds 0.28 at one depth and says: "here the model believes the opposite". What do you ask first?
# Write two sentences.
#
# Next: [lesson 2](02_back_patching.py) changes states. All statements: the [study](../studies/01_concept_depth.py).

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** One point for the split: do texts that share words, with opposite labels, stand on both sides?
# One point for a control: does a model with random weights fall below one half as well (here to 0.22)? Wrong: “more splits”, as every
# split of this kind fails alike; “the model is confused”, as nothing was asked of the model.
