"""Depth efficiency, its statistics, attributions and the integrator view, on small random models."""

import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

import lab
from lab import results
from lab.depth_efficiency import attributions, integrator, layers, scores, statistics
from lab.interventions import ablate, rewritten, skip
from lab.models import SITES, hooks_left, to_send
from lab.runs import clean_run
from lab.statistics import Interval
from lab.texts import tokenize

TEXTS = pd.DataFrame(
    {
        "text": [
            "Ana had 3 pears, and Bo had 4.",
            "The lamp was out; he sang a low song.",
            "Rain fell on the sea all day.",
        ]
    }
)
SMALL = {"n": 3, "n_cuts": 2, "n_read": 3, "progress": False}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def found(tiny_model):
    return layers.run(tiny_model("llama"), TEXTS, resume=False, **SMALL)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_effective_depth_of_known_profiles():
    assert statistics.effective_depth(np.array([0.0, 0.0, 1.0, 1.0]), 0.5) == 0.75
    assert statistics.effective_depth(np.array([0.0, 0.0, 1.0, 1.0]), 0.9) == 1.0
    drawn = statistics.effective_depth(np.array([[9.0, 1.0], [1.0, 9.0]]), 0.5)
    assert drawn.tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="nowhere|no effect"):
        statistics.effective_depth(np.zeros(4), 0.5)
    with pytest.raises(ValueError, match="share=1.5"):
        statistics.effective_depth(np.ones(4), 1.5)


def test_depth_score_of_a_flat_profile_and_the_last_layer_counts_nothing():
    assert statistics.depth_score(np.ones(5)) == 2.0
    effects = np.triu(np.ones((6, 6)))
    assert statistics.effect_profile(effects).tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_published_depths_by_other_definitions():
    assert statistics.depth_by_cosine(np.array([-0.1, 0.1, -0.1, 0.2, 0.3])) == 0.8
    assert np.isnan(statistics.depth_by_cosine(np.array([0.1, 0.2])))
    assert statistics.depth_by_divergence(np.array([8.0, 9.0, 4.0, 1.0])) == 0.75
    assert statistics.depth_by_overlap(np.array([0.0, 0.2, 0.3, 0.4])) == 1.0


def test_slope_finds_a_planted_slope_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    level = np.tile([1, 2, 3, 4], 40)
    frame = pd.DataFrame({"group": np.repeat(np.arange(40), 4), "level": level, "tokens": 10 + rng.integers(0, 5, 160)})
    there = statistics.slope(frame.assign(score=2 + 0.5 * level + rng.normal(0, 0.5, 160)), seed=0)
    assert there.low > 0.3 and there.high < 0.7
    none = statistics.slope(frame.assign(score=rng.normal(0, 0.5, 160)), seed=0)
    assert none.low < 0 < none.high
    by_length = frame.assign(tokens=level * 3.0 + rng.normal(0, 1, 160))
    by_length["score"] = by_length.tokens
    held = statistics.slope(by_length, seed=0, covariate="tokens")
    assert held.low <= 0 <= held.high or abs(held.estimate) < 1e-9, "length explains it all"
    with pytest.raises(ValueError, match="a slope needs two levels"):
        statistics.slope(frame[frame.level == 1].assign(score=0.0), seed=0)


def test_verdicts_are_those_of_the_interval():
    def of(low, high, n=12, **inside):
        return statistics.verdict(Interval((low + high) / 2, low, high), inside["inside"], n)

    assert of(0.1, 0.4, inside=(-np.inf, 0.5)) == "holds"
    assert of(0.5, 0.6, inside=(-np.inf, 0.5)) == "does not hold"
    assert of(-0.02, 0.38, inside=(-0.25, 0.25)) == "undecided", "zero inside is not enough"
    assert of(-0.1, 0.1, inside=(-0.25, 0.25)) == "holds"
    assert of(0.1, 0.1, n=7, inside=(-0.25, 0.25)) == "no verdict (n < 8)"
    assert of(np.nan, np.nan, inside=(0.0, 1.0)) == "undecided"


def test_depth_of_change_leaves_depth_0_out_and_ed_kl_does_not():
    kl = np.array([14.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 0.0])
    assert statistics.depth_by_divergence(kl[:-1]) == 0.25
    assert statistics.depth_of_change(kl) == 1.0
    assert statistics.depth_of_change(np.array([14.0, 8.0, 0.0, 0.0, 0.0])) == 0.5
    assert np.isnan(statistics.depth_of_change(np.ones(4)))


def planted(share, n=10):
    """Tables of a model whose second half has a share of the effect on later tokens; noise of a hundredth."""
    rng = np.random.default_rng(0)
    curve = np.repeat([(1 - share) / 2, share / 2], 2)
    rows = [{"example": i, "group": i, "skipped_layer": s, "output": curve[s] + rng.normal(0, 0.002)}
            for i in range(n) for s in range(4)]  # fmt: skip
    return pd.DataFrame(rows).assign(treatment="skip", kind="layer", mode="global", scope="future", effect=1.0)


def test_a_claim_that_random_weights_meet_too_is_no_evidence():
    empty = {"weights": [], "position_0": np.zeros(0, bool)}
    lens, contributions = pd.DataFrame(empty), pd.DataFrame({**empty, "quantity": []})

    def verdict(trained, random, **options):
        both = [planted(trained, **options).assign(weights="trained")]
        both += [] if random is None else [planted(random, **options).assign(weights="random")]
        table = statistics.claims(pd.concat(both), lens, contributions, seed=0)
        return table.set_index("claim").loc["the second half matters little for later tokens (output)"]

    assert verdict(0.10, 0.50).verdict == "holds"
    assert verdict(0.10, 0.12).verdict == "holds, and so does the null"
    assert verdict(0.10, 0.25).verdict == "holds, the null is undecided"
    assert verdict(0.50, 0.10).verdict == "does not hold"
    assert verdict(0.10, 0.12, n=5).verdict == "no verdict (n < 8)"
    alone = verdict(0.10, None)
    assert alone.verdict == "holds" and np.isnan(alone.null)
    assert -0.45 < verdict(0.10, 0.50).difference_low < verdict(0.10, 0.50).difference_high < -0.35


def test_slope_against_random_weights_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    level, length = np.tile([1, 2, 3], 20), rng.normal(0, 1, 60)
    frame = pd.DataFrame({"example": range(60), "group": np.repeat(range(20), 3), "level": level, "measure": "effect"})
    random = frame.assign(score=0.7 * level + length)
    row = statistics.slope_against(frame.assign(score=0.2 * level + random.score), random, seed=0).iloc[0]
    assert abs(row.difference - 0.2) < 1e-9 and row.high - row.low < 1e-9, "what both share drops out"
    assert abs(row.trained - row.random - row.difference) < 1e-9 and row.n == 20
    with pytest.raises(ValueError, match="58 of 60 scores have a partner"):
        statistics.slope_against(random, random[:58], seed=0)


# --- the experiment -------------------------------------------------------------------------------------------------


def test_tables(found):
    table = found.table
    assert set(table.weights) == {"trained", "random"} and set(table.scope) == {"all", "future"}
    assert set(table.treatment) == set(layers.TREATMENTS)
    assert set(table[table.treatment == "skip"].kind) == {"layer", "attn", "mlp"}
    last = table[(table.skipped_layer == 3)]
    assert (last.effect == 0).all(), "after the last layer there is none"
    heard = last[(last["mode"] == "global") & (last.scope == "future") & (last.kind == "layer")]
    assert heard.output.max() < 1e-5, "a change of the last layer before the cut cannot be heard after it"
    pairs = found.tables["pairs"]
    assert (pairs["max"] >= pairs["mean"] - 1e-12).all() and (pairs.p95 >= pairs["median"] - 1e-12).all()
    assert (pairs[pairs.layer <= pairs.skipped_layer]["max"] == 0).all()
    assert found.tables["floor"]["max"].max() < 1e-4
    assert found.tables["floor"]["max"].max() < 0.01 * pairs["max"].max()
    lens = found.tables["lens"]
    deepest = lens[lens.depth == 4]
    assert deepest.kl.abs().max() < 1e-5 and (deepest.overlap == 1).all(), "the lens at depth L is the output"
    assert lens[lens.depth == 0].kl.min() > 1e-3
    assert set(found.summary.statistic) >= {"ED_50", "ED_90", "ED_KL", "ED_ov", "second_half"}
    assert found.tables["against_null"].excludes_zero.dtype == bool
    assert (found.tables["against_null"].n_groups == 3).all() and found.tables["against_null"].few.all()
    claims = found.tables["claims"]
    assert set(claims.verdict) == {"no verdict (n < 8)"} and (claims.n == 3).all()
    np.testing.assert_allclose(claims.difference, claims.estimate - claims.null)
    assert (claims.difference_low <= claims.difference_high).all()


def test_treatments_are_paired_with_skipping(found):
    """The difference is that of the two numbers, and its interval that of the same prompts resampled for both."""
    paired = found.tables["against_treatments"]
    assert set(paired.treatment) == {"random", "other", "mean", "push"} and set(paired.scope) == {"all", "future"}
    np.testing.assert_allclose(paired.difference, paired.skip - paired.other)
    summary = found.summary.query("weights == 'trained' and kind == 'layer' and mode == 'global'")
    for row in paired.query("statistic == 'second_half'").itertuples():
        there = summary[(summary.scope == row.scope) & (summary.measure == row.measure)
                        & (summary.statistic == row.statistic)].set_index("treatment").estimate  # fmt: skip
        np.testing.assert_allclose([row.skip, row.other], there[["skip", row.treatment]])
    assert (paired.low <= paired.difference + 1e-9).all() and (paired.difference <= paired.high + 1e-9).all()
    assert paired.difference.abs().max() > 1e-3, "some replacement is not skipping"
    same = statistics.against(found.table, found.tables["lens"], found.tables["contributions"], seed=0,
                              column="treatment", base="skip", other="skip")  # fmt: skip
    assert not same.excludes_zero.any()


def test_contributions_are_those_of_the_formulas(tiny_model):
    model = tiny_model("llama")
    run = clean_run(model, tokenize(model, [TEXTS.text[0]]).ids[0], sublayers=True)
    table = layers.contributions(run)
    h, a, m = run.states[2, 1:], run.attn_out[2, 1:], run.mlp_out[2, 1:]

    def of(quantity, with_0=False):
        here = table[(table.quantity == quantity) & (table.layer == 2) & (table.position_0 == with_0)]
        return float(here.value.iloc[0])

    np.testing.assert_allclose(of("mlp_norm"), (m.norm(dim=-1) / (h + a).norm(dim=-1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(of("attn_cosine"), torch.cosine_similarity(a, h, dim=-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(
        of("state_cosine"), torch.cosine_similarity(run.states[3, 1:], h, dim=-1).mean(), rtol=1e-4
    )
    assert of("mlp_norm", True) != of("mlp_norm")


def test_parallel_blocks_have_another_denominator(tiny_model):
    model = tiny_model("neox")
    run = clean_run(model, tokenize(model, [TEXTS.text[0]]).ids[0], sublayers=True)
    one, other = (layers.contributions(run, parallel=flag) for flag in (True, False))
    same = one.quantity == "attn_norm"
    assert np.allclose(one[same].value, other[same].value)
    assert not np.allclose(one[one.quantity == "mlp_norm"].value, other[other.quantity == "mlp_norm"].value)


def test_interrupted_run_goes_on_and_ends_with_the_same_tables(tiny_model, cache, monkeypatch):
    model = tiny_model("llama")
    whole = layers.run(model, TEXTS, resume=False, **SMALL)
    plain, calls = layers.global_effects, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(layers, "global_effects", stops)
    with pytest.raises(KeyboardInterrupt):
        layers.run(model, TEXTS, **SMALL)
    assert len(list((cache / "runs").glob("*/result.json"))) == 1
    calls.append(0)
    again = layers.run(model, TEXTS, **SMALL)
    pd.testing.assert_frame_equal(again.table, whole.table)
    pd.testing.assert_frame_equal(again.summary, whole.summary)
    before = len(calls)
    layers.run(model, TEXTS, **SMALL)
    assert len(calls) == before, "everything was read"


def test_a_part_in_another_process_finds_its_models(tiny_model, found):
    """What an executor sends: where the models come from, not the models; the same table comes back."""
    model = tiny_model("llama")
    sent = {"model": to_send(model), "twin": to_send(lab.models.random_twin(model))}
    work = pickle.loads(pickle.dumps(functools.partial(results._work, layers.work, sent, None, False)))
    shared = {"queries": found.tables["queries"], "sums": []}
    shared["parameters"] = {**found.parameters, "kinds": ["layer"], "treatments": ["skip"], "local": False}
    for weights in ("trained", "random"):
        part = work(key="", arguments={"weights": weights, "which": 1, **shared})
        there = found.table.query("treatment == 'skip' and kind == 'layer' and mode == 'global'")
        here = there[(there.weights == weights) & (there.example == found.tables["queries"].example[1])]
        np.testing.assert_allclose(part.table.effect, here.effect, rtol=1e-6)


def test_results_survive_saving(found, tmp_path):
    there = lab.Result.load(found.save(tmp_path / "it"))
    pd.testing.assert_frame_equal(there.table, found.table)
    pd.testing.assert_frame_equal(there.tables["claims"], found.tables["claims"])
    told = there.columns()
    assert (told.meaning != "").all() and {"pairs", "against_null", "claims"} <= set(told.table)


def test_depth_scores(tiny_model):
    data = pd.DataFrame([
        {"example": f"{k}-{i}", "group": f"g{i}", "level": k, "answer": " x",
         "prompt": "W" + "o" * i + "rd" + " of it" * k + " is"}
        for k in (1, 2, 3) for i in range(4)
    ])  # fmt: skip
    result = scores.depth_scores(tiny_model("llama"), data, n_per_level=4, progress=False)
    assert len(result.table) == 24 and result.table.score.between(0, 3).all()
    assert set(result.tables["slopes"].covariate) == {"none", "tokens"}
    assert "known" not in result.table and set(result.tables["slopes"].questions) <= {"all", "right"}
    padded = data.assign(padded="So it is. " + data.prompt)
    padded = scores.depth_scores(tiny_model("llama"), padded, prompt_column="padded", progress=False)
    assert (padded.table.tokens.to_numpy() == result.table.tokens.to_numpy() + 10).all()
    profile = result.tables["profiles"].query("example == '2-1'").sort_values("skipped_layer")
    row = result.table.query("example == '2-1' and measure == 'output'").iloc[0]
    weights = profile.output.to_numpy()
    np.testing.assert_allclose(row.score, (weights * np.arange(4)).sum() / weights.sum())
    assert profile.output.iloc[-1] < 1e-5 and profile.output.iloc[0] > 1e-4
    with pytest.raises(ValueError, match=r"levels=\[7\]: choose from \[1, 2, 3\]"):
        scores.depth_scores(tiny_model("llama"), data, levels=[7])
    with pytest.raises(ValueError, match="depth scores need prompt and level"):
        scores.depth_scores(tiny_model("llama"), TEXTS)


def test_right_and_known_are_missing_where_an_answers_first_token_says_nothing(tiny_folder, capsys):
    """One token a byte: behind "is" each answer begins with a space. A space that is said is no hit, and no miss."""
    model = lab.load(tiny_folder("llama"), device="cpu")
    head, tokenizer = model.original_model.get_output_embeddings(), model.tokenizer
    ends = {"open": " ", "closed": ""}
    data = pd.DataFrame([
        {"example": f"{kind}-{answer}-{level}", "group": answer, "level": level, "answer": answer,
         "prompt": "The word" * level + " is" + ends[kind], "hop_prompts": ["It is "] * level, "hop_answers": [[answer]] * level}
        for kind in ends for answer in "xyzw" for level in (1, 2)
    ])  # fmt: skip
    hops = {"z": [["It is"], ["It is ", "It is"]], "w": [["It is "], ["It is", "It is "]]}  # "It is": cannot be read
    names = {"z": [[["x"]], [["x"], ["x"]]], "w": [[["y"]], [["x"], ["y"]]]}  # one miss is enough not to know
    for group in hops:
        for row in data.index[data.answer == group]:
            data.at[row, "hop_prompts"] = hops[group][data.level[row] - 1]
            data.at[row, "hop_answers"] = names[group][data.level[row] - 1]
    for text, wanted in ((" ", {"x": False}), ("x", {"x": True})):
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():  # this token is said now, whatever the prompt
            head.weight.mul_(0.5)  # but other words keep a chance, which skipping a layer changes
            head.bias.copy_(8.0 * (torch.arange(len(head.bias)) == token))
        result = scores.depth_scores(model, data, progress=True)
        assert "8 of 16 answers begin with a token that says nothing of them" in capsys.readouterr().out
        table = result.table[result.table.measure == "effect"].set_index("example")
        assert table.right[table.index.str.startswith("closed")].isna().all()
        for row in table[table.index.str.startswith("open")].itertuples():
            assert row.right == wanted.get(row.group, False), row
        known = table.groupby("group").known.first()
        assert known["x"] == wanted["x"] and not known["y"] and not known["w"]
        assert pd.isna(known["z"]) if wanted["x"] else not known["z"]
        summary = result.summary[result.summary.measure == "effect"]
        assert summary.n.tolist() == [8, 8] and summary.n_readable.tolist() == [4, 4]
        assert summary.right.tolist() == [wanted["x"] / 4] * 2
    assert lab.Result.load(result.save(tiny_folder("llama").parent / "saved")).table.right.equals(result.table.right)


def test_bad_input(tiny_model, tiny_folder):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="prompt 'prompt 1' has 8 tokens; cuts at 8, 16, ... need 13 at least"):
        layers.run(model, pd.DataFrame({"text": [TEXTS.text[0], "Too few."]}), n=2, progress=False)
    with pytest.raises(ValueError, match=r"kinds=\['heads'\]: choose at least one of layer, attn, mlp"):
        layers.run(model, TEXTS, kinds=["heads"])
    with pytest.raises(ValueError, match=r"treatments=\[\]: choose at least one of skip, random, other, mean, push"):
        layers.run(model, TEXTS, treatments=[])
    with pytest.raises(ValueError, match="wanted a column text, or prompt and solution"):
        layers.run(model, pd.DataFrame({"words": ["a"]}))
    broken = lab.load(tiny_folder("llama"), device="cpu")
    with torch.no_grad():
        broken.original_model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="^prompt 'prompt [012]': the state at depth 3 of '.*' is not finite"):
        layers.run(broken, TEXTS, resume=False, **SMALL)


SCORED = pd.DataFrame({"prompt": TEXTS.text, "level": [1, 2, 2], "answer": [" a", " b", " c"]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"example": ["p", "p", "q"]}, "your prompts: example 'p' occurs twice: every row needs a name of its own"),
        (
            {"example": ["p", None, "q"]},
            "your prompts: example in row 1 is (None|nan), neither a text nor a whole number",
        ),
        (
            {"group": "same"},
            r"your prompts: all \d prompts drawn are of the group 'same', and intervals are over groups",
        ),
        ({"group": ["a", "b", None]}, "your prompts: group in row 2 is (None|nan), neither a text nor a whole number"),
        ({"group": [1.0, 2.0, 3.0]}, "group in row 0 is 1.0, neither a text nor a whole number"),
        ({"text": [TEXTS.text[0], np.nan, "c"]}, "text in row 1 is nan, not a text"),
        ({"text": [TEXTS.text[0], "\u200b", "c"]}, r"text in row 1 is '\\u200b': give it a text or drop the row"),
        ({"prompt": ["a", 7, "c"]}, "prompt in row 1 is 7, not a text"),
        ({"answer": [" a", np.nan, " c"]}, "answer in row 1 is nan, not a text"),
    ],
)
def test_rows_are_checked_before_the_model_runs(tiny_model, monkeypatch, changes, message):
    monkeypatch.setattr(layers, "clean_run", lambda *args, **options: pytest.fail("the model ran"))
    data = (TEXTS if "text" in changes else SCORED).assign(**changes)
    with pytest.raises(ValueError, match=message):
        layers.run(tiny_model("llama"), data, resume=False, **SMALL)
    with pytest.raises(ValueError, match=message):
        scores.depth_scores(tiny_model("llama"), data.assign(level=1, answer=data.get("answer", " a")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"level": [1.5, 2, 2]}, "level 1.5 in row 0"),
        ({"prompt": ["Any prompt.", "a", "Some."]}, "prompt 'prompt 1' has 1 tokens; a depth score needs at least 3"),
        ({"aliases": [["a"], ["b"], "c"]}, "aliases in row 2 .* is 'c', not a list"),
        (
            {"hop_prompts": [["a"], ["b", "c"], ["d", "e"]]},
            "has hop_prompts and no hop_answers: give both, or known=False",
        ),
        ({"prompt_2": "x"}, "data has no column padded"),
    ],
)
def test_scored_prompts_are_checked_before_the_model_runs(tiny_model, monkeypatch, changes, message):
    monkeypatch.setattr(layers, "clean_run", lambda *args, **options: pytest.fail("the model ran"))
    column = "padded" if "prompt_2" in changes else "prompt"
    with pytest.raises(ValueError, match=message):
        scores.depth_scores(tiny_model("llama"), SCORED.assign(**changes), prompt_column=column, n_per_level=3)


@pytest.mark.usefixtures("unchecked")
def test_one_text_is_checked_before_the_model_runs(tiny_model, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(layers, "clean_run", lambda *args, **options: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="text 0 is None, not a text"):
        layers.without(model, None, [1])
    with pytest.raises(ValueError, match="data is a list; give a data set's name or a table"):
        layers.run(model, ["a text"])
    with pytest.raises(ValueError, match="prompt 0 is None, not a text"):
        attributions.joint(model, None, " a")
    with pytest.raises(ValueError, match="the answer is nan, not a text"):
        attributions.joint(model, "Ana", float("nan"))


def test_a_variant_that_is_not_finite_is_named_by_prompt(tiny_model, monkeypatch):
    def plain(*args):
        depths, states = skipped(*args)
        states[1, 3] = torch.inf
        return depths, states

    skipped = layers.skipped
    for module in (layers, scores):
        monkeypatch.setattr(module, "skipped", plain)
    with pytest.raises(FloatingPointError, match="^prompt 'prompt [012]': what layer 2 adds is not finite"):
        layers.run(tiny_model("llama"), TEXTS, resume=False, **SMALL)
    data = TEXTS.assign(prompt=TEXTS.text, level=[1, 2, 2], answer=" x")
    with pytest.raises(FloatingPointError, match="^prompt 'prompt 0': what layer 2 adds is not finite"):
        scores.depth_scores(tiny_model("llama"), data, progress=False)


# --- erasure and integrated gradients -------------------------------------------------------------------------------


def test_erasure(tiny_model):
    model = tiny_model("llama")
    table = attributions.erasure(model, "Ana saw the", " sea", background=list(TEXTS.text[1:]))
    ids, at = attributions.joint(model, "Ana saw the", " sea")
    assert len(at) == len(ids) - len("Ana saw the") and table.position.max() == at[-1]
    deepest = table[table.depth == model.cfg.n_layers]
    assert deepest[~deepest.position.isin(at)].change.max() < 1e-5, "at depth L a position changes only itself"
    assert deepest[deepest.position.isin(at)].change.min() > 1e-3
    assert table[table.depth == 0].change.min() > 1e-4
    with pytest.raises(ValueError, match="give mean= .one state per depth., or background="):
        attributions.erasure(model, "Ana saw the", " sea")
    with pytest.raises(ValueError, match="the answer is empty"):
        attributions.erasure(model, "Ana", "  ", background=["a b"])


@pytest.mark.parametrize("site", attributions.SITES)
def test_attributions_sum_to_the_difference(tiny_model, site, tmp_path):
    table = attributions.integrated_gradients(tiny_model("llama"), "Ana saw the", " sea", site=site, nodes=32)
    assert max(table.attrs["gap"].values()) < 1e-4 and {int(layer) for layer in table.attrs["gap"]} == set(table.layer)
    kept = lab.Result("table", table, table.iloc[:0], {})
    assert lab.Result.load(kept.save(tmp_path / "kept")).table.attrs == table.attrs
    assert table.groupby("layer").attribution.sum().abs().max() > 1e-5
    assert (table[table.position == 0].attribution == 0).all(), "position 0 stays where it is"
    moved = attributions.integrated_gradients(tiny_model("llama"), "Ana saw the", " sea", site=site, position_0=True)
    assert moved[moved.position == 0].attribution.abs().max() > 0 and max(moved.attrs["gap"].values()) < 1e-4
    with pytest.raises(ValueError, match=r"layers=\[\]: give at least one, each from 0 to 3"):
        attributions.integrated_gradients(tiny_model("llama"), "Ana saw the", " sea", layers=[])
    with pytest.raises(ValueError, match="site='mid'"):
        attributions.integrated_gradients(tiny_model("llama"), "Ana saw the", " sea", site="mid")


# --- the integrator view --------------------------------------------------------------------------------------------


def logits(model):
    ids = tokenize(model, [TEXTS.text[0]]).ids
    with torch.inference_mode():
        return model.original_model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_rewritten_blocks(tiny_model, family):
    model = tiny_model(family)
    plain = logits(model)
    with rewritten(model, {1: lambda x, step: step(x), 2: lambda x, step: step(x)}):
        assert torch.equal(logits(model), plain)
    with rewritten(model, {1: lambda x, step: x}):
        here = logits(model)
    with skip(model, 1):
        assert torch.equal(logits(model), here) and not torch.equal(here, plain)
    for left_out, site in (({"attn": 0}, "attn_out"), ({"mlp": 0}, "mlp_out")):
        with rewritten(model, {2: lambda x, step, left_out=left_out: step(x, **left_out)}):
            here = logits(model)
        with ablate(model, site, layer=2):
            assert torch.allclose(logits(model), here, atol=1e-6) and not torch.equal(here, plain)
    assert hooks_left(model) == 0 and torch.equal(logits(model), plain)


def test_rewritten_leaves_nothing_behind_after_an_error(tiny_model):
    model = tiny_model("llama")
    plain = logits(model)

    def fails(x, step):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), rewritten(model, {0: fails}):
        logits(model)
    assert hooks_left(model) == 0 and torch.equal(logits(model), plain)


def test_integrator_tables(tiny_model):
    model = tiny_model("llama")
    result = integrator.run(model, TEXTS, n_texts=3, n_tokens=20, n_step_texts=1, substeps=16, progress=False)
    steps = result.tables["steps"]
    finest = steps[steps.n == 8].error.mean()
    assert finest < steps[steps.n == 1].error.mean()
    one = result.table.query("program == 'dropped' and layer == 1").sort_values("example")
    with skip(model, 1, first=1):  # position 0 takes every block as usual
        dropped = integrator._nll(model, tokenize(model, list(TEXTS.text)).ids[:, :20], {})
    np.testing.assert_allclose(sorted(one.nll), sorted(dropped), rtol=1e-5)
    assert set(result.summary.program) == set(integrator.PROGRAMS)
    assert {"first third", "middle third", "last third", "all"} <= set(result.table["where"])
    assert set(result.tables["neighbours"].neighbours) == {True, False}
    assert set(steps.weights) == {"trained"} and hooks_left(model) == 0
    assert (result.columns().meaning != "").all()


def test_integrator_programs_leave_position_0_alone(tiny_model):
    """Whatever stands in for a block, position 0 takes it as usual; later positions do not."""
    model = tiny_model("llama")
    ids = tokenize(model, [TEXTS.text[0]]).ids

    def states(plan):
        seen = []
        hooks = [(SITES["resid_post"].format(layer=i), lambda x, hook: seen.append(x.clone())) for i in range(4)]
        with torch.inference_mode(), rewritten(model, plan), model.hooks(fwd_hooks=hooks):
            model.original_model.base_model(input_ids=ids, use_cache=False)
        return torch.cat(seen)

    plain = states({})
    plans = integrator._plans(list(integrator.PROGRAMS), [0, 1, 2, 3], 4, np.random.default_rng(0), 0)
    assert {name for name, *_ in plans} == set(integrator.PROGRAMS)
    for name, _, _, plan in plans:
        found = states(plan)
        assert torch.allclose(found[:, 0], plain[:, 0], atol=1e-6), name
        assert not torch.allclose(found[-1, 1:], plain[-1, 1:], atol=1e-4), name


def test_integrator_null(tiny_model):
    model = tiny_model("llama")
    null = lab.models.random_twin(model)
    result = integrator.run(model, TEXTS, n_texts=2, n_tokens=12, n_step_texts=1, substeps=8, programs=[], null=null)
    for name in ("steps", "splitting", "neighbours"):
        table = result.tables[name]
        one, other = (table[table.weights == weights] for weights in ("trained", "random"))
        assert len(one) == len(other) > 0
    alone = integrator.run(null, TEXTS, n_texts=2, n_tokens=12, n_step_texts=1, substeps=8, programs=[])
    np.testing.assert_allclose(alone.tables["splitting"].commutator, result.tables["splitting"].query(
        "weights == 'random'").commutator)  # fmt: skip


def test_integrator_bad_input(tiny_model):
    with pytest.raises(ValueError, match="no site resid_mid: this model's blocks run attention and MLP in parallel"):
        integrator.run(tiny_model("neox"), TEXTS)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="substeps=6: give a power of two, at least 8"):
        integrator.run(model, TEXTS, substeps=6)
    with pytest.raises(ValueError, match=r"layers=\[\]: give at least one, each from 0 to 3"):
        integrator.run(model, TEXTS, layers=[])
    with pytest.raises(ValueError, match=r"layers=\[4\]"):
        integrator.run(model, TEXTS, layers=[4])
    with pytest.raises(ValueError, match="n_tokens=40 needs longer ones"):
        integrator.run(model, TEXTS, n_tokens=40)
    with pytest.raises(ValueError, match="programs="):
        integrator.run(model, TEXTS, programs=["backwards"])
