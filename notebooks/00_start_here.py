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
# # Start here: a model's depth in ten minutes
#
# **Question.** A language model turns a text into a prediction in many small steps, one block after the other. At which
# step does it "know" that Lyon is in France?
#
# **You need** Python, and a rough idea of what a language model is. No GPU, and no network once the model is on this
# machine (93 MB are downloaded the first time, and 540 MB kept).
#
# **It takes** about half a minute to run from top to bottom on two processor cores, and 2 GB of memory.
#
# The idea to measure depth this way is from Jin et al., "Exploring Concept Depth"
# ([arXiv 2404.07066](https://arxiv.org/abs/2404.07066)). The next notebook, `01_concept_depth`, does it properly.

# %% tags=["parameters"]
model_name = "smollm2-135m"  # or "gemma3-270m", a Hugging Face name, or a local folder
accept_license = False  # Gemma has terms of its own: see the README
seed = 0
quick = False  # True: fewer statements, for a first look or a test

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import lab

model = lab.load(model_name, accept_license=accept_license)
n_layers = model.cfg.n_layers
pd.Series(lab.models.facts(model), name="this model").to_frame()

# %% [markdown]
# ## A first plot
#
# We take statements such as "The city of Lyon is in France." and "The city of Lyon is in Peru.", look at the model's state
# after each block, and ask a simple classifier (a *probe*): from the numbers at this point alone, is the statement true? It learns on some
# cities and is tested on others.
#
# **What do you expect?** Make a guess before you run the cell.
#
# - (a) It works from the start: the words are all there.
# - (b) It works only at the very end, where the model has to answer.
# - (c) It starts somewhere in between.

# %%
first = lab.concept_depth.run(
    model, "cities", limit=160 if quick else 320, repeats=5, sites=("resid",), null=False, seed=seed
)
figure = first.plot()

# %% [markdown]
# **Things to notice**
#
# - *At depth 0* only the last token's own embedding is there. It is a full stop in true and false statements alike, so
#   the score must be one half. If you chose (a): the words are all there, but not at the place we look at. Something has
#   to carry them to the last token, and that takes blocks.
# - *In between* the score leaves the dotted lines: (c). (With `quick = True` there are too few statements to be sure.)
# - *At the end* the score is no higher than in the middle. If you chose (b): the last blocks prepare the next token, and
#   after a full stop that need not depend on whether the sentence was true.
# - The dotted red line is the same classifier on shuffled labels. One half should lie within its band. If it did
#   not, something would be leaking from the training statements to the test statements.
# - The bands are wide: there are few statements here. Notebook 01 uses all of them, and explains the three markers at the
#   bottom.

# %% [markdown]
# ## What is measured: the residual stream
#
# A model with $L$ blocks keeps one vector for each token. Block $l$ reads it, and *adds* two things to it: what its
# attention found at other tokens, and what its MLP made of that.
#
# $$\text{resid\_post}_l = \text{resid\_pre}_l + \text{attn\_out}_l + \text{mlp\_out}_l$$
#
# That vector is the **residual stream**. **Depth** $d$ is the stream after $d$ blocks: depth 0 is the embedding, depth
# $L$ is what goes into the final norm. Here it is for one sentence, with nothing but a hook that looks:

# %%
sentence = "The city of Lyon is in France."
ids = lab.texts.tokenize(model, [sentence]).ids.to(model.cfg.device)
with torch.inference_mode():
    logits, cache = model.run_with_cache(ids)
block = 3
before, after = cache[f"blocks.{block}.hook_resid_pre"], cache[f"blocks.{block}.hook_resid_post"]
added = cache[f"blocks.{block}.hook_attn_out"] + cache[f"blocks.{block}.hook_mlp_out"]
print("one vector a token:", tuple(before.shape), "= [example, position, d_model]")
print("largest difference between the two sides:", float((before + added - after).abs().max()))

# %% [markdown]
# The two sides agree, to the last digit or to rounding. So we may speak of what a block *adds*. How much is that, beside
# what is there already?

# %%
stream = torch.stack([cache[f"blocks.{b}.hook_resid_pre"][0, -1] for b in range(n_layers)])
added = torch.stack(
    [cache[f"blocks.{b}.hook_attn_out"][0, -1] + cache[f"blocks.{b}.hook_mlp_out"][0, -1] for b in range(n_layers)]
)
with lab.figures.classroom():
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    ax.semilogy(stream.norm(dim=-1).float().cpu(), "o-", color=lab.figures.BLUE, label="the stream that a block reads")
    ax.semilogy(added.norm(dim=-1).float().cpu(), "s--", color=lab.figures.ORANGE, label="what the block adds")
    ax.set(xlabel="block", ylabel="length of the vector (no unit)", title=f"last token of “{sentence}”")
    ax.grid(alpha=0.25)
    ax.legend()

# %% [markdown]
# ## What would the model say if it stopped here?
#
# The **logit lens** sends the stream of any depth through the model's own last steps (final norm and unembedding). It
# needs no training. We use TransformerLens's.
#
# **What do you expect** for "The capital of France is": does the right word come up early and stay, or only in the last
# few blocks?

# %%
from transformer_lens.tools.analysis import logit_lens

prompt, answer = "The capital of France is", " Paris"
prompt_ids = lab.texts.tokenize(model, [prompt]).ids.to(model.cfg.device)
with torch.inference_mode():
    lens = logit_lens(model, prompt_ids, targets=answer)
ranks = lens.rank_trajectory(answer).flatten()
with lab.figures.classroom():
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    ax.semilogy(torch.linspace(0, n_layers, len(ranks)), ranks.cpu() + 1, "o-", color=lab.figures.BLUE)
    ax.set(xlabel="depth", ylabel=f"rank of “{answer}” (1 = first)", title=prompt + " ...")
    ax.set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
    ax.invert_yaxis()
    ax.grid(alpha=0.25)

# %% [markdown]
# **Things to notice.** With the default model the word stays far behind for most of the blocks, and climbs to the front in
# the last quarter. The first plot asked another question of
# another text, and its answer came earlier. A lens asks what the model is about to *say*; a probe asks what can be *read*.
# Notebook 01 is about the second.

# %% [markdown]
# ## Can this be trusted?
#
# Everything above stands on hooks that read the right place and change nothing. `lab.check` tests that on the model that
# is loaded, against the same weights in plain Hugging Face: same logits, same states at every depth, padding that does
# not matter, and a patch that does just what it should.

# %%
health = lab.check(model)
assert health.ok.all(), "a check failed: look at the table before you trust a number"
health.style.format({"value": "{:.1e}", "limit": "{:.0e}"}, na_rep="").hide(axis="index")

# %% [markdown]
# ## Exercise: one place, two names
#
# The stream after block 4 is called `resid_post` of block 4. Which *depth* is that? And of which block is it the
# `resid_pre`? Give both numbers, as `(depth, block)`.

# %% tags=["exercise"]
your_answer = None  # for example (4, 4)


# %% tags=["check"]
def check_place(answer):
    if answer is None:
        return print("No answer yet: put two numbers into your_answer.")
    if not (isinstance(answer, tuple | list) and len(answer) == 2 and answer[1] in range(n_layers)):
        return print(f"Two numbers in brackets, please: (depth, block), with a block from 0 to {n_layers - 1}.")
    depth, next_block = answer
    if depth == 4:
        return print(
            "Depth counts the blocks that were passed, and blocks are counted from 0. After block 0, one is passed."
        )
    if next_block == 4:
        return print(
            "resid_pre of block 4 is what block 4 reads, before it added anything. Who reads what block 4 wrote?"
        )
    same = torch.equal(cache[f"blocks.{next_block}.hook_resid_pre"], cache["blocks.4.hook_resid_post"])
    if depth != 5 or not same:
        return print(
            "Not yet. Compare cache['blocks.4.hook_resid_post'] with other entries of the cache by torch.equal."
        )
    print("Yes. Depth d is resid_pre of block d and resid_post of block d - 1: one vector, two names.")
    return True


check_place(your_answer)

# %% tags=["solution"] jupyter={"outputs_hidden": true, "source_hidden": true}
assert check_place((5, 5))

# %% [markdown]
# ## Where next
#
# - `01_concept_depth`: facts, feelings and inferences at every depth, with the controls that make such a curve mean
#   something, and beside the published numbers.
# - Run this notebook again with another `model_name` in the parameters cell.
