"""Back-patching against a plain reference: an untouched Hugging Face model, one hooked pass a token, cell by cell."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_two_hop import PLAN, changed, first_of, ids_of, planned_queries, talking_model
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab.back_patching import patching, statistics, two_hop
from lab.back_patching.answers import ARTICLES, Answer
from lab.back_patching.patching import cells
from lab.identity import identity
from lab.models import plain_twin

REFERENCE = ("q00", "q01", "q02")  # the first three of the sets: two correct, one incorrect
SEED = 5
Tries = dict[tuple[str, str], list[tuple[int, int, str]]]  # (condition, position): source, target, text of ten tokens

KILLED = """
import sys
import lab
from lab.back_patching import patching, two_hop
model = lab.load(sys.argv[1])
data = lab.datasets.load("two_hop").query("r2 in ['capital', 'currency', 'language']")
answers = two_hop.run(model, data, limit=120, progress=False)
result = patching.run(model, answers, n=4, conditions=("own", "random"), positions=("t2",), queries_a_part=1,
                           resume=sys.argv[3] == "resume", progress=False)
result.save(sys.argv[2])
"""


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


# --- the plain reference: no batch, no keys and values, no rule that stops -----------------------------------------------


@functools.cache
def twin(model: TransformerBridge) -> torch.nn.Module:
    """The same weights in an untouched Hugging Face model: the reference knows neither the Bridge nor our hooks."""
    return plain_twin(model)


def state_in(out: torch.Tensor | tuple) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def states_of(model: TransformerBridge, prompt: str) -> torch.Tensor:
    """States after each layer; [layer position d_model]."""
    kept: list[torch.Tensor] = []
    with torch.inference_mode(), ExitStack() as stack:
        for layer in twin(model).base_model.layers:
            handle = layer.register_forward_hook(lambda module, given, out: kept.append(state_in(out)[0].clone()))
            stack.callback(handle.remove)
        twin(model)(torch.tensor([ids_of(model, prompt)]))
    return torch.stack(kept)


def plain_logits(
    model: TransformerBridge, ids: list[int], target: int, values: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Next-token logits when the states after layer `target` are replaced at some positions."""

    with torch.inference_mode(), written(model, target, values):
        return twin(model)(torch.tensor([ids]), use_cache=False).logits[0, -1]


@contextmanager
def written(model: TransformerBridge, target: int, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
    def write(module: torch.nn.Module, given: tuple, out: torch.Tensor | tuple) -> None:
        for position, value in (
            values.items() if state_in(out).shape[1] > 1 else ()
        ):  # not where only the newest token runs
            state_in(out)[:, position] = value

    handle = twin(model).base_model.layers[target].register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


def plain_text(
    model: TransformerBridge, prompt: str, target: int, values: Mapping[int, torch.Tensor], steps: int = 10
) -> str:
    ids = ids_of(model, prompt)
    start, end = len(ids), model.original_model.generation_config.eos_token_id
    while len(ids) < start + steps and ids[-1] != end:
        ids.append(int(plain_logits(model, ids, target, values).argmax()))
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def places(model: TransformerBridge, prompt: str, e1: str) -> dict[str, list[int]]:
    """Positions of e1's last token, of the last token, and of all tokens of e1."""
    spans = model.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    start = prompt.rfind(e1)
    own = [i for i, (begin, end) in enumerate(spans) if end > start and begin < start + len(e1)]
    return {"t1": own[-1:], "t2": [len(spans) - 1], "all": own}


def plain_tries(model: TransformerBridge, queries: pd.DataFrame, example: str, conditions: tuple[str, ...]) -> Tries:
    """Every try of a query, with the donors and the noise that the seed draws."""
    query, n = queries.set_index("example").loc[example], model.cfg.n_layers
    rng = np.random.default_rng([SEED, int(hashlib.sha256(example.encode()).hexdigest()[:8], 16)])
    donors = {}
    for condition in [name for name in ("other", "same_relation") if name in conditions]:
        same = (queries.r1 + queries.r2 == query.r1 + query.r2) == (condition == "same_relation")
        fits = queries[same & (queries.e2 != query.e2) & (queries.e3 != query.e3)]
        donors[condition] = fits.iloc[int(rng.integers(len(fits)))]
    found: Tries = {}
    for position in ("t1", "t2"):
        for condition in conditions:
            origin = donors.get(condition, query)
            own, states = states_of(model, query.text), states_of(model, origin.text)
            at, there = (places(model, one.text, one.e1)[position][0] for one in (query, origin))
            pairs = cells(n, condition=condition)
            values = states[[source for source, _ in pairs], there]
            if condition == "random":
                noise = torch.tensor(rng.standard_normal((len(pairs), 1, model.cfg.d_model)))[:, 0].float()
                values = noise * (own[[s for s, _ in pairs], at].norm(dim=-1) / noise.norm(dim=-1))[:, None]
            found[condition, position] = [
                (source, target, plain_text(model, query.text, target, {at: value}))
                for (source, target), value in zip(pairs, values, strict=True)
            ]
    return found


@pytest.fixture(scope="module")
def reference(model: TransformerBridge) -> dict[str, Tries]:
    queries, controls = planned_queries(model), tuple(patching.CONDITIONS)
    return {e: plain_tries(model, queries, e, controls if e == "q02" else ("own",)) for e in REFERENCE}


@pytest.fixture(scope="module")
def answers(model: TransformerBridge, reference: dict[str, Tries]) -> lab.Result:
    """Answers to the planned queries, whose aliases hold what some of the tries say: so these succeed."""
    queries = planned_queries(model)
    aliases = queries.e3_aliases.tolist()
    for row, example in enumerate(REFERENCE):
        said = [" ".join(two_hop.greedy(model, [queries[column][row]], progress=False)[0].split())
                for column in ("text", "entity_shortcut", "relation_shortcut", "first_hop")]  # fmt: skip
        for (condition, _), tries in reference[example].items():
            if condition == "identity":
                continue
            for cell, spell in ((0, str.strip), (3, first_words), (5, last_words)):
                alias = spell(tries[cell][2])
                if len(alias) > 1 and not any(Answer(alias).published(text) for text in said):
                    aliases[row] = [*aliases[row], alias]
    return two_hop.run(model, queries.assign(e3_aliases=aliases), resume=False, progress=False, seed=SEED)


def first_words(said: str) -> str:
    return " ".join(said.split()[:2])


def last_words(said: str) -> str:
    return " ".join(said.split()[-2:])


def run(model: TransformerBridge, data: lab.Result | pd.DataFrame, **options) -> lab.Result:
    return patching.run(model, data, **{"n": 3, "seed": SEED, "progress": False, "resume": False, **options})


def sorted_hits(result: lab.Result) -> pd.DataFrame:
    keys = ["example", "position", "condition", "draw", "source_layer", "target_layer"]
    return result.tables["hits"].sort_values(keys).reset_index(drop=True)


# --- every cell, every condition, every rule ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", two_hop.RULES)
def test_every_try_is_judged_as_the_plain_reference_is(model, answers, reference, rule):
    result = run(model, answers, rule=rule)
    hits = result.tables["hits"].set_index(["example", "condition", "position"]).sort_index()
    queries = {query.example: query for query in answers.tables["queries"].itertuples()}
    judge = {"word": Answer.word, "published": Answer.published, "leading": Answer.leads}[rule]
    succeeded = set()
    for row in result.table.itertuples():
        tries, answer = (
            reference[row.example][row.condition, row.position],
            two_hop.answer_of(queries[row.example], "e3"),
        )
        right = [(source, target, text) for source, target, text in tries if judge(answer, text)]
        where = (row.example, row.condition, row.position)
        assert (row.tries, row.hits, row.success, row.draw) == (len(tries), len(right), bool(right), 0), where
        assert row.group == queries[row.example].e2 and row.set == queries[row.example].set
        found = hits.loc[[where]] if right else hits.iloc[:0]
        assert list(zip(found.source_layer, found.target_layer, strict=True)) == [(s, t) for s, t, _ in right], where
        for said, (_, _, text) in zip(found.said, right, strict=True):
            # "leading" stops as soon as no token can change it; the others decode to the end
            assert text.startswith(said) if rule == "leading" else text == said
        succeeded |= {row.condition} if right else set()
        assert (row.condition == "identity") <= (not right), "the state itself made a wrong answer right"
    assert {"own", "other", "same_relation", "random"} <= succeeded, "too few hits: the test would see nothing"
    incorrect = {(e, c, p) for e in ("q02",) for c in patching.CONDITIONS for p in ("t1", "t2")}
    correct = {(e, "own", p) for e in ("q00", "q01") for p in ("t1", "t2")}
    assert (
        set(zip(result.table.example, result.table.condition, result.table.position, strict=True))
        == incorrect | correct
    )
    assert len(result.table) == len(incorrect | correct)
    plain = result.tables["queries"].set_index("example")
    said = answers.table[answers.table.prompt == "composition"].set_index("example")
    assert plain.plain.to_dict() == said.said[list(REFERENCE)].to_dict()
    assert plain.right.to_dict() == said[rule][list(REFERENCE)].to_dict()
    pd.testing.assert_frame_equal(result.summary, statistics.oracle_success(result.table, seed=SEED))


def test_cells():
    assert cells(3) == [(1, 0), (2, 0), (2, 1)] == cells(3, condition="random")
    assert cells(3, condition="forward") == [(0, 1), (0, 2), (1, 2)]
    assert cells(3, condition="identity") == [(0, 0), (1, 1), (2, 2)]
    assert len(cells(30)) == 435


def test_all_tokens_of_e1_get_their_own_later_states(model, answers):
    result = run(model, answers, conditions=("own",), positions=("t1",), e1_tokens="all", rule="word")
    last = run(model, answers, conditions=("own",), positions=("t1",), rule="word")
    texts = set()
    for query in answers.tables["queries"][1:3].itertuples():
        at, states = places(model, query.text, query.e1)["all"], states_of(model, query.text)
        assert len(at) > 1
        answer = two_hop.answer_of(query, "e3")
        right = []
        for source, target in cells(model.cfg.n_layers):
            text = plain_text(model, query.text, target, {position: states[source, position] for position in at})
            right += [(source, target, text)] if answer.word(text) else []
            texts.add(text)
        hits = result.tables["hits"].query("example == @query.example")
        assert list(zip(hits.source_layer, hits.target_layer, hits.said, strict=True)) == right
    assert sorted_hits(result).said.tolist() != sorted_hits(last).said.tolist()
    assert len(texts) > 8, "all tries alike: the test would see nothing"


def test_several_draws_are_new_draws(model, answers):
    result = run(model, answers, conditions=("own", "random", "other"), draws=3, rule="word")
    rows = result.table[result.table.example == "q02"]
    assert rows.groupby("condition").draw.unique().map(list).to_dict() == {
        "own": [0], "random": [0, 1, 2], "other": [0, 1, 2],
    }  # fmt: skip
    other = run(model, answers, conditions=("own", "random", "other"), draws=3, rule="word", seed=SEED + 1)
    pd.testing.assert_frame_equal(
        *[r.table.query("condition == 'own'").reset_index(drop=True) for r in (other, result)]
    )


def test_donors_have_another_bridge_and_answer_and_the_named_relations(model, answers):
    queries = answers.tables["queries"].assign(prompt=answers.tables["queries"].text)
    by_prompt = queries.set_index("text")
    query, rng = queries.set_index("example", drop=False).loc["q02"], np.random.default_rng(0)
    for condition, same in (("same_relation", True), ("other", False)):
        seen = set()
        for _ in range(15):
            clean, where = patching._donor(model, queries, query, condition, rng)
            donor = by_prompt.loc[model.tokenizer.decode(clean.ids, clean_up_tokenization_spaces=False)]
            seen.add(donor.e1)
            assert ((donor.r1, donor.r2) == (query.r1, query.r2)) is same
            assert donor.e2 != query.e2 and donor.e3 != query.e3
            assert where.t1 == places(model, donor.name, donor.e1)["t1"][0]
        assert len(seen) > 3


def test_queries_that_nobody_can_lend_a_state_to_are_left_out_by_name(model, answers, capsys):
    """Otherwise the paired test fails after all the work: q03 is the only one here with its relations."""
    few = answers.tables["queries"].query("example in ['q02', 'q03', 'q04', 'q06']").reset_index(drop=True)
    alone = replace(answers, tables={**answers.tables, "queries": few})
    result = run(model, alone, n=4)
    said = capsys.readouterr().out
    assert "1 of 4 queries are left out" in said and "q03" in said and "(limit=)" in said
    assert result.table.example.unique().tolist() == ["q02", "q04", "q06"] and result.parameters["n"] == 3
    assert len(run(model, alone, n=4, conditions=("own", "random")).tables["queries"]) == 4
    with pytest.raises(ValueError, match="no query is left: answer more queries"):
        lone = replace(answers, tables={**answers.tables, "queries": few[1:3].reset_index(drop=True)})
        run(model, lone, conditions=("own", "same_relation"))


def test_controls_alone(model, answers):
    """The correct set has no controls, and that is no reason to fail."""
    result = run(model, answers, conditions=("random",))
    assert set(result.table.example) == {"q02"} and set(result.table.condition) == {"random"}
    assert result.tables["queries"].example.tolist() == list(REFERENCE)


def test_the_plain_fallback_gives_the_same_and_says_that_it_is_slow(model, answers, monkeypatch, capsys):
    wanted = run(model, answers, conditions=("own", "other"))
    assert "Slow" not in capsys.readouterr().out
    monkeypatch.setattr(patching, "why_plain", lambda model: "its memory is a river")
    found = run(model, answers, conditions=("own", "other"))
    said = capsys.readouterr().out
    assert "cannot be reused in this model (its memory is a river)" in said and "Slow." in said
    assert (found.parameters["reuse"], wanted.parameters["reuse"]) == (False, True)
    pd.testing.assert_frame_equal(found.table, wanted.table)
    pd.testing.assert_frame_equal(sorted_hits(found), sorted_hits(wanted))


def test_a_start_token_and_parallel_blocks(tmp_path):
    """NeoX, with a start token before each prompt: positions count it, too."""
    model = lab.load(talking_model(tmp_path / "neox", "neox"), device="cpu")
    model.cfg.default_prepend_bos = True
    queries = planned_queries(model, plan=PLAN[2:5])
    answers = two_hop.run(model, queries, resume=False, progress=False)
    where = patching.positions_of(model, queries.assign(prompt=queries.text))
    query = queries.iloc[0]
    assert where["t1"].iloc[0] == places(model, query.text, query.e1)["t1"][0] + 1
    result = run(model, answers, conditions=("own", "identity"), rule="word")
    assert not result.table.query("condition == 'identity'").hits.any()


# --- what is made of the hits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(model: TransformerBridge, answers: lab.Result) -> lab.Result:
    return run(model, answers, n=8, rule="word")


def test_success_matrix_holds_the_hits(found):
    hits = found.tables["hits"]
    for condition, sets in (("own", ("correct", "incorrect")), ("other", ("incorrect",)), ("identity", ("incorrect",))):
        for position in ("t1", "t2"):
            matrix, queries, pairs = patching.success_matrix(found, position, condition=condition, sets=sets)
            assert queries.set.isin(sets).all() and len(queries) == (8 if condition == "own" else 6)
            assert pairs == cells(4, condition=condition)
            part = hits[(hits.position == position) & (hits.condition == condition)]
            theirs = set(zip(part.example, part.source_layer, part.target_layer, strict=True))
            ours = {(queries.example[i], *pairs[j]) for i, j in zip(*matrix.nonzero(), strict=True)}
            assert ours == theirs and matrix.sum() == len(part)
    assert hits.query("condition == 'own'").set_index(["example", "position"]).index.nunique() > 2


def test_success_matrix_has_no_rows_for_queries_on_which_nothing_was_tried(found):
    """A control isn't tried on the correct set: rows full of False would read as failures."""
    matrix, queries, _ = patching.success_matrix(found, "t1", condition="random")
    assert set(queries.set) == {"incorrect"} and len(matrix) == 6
    with pytest.raises(ValueError, match=r"random was not tried at t1 on the sets correct \(draw 0\)"):
        patching.success_matrix(found, "t1", condition="random", sets=("correct",))
    with pytest.raises(ValueError, match="own was not tried at t3"):
        patching.success_matrix(found, "t3")


def test_fixed_pair_and_search_cost_get_the_right_columns(found):
    matrix, queries, pairs = patching.success_matrix(found, "t2")
    fixed = patching.fixed_pair(found, "t2", folds=3, seed=1)
    wanted = statistics.fixed_pair(
        matrix, queries.right.to_numpy(bool), queries.group.to_numpy(str), pairs, folds=3, seed=1
    )
    pd.testing.assert_frame_equal(fixed.summary, wanted.summary)
    assert fixed.summary.estimate["plain"] == pytest.approx(2 / 8)  # the two of the correct set
    matrix, queries, pairs = patching.success_matrix(found, "t1", sets=("incorrect",))
    cost = patching.search_cost(found, "t1", folds=3, seed=1)
    wanted = statistics.search_cost(  # six pairs: "among the first ten" is no question here
        matrix, queries.group.to_numpy(str), pairs, first=(1, 3), folds=3, seed=1
    )
    pd.testing.assert_frame_equal(cost, wanted)


def test_the_latent_way_is_the_prompt_that_is_patched(model, answers, found):
    ways = patching.compare_methods(model, answers, found, folds=2, progress=False).set_index("method")
    assert ways.index.tolist() == ["latent", "explicit", "oracle", "other", "back-patch t1", "back-patch t2"]
    assert ways.share["latent"] == pytest.approx(found.tables["queries"].right.mean())
    for position in ("t1", "t2"):
        fixed = patching.fixed_pair(found, position, folds=2).summary.estimate["fixed"]
        assert ways.share[f"back-patch {position}"] == pytest.approx(fixed)
    shown = replace(answers, parameters={**answers.parameters, "shots": 1})  # the same sets, asked with an example
    _, chosen = patching.chosen_queries(model, shown, 8)
    rows = two_hop.decomposition(model, shown, examples=chosen.example.tolist(), progress=False)
    latent = rows[rows.method == "latent"].prompt.tolist()
    assert latent == chosen.prompt.tolist() and all(text.count("\n") == 1 for text in rows.prompt)


def test_a_result_is_saved_with_its_lists(found, tmp_path):
    loaded = lab.Result.load(found.save(tmp_path / "saved"))
    assert loaded.parameters == json.loads(json.dumps(found.parameters))
    for name, frame in {"table": found.table, "summary": found.summary, **found.tables}.items():
        there = {"table": loaded.table, "summary": loaded.summary, **loaded.tables}[name]
        pd.testing.assert_frame_equal(there, frame, check_dtype=False)
    assert patching.fixed_pair(loaded, "t1", folds=3).summary.equals(patching.fixed_pair(found, "t1", folds=3).summary)


# --- one query ----------------------------------------------------------------------------------------------------------


def test_patch_once_says_what_the_reference_says(model, answers, reference):
    query, donor = (answers.tables["queries"].set_index("example").loc[e] for e in ("q02", "q03"))
    at = places(model, query.text, query.e1)
    for position in ("t1", "t2"):
        for source, target, text in reference["q02"]["own", position]:
            place = {"position": at[position][0], "source_layer": source, "target_layer": target}
            assert patching.patch_once(model, query.text, **place) == text
            short = patching.patch_once(model, query.text, **place, max_new_tokens=3)
            assert text.startswith(short) and short != text
    there = places(model, donor.text, donor.e1)["t1"][0]
    said = patching.patch_once(
        model, query.text, position=at["t1"][0], source_layer=3, target_layer=1, donor=donor.text, donor_position=there
    )
    value = states_of(model, donor.text)[3, there]
    assert said == plain_text(model, query.text, 1, {at["t1"][0]: value}) != reference["q02"]["own", "t1"][4][2]


def test_sweep_ranks_and_judges_each_pair(model, answers, reference):
    query = answers.tables["queries"].set_index("example").loc["q02"]
    at, states, ids = places(model, query.text, query.e1), states_of(model, query.text), ids_of(model, query.text)
    names = [query.e3, *query.e3_aliases]
    first = first_of(model, names)
    answer = two_hop.answer_of(query, "e3")
    for position in ("t1", "t2"):
        for rule, judge in (("leading", answer.leads), ("word", answer.word)):
            table = patching.sweep(model, query.text, names, positions=at[position], rule=rule)
            cells_of = list(zip(table.source_layer, table.target_layer, strict=True))
            assert cells_of == [(source, target) for source, target, _ in reference["q02"]["own", position]]
            for row, (source, target, text) in zip(table.itertuples(), reference["q02"]["own", position], strict=True):
                assert row.right == judge(text) and text.startswith(row.said)
                logits = plain_logits(model, ids, target, {at[position][0]: states[source, at[position][0]]})
                assert row.rank == int((logits > logits[first].max()).sum())
    assert table["rank"].nunique() > 1


def test_sweep_of_an_answer_that_no_lens_can_read_has_no_ranks(model, answers):
    """Its first token is a lone space: said or not, it is no hit."""
    query = answers.tables["queries"].set_index("example").loc["q02"]
    at = places(model, query.text, query.e1)["t1"]
    table = patching.sweep(model, query.text, ["Answer02"], positions=at)
    assert table["rank"].isna().all() and not table.right.any()


def test_sweep_judges_as_run_does(model, answers):
    """No introductions but articles: "located in Rome" does not lead in either."""
    prompt = answers.tables["queries"].text[2]
    said = set(patching.sweep(model, prompt, ["nothing"], positions=[3], rule="word").said)
    assert said
    query = pd.Series({"e3": "Rome", "e3_aliases": ["Rome"], "e3_type": "person"})
    assert not two_hop.answer_of(query, "e3").leads(" located in Rome")
    judged: list[Answer] = []
    original = two_hop.judge
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(two_hop, "judge", lambda a, *rest: judged.append(a) or original(a, *rest))
        patching.sweep(model, prompt, ["Rome"], positions=[3])
    assert not judged[0].leads(" located in Rome") and judged[0].leads(" the Rome")


def test_places_are_those_of_the_tokens(model, answers):
    for query in answers.tables["queries"].head(6).itertuples():
        wanted = places(model, query.text, query.e1)
        where = patching.positions_of(
            model, pd.DataFrame({"example": ["it"], "prompt": [query.text], "e1": [query.e1]})
        )
        assert where.iloc[0].tolist() == [wanted["all"][0], wanted["t1"][0], wanted["t2"][0]]
        ids = ids_of(model, query.text)
        assert model.tokenizer.decode(ids[wanted["all"][0] : wanted["t1"][0] + 1]).strip() == query.e1


# --- saved, resumed, elsewhere --------------------------------------------------------------------------------------------


def assert_same(one: lab.Result, other: lab.Result) -> None:
    for name, frame in {"table": one.table, "summary": one.summary, **one.tables}.items():
        there = {"table": other.table, "summary": other.summary, **other.tables}[name]
        pd.testing.assert_frame_equal(frame, there, check_dtype=False)


def test_an_interrupted_run_goes_on_and_gives_the_same_table(model, answers, monkeypatch, own_cache):
    few = {"n": 5, "queries_a_part": 2, "conditions": ("own", "random")}
    whole = run(model, answers, **few)
    original, asked = patching._query, []

    def three_times(model, queries, example, about):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(example)
        return original(model, queries, example, about)

    monkeypatch.setattr(patching, "_query", three_times)
    with pytest.raises(KeyboardInterrupt):
        run(model, answers, **few, resume=True)
    assert asked == ["q00", "q01", "q02"] and len(list((own_cache / "runs").glob("*/result.json"))) == 1
    monkeypatch.setattr(patching, "_query", lambda *given: asked.append(given[2]) or original(*given))
    again = run(model, answers, **few, resume=True)
    assert asked[3:] == ["q02", "q03", "q04"], "a finished part was computed again, or an unfinished one was not"
    assert_same(again, whole)
    fewer = run(model, answers, **{**few, "n": 4}, resume=True)  # the same parts
    assert len(asked) == 6 and fewer.table.equals(again.table[again.table.example != "q04"])
    run(model, answers, **few, resume=True, seed=SEED + 1)
    assert len(asked) == 11


def test_a_result_with_queries_that_have_no_hit_is_the_same_after_loading(model, answers, tmp_path):
    """A part without a hit has a table without rows: its columns are numbers all the same."""
    result = run(model, answers, n=5, queries_a_part=1, conditions=("own",))
    assert (result.table.groupby("example").hits.sum() == 0).any() and result.table.hits.any()
    loaded = lab.Result.load(result.save(tmp_path / "saved"))
    for position in ("t1", "t2"):
        here, there = (patching.success_matrix(r, position)[0] for r in (result, loaded))
        assert here.any() and (here == there).all()


def test_other_aliases_and_other_sets_are_not_read_from_the_cache(model, answers):
    """The same prompts, judged by other names: a finished part says nothing about them."""
    first = run(model, answers, resume=True, rule="word")
    queries = answers.tables["queries"]
    bare = replace(answers, tables={**answers.tables, "queries": queries.assign(
        e3_aliases=pd.Series([[e3] for e3 in queries.e3]), set="incorrect")})  # fmt: skip
    other = run(model, bare, resume=True, rule="word")
    assert first.table.hits.sum() > 0 and other.table.hits.sum() == 0
    assert (other.table.groupby("example").condition.nunique() == len(patching.CONDITIONS)).all()


def test_an_empty_answer_and_empty_hits_come_back_from_the_cache(model, answers, own_cache):
    head = model.original_model.get_output_embeddings()
    end = model.original_model.generation_config.eos_token_id
    row = head.weight[end].detach().clone()
    queries = answers.tables["queries"]
    with torch.no_grad():
        ids = torch.tensor([ids_of(model, queries.text[2])])
        state = model.original_model.base_model(ids).last_hidden_state[0, -1]
        head.weight[end] = state * (head(state).max() + 1) / state.square().sum()  # it now says nothing to this query
    answers = replace(answers, parameters={**answers.parameters, "identity": str(identity(model))})
    try:
        first, again = (run(model, answers, resume=True, queries_a_part=1) for _ in range(2))
    finally:
        with torch.no_grad():
            head.weight[end] = row
    assert first.tables["queries"].plain[2] == "" == again.tables["queries"].plain[2]
    assert_same(first, again)


def test_another_process_gives_the_same_table(model, answers):
    here = run(model, answers)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = run(model, answers, queries_a_part=1, executor=pool)
    assert_same(here, there)


# --- refusals: before a patch is tried -----------------------------------------------------------------------------------

BAD = {
    "position": ({"positions": ["t3"]}, r"positions=\['t3'\]: choose at least one of t1, t2"),
    "no position": ({"positions": []}, r"positions=\[\]: choose at least one of t1, t2"),
    "condition": ({"conditions": ("own", "noise")}, r"conditions=\['own', 'noise'\]: choose at least one of own, random, other"),
    "condition twice": ({"conditions": ("own", "own")}, "none twice"),
    "rule": ({"rule": "exact"}, "rule='exact': choose one of word, published, leading"),
    "e1_tokens": ({"e1_tokens": "first"}, "e1_tokens='first': choose one of last, all"),
    "n": ({"n": 0}, "n=0: give a whole number, at least 1"),
    "draws": ({"draws": 0}, "draws=0"),
}  # fmt: skip
BAD_DATA: dict[str, tuple[Callable, str]] = {
    "e1 not there": (changed("e1", "Bergen"), "e1 'Bergen' of row 1 .* isn't there"),
    "empty alias": (changed("e3_aliases", [""]), "e3_aliases in row 1 .* contains ''"),
    "too long": (changed("text", "The Oslo " + "x" * 520), "text 1 has 527 tokens, and this model's context holds 512"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_the_model_runs(model, answers, passes, own_cache, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        patching.run(model, answers, progress=False, **options)
    assert passes == [] and not os.path.exists(own_cache / "runs")


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_queries_are_refused_before_the_model_runs(model, answers, passes, case):
    edit, message = BAD_DATA[case]
    queries = answers.tables["queries"].drop(columns=["set", "cell"])
    with pytest.raises(ValueError, match=message):
        run(model, edit(queries))
    assert passes == []


def test_places_without_a_token_are_refused(model, answers, passes):
    """ "Rome" is R, o, me: no token ends after "Rom"."""
    queries = changed("e1", "Rom", row=2)(answers.tables["queries"])
    with pytest.raises(ValueError, match="the end of 'Rom' lies inside the token 'me' of text 2: no token ends there"):
        run(model, replace(answers, tables={**answers.tables, "queries": queries}))
    queries = changed("e1", "Bergen", row=2)(answers.tables["queries"])
    with pytest.raises(ValueError, match="'Bergen' does not stand in text 2: 'The capital of the land of Rome is'"):
        run(model, replace(answers, tables={**answers.tables, "queries": queries}))
    assert passes == []


def test_answers_of_something_else_are_refused(tiny_model, model, answers, found, passes):
    with pytest.raises(ValueError, match="this is a result of back_patching; give one of two_hop.run, or queries"):
        run(model, found)
    with pytest.raises(ValueError, match=r"these answers are those of talking \(\w+\), not of llama as it is now"):
        run(tiny_model("llama"), answers)
    none = replace(answers, tables={**answers.tables, "queries": answers.tables["queries"].assign(set="other")})
    with pytest.raises(
        ValueError, match=r"no query in the sets correct and incorrect among 14: .* \(limit=\), or .* shots="
    ):
        run(model, none)
    bare = replace(answers, tables={**answers.tables, "queries": answers.tables["queries"].drop(columns="r1")})
    with pytest.raises(ValueError, match="no column r1, which other and same_relation need"):
        run(model, bare)
    assert passes == []


@pytest.mark.parametrize(
    "source, target, message",
    [
        (1, 1, "target_layer 1 is not before source_layer 1: a back-patch needs target < source"),
        (0, 2, "target_layer 2 is not before source_layer 0"),
        (4, 2, "source_layer=4: give a whole number from 0 to 3"),
        (2, -1, "target_layer=-1: give a whole number from 0 to 3"),
    ],
)
def test_layers_that_make_no_back_patch_are_refused(model, passes, source, target, message):
    with pytest.raises(ValueError, match=message):
        patching.patch_once(model, "The land of Rome is", position=3, source_layer=source, target_layer=target)
    assert passes == []


def test_a_place_out_of_range_is_refused(model):
    text, message = "The land of Rome is", r"positions=\[40\]: give at least one, each from 0 to 14"
    pair = {"source_layer": 2, "target_layer": 1}
    with pytest.raises(ValueError, match=message):
        patching.sweep(model, text, ["Rome"], positions=[40])
    with pytest.raises(ValueError, match=message):
        patching.patch_once(model, text, position=40, **pair)
    with pytest.raises(ValueError, match=message):
        patching.patch_once(model, text, position=1, donor=text, donor_position=40, **pair)
    with pytest.raises(ValueError, match="rule='exact': choose one of word, published, leading"):
        patching.sweep(model, text, ["Rome"], positions=[4], rule="exact")


# --- the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_the_middle_goes_on_and_ends_with_the_same_bytes(smollm2, own_cache, tmp_path):
    command = [sys.executable, "-c", KILLED, smollm2.lab_source["path"]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, str(tmp_path / "killed"), "resume"], **quiet)

    def finished() -> list[Path]:
        files = (own_cache / "runs").glob("*/result.json")
        return [file.parent for file in files if json.loads(file.read_text())["kind"] == "back_patching"]

    while not finished():
        time.sleep(0.2)
        assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {part: (part / "result.json").stat().st_mtime_ns for part in finished()}
    assert 0 < len(there) < 4
    subprocess.run([*command, str(tmp_path / "killed"), "resume"], check=True, **quiet)
    assert len(finished()) == 4
    assert {part: (part / "result.json").stat().st_mtime_ns for part in there} == there
    subprocess.run([*command, str(tmp_path / "whole"), "afresh"], check=True, **quiet)
    for name in ("table", "hits", "queries", "summary"):
        killed, whole = (next((tmp_path / run).glob(f"{name}-*.parquet.gz")) for run in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes(), name
    assert len(lab.Result.load(tmp_path / "whole").table) > 4


@pytest.mark.slow
def test_all_pairs_of_a_real_query_are_those_of_the_plain_reference(smollm2):
    """435 pairs at t1 and at t2: each a hooked pass of the whole prompt; ten tokens where the first leaves hope."""
    prompt, e1 = "The capital of the country whose territory includes the Parthenon is", "the Parthenon"
    names, ids = ["Athens"], ids_of(smollm2, prompt)
    answer, states = Answer("Athens", lead_ins=ARTICLES), states_of(smollm2, prompt)
    first, tokenizer = ids_of(smollm2, " Athens")[:1], smollm2.tokenizer
    hits = decoded = 0
    for position, at in patching.places(smollm2, prompt, e1).items():
        table = patching.sweep(smollm2, prompt, names, positions=[at])
        assert len(table) == 435
        for target, rows in table.groupby("target_layer"):
            alive = []
            for row in rows.itertuples():
                logits = plain_logits(smollm2, ids, target, {at: states[row.source_layer, at]})
                token = tokenizer.decode([int(logits.argmax())], clean_up_tokenization_spaces=False)
                assert row.said.startswith(token), (position, row)
                rank = int((logits > logits[first].max()).sum())
                assert abs(row.rank - rank) <= 1, (position, row, rank)  # two words may be equal up to rounding
                if answer.can_still_lead(token):
                    alive.append(row)
                else:
                    assert not row.right
            if not alive:
                continue
            same = torch.tensor([ids]).repeat(len(alive), 1)  # to the end, by Hugging Face, as rows of one batch
            with (
                torch.inference_mode(),
                written(smollm2, target, {at: states[[row.source_layer for row in alive], at]}),
            ):
                out = twin(smollm2).generate(
                    same, attention_mask=torch.ones_like(same), max_new_tokens=10, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            new = out[:, len(ids) :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, text in zip(alive, texts, strict=True):
                assert text.startswith(row.said) and answer.leads(text) == row.right, (position, row, text)
                hits, decoded = hits + row.right, decoded + 1
    assert hits > 0 and decoded > 50, "no pair gives the answer: the test would see nothing"
