"""Descriptions, knockouts, projections and the stages made of them, on a small real model with planned queries."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_back_patching import places, plain_text, states_of
from test_two_hop import changed, first_of, ids_of, next_token, planned_queries, talking_model
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab import back_patching
from lab.back_patching import stages, two_hop
from lab.back_patching.answers import Answer
from lab.back_patching.stages import DESCRIPTION, STAGES
from lab.interventions import block_attention
from lab.models import SITES
from lab.runs import clean_run

TARGETS = [0, 2]
NAMED = "q02"  # the query whose names are what its states are described as


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_model(tmp_path_factory.mktemp("talking") / "talking")


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformerBridge:
    return lab.load(folder, device="cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def described(model: TransformerBridge) -> dict[str, list[tuple[int, int, str]]]:
    """The plain reference for one query: (source, target, full text) of each description, for t1 and t2."""
    query = planned_queries(model).set_index("example").loc[NAMED]
    at, states, last = (
        places(model, query.text, query.e1),
        states_of(model, query.text),
        len(ids_of(model, DESCRIPTION)) - 1,
    )
    return {
        position: [
            (source, target, plain_text(model, DESCRIPTION, target, {last: states[source, at[position][0]]}))
            for source in range(4)
            for target in TARGETS
        ]
        for position in ("t1", "t2")
    }


@pytest.fixture(scope="module")
def answers(model: TransformerBridge, described: dict[str, list[tuple[int, int, str]]]) -> lab.Result:
    """Planned queries, one of them with bridge and answer named as its states are described from source layer 1 and 2 on."""
    queries = planned_queries(model)
    row = queries.example.tolist().index(NAMED)
    names = {"e2": [described["t1"][3][2], described["t2"][5][2]], "e3": [described["t2"][4][2]]}
    for column, more in names.items():
        aliases = queries[f"{column}_aliases"].tolist()
        aliases[row] = [*aliases[row], *(text.strip() for text in more)]
        queries[f"{column}_aliases"] = aliases
    return two_hop.run(model, queries, resume=False, progress=False)


@pytest.fixture(scope="module")
def result(model: TransformerBridge, answers: lab.Result) -> lab.Result:
    return run(model, answers)


def run(model: TransformerBridge, data: lab.Result | pd.DataFrame, **options) -> lab.Result:
    given = {"n": 4, "target_layers": TARGETS, "window": 1, "progress": False, "resume": False, **options}
    return stages.run(model, data, **given)


# --- tables -------------------------------------------------------------------------------------------------------------


def test_tables_have_every_row(model, result):
    tables, examples = result.tables, {"q00", "q01", "q02", "q03"}
    wanted = {
        "descriptions": (["position", "names"], 2 * 4),
        "projections": (["site", "layer", "what"], 2 * 4 * 3),
        "knockout": (["keys", "layer"], 3 * 4),
        "lens": (["position", "depth", "what"], 2 * 5 * 2),
        "published_projections": (["site", "layer", "what"], 2 * 4 * 2),
        "published_knockout": (["layer"], 4),
    }
    assert set(tables) == {*wanted, "queries"}
    for name, (keys, rows) in wanted.items():
        table = tables[name]
        assert len(table) == 4 * rows and not table.duplicated(["example", *keys]).any(), name
        assert set(table.example) == examples and not table.drop(columns="rank", errors="ignore").isna().any(
            axis=None
        ), name
    missing = tables["lens"][tables["lens"]["rank"].isna()]  # names that begin with a lone space
    assert set(zip(missing.example, missing.what, strict=True)) == {
        (query.example, name) for query in tables["queries"].itertuples() for name in ("e2", "e3")
        if not first_of(model, getattr(query, f"{name}_aliases"))
    }  # fmt: skip
    assert 0 < len(missing) < len(tables["lens"])
    assert set(tables["descriptions"].names) == {"e2", "e3", "decoy", "answer_decoy"}
    assert set(tables["knockout"]["keys"]) == {"e1", "t1", "other"}
    assert set(result.table.stage) <= set(STAGES) and set(result.summary.stage) == set(STAGES)
    assert result.parameters["target_layers"] == TARGETS and result.parameters["window"] == 1


def test_names_are_found_where_the_reference_says_them(model, answers, result, described):
    """By the full texts of the plain path; as published, a text that names e1 does not count for e2."""
    query = next(q for q in answers.tables["queries"].itertuples() if q.example == NAMED)
    table = result.tables["descriptions"].query("example == @NAMED").set_index(["position", "names"])
    e1 = two_hop.answer_of(query, "e1")
    for position in ("t1", "t2"):
        for name in ("e2", "e3"):
            answer = two_hop.answer_of(query, name)
            sources = [s for s, _, text in described[position] if answer.leads(text) and not e1.leads(text)]
            row = table.loc[position, name]
            assert (row.resolved, row.cells) == (bool(sources), len(sources))
            assert row.first_source_layer == (min(sources) if sources else -1)
    assert table.first_source_layer["t1", "e2"] == 1 and table.first_source_layer["t2", "e3"] <= 2
    assert not table.resolved["t1", "decoy"]


def test_a_description_that_names_e1_names_no_bridge(model, answers, described):
    queries = answers.tables["queries"].copy()
    row = queries.example.tolist().index(NAMED)
    queries = changed("e1_aliases", [queries.e1[row], described["t1"][3][2].strip()], row=row)(queries)
    table = run(model, replace(answers, tables={**answers.tables, "queries": queries}), n=3).tables["descriptions"]
    assert table.query("example == @NAMED and position == 't1' and names == 'e2'").first_source_layer.item() != 1


def test_stages_are_the_first_layers_of_the_tables(result):
    tables = result.tables
    expected = set()
    descriptions = tables["descriptions"]
    for stage, place, name in (
        ("bridge at t1", "t1", "e2"),
        ("bridge at t2", "t2", "e2"),
        ("answer at t2", "t2", "e3"),
    ):
        rows = descriptions[(descriptions.position == place) & (descriptions.names == name) & descriptions.resolved]
        expected |= {(row.example, stage, row.first_source_layer) for row in rows.itertuples()}
    cut = tables["knockout"].query("keys == 'e1' and changed")
    expected |= {(row.example, "moved", row.layer) for row in cut.itertuples()}
    cut = tables["published_knockout"].query("changed")
    expected |= {(row.example, "moved_published", row.layer) for row in cut.itertuples()}
    top = tables["projections"].query("what == 'prediction' and rank == 0").groupby("example").layer.min()
    expected |= {(example, "prediction", layer) for example, layer in top.items()}
    assert set(zip(result.table.example, result.table.stage, result.table.layer, strict=True)) == expected
    assert len(result.table) == len(expected)
    assert {"bridge at t1", "bridge at t2", "answer at t2", "moved"} <= {stage for _, stage, _ in expected}
    summary = result.summary.set_index(["set", "stage"])
    sets = result.tables["queries"].set_index("example").set
    for (kind, stage), row in summary.iterrows():
        reached = {example for example, name, _ in expected if name == stage and sets[example] == kind}
        assert row.n == 2 and row.share == pytest.approx(len(reached) / 2)
    assert summary.share.dtype == float and summary.median_layer.dtype == float


def test_projections_and_lens_are_ranks_of_the_models_own_unembedding(model, answers, result):
    query = next(q for q in answers.tables["queries"].itertuples() if q.example == NAMED)
    ids, at, plain = ids_of(model, query.text), places(model, query.text, query.e1), model.original_model
    names = [SITES[site].format(layer=layer) for site in ("attn_out", "mlp_out", "resid_post") for layer in range(4)]
    with torch.inference_mode():
        logits, cache = model.run_with_cache(torch.tensor([ids]), names_filter=names)

    def rank(state: torch.Tensor, wanted: list[int]) -> int:
        with torch.inference_mode():
            row = plain.lm_head(plain.model.norm(state))
        return int((row > row[wanted].max()).sum())

    first = {name: first_of(model, [getattr(query, name), *getattr(query, f"{name}_aliases")])
             for name in ("e2", "e3")}  # fmt: skip
    first["prediction"] = [int(logits[0, -1].argmax())]
    for row in result.tables["projections"].query("example == @NAMED").itertuples():
        state = cache[SITES[row.site].format(layer=row.layer)][0, -1]
        assert row.rank == rank(state, first[row.what]), row
    for row in result.tables["lens"].query("example == @NAMED and depth > 0").itertuples():
        state = cache[SITES["resid_post"].format(layer=row.depth - 1)][0, at[row.position][0]]
        assert row.rank == rank(state, first[row.what]), row
    table = stages.lens(model, query.text, {"t2": at["t2"][0]}, {"e3": [query.e3, *query.e3_aliases]})
    wanted = result.tables["lens"].query("example == @NAMED and position == 't2' and what == 'e3'")
    assert table["rank"].tolist() == wanted["rank"].tolist()


@pytest.mark.parametrize("name, other", [("e2", "e3"), ("e3", "e2")])
def test_a_decoy_is_that_of_another_query_of_the_same_type(model, answers, name, other):
    queries = answers.tables["queries"]
    queries = queries.assign(e3_type=["city", "river"] * 7)
    by_label = queries.set_index(name)
    for seed in range(5):
        decoys = stages._decoys(queries, queries, name, seed)
        for query, (label, *aliases) in zip(queries.itertuples(), decoys, strict=True):
            donor = by_label.loc[label]
            assert label != getattr(query, name) and donor[other] != getattr(query, other)
            assert donor[f"{name}_type"] == getattr(query, f"{name}_type")
            assert aliases == donor[f"{name}_aliases"]  # as many names as the true one has
    assert stages._decoys(queries, queries, name, 0) == stages._decoys(queries, queries[:], name, 0) != decoys
    untyped = queries.drop(columns=f"{name}_type")
    assert len(stages._decoys(untyped, untyped, name, 0)) == len(queries)


def test_the_control_of_the_knockout_is_as_long_as_e1_and_spares_the_first_token(model, answers, result):
    queries = answers.tables["queries"].set_index("example")
    for example, text in result.tables["queries"].set_index("example").text.items():
        at = places(model, text, queries.e1[example])["all"]
        keys = list(range(at[0] - len(at), at[0]))
        assert min(keys) > 0
        wanted = stages.knockout(model, text, keys, window=1)
        rows = result.tables["knockout"].query("example == @example and keys == 'other'")
        assert rows.changed.tolist() == (wanted.token[1:] != wanted.token[0]).tolist()
    frame = answers.tables["queries"]
    for start, words in (("", 0), ("A", 0), ("So, ", 1)):  # nothing before e1 but, at most, the first token
        texts = frame.text.where(frame.example != NAMED, start + frame.e1 + " has a capital, it is")
        moved = replace(answers, tables={**answers.tables, "queries": frame.assign(text=texts)})
        rows = run(model, moved, n=3).tables["knockout"].query("example == @NAMED")
        assert set(rows["keys"]) == {"e1", "t1", *(["other"] if words else [])}, start


def test_names_stand_beside_their_decoys_paired():
    rows = [
        ("t1", "e2", [1, 1, 0]),
        ("t1", "decoy", [0, 1, 0]),
        ("t1", "e3", [0, 0, 0]),
        ("t1", "answer_decoy", [1, 0, 0]),
    ]
    table = pd.DataFrame([
        {"example": example, "group": example, "position": position, "names": names, "resolved": bool(hit), "cells": 3 * hit}
        for position, names, hits in rows for example, hit in zip("abc", hits, strict=True)
    ])  # fmt: skip
    found = stages.against_decoys(table.iloc[::-1]).set_index("names")
    assert found.share.to_dict() == pytest.approx({"e2": 2 / 3, "e3": 0}) and found.n.tolist() == [3, 3]
    assert found.decoy.to_dict() == pytest.approx({"e2": 1 / 3, "e3": 1 / 3})
    assert found.difference.to_dict() == pytest.approx({"e2": 1 / 3, "e3": -1 / 3})
    assert found.loc["e2", ["diff_low", "diff_high"]].tolist() == [0, 1] and found.pairs["e2"] == 2
    assert (found.low <= found.share).all() and (found.share <= found.high).all()


def test_answer_first_by_hand(capsys):
    """a: answer at depth 1, bridge at 2; b: bridge only; c: answer only; d: both at depth 0; e: neither."""
    first = {"a": (2, 1), "b": (1, None), "c": (None, 2), "d": (0, 0), "e": (None, None)}
    rows = [
        {"example": example, "group": "g", "position": position, "depth": depth, "what": what,
         "rank": 9 if at is not None and depth >= at and position == "t2" else 10}
        for example, pair in first.items() for what, at in zip(("e2", "e3"), pair, strict=True)
        for position in ("t1", "t2") for depth in range(3)
    ]  # fmt: skip
    unread = pd.DataFrame(rows)
    unread["rank"] = unread["rank"].astype("Int64").mask((unread.example == "a") & (unread.what == "e3"))
    assert stages.answer_first(unread).index.tolist() == list("bcde"), "what cannot be read does not come first"
    assert "1 of 5 queries are left out" in capsys.readouterr().out
    found = stages.answer_first(pd.DataFrame(rows))
    assert found.index.tolist() == list("abcde") and not capsys.readouterr().out
    assert found.answer_first.tolist() == [True, False, True, False, False]
    assert found.bridge_first.tolist() == [False, True, False, False, False]
    assert found.bridge.tolist() == [2, 1, np.inf, 0, np.inf]
    assert not stages.answer_first(pd.DataFrame(rows), top=9)[["answer_first", "bridge_first"]].any(axis=None)


# --- descriptions and knockouts against a plain forward pass --------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_describe_is_a_plain_patched_forward(model, described, reuse):
    query = planned_queries(model).set_index("example").loc[NAMED]
    at = places(model, query.text, query.e1)
    clean = clean_run(model, torch.tensor(ids_of(model, query.text)))
    for position in ("t1", "t2"):
        full = described[position]
        words = [text.split()[0] for _, _, text in full if len(text.split()[0]) > 1]
        names = [
            Answer(words[0]),
            Answer(f"{words[0]} {full[0][2].split()[1]}"),
            Answer(full[-1][2].strip()),
            Answer("Nowhere"),
        ]
        pairs, texts = stages.describe(model, clean.states[:, at[position][0]], TARGETS, names, reuse=reuse)
        assert pairs == [(source, target) for source, target, _ in full]
        for said, (_, _, text) in zip(texts, full, strict=True):
            assert text.startswith(said)
            for name in names:  # a longer name that begins with a shorter one is waited for
                assert name.leads(said) == name.leads(text), (name, said, text)
        assert sum(map(len, texts)) < sum(len(text) for _, _, text in full), "nothing was cut short"


@pytest.mark.parametrize("reuse", [True, False])
def test_knockout_is_the_context_manager_layer_by_layer(model, reuse):
    prompt = "The capital of the land of Rome is"
    ids = ids_of(model, prompt)
    last, keys = len(ids) - 1, [8, 9, 10]
    table = stages.knockout(model, prompt, keys, window=1, wanted=[70, 90], reuse=reuse)
    assert table.layer.tolist() == [-1, 0, 1, 2, 3]
    assert table.token[0] == next_token(model, ids)
    for centre in range(4):
        layers = [layer for layer in range(4) if abs(layer - centre) <= 1]
        with block_attention(model, layers, query=last, keys=keys), torch.inference_mode():
            logits = model.original_model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert table.token[centre + 1] == int(logits.argmax())
        assert table["rank"][centre + 1] == int((logits > logits[[70, 90]].max()).sum())
    # the partner: blind to everything but itself in all layers, the last token says what it says alone
    alone = stages.knockout(model, prompt, list(range(last)), window=4, reuse=reuse)
    assert alone.token[0] == table.token[0] and (alone.token[1:] != table.token[0]).all()
    assert alone.token[1:].nunique() == 1


def test_a_blind_last_token_says_what_it_says_alone(model):
    """Rotary positions are relative, so a token that sees itself only does not know where it stands."""
    ids = ids_of(model, "The capital of the land of Rome is")
    alone = stages.knockout(model, "The capital of the land of Rome is", list(range(len(ids) - 1)), window=4)
    assert set(alone.token[1:]) == {next_token(model, ids[-1:])}


# --- as published ---------------------------------------------------------------------------------------------------------


def test_the_published_rule_stands_beside_ours(model, answers):
    """A planned text: q00 at t1, source 2, target 0 says "UPpi pocgoG: po po": "name: ", and not the first thing said."""
    queries = answers.tables["queries"]
    row = queries.example.tolist().index("q00")

    def named(**aliases: list[str]) -> lab.Result:
        frame = queries.copy()
        for column, names in aliases.items():
            frame = changed(f"{column}_aliases", [*frame[f"{column}_aliases"][row], *names], row=row)(frame)
        given = replace(answers, tables={**answers.tables, "queries": frame})
        return run(model, given, n=2, published_rule=True)

    def found(result: lab.Result, names: str, table: str = "published_descriptions") -> tuple:
        rows = result.tables[table].query("example == 'q00' and position == 't1' and names == @names")
        return tuple(rows[["resolved", "first_source_layer", "cells"]].iloc[0])

    result = named(e2=["pocgoG"])
    assert found(result, "e2") == (True, 2, 1) and found(result, "e2", "descriptions") == (False, -1, 0)
    assert found(named(e3=["pocgoG"]), "e3") == (True, 2, 1)
    assert found(named(e3=["pocgoG"], e2=["POCGOG"]), "e3") == (False, -1, 0)  # e2 is tried first, in any case
    assert found(named(e2=["pocgoG"], e1=["pocgoG"]), "e2") == (False, -1, 0)  # and e1 before it
    assert found(named(e2=["UPpi"]), "e2") == (False, -1, 0) and found(named(e2=["UPpi"]), "e2", "descriptions")[0]
    both = named(e2=["UPpi pocgoG"]).tables
    assert both["published_descriptions"].query("position == 't1' and names == 'e2'").both.tolist() == [1, 0]
    assert result.tables["published_descriptions"].query("position == 't1' and names == 'e2'").both.tolist() == [0, 0]
    table = stages.against_decoys(result.tables["published_descriptions"])
    assert table.query("position == 't1' and names == 'e2'").share.item() == 0.5 and not table.decoy.any()


def test_whole_descriptions_move_nothing_of_ours(model, answers, result):
    whole = run(model, answers, published_rule=True)
    pd.testing.assert_frame_equal(whole.table, result.table)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(whole.tables[name], table)
    assert len(whole.tables["published_descriptions"]) == len(result.tables["descriptions"])


@pytest.mark.parametrize("reuse", [True, False])
def test_a_published_knockout_reads_the_prompt_with_the_cut_and_speaks_on_without(model, reuse):
    """Ten tokens by the plain model: attention of the prompt's last position is cut, that of the new ones is not."""
    prompt = "The capital of the land of Rome is"
    start = ids_of(model, prompt)
    last, keys = len(start) - 1, list(range(1, 14))
    table = stages.knockout(model, prompt, keys, window=1, max_new_tokens=10, reuse=reuse).set_index("layer")
    for centre in range(-1, 4):
        ids, layers = list(start), [layer for layer in range(4) if centre >= 0 and abs(layer - centre) <= 1]
        for _ in range(10):
            with block_attention(model, layers, query=last, keys=keys), torch.inference_mode():
                ids.append(int(model.original_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        said = model.tokenizer.decode(ids[len(start) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert table.text[centre] == said, centre
    assert table.text.nunique() > 2


def test_what_a_published_cut_changes():
    """Changed: not the same text, and not both right."""
    answer = Answer("Athens", ["A"])
    for plain, cut, wanted in (
        (" Athens.", " the city of Athens", False),  # both right
        (" Athens.", " Sparta", True),
        (" Sparta", " Athens", True),  # the cut repaired it
        (" Sparta", " Thebes", True),  # neither is right: another word is enough
        (" Sparta\n", "Sparta", False),
        (" A", " A a", True),  # an alias of one character is no answer
    ):
        assert stages.changed_as_published(plain, cut, answer) is wanted, (plain, cut)


def test_the_table_of_published_cuts_is_that_of_t1(model, answers):
    result = run(model, answers, n=8)
    queries, cuts = answers.tables["queries"].set_index("example"), result.tables["published_knockout"]
    for example, rows in cuts.groupby("example"):
        query = next(queries.loc[[example]].itertuples())
        t1 = places(model, query.text, query.e1)["t1"]
        text = stages.knockout(model, query.text, t1, window=1, max_new_tokens=10).text
        wanted = [stages.changed_as_published(text[0], cut, two_hop.answer_of(query, "e3")) for cut in text[1:]]
        assert rows.changed.tolist() == wanted
    changed = cuts[cuts.changed]
    assert 0 < len(changed) < len(cuts)
    moved = result.table.query("stage == 'moved_published'")
    assert moved[["example", "layer"]].to_numpy().tolist() == changed[["example", "layer"]].to_numpy().tolist()


def test_published_first_tokens_count_in_lower_case_and_without_a_space(model, answers, result):
    ids = stages.published_first_tokens(model, ["Rome", "Oslo", "O"])
    spellings = [" Rome", "Rome", " rome", "rome", " Oslo", "Oslo", " oslo", "oslo"]
    wanted = {ids_of(model, spelling)[0] for spelling in spellings}
    assert set(ids) == {token for token in wanted if model.tokenizer.decode([token]).strip()}
    assert len(ids) > len(two_hop.first_tokens(model, ["Rome", "Oslo"]))
    query = next(answers.tables["queries"].query("example == @NAMED").itertuples())
    sites = {site: [SITES[site].format(layer=layer) for layer in range(4)] for site in ("attn_out", "mlp_out")}
    with torch.inference_mode():
        _, cache = model.run_with_cache(torch.tensor([ids_of(model, query.text)]), names_filter=sum(sites.values(), []))
    for row in result.tables["published_projections"].query("example == @NAMED").itertuples():
        names = [getattr(query, row.what), *getattr(query, f"{row.what}_aliases")]
        with torch.inference_mode():
            plain = model.original_model
            logits = plain.lm_head(plain.model.norm(cache[sites[row.site][row.layer]][0, -1]))
        assert row.rank == int((logits > logits[stages.published_first_tokens(model, names)].max()).sum()), row


def test_info_propagation_is_the_mean_of_what_is_there(result):
    queries = pd.DataFrame({"example": ["a", "b", "c"], "group": ["a", "b", "c"], "set": ["correct"] * 3})
    cut = pd.DataFrame({"example": ["a", "a", "b"], "layer": [2, 3, 5], "changed": [False, True, True]})
    written = pd.DataFrame({
        "example": ["a", "a", "a", "b"], "site": ["attn_out", "attn_out", "mlp_out", "attn_out"], "what": ["e2"] * 4,
        "layer": [6, 8, 0, 1], "rank": [1, 0, 0, 4],
    })  # fmt: skip
    said = pd.DataFrame({
        "example": ["a", "a", "b"], "position": ["t2", "t1", "t2"], "names": ["e2"] * 3, "resolved": [True, True, False],
        "first_source_layer": [4, 0, -1],
    })  # fmt: skip
    tables = {"queries": queries, "published_knockout": cut, "published_projections": written, "descriptions": said}
    found = stages.info_propagation(replace(result, tables=tables))
    assert found.layer.tolist()[:2] == [5, 5] and np.isnan(found.layer["c"])
    assert found.loc["a", ["cut", "projected", "described"]].tolist() == [3, 8, 4]
    theirs = said.assign(first_source_layer=[1, 0, -1])
    found = stages.info_propagation(replace(result, tables={**tables, "published_descriptions": theirs}))
    assert found.layer["a"] == 4


# --- kept, saved ---------------------------------------------------------------------------------------------------------


def test_parts_are_read_and_other_names_are_not(model, answers, passes, own_cache):
    first = run(model, answers, resume=True, queries_a_part=3)
    there = len(passes)
    assert len(list((own_cache / "runs").glob("*/result.json"))) == 2
    again = run(model, answers, resume=True, queries_a_part=3)
    assert len(passes) - there < 10  # `why_plain`, which tries four tokens
    for name in ("descriptions", "projections", "knockout", "lens"):
        pd.testing.assert_frame_equal(first.tables[name], again.tables[name], check_dtype=False)
    pd.testing.assert_frame_equal(first.table, again.table, check_dtype=False)
    pd.testing.assert_frame_equal(first.summary, again.summary, check_dtype=False)
    queries = answers.tables["queries"]
    bare = queries.assign(e2_aliases=pd.Series([[e2] for e2 in queries.e2]))
    other = run(model, replace(answers, tables={**answers.tables, "queries": bare}), resume=True, queries_a_part=3)
    assert first.tables["descriptions"].query("names == 'e2'").resolved.any()
    assert not other.tables["descriptions"].query("names == 'e2'").resolved.any()


def test_a_result_is_saved_and_comes_back(result, tmp_path):
    loaded = lab.Result.load(result.save(tmp_path / "saved"))
    assert loaded.parameters == json.loads(json.dumps(result.parameters))
    for name, frame in {"table": result.table, "summary": result.summary, **result.tables}.items():
        there = {"table": loaded.table, "summary": loaded.summary, **loaded.tables}[name]
        pd.testing.assert_frame_equal(there, frame, check_dtype=False)


def test_parallel_blocks_and_a_small_window(tmp_path):
    model = lab.load(talking_model(tmp_path / "neox", "neox"), device="cpu")
    answers = two_hop.run(model, planned_queries(model), resume=False, progress=False)
    result = run(model, answers, n=3, window=0, target_layers=[1])
    assert len(result.tables["projections"]) == 3 * 24 and result.tables["knockout"].changed.any()
    assert np.isin(result.tables["descriptions"].cells, range(5)).all()


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_layers": [0, 4]}, r"target_layers=\[0, 4\]: give at least one, each from 0 to 3"),
        ({"target_layers": [-1]}, r"target_layers=\[-1\]: give at least one, each from 0 to 3"),
        ({"target_layers": []}, r"target_layers=\[\]: give at least one, each from 0 to 3"),
        ({"window": -1}, "window=-1: give a whole number, at least 0"),
    ],
)
def test_bad_options_are_refused_before_the_model_runs(model, answers, passes, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, answers, **options)
    assert passes == []


def test_what_cannot_be_measured_is_refused(model, answers, passes, monkeypatch):
    with pytest.raises(ValueError, match="this is a result of hop_stages; give one of two_hop.run"):
        run(model, replace(answers, kind="hop_stages"))
    queries = answers.tables["queries"]
    with pytest.raises(ValueError, match="no query in the sets correct and incorrect"):
        run(model, replace(answers, tables={**answers.tables, "queries": queries.assign(set="other")}))
    lone = queries.assign(e2_type=["alone", *queries.e2_type[1:]])
    with pytest.raises(ValueError, match="q00 has no decoy: .* another answer, its e2 of type 'alone'"):
        run(model, replace(answers, tables={**answers.tables, "queries": lone}))
    hidden = {name: point for name, point in model.hook_dict.items() if "hook_mlp_out" not in name}
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "hook_dict", hidden)
        assert SITES["mlp_out"].format(layer=0) not in model.hook_dict
        with pytest.raises(ValueError, match="no site mlp_out: this model's blocks do not expose it; use one of"):
            run(model, answers)


@pytest.mark.parametrize("keys", [[], [14], [-1], [3, 99]])
def test_a_knockout_needs_keys_before_the_last_token(model, passes, keys):
    assert back_patching.places(model, "The land of Rome is", "Rome")["t2"] == 14
    with pytest.raises(ValueError, match="each from 0 to 13, none twice, positions before the last token"):
        stages.knockout(model, "The land of Rome is", keys)
