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
# # Lesson 2: send a later state back
#
# | | |
# |---|---|
# | **Question** | A [state](../glossary.md#state) from a later [layer](../glossary.md#layer), put back into an earlier one, brings out the answer. Was it the state? |
# | **Time** | 35 minutes of class, 30 minutes of exercises |
# | **You will be able to** | write a [patch](../glossary.md#patch); map all pairs of layers; choose [controls](../glossary.md#control) that can prove you wrong |
# | **You need** | [lesson 0](00_watch_a_model_think.py): [hooks](../glossary.md#hook) and states |

# %% [markdown] tags=["instructor"]
# **For instructors: the plan.** Opening 5 minutes; step 1 with exercises 1 and 2, 15; step 2 with exercise 3 and the prediction, 14;
# step 3 with exercises 4 to 6 and two predictions, 22; step 4 and play, 9. Short of time: leave out exercise 5; the map of Wangari
# Maathai comes all the same. Waits are short. Keep the tally of “play” on the board: it is what step 4 is about.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", a Hugging Face name, or a local folder
accept_license = False  # Gemma has terms of its own: see the README
class_mode = False  # True: a figure waits until you have predicted what it will show

# %%
import lab
from lab import lessons
from lab.lessons import back_patching as check
from lab.lessons import patch

lessons.start(class_mode=class_mode)
model = lab.load(model_name, accept_license=accept_license)
queries = lab.datasets.load("two_hop").set_index("example")
query = queries.loc["two_hop-1538"]
n_layers = model.cfg.n_layers
later, earlier = 19 * n_layers // 30, 6 * n_layers // 30  # 19 and 6 in a model of 30 layers
print(query.text, "... e1 (the name):", query.e1, "| e2 (the bridge):", query.e2, "| e3 (the answer):", query.e3)
figure = patch.opening(model, query, source=later, target=earlier)

# %% [markdown]
# This is a [two-hop query](../glossary.md#two-hop-query): which country (Italy), and what is its capital (Rome)? Asked one
# by one, the model knows both. Asked at once, it says "a", and Rome is third.
#
# Perhaps "Italy" is found only in late layers, and those that know capitals come before. So we take the
# state after layer 19 and put it back after layer 6, a
# [back-patch](../glossary.md#back-patching). Now it says Rome: 20 %, from 9 %. You will build this, and then try to prove it wrong.
#
# ## Step 1: one back-patch
#
# A hook that **returns** a state replaces what the model had.
#
# ### Exercise 1: the patch
#
# ●○○ difficulty, ●●● importance, 5 minutes, code.


# %% tags=["exercise"]
def put(position, vector):
    """A hook that replaces the state of one token by a vector [d_model]."""

    def hook_fn(state, hook):  # state: [1, position, d_model]
        ...  # copy the state, write the vector into the copy, return the copy

    return hook_fn


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `state.clone()` copies. `state[:, position] = ...` writes at one token.
# </details>

# %% tags=["check"]
put = check.put(put, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def put(position, vector):
#     def hook_fn(state, hook):
#         state = state.clone()
#         state[:, position] = vector
#         return state
#
#     return hook_fn
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 1, 5 minutes.** Three lines. Ask what a hook that returns nothing does: it only looks.
# - **Wrong:** no copy: “who else may hold this state?” `state[position] = ...`: “what is the first axis?” No return: “how shall the model know?”
# - **Expect:** the check says right; there is no number yet. In the opening figure Rome goes from 9 % to 20 % (1 point up or down).

# %% [markdown]
# ### Exercise 2: the next word
#
# ●○○ difficulty, ●●● importance, 5 minutes, code. `blocks.{target}.hook_resid_post` is what a layer gives to the next one.

# %%
import torch


# %% tags=["exercise"]
def patched(ids, position, target, vector):
    """The logits [d_vocab] of the next word, when `vector` stands after layer `target` at one position."""
    ...  # run model(ids) with your hook, and return the logits after the last token


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `with torch.no_grad(), model.hooks(fwd_hooks=[(name, hook)]):`. `model(ids)` gives [1, position, d_vocab].
# </details>

# %% tags=["check"]
patched = check.patched(patched, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def patched(ids, position, target, vector):
#     name = f"blocks.{target}.hook_resid_post"
#     with torch.no_grad(), model.hooks(fwd_hooks=[(name, put(position, vector))]):
#         return model(ids)[0, -1]
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 2, 5 minutes.** The name of the place must hold `target`; the hook is theirs from exercise 1.
# - **Wrong:** `model(ids)` outside the `with`: “when is your hook there?” `[0, 0]`: “the logits after which token?”
# - **Expect:** the next cell says *Rome*, *Rome*, *a*, *not*, exactly; later the difference to the kit's patch is at most 0.001.


# %% [markdown]
# Two [positions](../glossary.md#position) matter: **t1**, where the name ends, and **t2**, the last word.


# %%
def stream(text):
    """Ids [1, position] and states [depth, position, d_model], as in lesson 0."""
    ids = lab.texts.tokenize(model, [text]).ids
    return ids, lab.runs.clean_run(model, ids[0]).states.clone()


ids, states = stream(query.text)
places = lab.back_patching.places(model, query.text, query.e1)
t1, t2 = places["t1"], places["t2"]
rome = lab.texts.first_tokens(model, query.text, [query.e3])[0]
for source, target in ((later, earlier), (n_layers // 2, n_layers // 10), (n_layers // 4, 1), (n_layers - 3, 5)):
    logits = patched(ids, t1, target, states[source + 1, t1])
    print(f"after layer {source:2} put after {target}: the model says {model.tokenizer.decode(logits.argmax())!r}")

# %% [markdown]
# ## Step 2: all pairs
#
# Did we choose a lucky pair? Try them all. A [rank](../glossary.md#rank) of 1 means: this word is said.
#
# ### Exercise 3: the map
#
# ●●● difficulty, ●●● importance, 8 minutes, code. `vectors` has one vector per **[depth](../glossary.md#depth)**: `vectors[0]` stands before
# layer 0. Targets 0, 3, 6, ...; for each, the sources 3, 6, ... layers later.


# %% tags=["exercise"]
def rank_map(ids, position, vectors, word, step=3):
    """vectors: [depth, d_model]. Return [source, target]: the rank of `word`; nan where nothing was tried."""
    ranks = torch.full((n_layers, n_layers), torch.nan)
    ...  # for target 0, step, ... and each later source: put the vector of `source` after `target`; note the rank
    return ranks


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Two loops; the inner one is `range(target + step, n_layers, step)`. The rank is the number of words with a greater
# logit, plus 1. Which depth is the state after layer `source`?
# </details>

# %% tags=["check"]
rank_map = check.rank_map(rank_map, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def rank_map(ids, position, vectors, word, step=3):
#     ranks = torch.full((n_layers, n_layers), torch.nan)
#     for target in range(0, n_layers, step):
#         for source in range(target + step, n_layers, step):
#             logits = patched(ids, position, target, vectors[source + 1])
#             ranks[source, target] = (logits > logits[word]).sum() + 1
#     return ranks
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 3, 8 minutes.** The hardest one. Write on the board: `vectors[0]` stands **before** layer 0.
# - **Wrong:** `vectors[source]`: “which depth comes out of layer 3?” Sources before the target: “which way is back?” No `+ 1`: “rank 0?”
# - **Expect:** 14 of the 45 coarse pairs say Rome, and 107 of all 435, exactly (another processor may move a few by rounding).

# %% tags=["prediction"]
guess = lessons.predict(
    "There are 435 pairs of a later and an earlier layer. After how many of them does the model say Rome, patched at t1?",
    ["Fewer than 10", "About 100", "More than 300"],
)
guess

# %% [markdown]
# ### Does the kit see the same?
#
# `lab.interventions.patch` is your hook, and `lab.back_patching.sweep` tries all pairs at once. They must agree with you.

# %%
vector = states[later + 1, t1]
with torch.no_grad(), lab.interventions.patch(model, "resid_post", layer=earlier, value=vector, position=t1):
    theirs = model(ids)[0, -1]
off = (patched(ids, t1, earlier, vector) - theirs).abs().max()  # yours, outside of the kit's patch
print("one patch, logits, largest difference:", float(off))
assert off < 1e-3

coarse = rank_map(ids, t1, states[:, t1], rome)
whole = patch.grid(lab.back_patching.sweep(model, query.text, [query.e3], positions=[t1], max_new_tokens=1))
tried = coarse.isfinite()
off = ((whole - coarse).abs() / coarse)[tried].max()
print(f"{int(tried.sum())} pairs, ranks, largest difference: {float((whole - coarse)[tried].abs().max()):.0f}")
assert off < 0.05, "rounding may swap neighbours far down the list, no more"


# %%
def draw():
    return patch.maps({"yours, every third layer": coarse, "the kit's, every layer": whole}, query.e3, "Patched at t1")


guess.then(draw)

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *Fewer than 10*: a patch disturbs the model, and chance needs luck. *More than 300*: if the state knows, it should
# always help. *About 100*: yes, and they form one block: taken in the middle, put early.
# </details>
#
# ## Step 3: was it the state?
#
# Rome was close without a patch. Perhaps any shock brings it to the top.
#
# ### Exercise 4: as long, but random
#
# ●●○ difficulty, ●●● importance, 4 minutes, code.


# %% tags=["exercise"]
def random_like(vectors):
    """For each vector of [depth, d_model] one of the same length that points anywhere."""
    ...  # two lines: draw noise; give each row the length it should have


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.randn(vectors.shape)`, and `.norm(dim=-1, keepdim=True)` is the length of each row.
# </details>

# %% tags=["check"]
random_like = check.random_like(random_like)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def random_like(vectors):
#     noise = torch.randn(vectors.shape)
#     return noise / noise.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 4, 4 minutes.** Ask what a fair shock is: as long as the state, and with nothing of it inside.
# - **Wrong:** the state's own numbers mixed, `torch.rand` (all one sign), length 1: “is this as strong a push as the state itself?”
# - **Expect:** at t1 random vectors bring Rome after 0 to 7 of 435 pairs (7 in the lesson's first map), the state of Wangari Maathai after 1.

# %% [markdown]
# ### Exercise 5: somebody else's state
#
# ●●○ difficulty, ●●○ importance, 5 minutes, code. The second control takes the state of another query, at **its** t1 or t2.


# %% tags=["exercise"]
def lent(other, place):
    """The vectors [depth, d_model] of another query (it has .text and .e1) at its own place "t1" or "t2"."""
    ...  # stream(...) gives its states, lab.back_patching.places(...) where its t1 and t2 are


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `lab.back_patching.places(model, other.text, other.e1)[place]` is a position in the other text.
# </details>

# %% tags=["check"]
lent = check.lent(lent, model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def lent(other, place):
#     ids, states = stream(other.text)
#     position = lab.back_patching.places(model, other.text, other.e1)[place]
#     return states[:, position]
# ```
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 5, 5 minutes.** The other text is longer or shorter, so its t1 and t2 are elsewhere.
# - **Wrong:** `t1` of our own query: “where does **her** name end?” All tokens' states: “how many vectors does one patch need?”
# - **Expect:** at t1 Wangari Maathai's state brings Rome after 1 of 435 pairs; at t2 after 55, beside 52 with the own state and 0 to 3 with random ones.

# %% tags=["prediction"]
guess = lessons.predict(
    f"Own state: {patch.hits(whole)} say Rome. And random vectors, or the state of Wangari Maathai (Kenya), at t1?",
    ["About as many: a shock is enough", "About half as many", "Next to none: it was the state"],
)
guess

# %%
torch.manual_seed(0)
other = queries.loc["two_hop-0415"]


def three_maps(query, place):
    """Ranks of the answer, patched with the own later state, a random vector and another query's state."""
    ids, states = stream(query.text)
    at = lab.back_patching.places(model, query.text, query.e1)[place]
    word = lab.texts.first_tokens(model, query.text, [query.e3])[0]
    tried = {"its own later state": states[:, at], "random vectors": random_like(states[:, at])}
    tried[f"state of {other.e1}"] = lent(other, place)
    return {name: patch.rank_map(model, ids[0], at, vectors, word) for name, vectors in tried.items()}


at_t1 = three_maps(query, "t1")


# %%
def draw():
    return patch.maps(at_t1, query.e3, f"{query.e1}, patched at t1")


guess.then(draw)

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *As many*, *half*: Rome was near the top, and many shocks move a near word up. Here they do not. *Next to none*: yes.
# </details>
#
# At t1 it **is** the state; other draws of random vectors gave 0 to 7. Now the same at t2, the last word, "is".

# %% tags=["prediction"]
guess = lessons.predict(
    "At t2, how many pairs say Rome with the state of Wangari Maathai, whose capital is Nairobi?",
    ["None: it is a state about Kenya", "Far fewer than with the own state", "About as many as with the own state"],
)
guess

# %%
at_t2 = three_maps(query, "t2")


# %%
def draw():
    return patch.maps(at_t2, query.e3, f"{query.e1}, patched at t2")


guess.then(draw)

# %% [markdown]
# <details><summary>Why each answer was tempting</summary>
#
# *None*, *fewer*: at t1 it was so. But t2 can still look back at "Berlusconi" in the layers above the target.
# </details>
#
# Nor is she special: in a longer run, the states of ten other queries gave 38 to 151.
#
# ### Exercise 6: what was carried?
#
# ●●○ difficulty, ●●● importance, 3 minutes, question. What does a patch at **t2** do?
#
# (a) It carries "Rome" back. (b) It is a shock, and any shock brings Rome. (c) It carries no answer. It makes the model
# answer, with what it finds elsewhere.

# %% tags=["exercise"]
carried = ...  # "a", "b" or "c"

# %% tags=["check"]
carried = check.carried(carried)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `carried = "c"`. A state about Kenya can't carry Rome, and a random vector is a shock and fails.
# </details>

# %% [markdown] tags=["instructor"]
# **For instructors: exercise 6, 3 minutes.** Put the six numbers on the board, t1: 107, 7, 1; t2: 52, 0, 55. Let them argue in pairs.
# - **Wrong:** (a): “how can a state about Kenya carry Rome?” (b): “a random vector is a shock. How often did it work at t2?”
# - **Expect:** c. The next map, Vesuvius at t1: own state 87, random 105 (95 to 163 in other draws), Wangari Maathai 5. In play, Berlusconi's state in her
# query brings Rome after 230 pairs at t1 and after 1 at t2: content travels at t1, not at t2.

# %% [markdown]
# ## Step 4: count
#
# We chose this query **because** it works. Here is another one.

# %%
vesuvius = three_maps(queries.loc["two_hop-2715"], "t1")
figure = patch.maps(vesuvius, "Rome", "Mount Vesuvius, patched at t1")

# %% [markdown]
# Here random vectors do it as well. There are 219 queries whose two hops the model knows and whose whole it gets wrong. In a
# long run, made once, we patched each at t1 and t2 (438 maps; controls at t2 for 110 of them). The share of pairs that say the answer:
#
# | | own later state | control | difference in points (95 %) |
# |---|---|---|---|
# | t1, 219 queries | 1.9 % | random vectors: 2.0 % | -0.1 (-1.2 to 0.8) |
# | t2, 110 queries | 2.3 % | random vectors: 0.04 % | |
# | t2, 110 queries | 2.3 % | same relations, other query: 2.2 % | -0.1 (-0.3 to 0.3) |
#
# Where the [interval](../glossary.md#interval) in brackets holds 0, own and control cannot be told apart. Only 8 of the 438 maps had many
# hits and three times those of every control, Berlusconi's among them, all at t1: a real effect, and not the rule.

# %% [markdown]
# ## Play
#
# In pairs: take one query, both places, some random vectors. Write your counts on the board.
# Then put Berlusconi's state into Maathai's query ("a query of your own") and ask for Rome.

# %%
patch.patch(model)

# %%
lessons.summary()

# %% [markdown]
# **Key points**
#
# 1. "Some pair works" is the best of 435 tries. Give a control as many.
# 2. A random vector asks: was it a shock? Another query's state asks: was it *this* content?
# 3. A showcase shows that something can happen. Only a count shows how often.
#
# **Exit question.** A paper says: "66 % of failed queries are rescued by back-patching." Which two numbers do you ask for?
#
# Next: lesson 3, which leaves layers out.

# %% [markdown] tags=["instructor", "exit"]
# **For instructors: the exit question.** One point each. How many queries does a **control** rescue that has as many tries (random vectors,
# another query's state)? And what share of single pairs works, not of queries with at least one among hundreds (here 1.9 % of
# pairs)? As good: how the queries were chosen. Wrong: “a larger model”, which answers another question.
