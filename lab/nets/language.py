"""Language models of different depth that have read the same text with the same tokenizer: for maps between depths."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from lab import datasets, require
from lab.nets import training
from lab.texts import checked_texts


@dataclass(frozen=True)
class TextModel:
    """A small language model: `lab.load(folder)` reads it.

    loss: nats a word on held-out documents: untrained, trained, and unigram (word frequencies of the training text).
    about: parameters, steps and seconds of training.
    """

    folder: Path
    loss: dict[str, float]
    about: dict[str, Any]


def text_models(
    documents: Sequence[str] | None = None,
    *,
    n_layers: Sequence[int] = (4, 8),
    d_model: int = 64,
    n_words: int = 2000,
    steps: int = 400,
    batch: int = 16,
    length: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> dict[int, TextModel]:
    """Language models trained on the same text, in the same order; a real ratio of depths with nothing else different.

    They know little: a few hundred steps on some ten thousand sentences of a few kinds teach word order and which words go
    together, most of it from templates. About 35 s for four blocks and 75 s for eight, on one core.

    Args:
        documents: texts, at least 20; None takes the statements, two-hop queries (with answers) and prose that the kit ships.
        n_layers: one model for each number of blocks; the result has it as its key. d_model: width, a multiple of 16.
        n_words: words known, the most frequent ones; all others are one unknown word.
        steps, batch, length, learning_rate: AdamW steps on `batch` stretches of `length` words. Documents are shuffled
            and joined, each after a start token.
        seed: of the shuffle, the batches and the weights.
    """
    n_layers, d_model, seed = require.wholes("n_layers", n_layers, 1, 64), training.width(d_model), require.seed(seed)
    n_words, steps = require.whole("n_words", n_words, 2, 10**5), require.whole("steps", steps, 1, 10**6)
    batch, length = require.whole("batch", batch, 1, 10**4), require.whole("length", length, 2, 512)
    learning_rate = require.number("learning_rate", learning_rate, above=0)
    texts = _shipped_documents() if documents is None else checked_texts(documents, what="document")
    if len(texts) < 20:
        raise ValueError(f"{len(texts)} documents: give at least 20, of which a tenth is held out")
    parameters = {
        **{"d_model": d_model, "n_words": n_words, "steps": steps, "batch": batch, "length": length},
        **{"learning_rate": learning_rate, "seed": seed, "documents": len(texts)},
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    return {count: _text_model(texts, {"n_layers": count, **parameters}, progress=progress) for count in n_layers}


def _text_model(texts: list[str], parameters: dict[str, Any], *, progress: bool) -> TextModel:
    def make(folder: Path) -> dict[str, Any]:
        order, n_held = np.random.default_rng([parameters["seed"], 0]).permutation(len(texts)), max(1, len(texts) // 10)
        counts = Counter(word for i in order[n_held:] for word, _ in training.SPLITTER.pre_tokenize_str(texts[i]))
        known = sorted(counts, key=lambda word: (-counts[word], word))[: parameters["n_words"]]
        tokenizer = training.word_tokenizer([*training.SPECIAL, *known])
        held, train = (
            np.concatenate(tokenizer([texts[i] for i in part]).input_ids) for part in (order[:n_held], order[n_held:])
        )
        batch, length = parameters["batch"], parameters["length"]
        if min(len(train) // batch, len(held)) < length + 1:
            raise ValueError(
                f"{len(train)} words to train on and {len(held)} held out are too few for batches of {batch} x {length} "
                "words: give more text, or lower batch or length"
            )
        held = held[: len(held) // (length + 1) * (length + 1)].reshape(-1, length + 1)
        model, untrained, trained = _train(train, held, len(tokenizer), parameters, progress=progress)
        training.save(model, tokenizer, folder)
        frequency = np.bincount(train, minlength=len(tokenizer)) + 1.0  # one more, so that no word is impossible
        unigram = float(-np.log(frequency / frequency.sum())[held[:, 1:]].mean())
        return {"loss": {"untrained": untrained, "trained": trained, "unigram": unigram}, "steps": parameters["steps"]}

    folder, about = training.made("text", parameters, make)
    return TextModel(folder, about["loss"], about)


def _train(
    train: Int[np.ndarray, " word"],
    held: Int[np.ndarray, "stretch position"],
    n_tokens: int,
    parameters: dict[str, Any],
    *,
    progress: bool,
) -> tuple[LlamaForCausalLM, float, float]:
    """The model, and its loss on the held-out text before and after."""
    rng = np.random.default_rng([parameters["seed"], 1])  # the same stretches for every depth
    steps, length = parameters["steps"], parameters["length"]
    with training.run(n_tokens, parameters, steps, context=512, progress=progress) as run:
        untrained = _loss(run.model, held)
        for step in range(steps):
            starts = rng.integers(len(train) - length, size=parameters["batch"])
            ids = torch.tensor(train[starts[:, None] + np.arange(length + 1)])
            logits = run.model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            run.step(loss, step, steps, steps - 1, blocks=parameters["n_layers"], loss=f"{loss.item():.2f}")
        return run.model.eval(), untrained, _loss(run.model, held)


def _loss(model: LlamaForCausalLM, stretches: np.ndarray) -> float:
    """Mean nats a word."""
    total = 0.0
    with torch.inference_mode():
        for part in torch.tensor(stretches).split(32):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            total += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / stretches[:, 1:].size


def _shipped_documents() -> list[str]:
    """The statements of every set that ships, the two-hop queries with their answers, and the prose."""
    names = [name for name in datasets.names() if "/" not in name]  # a published set would be downloaded
    documents = [text for name in names for text in datasets.load(name).text.astype(str)]
    two_hop = datasets.load("two_hop")
    documents += [f"{text} {answer}." for text, answer in zip(two_hop.text, two_hop.e3, strict=True)]
    return documents + datasets.load("prose").text.tolist()
