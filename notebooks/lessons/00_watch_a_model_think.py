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
# # Lesson 0: watch a model think
#
# | | |
# |---|---|
# | **Question** | A model reads a sentence and says the next word. What would it say if it stopped earlier? |
# | **Time** | 15 minutes of class, 17 minutes of exercises |
# | **You will be able to** | write a [hook](../glossary.md#hook) that reads a model's [states](../glossary.md#state); turn a state into words; say why "late" alone is no evidence |
# | **You need** | Python, and a rough idea of what a language model is |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** Opening 3 minutes; step 1 with exercise 1, 8; step 2 with exercise 2, 6; ranks with exercise 3
# and the prediction, 9; play and exercise 4, 6. Short of time: leave out exercise 3, the lesson goes on with the kit's own answer.
# The longest wait comes behind the prediction: half of all the computing. Let them give reasons for their guess meanwhile.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", a Hugging Face name, or a local folder
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %%
import lab
from lab import lessons
from lab.lessons import watch
from lab.lessons import watching as check

lessons.start(class_mode=class_mode)
model = lab.load(model_name, accept_license=accept_license)
text = "He poured himself a glass of"
seen = watch.lens_map(model, text)
figure = watch.picture(seen, words=True)

# %% [markdown]
# A language model is a stack of [blocks](../glossary.md#block); this one has 30. For each word of the sentence it
# keeps one list of numbers, the state. Each block reads the states and changes them a little.
#
# Every cell shows which word would come next if the model stopped there. Read the last column from bottom to top:
# after "of" it goes from *which* to *water*, *liquid*, and at last *wine*.
#
# You will now build this picture yourself.

# %% [markdown]
# ## Step 1: look inside with a hook
#
# A **hook** is a function that the model calls in the middle of its work, with the state of that moment. This one looks
# and changes nothing.

# %%
import torch

n_blocks = model.cfg.n_layers
ids = lab.texts.tokenize(model, [text]).ids  # the sentence as numbers, one for each token


def look(state, hook):
    print(f"{hook.name}: {state.shape[1]} tokens, {state.shape[2]} numbers for each")


with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.3.hook_resid_pre", look), ("blocks.4.hook_resid_pre", look)]):
    model(ids)

# %% [markdown]
# `hook_resid_pre` is the state that a block reads. A [token](../glossary.md#token) is a piece of text, often a word.
# `hook.name` is **not** the name that you asked for: a hook has to remember by itself which [depth](../glossary.md#depth) it belongs to.
#
# ### Exercise 1: keep the states
#
# ●○○ difficulty, ●●● importance, 5 minutes, code. `keep(depth, states)` makes a hook that stores the states of all tokens
# in the dictionary `states`, under its depth.


# %% tags=["exercise"]
def keep(depth, states):
    def hook_fn(state, hook):  # state: [1, position, d_model]
        ...  # one line: store the states of the one text that is here

    return hook_fn


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `states[...] = ...`. The text is the first and only row of `state`. The inner function can see `depth`.
# </details>

# %% tags=["check"]
keep = check.keep(keep, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def keep(depth, states):
#     def hook_fn(state, hook):
#         states[depth] = state[0]
#
#     return hook_fn
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 5 minutes.** Let them read the two printed names aloud first: `blocks.3.hook_in`, not what was asked for.
# - **Wrong:** `states[hook.name]`: “which depth is that? Use the one that `keep` was called with.” `state` without `[0]`: “there is one text.”
# - **Expect:** `states.shape` is 31 x 6 x 576, exactly; later the largest difference to the kit's states is 0 (at most 0.001).

# %% [markdown]
# **Depth** counts the blocks that were passed. Depth 0 is what goes into the first block, depth 30 what comes out of
# the last.


# %%
def watch_states(model, ids):
    """The states [depth, position, d_model] of one text."""
    states = {}
    hooks = [(f"blocks.{depth}.hook_resid_pre", keep(depth, states)) for depth in range(n_blocks)]
    hooks.append((f"blocks.{n_blocks - 1}.hook_resid_post", keep(n_blocks, states)))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(ids)
    return torch.stack([states[depth] for depth in range(n_blocks + 1)])


states = watch_states(model, ids)
states.shape

# %% [markdown]
# ## Step 2: from a state to words
#
# After its last block a model brings the numbers to a common size (`model.ln_final`) and compares them with every word
# that it knows (`model.unembed`). The [logit lens](../glossary.md#logit-lens) does so with a state from any depth.
#
# ### Exercise 2: the lens
#
# ●○○ difficulty, ●●● importance, 4 minutes, code. [Norm](../glossary.md#final-norm), [unembed](../glossary.md#unembedding), then `.softmax(-1)`, which makes
# probabilities that add up to 1.


# %% tags=["exercise"]
def lens(states):
    with torch.no_grad():
        ...  # one line: return the probabilities of all words, [depth, position, d_vocab]


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Both are functions: `model.unembed(model.ln_final(...))`. The softmax comes last.
# </details>

# %% tags=["check"]
lens = check.lens(lens, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def lens(states):
#     with torch.no_grad():
#         return model.unembed(model.ln_final(states)).softmax(-1)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 4 minutes.** Two functions and a softmax; whoever asks what a norm is: it brings the numbers to one size.
# - **Wrong:** no `ln_final`: “what does the model do after its last block?” `.softmax(0)`: “what must add up to 1: the words, or the depths?”
# - **Expect:** the last words printed are *water* (depth 24), *hers* (27) and *wine* (30), exactly; difference to the kit's lens at most 0.00001.

# %%
probabilities = lens(states)
for depth in range(0, n_blocks + 1, 3):
    best = probabilities[depth, -1].argmax()
    print(f"depth {depth:2}: {model.tokenizer.decode(best)!r}")

# %% [markdown]
# In the lower half there are commas, blanks and pieces of words. The first picture left them out, because they hide the
# point. Here is all of it, from your own states:

# %%
from dataclasses import replace

figure = watch.picture(replace(seen, probabilities=probabilities), words=False)

# %% [markdown]
# ## Does the kit see the same?
#
# `lab` has functions for both steps, with [batches](../glossary.md#batch), checks and speed. They must give your numbers.

# %%
kit_states = lab.states.collect_states(model, [text], progress=False)["resid"].values[0]  # of the last token
kit_words = lab.lenses.readout(model, states, kind="probs")
print("states, largest difference:", float((torch.as_tensor(kit_states) - states[:, -1]).abs().max()))
print("lens, largest difference:  ", float((kit_words - probabilities).abs().max()))
assert torch.allclose(torch.as_tensor(kit_states), states[:, -1], atol=1e-3)
assert torch.allclose(kit_words, probabilities, atol=1e-5)

# %% [markdown]
# ## How late is late?
#
# The last word rises to the top in the last few blocks. Is all the thinking done there? Measure the **[rank](../glossary.md#rank)** of the word
# that the model says in the end. Rank 1 means: on top.
#
# ### Exercise 3: the rank of a word
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code.


# %% tags=["exercise"]
def rank(p, word):
    """p: [depth, d_vocab]; word: a number. Return [depth]: 1 where this word is the likeliest, 2 where it is second."""
    ...


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count the words that are likelier: `p > p[:, [word]]` is a table of true and false; `.sum(-1)` counts along a row.
# </details>

# %% tags=["check"]
rank = check.rank(rank)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def rank(p, word):
#     return (p > p[:, [word]]).sum(-1) + 1
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 5 minutes.** Do it by hand for .1, .6, .3: the last word is second.
# - **Wrong:** no `+ 1`: “which rank has the likeliest word?” `<` for `>`: “you count the words that are less likely.”
# - **Expect:** in the figure, half way up (depth 15): rank 14 (10 to 20) trained, about 110 (50 to 300) with random weights; both at 1 at the end.

# %% tags=["prediction"]
guess = lessons.predict(
    "Now a model of the same shape whose weights are random: it has learnt nothing. When does its final word get to rank 1?",
    ["Never: it has no final word", "At once, at depth 0", "At the end, just like the trained model"],
)
guess

# %%
twin = lab.models.random_twin(model)
prose = lab.datasets.load("prose").text.str.slice(0, 150)[:4]


def ranks_of_the_final_word(model):
    found = []
    for passage in prose:
        states = watch_states(model, lab.texts.tokenize(model, [passage]).ids)[:, 1:30]
        p = model.unembed(model.ln_final(states)).softmax(-1).detach()
        found += [rank(p[:, at], int(p[-1, at].argmax())) for at in range(p.shape[1])]
    return torch.stack(found, 1).float()  # [depth, position]


ranks = {"trained": ranks_of_the_final_word(model), "random weights": ranks_of_the_final_word(twin)}


# %%
def draw():
    return lab.lessons.watch.late(ranks)


guess.then(draw)

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Never*: a random model has a likeliest word too; it just means nothing. *At once*: its last state decides, and each block
# moves the state, so the first guess is not the last one. *At the end*: yes. In **any** stack of blocks the last state is
# most like the states just before it.
# </details>
#
# So "the answer comes late" is no evidence for thinking. What training adds is the gap between the two lines in the first
# half: the trained model has its word near the top early, the random one does not.

# %% [markdown]
# ## Play
#
# In pairs: type a sentence of your own. Find one whose last word is there early, and one that changes its mind.
# Sentences that work: *Neil Armstrong was the first man to walk on the*, *He is very tall, but his brother is very*.

# %%
watch.watch(model, text)

# %% [markdown]
# ### Exercise 4: the lowest row
#
# ●●○ difficulty, ●●○ importance, 3 minutes, question. Here is the map of the random model. At depth 0 the lens often repeats
# the word that was just read: *glass* over "glass". Why?
#
# (a) The model expects that people say words twice. (b) At depth 0 the state is the word's own entry in the
# table of words, and the lens compares it with that same table. (c) Training put the word there, to remember it.

# %%
figure = watch.picture(watch.lens_map(twin, text), words=True)

# %% tags=["exercise"]
why_repeated = ...  # "a", "b" or "c"

# %% tags=["check"]
why_repeated = check.why_repeated(why_repeated)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `why_repeated = "b"`. In this model both tables are the same one, and a word is most like itself.
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 3 minutes.** Ask first: how many blocks has a state at depth 0 passed?
# - **Wrong:** (a): “no block has run, so nothing can expect anything.” (c): “these weights are random, and the word is there too.”
# - **Expect:** b. In the random map *glass* stands over “glass” at depth 0 with about 0.49, *poured* with 0.60 (0.4 to 0.7).

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. A hook is a function that the model calls at one place; it can keep what it sees.
# 2. The logit lens says what a state would become if the model stopped there.
# 3. A curve means something only beside its [control](../glossary.md#control): the same with [random weights](../glossary.md#random-twin).
#
# **Exit question.** *Wine* is not in the map at depth 15. Does the model not know it there? Write two sentences.
#
# Next: lesson 1, which can read more than what is about to be said.

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** A good answer has two parts, one point each. The lens shows only what the model would **say** if it
# stopped at depth 15. So “not in the map” is not “not there”: the state may hold it in a form that later blocks read, which needs another
# test (a probe, a patch). Wrong: “it comes late, so it is computed late”: a random model's word comes late as well.
