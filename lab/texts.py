"""Texts to tokens, and positions by meaning: the last token of the text, the last token of a phrase in it.

The start token is the model's own rule (`model.cfg.default_prepend_bos`), written here, once: the model only gets ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformer_lens.model_bridge import TransformerBridge

from lab.require import why_no_text


@dataclass(frozen=True)
class Tokens:
    """A batch of texts as token ids. `offsets` are the characters `[start, end)` that each token covers."""

    texts: tuple[str, ...]
    ids: Int[torch.Tensor, "example position"]
    mask: Bool[torch.Tensor, "example position"]  # False on padding
    offsets: Int[np.ndarray, "example position 2"]  # (0, 0) on padding and on the start token

    @property
    def lengths(self) -> Int[np.ndarray, " example"]:
        return self.mask.sum(1).numpy()


def tokenize(model: TransformerBridge, texts: Sequence[str], *, padding_side: str = "right") -> Tokens:
    """Texts as ids, padded to the longest.

    Raises:
        ValueError: no texts, no text (None, nan, a number), one that is empty or becomes no token, has a token without an
            embedding, or is longer than the model's context (each named by its index).
    """
    texts = tuple(checked_texts(texts))
    encoded = model.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    start = [model.tokenizer.bos_token_id] if model.cfg.default_prepend_bos else []
    for index, ids in enumerate(encoded["input_ids"]):
        if not ids:
            raise ValueError(
                f"text {index}, {texts[index]!r}, becomes no token: this model's tokenizer drops all of it"
            )
    rows = [start + ids for ids in encoded["input_ids"]]
    n_embeddings = model.original_model.get_input_embeddings().weight.shape[0]
    for index, row in enumerate(rows):
        if max(row) >= n_embeddings:
            token = model.tokenizer.convert_ids_to_tokens(max(row))
            own = "; it is the start token: set model.cfg.default_prepend_bos = False" if max(row) in start else ""
            raise ValueError(
                f"text {index}, {texts[index]!r:.60}, has the token {token!r} with id {max(row)}, and this model has "
                f"{n_embeddings} embeddings: its tokenizer is another model's, or got this token later{own}"
            )
    spans = [[(0, 0)] * len(start) + list(map(tuple, offsets)) for offsets in encoded["offset_mapping"]]
    width = max(map(len, rows))
    if width > model.cfg.n_ctx:
        index = next(i for i, row in enumerate(rows) if len(row) > model.cfg.n_ctx)
        raise ValueError(
            f"text {index} has {len(rows[index])} tokens, and this model's context holds {model.cfg.n_ctx}; shorten it "
            f"(it begins {texts[index][:40]!r})"
        )
    ids = torch.full((len(rows), width), pad_id(model), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    offsets = np.zeros((len(rows), width, 2), dtype=np.int64)
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        place = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place], offsets[i, place] = torch.tensor(row), True, span
    return Tokens(texts, ids, mask, offsets)


def checked_texts(texts: Sequence[str], *, what: str = "text") -> list[str]:
    """The texts as they are, or a ValueError that names the first that is none by its index; `what` they are called."""
    if isinstance(texts, str | bytes):
        raise ValueError(f"{what}s is one string: give a list of texts, [text] for a single one")
    texts = list(texts)
    if not texts:
        raise ValueError(f"no {what}s: the list is empty")
    for index, text in enumerate(texts):
        if why := why_no_text(text):
            shown = "" if why == "empty" and not text.strip() else f"{text!r:.60}, "  # '\u200b' is there, and not seen
            raise ValueError(f"{what} {index} is {shown}{why}; each {what} needs at least one word")
    return texts


def pad_id(model: TransformerBridge) -> int:
    """The id on padding: the tokenizer's own, or 0 where the model has no embedding for it. The mask hides it anyway."""
    own = model.tokenizer.pad_token_id
    n_embeddings = model.original_model.get_input_embeddings().weight.shape[0]
    return own if own is not None and 0 <= own < n_embeddings else 0


def first_tokens(model: TransformerBridge, prompt: str, answers: Sequence[str]) -> list[int]:
    """Ids of the first token of each of an answer's names, said behind a prompt: what a lens or a rank looks for.

    The token right after the prompt's own counts, with one space between unless the prompt ends in white space. A name is left
    out where this token has nothing of it (a lone space or marker, the + of every calling code, the unknown token) or where it
    melts into the prompt's last token. No name left: an empty list, and no lens can read the answer.
    """
    start = prompt if prompt[-1:].isspace() else prompt + " "
    if isinstance(answers, str | bytes) or not all(isinstance(name, str) for name in answers):
        checked_texts(answers, what="name")  # raises
    names = [name.strip() for name in answers if name.strip()]
    own, *rows = model.tokenizer([prompt, *(start + name for name in names)], add_special_tokens=False).input_ids
    found = {row[len(own)] for name, row in zip(names, rows, strict=True)
             if row[: len(own)] == own and len(row) > len(own) and _says_something(model, row[len(own)], name)}  # fmt: skip
    return sorted(found)


def _says_something(model: TransformerBridge, token: int, name: str) -> bool:
    """Whether a token has a letter or digit, or a piece of one; any sign, for a name that is all signs."""
    text = model.tokenizer.decode([token], skip_special_tokens=True).strip().strip("\u2581\u0120").strip()
    return any(c.isalnum() or c == "\ufffd" for c in text) or bool(text) and not any(map(str.isalnum, name))


def last_positions(tokens: Tokens) -> Int[np.ndarray, " example"]:
    """Position of the last token of each text, whichever side is padded."""
    width = tokens.mask.shape[1]
    return width - 1 - tokens.mask.flip(1).int().argmax(1).numpy()


def phrase_positions(tokens: Tokens, phrases: Sequence[str]) -> Int[np.ndarray, " example"]:
    """Position of the last token of a phrase, in its last occurrence in each text (a subject, a bridge entity).

    Raises:
        ValueError: a phrase that is not in its text, or whose end lies inside a token.
    """
    if len(phrases) != len(tokens.texts):
        raise ValueError(f"{len(phrases)} phrases for {len(tokens.texts)} texts; give one for each")
    positions = []
    for i, (text, phrase) in enumerate(zip(tokens.texts, phrases, strict=True)):
        start = text.rfind(phrase) if isinstance(phrase, str) and phrase else -1
        if start < 0:
            raise ValueError(f"{phrase!r} does not stand in text {i}: {text!r}")
        end = start + len(phrase)
        ends = np.flatnonzero(tokens.offsets[i, :, 1] == end)
        if not len(ends):
            covering = (tokens.offsets[i, :, 0] < end) & (tokens.offsets[i, :, 1] > end)
            token = text[slice(*tokens.offsets[i, np.flatnonzero(covering)[0]])] if covering.any() else "?"
            raise ValueError(f"the end of {phrase!r} lies inside the token {token!r} of text {i}: no token ends there")
        positions.append(int(ends[-1]))
    return np.array(positions)
