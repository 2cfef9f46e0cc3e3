"""What linear maps stand on: streamed states, tokens of two models that belong together, splits, sums."""

import numpy as np
import pytest
import torch

from lab import maps
from lab.nets import training
from lab.states import collect_states, stream_states
from lab.texts import Tokens, tokenize

WORDS = "the cat saw a big dog and ran to the old red house where it slept until noon".split()


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(24)]


# --- states at all positions ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_streamed_states_are_the_collected_ones(family, tiny_model, documents):
    model, texts = tiny_model(family), documents[:5]
    tokens = tokenize(model, texts)
    positions = [np.array([0, n // 2, n - 1]) for n in tokens.lengths]
    seen = {}
    for batch, found in stream_states(model, tokens, positions, batch_tokens=150):
        assert found.shape == (5, 3 * len(batch), 32)
        seen |= {int(text): found[:, 3 * k : 3 * k + 3] for k, text in enumerate(batch)}
    assert sorted(seen) == list(range(5))
    for place in range(3):
        at = np.array([p[place] for p in positions])
        expected = collect_states(model, texts, positions=at, progress=False)["resid"].values
        for text in range(5):
            np.testing.assert_allclose(seen[text][:, place], expected[text], rtol=1e-4, atol=1e-5)


def test_streaming_refuses_wrong_positions(tiny_model):
    model = tiny_model("llama")
    tokens = tokenize(model, ["abc", "abcde"])
    with pytest.raises(ValueError, match="2 texts need one array of positions each; got 1"):
        stream_states(model, tokens, [np.array([0])])
    with pytest.raises(ValueError, match="positions 1 to 3 of text 0: it has positions 0 to 2 only"):
        stream_states(model, tokens, [np.array([1, 3]), np.array([0])])


# --- alignment ---


def tokens_of(texts, cuts):
    """Tokens that cover, in each text, the pieces [start, end) listed; ids count up from the end of the first."""
    width = max(map(len, cuts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.bool)
    offsets = np.zeros((len(texts), width, 2), int)
    for i, spans in enumerate(cuts):
        ids[i, : len(spans)] = torch.arange(len(spans)) + spans[0][1]  # other cuts, other ids
        mask[i, : len(spans)], offsets[i, : len(spans)] = True, spans
    return Tokens(tuple(texts), ids, mask, offsets)


def test_alignment_at_word_ends():
    text = "unhappy cats, 42 dogs"
    #       0       8    13   17
    a = tokens_of([text], [[(0, 2), (2, 7), (7, 12), (12, 13), (13, 16), (16, 21)]])  # un|happy| cats|,| 42| dogs
    b = tokens_of([text], [[(0, 0), (0, 7), (7, 13), (13, 15), (15, 16), (16, 21)]])  # <s>|unhappy| cats,| 4|2| dogs
    found = maps.align(a, b)
    # "cats" ends no token of b, so it is dropped; the other four are kept, the comma too
    assert [at.tolist() for at in found.positions_a] == [[1, 3, 4, 5]]
    assert [at.tolist() for at in found.positions_b] == [[1, 2, 4, 5]]
    assert found.share == pytest.approx(4 / 5) and not found.same_tokens


def test_alignment_leaves_out_position_0_and_takes_the_last_token_of_an_end():
    text = "a é b"
    a = tokens_of([text], [[(0, 1), (1, 3), (2, 3), (3, 5)]])  # é in two tokens with one end
    b = tokens_of([text], [[(0, 0), (0, 1), (1, 3), (3, 5)]])
    found = maps.align(a, b)
    assert found.positions_a[0].tolist() == [2, 3] and found.positions_b[0].tolist() == [2, 3]
    assert found.share == 1


def test_the_same_tokens_are_all_compared(tiny_model, documents):
    tokens = tokenize(tiny_model("llama"), documents)
    found = maps.align(tokens, tokenize(tiny_model("gpt2"), documents))
    assert found.same_tokens and [at.tolist() for at in found.positions_a] == [
        list(range(1, n)) for n in tokens.lengths
    ]


def test_bytes_and_words_meet_at_word_ends(tiny_model):
    texts = ["the cat saw", "a dog, it ran"]
    words = training.word_tokenizer([*training.SPECIAL, *WORDS, ","])
    encoded = words(texts, return_offsets_mapping=True)
    tokens_b = tokens_of(texts, encoded["offset_mapping"])
    found = maps.align(tokenize(tiny_model("llama"), texts), tokens_b)
    ends = [[3, 7, 11], [1, 5, 6, 9, 13]]
    # "a" ends at byte 0 of the second text: position 0 is left out
    assert [at.tolist() for at in found.positions_a] == [[e - 1 for e in ends[0]], [e - 1 for e in ends[1][1:]]]
    assert [at.tolist() for at in found.positions_b] == [[1, 2, 3], [2, 3, 4, 5]]


def test_alignment_refuses():
    one, other = tokens_of(["ab"], [[(0, 2)]]), tokens_of(["ac"], [[(0, 2)]])
    with pytest.raises(ValueError, match="different texts: tokenize the same list with both"):
        maps.align(one, other)
    with pytest.raises(ValueError, match="no tokens to compare: 100% of the words"):
        maps.align(one, one)


# --- splits and sums ---


@pytest.mark.parametrize("seed", range(10))
def test_no_group_is_on_two_sides(seed):
    groups = np.random.default_rng(seed).integers(0, 15, 60)
    split = maps.split_documents(groups, seed=seed)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(groups[split == one]) & set(groups[split == other])
    assert set(split) == {0, 1, 2}
    np.testing.assert_array_equal(split, maps.split_documents(groups, seed=seed))


def test_moments_in_batches_are_those_at_once():
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(size=(50, 5))), torch.tensor(rng.normal(size=(50, 3)))
    origins = x[:20].mean(0), y[:20].mean(0)
    whole, parts = maps.Moments(*origins), maps.Moments(*origins)
    whole.add(x, y)
    for start in (0, 7, 30):
        end = {0: 7, 7: 30, 30: 50}[start]
        parts.add(x[start:end], y[start:end])
    assert parts.n == whole.n == 50
    for name in ("xx", "xy", "yy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert float(whole.yy.sum()) == pytest.approx(float((y - origins[1]).square().sum()))


def test_errors_from_moments_are_those_of_the_residuals():
    rng = np.random.default_rng(2)
    x, y = torch.tensor(rng.normal(size=(60, 5))), torch.tensor(rng.normal(size=(60, 3)))
    train, held = (maps.Moments(x[:40].mean(0), y[:40].mean(0)) for _ in range(2))
    train.add(x[:40], y[:40])
    held.add(x[40:], y[40:])
    ridge = maps.Ridge(train.xx)
    for c, error in zip(maps.RIDGES, ridge.errors(train, held, maps.RIDGES), strict=True):
        residual = (y[40:] - train.origin_y) - (x[40:] - train.origin_x) @ ridge.solve(train.xy, c)
        assert error == pytest.approx(float(residual.square().sum()), rel=1e-10)
