"""Small models trained here, from scratch, in minutes on one CPU core: for questions that no ready model answers.

- `k_hop`: follows chains of 1 to k relations, where the answer to a longer chain needs more blocks. It is the positive
  control of a depth score: a score that does not grow with k on this model measures something else.
- `text_models`: models of different depth that have read the same text with the same tokenizer, for maps between depths.

All are Llama-shaped and are written in Hugging Face format with a word-level tokenizer, so that `lab.load(folder)` reads
them like any other model. A model is trained once: it is kept in the cache folder under a hash of its parameters, its
text, the versions of torch and transformers, and the number of the recipe below.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from jaxtyping import Int
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import datasets, require
from lab.cache import cache_folder, locked, room, writable
from lab.texts import checked_texts

# The world of the k-hop model: people, each with exactly one friend, one boss, and so on.
NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jade", "Kai", "Lea"),
    *("Max", "Nora", "Otto", "Pia", "Quinn", "Rosa", "Sam", "Tess", "Uma", "Vic", "Wren", "Yara"),
)
RELATIONS = ("friend", "boss", "doctor", "teacher", "rival", "neighbour", "tenant", "coach", "lawyer", "barber")
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_RECIPE = (
    1  # of the training below: a change that changes weights raises it, so that no old model is taken for a new one
)
_PASSED = 0.95  # accuracy that the k-hop model must have at every k


# --- chains of relations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KHop:
    """A trained k-hop model: `lab.load(folder)` reads it.

    prompts: one a row, all with the same number of tokens, the answer predicted at the last one. Columns k, text, answer,
        hop_0 (the person named) .. hop_K (whom each relation leads to; empty past k), new (the chain was kept out of
        training; the single facts, k = 1, cannot be). Token 0 is the start token, token 1 the person, token 1 + j the
        j-th relation; then full stops up to the last token, "is".
    accuracy: columns k, accuracy, n, on these prompts.
    about: parameters, steps and seconds of training.
    """

    folder: Path
    prompts: pd.DataFrame
    accuracy: pd.DataFrame
    about: dict[str, Any]


def k_hop(
    *,
    max_hops: int = 4,
    n_layers: int = 6,
    d_model: int = 64,
    n_names: int = 16,
    n_relations: int = 6,
    n_prompts: int = 200,
    batch: int = 256,
    max_steps: int = 2500,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> KHop:
    """A model that answers "Ada friend boss . . is" (Ada's friend's boss) in one forward pass, for 1 to `max_hops` hops.

    The world is `n_relations` random permutations of `n_names` people; the model has to keep it in its weights and gets
    no text but such chains. Why depth must grow with k: a relation is a table that a block's MLP can hold (96 entries by
    default), but to apply the second one the model must first have the result of the first one, so each hop costs a
    block; a table of whole chains would need n_names * n_relations^k entries. Permutations that do not commute leave
    no order-free short cut, and no answer is likelier than another (chance is 1 / n_names at every k). Yao et al. (arXiv
    2505.17923) find the same for facts held in weights: blocks grow with k. It is not a law: permutations can be
    composed pairwise in log2(k) blocks, a wide block can hold two hops, and a world of few names and relations is learnt
    by heart, chain by chain. Two things belong beside any claim: the accuracy on chains kept out of training, which
    only a model that composes can answer (returned), and the accuracy of shallower models. Measured with the defaults,
    k = 1, 2, 3, 4: 1.00, 1.00, 1.00, 1.00; after 1,000 steps with 1, 2 and 3 blocks 1.00, 0.45, 0.23, 0.07;
    1.00, 0.94, 0.91, 0.23; and 1.00, 1.00, 1.00, 0.72.

    All prompts have the same length, and a relation's place does not tell how many follow, so neither explains a
    difference between values of k. Trained on the answer alone (no loss on other tokens), with a curriculum: chains of
    k + 1 join when all shorter ones are right 9 times in 10. A tenth of all chains with k >= 2 is never trained on.

    Args:
        max_hops: longest chain, 1 to 8.
        n_layers: blocks. d_model: width, a multiple of 16; the MLP is four times as wide.
        n_names, n_relations: size of the world, up to 24 and 10.
        n_prompts: for each k, at most so many prompts are returned (k = 1 has n_names * n_relations).
        batch, max_steps, learning_rate: of AdamW; training ends earlier once every k is right 19 times in 20.
        seed: of the world, the chains and the weights. The same seed gives the same bits on the same kind of processor.
        progress: print an estimate and show a bar.

    Returns:
        KHop. With the defaults training takes about 3 minutes on one core, and no time when it was done before.

    Raises:
        ValueError: a size out of range.

    Warns:
        UserWarning: an accuracy below 0.95 at some k (also when the model is read back).
    """
    max_hops, n_layers = require.whole("max_hops", max_hops, 1, 8), require.whole("n_layers", n_layers, 1, 64)
    n_names, d_model = require.whole("n_names", n_names, 2, len(NAMES)), _width(d_model)
    n_relations = require.whole("n_relations", n_relations, 1, len(RELATIONS))
    n_prompts, batch = require.whole("n_prompts", n_prompts, 1, 10**6), require.whole("batch", batch, 1, 10**6)
    max_steps, seed = require.whole("max_steps", max_steps, 1, 10**6), require.seed(seed)
    learning_rate = require.number("learning_rate", learning_rate, above=0)
    if n_names * n_relations**max_hops > 10**8:
        raise ValueError(
            f"{n_names} names and {n_relations} relations make {n_names * n_relations**max_hops:.0e} chains of {max_hops} "
            "hops, and the list of those kept out of training holds 10^8: lower one of the three"
        )
    parameters = {
        **{"max_hops": max_hops, "n_layers": n_layers, "d_model": d_model, "n_names": n_names},
        **{"n_relations": n_relations, "n_prompts": n_prompts, "batch": batch, "max_steps": max_steps},
        **{"learning_rate": learning_rate, "seed": seed},
    }

    def make(folder: Path) -> dict[str, Any]:
        world = _World(max_hops, n_names, n_relations, seed)
        model, steps = _train_k_hop(world, parameters, progress=progress)
        prompts = world.prompts(n_prompts, seed)
        tokenizer = _word_tokenizer(world.words)
        _save(model, tokenizer, folder)
        ids = torch.tensor(tokenizer(prompts.text.tolist()).input_ids)
        with torch.inference_mode():
            said = model(input_ids=ids).logits[:, -1].argmax(-1)
        right = said.numpy() == np.array(tokenizer.convert_tokens_to_ids(prompts.answer.tolist()))
        accuracy = prompts.assign(right=right).groupby("k").right.agg(["mean", "size"]).reset_index()
        accuracy.columns = pd.Index(["k", "accuracy", "n"])
        prompts.to_csv(folder / "prompts.csv", index=False)
        accuracy.to_csv(folder / "accuracy.csv", index=False)
        return {"steps": steps}

    if progress:
        print(f"Training a model of {n_layers} blocks to follow 1 to {max_hops} relations, unless it is in the cache.")
    folder, about = _made_once("k_hop", parameters, make)
    accuracy = pd.read_csv(folder / "accuracy.csv")
    low = accuracy[accuracy.accuracy < _PASSED]
    if len(low):
        reached = ", ".join(f"{row.accuracy:.2f} at k = {row.k}" for row in low.itertuples())
        warnings.warn(
            f"the k-hop model is right less than {_PASSED:.0%} of the time: {reached}. Give it more blocks (n_layers), "
            "more max_steps, or shorter chains (max_hops)",
            stacklevel=2,
        )
    return KHop(folder, pd.read_csv(folder / "prompts.csv", keep_default_na=False), accuracy, about)


class _World:
    """Who is whose what, and chains through it as token ids."""

    def __init__(self, max_hops: int, n_names: int, n_relations: int, seed: int) -> None:
        self.hops, self.n, self.m = max_hops, n_names, n_relations
        rng = np.random.default_rng([seed, 0])
        self.table = np.stack([rng.permutation(n_names) for _ in range(n_relations)])  # [relation person]
        # whether a chain is kept out of training, for each number of hops, by its code (see `_code`)
        self.kept_out = [rng.random(n_names * n_relations**k) < 0.1 * (k > 1) for k in range(max_hops + 1)]
        for out in self.kept_out[2:]:
            if not out.any():  # in a very small world
                out[rng.integers(len(out))] = True
        self.words = [*_SPECIAL, *NAMES[:n_names], *RELATIONS[:n_relations], ".", "is"]

    def batch(
        self, k: Int[np.ndarray, " example"], rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, "kept position"], Int[np.ndarray, " kept"], Int[np.ndarray, " kept"]]:
        """Token ids, the answer's id, and k, of random chains with k[i] hops; chains kept out of training are dropped."""
        start, relations = rng.integers(self.n, size=len(k)), rng.integers(self.m, size=(len(k), self.hops))
        code, out = self._code(start, relations, k), np.zeros(len(k), bool)
        for hops in range(1, self.hops + 1):
            out[k == hops] = self.kept_out[hops][code[k == hops]]
        start, relations, k = start[~out], relations[~out], k[~out]
        return self._ids(start, relations, k), len(_SPECIAL) + self._follow(start, relations, k)[:, -1], k

    def prompts(self, n: int, seed: int) -> pd.DataFrame:
        """Chains kept out of training (for k = 1 all facts), at most n of each length, with whom each hop leads to."""
        rng, frames = np.random.default_rng([seed, 2]), []
        for k in range(1, self.hops + 1):
            codes = np.flatnonzero(self.kept_out[k]) if k > 1 else np.arange(self.n * self.m)
            codes = rng.permutation(codes)[:n]
            relations = np.zeros((len(codes), self.hops), int)
            start = codes % self.n
            for hop in range(k):
                relations[:, hop] = codes // self.n // self.m**hop % self.m
            hops = np.full(len(codes), k)
            visited = np.array(NAMES, object)[self._follow(start, relations, hops)]
            visited[:, k + 1 :] = ""
            words = np.array(self.words, object)[self._ids(start, relations, hops)]
            columns = {"k": hops, "text": [" ".join(row[1:]) for row in words], "answer": visited[:, k]}
            columns |= {f"hop_{i}": visited[:, i] for i in range(self.hops + 1)}
            frames.append(pd.DataFrame({**columns, "new": k > 1}))
        return pd.concat(frames, ignore_index=True)

    def _code(self, start: np.ndarray, relations: np.ndarray, k: np.ndarray) -> np.ndarray:
        """One number for each chain among those of its length: start + n (r_1 + m r_2 + m^2 r_3 ...)."""
        digits = np.where(np.arange(self.hops) < k[:, None], relations, 0)
        return start + self.n * (digits @ self.m ** np.arange(self.hops))

    def _follow(self, start: np.ndarray, relations: np.ndarray, k: np.ndarray) -> np.ndarray:
        """[example hop]: the person after 0, 1, ... hops; past k the person stays."""
        people = [start]
        for hop in range(self.hops):
            people.append(np.where(hop < k, self.table[relations[:, hop], people[-1]], people[-1]))
        return np.stack(people, 1)

    def _ids(self, start: np.ndarray, relations: np.ndarray, k: np.ndarray) -> np.ndarray:
        people, relation, stop, last = (
            len(_SPECIAL),
            len(_SPECIAL) + self.n,
            len(self.words) - 2,
            len(self.words) - 1,
        )
        middle = np.where(np.arange(self.hops) < k[:, None], relation + relations, stop)
        ends = np.ones((len(k), 1), int)
        return np.concatenate([ends * self.words.index("<s>"), people + start[:, None], middle, ends * last], 1)


def _train_k_hop(world: _World, parameters: dict[str, Any], *, progress: bool) -> tuple[LlamaForCausalLM, int]:
    """The trained model, and the number of steps it took."""
    batch, last_step, tail = parameters["batch"], parameters["max_steps"], min(200, parameters["max_steps"] // 2)
    rng = np.random.default_rng([parameters["seed"], 1])
    running, longest, end = np.zeros(world.hops + 1), 1, last_step
    with _repeatable(parameters["seed"]), _bar(last_step, progress) as bar:
        model = _llama(len(world.words), parameters["n_layers"], parameters["d_model"], context=64)
        optimizer = _adamw(model, parameters["learning_rate"])
        for step in range(last_step):
            if step >= end:
                break
            # as many of the newest length as of all lengths together, until there is no longer one
            any_length = rng.integers(1, longest + 1, batch)
            newest = (rng.random(batch) < 0.5) & (longest < world.hops)
            ids, answer, k = world.batch(np.where(newest, longest, any_length), rng)
            logits = model.lm_head(model.model(input_ids=torch.tensor(ids), use_cache=False).last_hidden_state[:, -1])
            loss = cross_entropy(logits, torch.tensor(answer))
            _step(model, optimizer, loss, parameters["learning_rate"] * _schedule(step, end, tail))
            right = logits.argmax(-1).numpy() == answer
            for hops in np.unique(k):
                running[hops] += 0.1 * (right[k == hops].mean() - running[hops])
            lowest = running[1 : longest + 1].min()
            if longest < world.hops and lowest > 0.9:
                longest += 1
            elif longest == world.hops and lowest > _PASSED:
                end = min(end, step + 1 + tail)  # the learning rate falls to 0 over the last steps
            bar.update()
            bar.set_postfix(hops=longest, accuracy=f"{running[longest]:.2f}", refresh=False)
    return model.eval(), min(end, last_step)


# --- text -----------------------------------------------------------------------------------------------------------


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
    """Language models of different depth trained on the same text, in the same order, with the same tokenizer.

    For maps between depths: a real ratio of depths with nothing else different (width, data, tokens, steps). They know
    little: a few hundred steps on some ten thousand sentences of a few kinds teach word order and which words go
    together, most of it from templates.

    Args:
        documents: texts; None takes the statements, two-hop queries (with answers) and prose that the kit ships.
        n_layers: one model for each number of blocks.
        d_model: width, a multiple of 16.
        n_words: words known, the most frequent ones; all others are one unknown word.
        steps, batch, length, learning_rate: AdamW steps on `batch` stretches of `length` words. Documents are shuffled
            and joined, each after a start token.
        seed: of the shuffle, the batches and the weights.
        progress: show a bar for each model.

    Returns:
        A TextModel for each entry of n_layers, by it. About 35 s for four blocks and 75 s for eight, on one core.

    Raises:
        ValueError: sizes out of range, fewer than 20 documents, an empty one, too little text for one batch.
    """
    n_layers, d_model, seed = require.wholes("n_layers", n_layers, 1, 64), _width(d_model), require.seed(seed)
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
        order = np.random.default_rng([parameters["seed"], 0]).permutation(len(texts))
        n_held = max(1, len(texts) // 10)
        counts = Counter(word for i in order[n_held:] for word, _ in _words(texts[i]))
        known = sorted(counts, key=lambda word: (-counts[word], word))[: parameters["n_words"]]
        tokenizer = _word_tokenizer([*_SPECIAL, *known])
        held, train = (
            np.concatenate(tokenizer([texts[i] for i in part]).input_ids) for part in (order[:n_held], order[n_held:])
        )
        length = parameters["length"]
        if min(len(train) // parameters["batch"], len(held)) < length + 1:
            raise ValueError(
                f"{len(train)} words to train on and {len(held)} held out are too few for batches of "
                f"{parameters['batch']} x {length} words: give more text, or lower batch or length"
            )
        held = held[: len(held) // (length + 1) * (length + 1)].reshape(-1, length + 1)
        model, untrained, trained = _train_text(train, held, len(tokenizer), parameters, progress=progress)
        _save(model, tokenizer, folder)
        frequency = np.bincount(train, minlength=len(tokenizer)) + 1.0  # one more, so that no word is impossible
        unigram = float(-np.log(frequency / frequency.sum())[held[:, 1:]].mean())
        return {"loss": {"untrained": untrained, "trained": trained, "unigram": unigram}, "steps": parameters["steps"]}

    folder, about = _made_once("text", parameters, make)
    return TextModel(folder, about["loss"], about)


def _train_text(
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
    with _repeatable(parameters["seed"]), _bar(steps, progress) as bar:
        model = _llama(n_tokens, parameters["n_layers"], parameters["d_model"], context=512)
        optimizer = _adamw(model, parameters["learning_rate"])
        untrained = _loss(model, held)
        for step in range(steps):
            starts = rng.integers(len(train) - length, size=parameters["batch"])
            ids = torch.tensor(train[starts[:, None] + np.arange(length + 1)])
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            _step(model, optimizer, loss, parameters["learning_rate"] * _schedule(step, steps, steps - 1))
            bar.update()
            bar.set_postfix(blocks=parameters["n_layers"], loss=f"{loss.item():.2f}", refresh=False)
        return model.eval(), untrained, _loss(model, held)


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


# --- what both share ------------------------------------------------------------------------------------------------


def _words(text: str) -> list[tuple[str, tuple[int, int]]]:
    return _splitter().pre_tokenize_str(text)


def _splitter() -> pre_tokenizers.PreTokenizer:
    """At white space, and between letters and punctuation."""
    return pre_tokenizers.Whitespace()


def _word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, a start token in front of every text."""
    known = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocab=known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", known["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _llama(n_tokens: int, n_layers: int, d_model: int, *, context: int) -> LlamaForCausalLM:
    pad, start, end, _ = range(len(_SPECIAL))
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 16,
        num_key_value_heads=d_model // 16,
        max_position_embeddings=context,
        pad_token_id=pad,
        bos_token_id=start,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config).train()


def _adamw(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)


def _step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, loss: torch.Tensor, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _schedule(step: int, end: int, tail: int) -> float:
    """Share of the learning rate: up over 50 steps, flat, then down in a line to 0 over the last `tail` steps."""
    return min(1.0, (step + 1) / 50, (end - step) / max(tail, 1))


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """One thread (sums are then always in the same order), seeded; afterwards all is as it was."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc="Training (at most)", unit="step", disable=not progress, leave=False)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _made_once(
    kind: str, parameters: dict[str, Any], make: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, made by `make(folder)` when it is not there, and what `lab.json` in it says.

    Made aside under a lock and renamed at the end: a folder is whole or absent, and two processes do the work once.
    """
    made_by = [_RECIPE, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([kind, parameters, made_by], sort_keys=True).encode()).hexdigest()[:12]
    root = cache_folder() / "small_models"
    folder = root / f"{kind}-{key}"
    if not (folder / "lab.json").exists():
        with locked(writable(root) / f"{folder.name}.lock", f"training {folder.name}"):
            if not (folder / "lab.json").exists():  # another process may have made it
                for stale in root.glob(f"{folder.name}.partial-*"):  # left by a process that was killed
                    shutil.rmtree(stale, ignore_errors=True)
                partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=root))
                try:
                    with room(root, f"training {folder.name}"):
                        start = time.perf_counter()
                        found = make(partial)
                        about = {"name": folder.name, "parameters": parameters, "seconds": time.perf_counter() - start}
                        about["bytes"] = (partial / "model.safetensors").stat().st_size
                        (partial / "lab.json").write_text(json.dumps({**about, **found}, indent=1))
                        os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return folder, json.loads((folder / "lab.json").read_text())


def _width(d_model: int) -> int:
    if (d_model := require.whole("d_model", d_model, 16)) % 16:
        raise ValueError(f"d_model={d_model}: pass a multiple of 16, such as 64 (a head is 16 wide)")
    return d_model
