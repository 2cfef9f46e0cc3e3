import string

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lab
from lab import back_patching
from lab.back_patching import two_hop
from lab.depth_efficiency import attributions
from lab.models import facts
from lab.states import collect_states
from lab.texts import first_tokens, last_positions, phrase_positions, tokenize

TEXTS = ["The city of Paris is in France.", "Paris", "Kuala Lumpur is in Malaysia"]


# --- the start token ---


def test_smollm2_gets_no_start_token(smollm2):
    """The Bridge's own default would put one there, which this model never saw in training."""
    tokens = tokenize(smollm2, TEXTS)
    plain = AutoTokenizer.from_pretrained(smollm2.lab_source["path"])
    own = [plain(text).input_ids for text in TEXTS]
    assert [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)] == own
    assert all(row[0] != smollm2.tokenizer.bos_token_id for row in own) and facts(smollm2)["start_token"] is None
    assert smollm2.to_tokens("Paris").tolist() == [own[1]]  # and so it is when the Bridge is given a string


def test_a_model_with_a_start_token_gets_exactly_one(tiny_model):
    model = tiny_model("gemma2")
    tokens = tokenize(model, TEXTS)
    start = model.tokenizer.bos_token_id
    for ids, mask, text in zip(tokens.ids, tokens.mask, TEXTS, strict=True):
        row = ids[mask].tolist()
        assert row == model.tokenizer(text).input_ids and row[0] == start and row.count(start) == 1
    assert tokens.lengths.tolist() == [1 + len(text) for text in TEXTS] and facts(model)["start_token"] == "<s>"


# --- the first token of an answer ---


def word_model(tiny_folder, folder, *, normalizer=None, pre_tokenizer=None):
    """A model whose tokenizer marks the beginning of a word with "▁", and knows some words whole and any digit."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    words = ["Paris", "Berlin", "It", "is", "The", "capital", "of", "France", "sum", "É"]
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *string.digits, "+", "=", ":", "\n", "É"]
    merges = []
    for word in words:
        now = "▁"
        for letter in word:
            merges += [(now, letter)] if (now, letter) not in merges else []
            now += letter
            pieces.append(now)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    return model


MARKING = {
    "prepended (Llama 2)": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    },
    "replaced (Gemma)": {"normalizer": normalizers.Replace(" ", "▁")},
    "metaspace, words apart": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always", split=True)},
}


@pytest.mark.parametrize("marking", MARKING)
def test_the_first_token_is_that_of_the_answer_in_its_sentence(tiny_folder, tmp_path, marking):
    """A name alone, with a space before it, would begin with the lone marker in the first tokenizer: for every answer."""
    model = word_model(tiny_folder, tmp_path, **MARKING[marking])
    (paris,), (berlin,) = (first_tokens(model, "The capital of France is", [name]) for name in ("Paris", "Berlin"))
    assert model.tokenizer.convert_ids_to_tokens([paris, berlin]) == ["▁Paris", "▁Berlin"]
    assert paris == model.tokenizer("The capital of France is Paris", add_special_tokens=False).input_ids[-1]
    assert two_hop.first_tokens(model, ["Paris", "Berlin"]) == sorted([paris, berlin])
    assert first_tokens(model, "The capital of France is", ["Paris", " Paris ", "12", "Ω", ""]) == [paris]
    assert first_tokens(model, "The sum is", ["12", "7"]) == []  # "▁", then the digits
    assert first_tokens(model, "The sum is", ["12", "Paris"]) == [paris]
    assert first_tokens(model, "The capital is", ["Ωμ"]) == []  # the token for unknown words is everybody's


@pytest.mark.parametrize("ending", ["\n", ":\n"])
def test_behind_white_space_no_space_is_added(tiny_folder, tmp_path, ending):
    model = word_model(tiny_folder, tmp_path, **MARKING["replaced (Gemma)"])
    tokens = model.tokenizer.convert_ids_to_tokens
    assert tokens(first_tokens(model, f"The capital{ending}", ["Paris"])) == ["P"]
    assert tokens(first_tokens(model, f"The sum is{ending}", ["12", "7"])) in (["1", "7"], ["7", "1"])
    assert first_tokens(model, "The capital is ", ["Paris"]) == [], "it takes in the prompt's last space, which is said"


def test_the_first_token_of_smollm2(smollm2):
    """It writes a space before a number as a token of its own, and each digit as one."""
    token = {text: smollm2.tokenizer(text, add_special_tokens=False).input_ids for text in (" Tokyo", "13", " +")}
    assert first_tokens(smollm2, "The capital of Japan is", ["Tokyo"]) == [token[" Tokyo"][0]]
    assert first_tokens(smollm2, "7 + 6 =", ["13"]) == []
    assert first_tokens(smollm2, "7 + 6 = ", ["13"]) == [token["13"][0]]
    assert (
        first_tokens(smollm2, "The calling code of Japan is", ["+81", "81", "0081"]) == []
    )  # " +" is that of every code
    assert first_tokens(smollm2, "The domain of Japan is", [".jp"]) == []
    assert first_tokens(smollm2, "The sign of the sum is", ["+"]) == token[" +"]


# --- padding and positions ---


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_stands_on_the_chosen_side(tiny_model, side):
    model = tiny_model("llama")
    tokens = tokenize(model, TEXTS, padding_side=side)
    width = max(map(len, TEXTS))
    assert tokens.ids.shape == tokens.mask.shape == tokens.offsets.shape[:2] == (3, width)
    assert tokens.lengths.tolist() == [len(text) for text in TEXTS] and tokens.texts == tuple(TEXTS)
    for i, text in enumerate(TEXTS):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        assert tokens.mask[i].nonzero()[:, 0].tolist() == list(range(width))[place]
        assert model.tokenizer.decode(tokens.ids[i, place]) == text
        assert (tokens.ids[i][~tokens.mask[i]] == model.tokenizer.pad_token_id).all()
        assert not tokens.offsets[i][~tokens.mask[i].numpy()].any()
    last = last_positions(tokens)
    assert last.tolist() == ([len(text) - 1 for text in TEXTS] if side == "right" else [width - 1] * 3)


def test_padding_does_not_hide_a_text_that_ends_in_the_padding_token(tiny_model):
    """Length comes from the mask, not from the ids: GPT-2's usual padding token is its end-of-text token."""
    model = tiny_model("llama")
    text = "ab" + model.tokenizer.pad_token
    tokens = tokenize(model, [text, "abcdefgh"])
    assert tokens.ids[0, 2] == model.tokenizer.pad_token_id
    assert tokens.lengths.tolist() == [3, 8] and last_positions(tokens).tolist() == [2, 7]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("added", [False, True])
def test_a_padding_token_that_the_model_does_not_have(tiny_folder, family, added):
    """None at all, and no end token to take its place; or one that was added to the tokenizer alone."""
    model = lab.load(tiny_folder(family), device="cpu")
    usual = collect_states(model, TEXTS, progress=False)["resid"].values
    model.tokenizer.pad_token = model.tokenizer.eos_token = None
    if added:
        model.tokenizer.add_special_tokens({"pad_token": "<added>"})
    assert model.tokenizer.pad_token_id == (model.cfg.d_vocab if added else None)
    for side in ("left", "right"):
        tokens = tokenize(model, TEXTS, padding_side=side)
        assert (tokens.ids[~tokens.mask] == 0).all() and tokens.ids.max() < model.cfg.d_vocab
    assert np.array_equal(collect_states(model, TEXTS, progress=False)["resid"].values, usual)
    assert lab.check(model).ok.all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_last_token_of_a_phrase(smollm2, side):
    tokens = tokenize(smollm2, TEXTS, padding_side=side)
    at = phrase_positions(tokens, ["Paris", "Paris", "Kuala Lumpur"])
    for i, (text, ends) in enumerate(zip(TEXTS, ["Paris", "Paris", "Kuala Lumpur"], strict=True)):
        ids = tokens.ids[i, : at[i] + 1][tokens.mask[i, : at[i] + 1]]
        assert smollm2.tokenizer.decode(ids) == text[: text.index(ends) + len(ends)]


def test_the_last_occurrence_of_a_phrase_counts(tiny_model):
    tokens = tokenize(tiny_model("llama"), ["Paris and Paris again"])
    assert phrase_positions(tokens, ["Paris"]).tolist() == [len("Paris and Paris") - 1]


def test_a_phrase_after_a_start_token(tiny_model):
    """The start token moves every position by one, and covers no characters."""
    tokens = tokenize(tiny_model("gemma3"), ["ab cd"])
    assert phrase_positions(tokens, ["a"]).tolist() == [1] and phrase_positions(tokens, ["ab cd"]).tolist() == [5]


def test_a_phrase_in_letters_of_several_bytes(tiny_model):
    """One letter is two tokens here: the second of them is the last."""
    tokens = tokenize(tiny_model("llama"), ["Åbo é x"])
    assert tokens.lengths.tolist() == [9]
    assert phrase_positions(tokens, ["Åbo"]).tolist() == [3] and phrase_positions(tokens, ["é"]).tolist() == [6]


# --- errors ---


def test_a_phrase_that_is_not_there(smollm2):
    tokens = tokenize(smollm2, TEXTS)
    with pytest.raises(ValueError, match="'Rome' does not stand in text 1: 'Paris'"):
        phrase_positions(tokens, ["Paris", "Rome", "Kuala"])
    with pytest.raises(ValueError, match="'' does not stand in text 0"):
        phrase_positions(tokens, ["", "Paris", "Kuala"])
    with pytest.raises(ValueError, match="2 phrases for 3 texts; give one for each"):
        phrase_positions(tokens, ["Paris", "Paris"])


def test_a_phrase_that_ends_inside_a_token(smollm2):
    tokens = tokenize(smollm2, ["The city of Paris is in France."])
    with pytest.raises(
        ValueError, match="the end of 'Par' lies inside the token ' ?Paris' of text 0: no token ends there"
    ):
        phrase_positions(tokens, ["Par"])
    with pytest.raises(ValueError, match="the end of 'city ' lies inside the token ' of' of text 0"):
        phrase_positions(tokens, ["city "])


@pytest.mark.parametrize(
    "texts, message",
    [
        ("one string", r"texts is one string: give a list of texts, \[text\] for a single one"),
        ([], "no texts: the list is empty"),
        (["a", ""], "text 1 is empty; each text needs at least one word"),
        (["a", "b", "\n\t "], "text 2 is empty"),
        (["a", "b" * 128, "Long: " + "c" * 123], r"text 2 has 129 tokens, .* context holds 128; .*begins 'Long: ccc"),
    ],
)
def test_errors(tiny_model, texts, message):
    with pytest.raises(ValueError, match=message):
        tokenize(tiny_model("llama"), texts)


HALF = "\ud800"


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "text 1 is None, not a text; each text needs at least one word"),
        (float("nan"), "text 1 is nan, not a text"),
        (pd.NA, "text 1 is <NA>, not a text"),
        (7, "text 1 is 7, not a text"),
        (b"bytes", "text 1 is b'bytes', not a text"),
        ("\u200b\ufeff", r"text 1 is '\\u200b\\ufeff', empty"),
        ("\u00a0\u2060 ", "empty; each text needs"),
        ("\0\x1b", r"text 1 is '\\x00\\x1b', empty"),
        (f"Paris{HALF}", "text 1 is .*, no text: it holds half a surrogate pair"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_is_refused_by_index(tiny_model, text, message):
    with pytest.raises(ValueError, match=message):
        tokenize(tiny_model("llama"), ["Paris", text])
    with pytest.raises(ValueError, match="texts is one string"):
        tokenize(tiny_model("llama"), b"Paris")


@pytest.mark.parametrize("text", [None, float("nan"), pd.NA, 7, b"Paris", "\u200b"], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_is_refused_by_what_takes_texts(tiny_model, text):
    model = tiny_model("llama")
    for call in (lambda: two_hop.greedy(model, ["Paris", text], progress=False),
                 lambda: back_patching.sweep(model, "The city", ["Paris", text], positions=[0])):  # fmt: skip
        with pytest.raises(ValueError, match=r"(text|name) 1 is .*(not a text|empty)"):
            call()
    with pytest.raises(ValueError, match="the answer is .*(not a text|empty)"):
        attributions.joint(model, "The city", text)
    with pytest.raises(ValueError, match="does not stand in text 0"):
        phrase_positions(tokenize(model, ["The city"]), [text])
    if not isinstance(text, str):  # a name that no lens can read
        with pytest.raises(ValueError, match="name 1 is .*not a text"):
            first_tokens(model, "The city is", ["Paris", text])


@pytest.mark.parametrize("text", ["।", "🙂", "e\u0301", "\ue000", "a\0b", "x\rl"])
def test_texts_in_any_script_are_read(tiny_model, text):
    assert tokenize(tiny_model("llama"), ["a", text]).texts == ("a", text)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_text_that_becomes_no_token(tiny_folder, family):
    """With a start token it would be read as if the start token were the text."""
    model = lab.load(tiny_folder(family), device="cpu")
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    with pytest.raises(ValueError, match="text 1, '##', becomes no token: this model's tokenizer drops all of it"):
        tokenize(model, ["a#", "##"])
    assert tokenize(model, ["a#"]).lengths.tolist() == [1 + (family == "gemma2")]


def test_the_start_token_counts_for_the_context(tiny_model):
    assert tokenize(tiny_model("llama"), ["b" * 128]).lengths.tolist() == [128]
    with pytest.raises(ValueError, match="text 0 has 129 tokens"):
        tokenize(tiny_model("gemma2"), ["b" * 128])


def test_the_longest_text_of_smollm2_still_runs(smollm2):
    """The context that is allowed is the model's own, and its first text too long is refused."""
    assert facts(smollm2)["n_ctx"] == smollm2.original_model.config.max_position_embeddings
    word = smollm2.tokenizer("a", add_special_tokens=False).input_ids
    assert len(word) == 1
    with pytest.raises(ValueError, match="this model's context holds"):
        tokenize(smollm2, [" a" * (facts(smollm2)["n_ctx"] + 1)])


def test_shapes_are_checked_in_tests(tiny_model):
    """The import hook of conftest.py is at work: a wrong shape in an annotated place is refused."""
    tokens = tokenize(tiny_model("llama"), ["abc"])
    with pytest.raises(Exception, match="Tokens"):
        type(tokens)(tokens.texts, tokens.ids[0], tokens.mask, tokens.offsets)
    assert isinstance(tokens.lengths, np.ndarray) and tokens.ids.dtype == torch.long


def test_a_token_that_the_model_has_no_embedding_for(tiny_folder):
    model = lab.load(tiny_folder("llama"), device="cpu")
    model.tokenizer.add_tokens(["city"])
    with pytest.raises(
        ValueError, match="^text 1, 'The city', has the token 'city' with id 259, and this model has 259 emb"
    ):
        tokenize(model, ["a", "The city"])
    assert tokenize(model, ["a"]).ids.shape == (1, 1)
    model.tokenizer.bos_token, model.cfg.default_prepend_bos = "city", True
    with pytest.raises(
        ValueError, match="^text 0, 'a', has .*; it is the start token: set model.cfg.default_prepend_bos = Fa"
    ):
        tokenize(model, ["a"])
