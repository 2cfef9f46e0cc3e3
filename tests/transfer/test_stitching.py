"""Stitching on real Bridge models: exact identities, a plain forward pass beside it, and how it refuses."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import lab
from lab import maps, models
from lab.depth_efficiency.linear_maps import fit_maps
from lab.nets import language
from lab.results import Result
from lab.states import collect_states, stream_states
from lab.texts import tokenize
from lab.transfer import stitching

WORDS = "the cat saw a big dog and ran to the old red house where it slept until noon".split()
OPTIONS = {"draws": 50, "random_weights": False, "progress": False}


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(24)]


@pytest.fixture(scope="module")
def stitched(tiny_model, documents):
    pairs = [(1, 2), (3, 4)]
    return stitching.run(
        tiny_model("llama"), tiny_model("gpt2"), documents, pairs=pairs, position_0=True, draws=50, progress=False
    )


def value(result, condition, metric, pair=None):
    rows = result.table[result.table.condition == condition]
    if pair is not None:
        rows = rows[(rows.source_depth == pair[0]) & (rows.target_depth == pair[1])]
    return rows[metric].to_numpy()


def plain_scores(x, y, documents, pair, *, first_too=False, seed=0):
    """Mean KL, loss and accuracy over tested tokens: maps from fit_maps, Hugging Face models, one document at a time."""
    i, j = pair
    weight, bias = fit_maps(x, y, documents, keep=[pair], draws=5, seed=seed, progress=False).map(i, j)
    split = maps.split_documents(np.arange(len(documents)), seed=seed)
    plain_x, plain_y = models.plain_twin(x), models.plain_twin(y)
    blocks = next(m for m in plain_y.modules() if isinstance(m, torch.nn.ModuleList))  # the first list is the blocks
    found = []
    for document in np.flatnonzero(split == 2):
        a, b = (tokenize(model, [documents[document]]) for model in (x, y))
        aligned = maps.align(a, b)
        at_x, at_y = aligned.positions_a[0], aligned.positions_b[0]
        if first_too:
            at_x, at_y = np.r_[0, at_x], np.r_[0, at_y]
        with torch.no_grad():
            mapped = plain_x(a.ids, output_hidden_states=True).hidden_states[i][0, at_x].double() @ torch.tensor(weight)
            clean = plain_y(b.ids).logits[0].double()

            mapped = mapped + torch.tensor(bias)

            def put(module, args, kwargs, at=at_y, states=mapped):
                new = args[0].clone()
                new[0, at] = states.float()
                return (new, *args[1:]), kwargs

            handle = blocks[j].register_forward_pre_hook(put, with_kwargs=True)
            changed = plain_y(b.ids).logits[0].double()
            handle.remove()
        ids = b.ids[0]
        measured = aligned.positions_b[0]
        measured = torch.tensor(measured[measured < len(ids) - 1])
        truth, said = clean[measured].log_softmax(-1), changed[measured].log_softmax(-1)
        kl = kl_div(said, truth, reduction="none", log_target=True).sum(-1)
        loss = cross_entropy(changed[measured], ids[measured + 1], reduction="none")
        found.append(torch.stack([kl, loss, (said.argmax(-1) == ids[measured + 1]).double()], 1))
    return torch.cat(found).mean(0).tolist()


@pytest.mark.parametrize("first_too", [False, True])
def test_mapped_states_against_a_plain_forward_pass(tiny_model, documents, stitched, first_too):
    kl, loss, accuracy = plain_scores(tiny_model("llama"), tiny_model("gpt2"), documents, (1, 2), first_too=first_too)
    condition = "mapped_with_position_0" if first_too else "mapped"
    assert value(stitched, condition, "kl", (1, 2))[0] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert value(stitched, condition, "loss", (1, 2))[0] == pytest.approx(loss, abs=1e-5)
    assert value(stitched, condition, "accuracy", (1, 2))[0] == pytest.approx(accuracy, abs=1e-9)
    other = "mapped" if first_too else "mapped_with_position_0"
    assert abs(value(stitched, other, "kl", (1, 2))[0] - kl) > 1e-3 * kl  # position 0 makes a difference


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_own_states_change_no_bit(family, tiny_model, documents):
    model = tiny_model(family)
    result = stitching.run(model, model, documents, pairs=[(1, 2), (1, 4)], **OPTIONS)
    assert (value(result, "own_states", "kl") == 0).all()
    assert (value(result, "own_states", "loss") == value(result, "clean", "loss")).all()
    assert (value(result, "mean_state", "kl") > 1e-3).all()
    assert (value(result, "mapped", "kl") > 1e-6).all()
    assert models.hooks_left(model) == 0


def test_the_identity_map_gives_no_divergence(tiny_model, documents):
    """X = Y at one depth with next to no ridge: the map is the identity but for rounding."""
    model = tiny_model("llama")
    result = stitching.run(model, model, documents, pairs=[(2, 2), (0, 2)], ridges=(1e-12,), **OPTIONS)
    assert value(result, "mapped", "kl", (2, 2))[0] < 1e-7
    assert value(result, "mapped", "r2", (2, 2))[0] == pytest.approx(1, abs=1e-8)
    # the embedding as source is the token identity control, bit for bit
    for metric in ("kl", "loss", "r2"):
        assert value(result, "mapped", metric, (0, 2)) == value(result, "token_identity", metric, (0, 2))


def test_two_tokenizers_meet_at_word_ends(tiny_model, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    made = language.text_models(
        documents, n_layers=(2,), d_model=16, n_words=30, steps=5, batch=2, length=8, progress=False
    )
    words, letters = lab.load(made[2].folder, device="cpu"), tiny_model("llama")
    result = stitching.run(words, letters, documents, pairs=[(1, 2)], **OPTIONS)
    assert not result.parameters["same_tokens"]
    kl, loss, accuracy = plain_scores(words, letters, documents, (1, 2))
    assert value(result, "mapped", "kl")[0] == pytest.approx(kl, rel=1e-3)
    assert value(result, "mapped", "loss")[0] == pytest.approx(loss, abs=1e-5)
    assert value(result, "own_states", "kl")[0] == 0
    assert result.table.n_tokens.iloc[0] < sum(len(documents[d]) for d in result.tables["documents"].document.unique())


def test_maps_are_those_of_fit_maps(tiny_model, documents, stitched):
    both, pairs = (tiny_model("llama"), tiny_model("gpt2")), ((1, 2), (3, 4))
    fitted = fit_maps(*both, documents, draws=5, progress=False, keep=pairs)
    theirs = fitted.result.table.set_index(["source_depth", "target_depth"])
    ours = stitched.tables["position_0"].set_index(["source_depth", "target_depth"])
    tested = [documents[d] for d in np.flatnonzero(fitted.result.tables["documents"].split == "test")]
    x, y = (
        collect_states(m, tested, positions=np.zeros(len(tested), int), progress=False)["resid"].values for m in both
    )
    tokens = tokenize(both[1], tested)
    later = stream_states(both[1], tokens, [np.arange(1, n) for n in tokens.lengths])
    elsewhere = np.concatenate([np.linalg.norm(found, axis=-1) for _, found in later], 1).mean(1)  # [depth]
    for i, j in pairs:
        assert value(stitched, "mapped", "r2", (i, j))[0] == pytest.approx(theirs.r2[i, j], abs=1e-9)
        assert value(stitched, "mapped", "c", (i, j))[0] == theirs.c[i, j]
        (weight, bias), norm = fitted.map(i, j), np.linalg.norm(y[:, j], axis=1)
        error = np.linalg.norm(x[:, i] @ weight + bias - y[:, j], axis=1) / norm
        assert ours.relative_error[i, j] == pytest.approx(error.mean(), rel=1e-5)
        assert ours.norm_ratio[i, j] == pytest.approx(norm.mean() / elsewhere[j], rel=1e-5)


def test_unigram_and_clean_by_hand(tiny_model, documents, stitched):
    model = tiny_model("gpt2")
    split = maps.split_documents(np.arange(len(documents)), seed=0)
    tokens = tokenize(model, documents)
    ids = [row[1 + 1 : n].numpy() for row, n in zip(tokens.ids, tokens.lengths, strict=True)]  # predicted from 1 on
    train, held, test = (np.concatenate([ids[d] for d in np.flatnonzero(split == part)]) for part in range(3))
    counts = np.bincount(train, minlength=model.cfg.d_vocab)
    losses = {}
    for a in maps.RIDGES:
        frequency = (counts + a) / (counts + a).sum()
        losses[a] = (
            -np.log(frequency[held]).mean(),
            -np.log(frequency[test]).mean(),
            (frequency.argmax() == test).mean(),
        )
    best = min(losses, key=lambda a: losses[a][0])
    assert stitched.parameters["unigram_constant"] == best
    assert value(stitched, "unigram", "loss")[0] == pytest.approx(losses[best][1], abs=1e-5)
    assert value(stitched, "unigram", "accuracy")[0] == pytest.approx(losses[best][2])
    assert len(test) == stitched.table.n_tokens.iloc[0]
    assert (value(stitched, "clean", "kl") == 0).all()


def test_controls_and_tables(stitched, tmp_path):
    table, summary = stitched.table, stitched.summary
    assert set(table.condition) == {
        *stitching.PAIR_CONDITIONS, *stitching.TARGET_CONDITIONS, *stitching.OUTPUT_CONDITIONS,
    }  # fmt: skip
    assert not table.duplicated(["source_depth", "target_depth", "condition"]).any()
    assert (value(stitched, "shuffled_pairs", "r2") < 0.05).all() and (value(stitched, "mapped", "r2") > 0.08).all()
    assert (value(stitched, "mean_state", "r2") <= 0).all()
    assert (value(stitched, "mapped", "kl") < value(stitched, "shuffled_pairs", "kl")).all()
    assert (value(stitched, "random_weights", "kl") != value(stitched, "mapped", "kl")).all()
    # token by token: the summary's means are those of documents, weighted by their tokens
    documents = stitched.tables["documents"]
    means = documents.assign(kl=documents.kl * documents.n_tokens).groupby(
        ["source_depth", "target_depth", "condition"]
    )
    by_hand = means.kl.sum() / means.n_tokens.sum()
    ours = summary[summary.metric == "kl"].set_index(["source_depth", "target_depth", "condition"])["mean"]
    np.testing.assert_allclose(ours, by_hand.loc[ours.index], rtol=1e-12, atol=1e-15)
    for _, rows in summary.groupby(["source_depth", "target_depth", "metric"]):
        reference = rows.loc[rows.condition == "token_identity", "mean"].item()
        np.testing.assert_allclose(rows.difference, rows["mean"] - reference, atol=1e-12)
        assert (rows.low <= rows["mean"]).all() and (rows["mean"] <= rows.high).all()
    mapped = summary[(summary.condition == "mapped") & (summary.metric == "kl")]
    assert (mapped.p_holm >= mapped.p).all() and summary.p_holm.notna().sum() == 6  # 2 pairs, 3 metrics
    again = Result.load(stitched.save(tmp_path / "saved"))
    assert again.summary.equals(summary) and again.table.equals(table)


def test_default_pairs_and_one_seed_one_result(tiny_model, documents, capsys):
    model = tiny_model("llama")
    documents = documents[:12]
    first = stitching.run(model, model, documents, draws=20, random_weights=False)
    assert "for the states of 12 documents" in capsys.readouterr().out
    second = stitching.run(model, model, documents, batch_tokens=130, **{**OPTIONS, "draws": 20})
    assert first.parameters["pairs"] == [[1, 2], [3, 2], [2, 3]]
    np.testing.assert_allclose(first.table.loss, second.table.loss, atol=1e-5)  # batches change rounding only


@pytest.mark.usefixtures("unchecked")
def test_refusals(tiny_model, documents):
    model = tiny_model("llama")
    for options, message in [
        ({"pairs": [(1, 5)]}, r"pairs=\[\[1, 5\]\]: give pairs of 0 to 4 and 0 to 4"),
        ({"pairs": [(-1, 2)]}, r"pairs\[0\]=\[-1, 2\]: give at least 2, each, at least 0 \(-1 is not\)"),
        ({"pairs": []}, "pairs is empty: give at least one"),
        ({"pairs": [(1, 2), (1, 2)]}, "give pairs of 0 to 4 and 0 to 4, none twice"),
        ({"ridges": [0.0]}, r"ridges\[0\]=0.0: give a number above 0"),
        ({"groups": np.arange(3)}, "3 groups for 24 documents"),
        ({"groups": np.zeros(24)}, "a split needs 1 group to train on"),
    ]:
        with pytest.raises(ValueError, match=message):
            stitching.run(model, model, documents, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="documents='one text': give a list of texts"):
        stitching.run(model, model, "one text", **OPTIONS)
    with pytest.raises(ValueError, match="3 documents in 3 groups: a split needs"):
        stitching.run(model, model, documents[:3], **OPTIONS)
    with pytest.raises(ValueError, match="tested documents have a token to predict"):
        stitching.run(model, model, ["ab"] * 8, validation_fraction=0.3, **OPTIONS)
