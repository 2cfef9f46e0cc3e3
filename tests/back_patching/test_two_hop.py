"""Two-hop queries on a small real model. Which answers are right is planned: aliases are what the model itself says."""

import os
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import _config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lab
from lab.back_patching import two_hop
from lab.back_patching.two_hop import first_phrase, greedy
from lab.datasets import as_two_hop

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
CITIES = ("Mumbai", "Oslo", "Rome", "Lima", "Cairo", "Quito", "Dakar", "Paris", "Turin", "Seoul", "Kyoto", "Minsk", "Accra",
          "Tunis")  # fmt: skip
BRIDGES = ("Alba", "Borea", "Corona", "Delos", "Electra", "Fauna", "Gorgo", "Hydra", "Icaria", "Juno", "Kappa", "Leda", "Mira",
           "Nyx")  # fmt: skip

# For each query the set and the cell that it shall fall into, and the prompts whose answers shall be right.
BOTH = ("first_hop", "second_hop")
PLAN = [
    ("correct", "CM", (*BOTH, "composition")),
    ("correct", "RM", ("first_hop", "composition")),  # the set does not ask for the second hop, the cell does
    *[("incorrect", "IG", BOTH)] * 6,
    ("other", "CM", (*BOTH, "composition", "entity_shortcut")),
    ("other", "IG", (*BOTH, "relation_shortcut")),
    ("other", "IK", ("second_hop",)),
    ("other", "RM", ("composition",)),
    ("other", "IK", ("first_hop", "entity_shortcut")),
    ("other", "IK", ()),
]


def syllables() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens whose random sequences read like words: "gapi" is two tokens, " la" is one."""
    single = [*string.ascii_letters, *string.digits, *".,:;'<|>?!-_/()", "Ġ", "Ċ"]
    merges = [("Ġ", c) for c in CONSONANTS] + [(c, v) for c in CONSONANTS for v in VOWELS]
    merges += [(f"Ġ{c}", v) for c in CONSONANTS for v in VOWELS]
    words = ["<pad>", "<s>", "</s>", *single, *(a + b for a, b in merges), "zz"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def talking_model(folder: Path, family: str = "llama") -> Path:
    """A random model that says something else to each prompt: larger weights than `tiny_model`, and syllables."""
    torch.manual_seed(1)
    config = _config(family)
    config.max_position_embeddings = 512
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    syllables().save_pretrained(folder)
    return folder


def planned_queries(
    model: TransformerBridge,
    spell: Callable[[str], str] = str.strip,
    plan: Sequence[tuple[str, str, Sequence[str]]] = tuple(PLAN),
) -> pd.DataFrame:
    """Queries whose hops and compositions are right or wrong as planned: what the model says becomes an alias.

    spell: which part of what the model says.
    """
    rows = []
    for i, (e1, e2) in enumerate(zip(CITIES[: len(plan)], BRIDGES, strict=False)):
        r1, r2 = (("land", "capital"), ("owner", "river"))[i % 2]
        rows.append({
            "example": f"q{i:02}", "text": f"The {r2} of the {r1} of {e1} is", "e1": e1, "e2": e2, "e3": f"Answer{i:02}",
            "r1": r1, "r2": r2, "r1_template": f"the {r1} of {{}}", "r2_template": f"the {r2} of {{}}", "e2_type": r1,
            "first_hop": f"The {r1} of {e1} is", "second_hop": f"The {r2} of {e2} is",
            "entity_shortcut": f"The {r2} of {e1} is", "relation_shortcut": f"The {r2} of the {r1} is",
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    for column in ("e2", "e3"):
        kinds = [kind for kind, answer in two_hop.PROMPTS.items() if answer == column]
        said = {kind: greedy(model, frame[two_hop.column_of(kind)].tolist(), progress=False) for kind in kinds}
        frame[f"{column}_aliases"] = [
            [frame[column][i], *(spell(said[kind][i]) for kind in kinds if kind in right)]
            for i, (_, _, right) in enumerate(plan)
        ]
    return as_two_hop(frame, name="planned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_model(tmp_path_factory.mktemp("talking") / "talking")


@pytest.fixture(scope="module")
def model(folder: Path) -> TransformerBridge:
    return lab.load(folder, device="cpu")


@pytest.fixture(scope="module")
def planned(model: TransformerBridge) -> pd.DataFrame:
    return planned_queries(model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(model: TransformerBridge, data: pd.DataFrame, **options) -> lab.Result:
    return two_hop.run(model, data, **{"progress": False, "resume": False, **options})


# --- sets and cells ----------------------------------------------------------------------------------------------------


def test_sets_and_cells_are_the_planned_ones(model, planned):
    result = run(model, planned)
    queries = result.tables["queries"]
    assert list(zip(queries.set, queries.cell, strict=True)) == [(kind, cell) for kind, cell, _ in PLAN]
    assert queries.example.tolist() == planned.example.tolist()
    right = result.table.pivot(index="example", columns="prompt", values="word")
    for example, (_, _, wanted) in zip(planned.example, PLAN, strict=True):
        for kind in ("first_hop", "second_hop", "composition"):
            assert right.loc[example, kind] == (kind in wanted), (example, kind)
    taxonomy = result.tables["taxonomy"].set_index("cell").n
    assert taxonomy[["IK", "IG", "CM_strict", "RM_strict"]].tolist() == [3, 7, 2, 2]
    shares = result.summary.query("rule == 'word'").set_index("prompt")
    assert shares.share["first_hop"] == pytest.approx(sum("first_hop" in right for _, _, right in PLAN) / len(PLAN))
    assert (shares.low <= shares.share).all() and (shares.share <= shares.high).all()


def test_shortcuts_are_asked_where_they_decide_and_a_right_one_takes_a_query_out(model, planned):
    result = run(model, planned)
    asked = result.table[result.table.prompt.str.endswith("shortcut")]
    deciding = [e for e, (_, _, right) in zip(planned.example, PLAN, strict=True)
                if {"first_hop"} < set(right) and {"second_hop", "composition"} & set(right)]  # fmt: skip
    assert sorted(asked.example.unique()) == deciding and len(asked) == 2 * len(deciding)
    assert asked[asked.word][["example", "prompt"]].values.tolist() == [
        ["q08", "entity_shortcut"],
        ["q09", "relation_shortcut"],
    ]
    # the same two queries with wrong shortcuts are in the sets
    without = [(kind, cell, [name for name in right if "shortcut" not in name]) for kind, cell, right in PLAN]
    queries = run(model, planned_queries(model, plan=without)).tables["queries"]
    assert queries.set[8:10].tolist() == ["correct", "incorrect"]


def test_no_shortcut_is_asked_where_none_decides(model):
    result = run(model, planned_queries(model, plan=[("other", "IK", ())] * 3))
    assert set(result.table.prompt) == {"first_hop", "second_hop", "composition"} and len(result.table) == 9
    assert set(result.tables["queries"].set) == {"other"}


def test_a_shortcut_about_one_bridge_has_a_share_and_no_interval(model):
    result = run(model, planned_queries(model, plan=[PLAN[0], *[("other", "IK", ())] * 2]))
    rows = result.summary.query("rule == 'word'").set_index("prompt")
    assert rows.n.to_dict() == {
        "first_hop": 3,
        "second_hop": 3,
        "composition": 3,
        "entity_shortcut": 1,
        "relation_shortcut": 1,
    }
    assert rows.share["entity_shortcut"] == 0 and rows.loc["entity_shortcut", ["low", "high"]].isna().all()
    assert rows.loc["composition", ["low", "high"]].notna().all()
    result.plot()


def cut(said: str) -> str:
    """Up to the last letter of the last word of two letters or more: no whole word ends there."""
    return said[: re.search(r".*[a-z](?=[a-z])", said).end()].strip()


def test_the_rule_makes_the_sets(model):
    """The same answers: names said first, said later, and found inside a word only."""
    plan = [PLAN[0], PLAN[2]]

    def sets(spell):
        frame = planned_queries(model, spell, plan)
        return {rule: run(model, frame, rule=rule).tables["queries"].set.tolist() for rule in two_hop.RULES}

    kinds, nothing = [kind for kind, _, _ in plan], ["other"] * 2
    assert sets(str.strip) == {"word": kinds, "published": kinds, "leading": kinds}
    later = sets(lambda said: said.strip().split(" ", 1)[1])
    assert later == {"word": kinds, "published": kinds, "leading": nothing}
    inside = sets(cut)
    assert inside["word"] == inside["leading"] == nothing
    assert inside["published"] == kinds
    frame = planned_queries(model, cut, plan)
    inflation = run(model, frame).tables["inflation"].set_index("prompt")
    assert inflation.not_word["first_hop"] == 2 and inflation.word["first_hop"] == 0


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_few_shot_prompts_show_other_answered_queries_of_the_kind(model, planned):
    for kind, answer in two_hop.PROMPTS.items():
        plain, column = planned[two_hop.column_of(kind)], planned[answer]
        written = two_hop.prompts(model, planned, kind, shots=2, seed=3)
        assert written == two_hop.prompts(model, planned, kind, shots=2, seed=3)
        assert written != two_hop.prompts(model, planned, kind, shots=2, seed=4)
        for i, text in enumerate(written):
            *shown, last = text.split("\n")
            assert last == plain[i] and len(shown) == 2 == len(set(shown))
            rows = [j for j in range(len(planned)) if f"{plain[j]} {column[j]}." in shown]
            assert i not in rows and set(planned.r2[rows]) == {planned.r2[i]}
            assert column[i] not in "\n".join(shown)
    with pytest.raises(ValueError, match="shots=7, and row 0 has 6 other queries of its kind to show"):
        run(model, planned, shots=7)
    shot = run(model, planned, shots=1)
    assert shot.parameters["shots"] == 1
    assert shot.table.said.tolist() != run(model, planned).table.said.tolist()


def test_chat_prompts_need_a_template_and_keep_one_start_token(folder, planned):
    model = lab.load(folder, device="cpu")
    with pytest.raises(
        ValueError, match='style="chat" needs a model with a chat template; this one has none: use style'
    ):
        run(model, planned, style="chat")
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ask = f"<user> Complete the sentence with the answer only.\n\n{planned.text[0]}\n<assistant>"
    assert two_hop.prompts(model, planned, "composition", style="chat")[0] == f"<s>{ask}"
    model.cfg.default_prepend_bos = True  # `tokenize` writes it, so the text must not
    assert two_hop.prompts(model, planned, "composition", style="chat")[0] == ask
    shown = two_hop.prompts(model, planned, "composition", style="chat", shots=1)[0]
    assert shown.count("<user>") == 1 and shown.count(" is") == 2
    result = run(model, planned, style="chat")
    assert result.parameters["style"] == "chat" and len(result.table) >= 3 * len(planned)


# --- greedy answers ----------------------------------------------------------------------------------------------------


def ids_of(model: TransformerBridge, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False).input_ids


def first_of(model: TransformerBridge, names: Sequence[str]) -> list[int]:
    """First tokens of names behind a space, one by one; names that begin with a lone space are not readable."""
    first = [ids_of(model, f" {name}")[0] for name in names]
    return [token for token in first if token != ids_of(model, " ")[0]]


def next_token(model: TransformerBridge, ids: list[int]) -> int:
    with torch.inference_mode():
        return int(model.original_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


def one_at_a_time(model: TransformerBridge, text: str, steps: int) -> str:
    """Greedy without a batch, without padding, without keys and values."""
    ids = ids_of(model, text)
    start, end = len(ids), model.original_model.generation_config.eos_token_id
    for _ in range(steps):
        ids.append(next_token(model, ids))
        if ids[-1] == end:
            break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_padded_batch_says_what_each_prompt_says_alone(model, planned):
    texts = [*planned.text[:7], *planned.second_hop[:3], "Lima"]
    assert len({len(text) for text in texts}) > 5
    alone = [one_at_a_time(model, text, 10) for text in texts]
    assert greedy(model, texts, progress=False) == alone
    assert greedy(model, texts, batch_size=3, progress=False) == alone
    assert len(set(alone)) == len(texts), "all prompts alike: the test would see nothing"
    assert greedy(model, texts[:2], max_new_tokens=3, progress=False) == [
        one_at_a_time(model, text, 3) for text in texts[:2]
    ]


def says_nothing_to(folder: Path, text: str) -> TransformerBridge:
    """The same model, with the end token's word vector turned to what it thinks after this text."""
    model = lab.load(folder, device="cpu")
    head, end = model.original_model.get_output_embeddings(), model.original_model.generation_config.eos_token_id
    with torch.no_grad():
        state = model.original_model.base_model(torch.tensor([ids_of(model, text)])).last_hidden_state[0, -1]
        head.weight[end] = state * (head(state).max() + 1) / state.square().sum()
    return model


def test_an_empty_generation_survives_the_cache_and_the_disk(folder, planned, tmp_path):
    model = says_nothing_to(folder, planned.first_hop[0])
    first = run(model, planned, resume=True)
    said = first.table.query("prompt == 'first_hop'").set_index("example").said
    assert said["q00"] == "" and (said != "").sum() > 5
    assert not first.table.query("example == 'q00' and prompt == 'first_hop'").word.any()
    again = run(model, planned, resume=True)
    pd.testing.assert_frame_equal(again.table, first.table, check_dtype=False)
    loaded = lab.Result.load(first.save(tmp_path / "saved"))
    here, there = (two_hop.decomposition(model, result, progress=False) for result in (first, loaded))
    pd.testing.assert_frame_equal(here, there)
    assert here.query("example == 'q00' and method == 'explicit'").prompt.item() == "The capital of  is"


# --- saved, resumed ----------------------------------------------------------------------------------------------------


def test_answers_are_read_and_not_asked_again(model, planned, passes, own_cache):
    first = run(model, planned, resume=True)
    there, files = len(passes), sorted((own_cache / "runs").glob("*/result.json"))
    assert there > 0 and len(files) == 2  # hops and compositions, shortcuts
    again = run(model, planned, resume=True)
    assert len(passes) == there
    pd.testing.assert_frame_equal(again.table, first.table, check_dtype=False)
    # other aliases, another rule: judged anew, and only a shortcut that was not asked before is asked
    other = planned.assign(e3_aliases=[[e3] for e3 in planned.e3])
    judged = run(model, other, resume=True, rule="leading")
    assert not judged.table.query("prompt == 'composition'").word.any() and len(passes) == there
    run(model, planned, resume=True, max_new_tokens=3)
    assert len(passes) > there


def test_an_edited_or_hooked_model_is_asked_anew(model, planned, passes, own_cache):
    clean = run(model, planned, resume=True)
    there = len(passes)
    with lab.interventions.quantized(model, 2, group_size=16):
        coarse = run(model, planned, resume=True)
    assert len(passes) > there and coarse.table.said.tolist() != clean.table.said.tolist()
    files = sorted((own_cache / "runs").iterdir())
    with lab.interventions.skip(model, 1):
        hooked = run(model, planned, resume=True)
    assert hooked.table.said.tolist() != clean.table.said.tolist()
    assert sorted((own_cache / "runs").iterdir()) == files, "no hash tells a hooked model, so nothing may be kept"


def test_a_saved_result_comes_back_with_its_lists(model, planned, tmp_path):
    result = run(model, planned)
    loaded = lab.Result.load(result.save(tmp_path / "saved"))
    assert loaded.parameters == result.parameters and loaded.kind == "two_hop"
    for name, frame in {"table": result.table, "summary": result.summary, **result.tables}.items():
        there = {"table": loaded.table, "summary": loaded.summary, **loaded.tables}[name]
        pd.testing.assert_frame_equal(there, frame, check_dtype=False)
    for aliases in loaded.tables["queries"].e3_aliases:
        assert isinstance(aliases, list) and all(isinstance(alias, str) for alias in aliases)
    assert loaded.tables["inflation"].prompt.tolist()[:3] == ["first_hop", "second_hop", "composition"]


# --- other ways to the answer ------------------------------------------------------------------------------------------


def test_decomposition_puts_the_own_the_right_and_another_bridge_into_the_second_hop(model, planned):
    result = run(model, planned)
    rows = two_hop.decomposition(model, result, rule="word", progress=False).set_index(["example", "method"])
    said = result.table.set_index(["example", "prompt"]).said
    for i, query in enumerate(planned.itertuples()):
        mine, right = rows.loc[query.example], PLAN[i][2]
        assert mine.prompt["latent"] == query.text and mine.said["latent"] == said[query.example, "composition"]
        assert mine.right["latent"] == ("composition" in right)
        assert mine.prompt["oracle"] == query.second_hop and mine.right["oracle"] == ("second_hop" in right)
        own = first_phrase(said[query.example, "first_hop"])
        assert mine.prompt["explicit"] == f"The {query.r2} of {own} is"
        swapped = mine.prompt["other"].removeprefix(f"The {query.r2} of ").removesuffix(" is")
        donor = planned[planned.e2 == swapped].iloc[0]
        assert donor.r2 == query.r2 and donor.group != query.group and donor.e3 != query.e3
        length = {text: len(ids_of(model, text)) for text in (*mine.prompt, query.first_hop)}
        for method in ("latent", "oracle", "other"):
            assert mine.tokens[method] == length[mine.prompt[method]] + 10
            assert mine.passes[method] == (mine.tokens[method] - 1) * 4  # the last token is said, and not run
        assert mine.tokens["explicit"] == length[mine.prompt["explicit"]] + length[query.first_hop] + 20
        assert mine.passes["explicit"] == (mine.tokens["explicit"] - 2) * 4  # two texts, each with a last token
    assert rows.said.tolist() == greedy(model, rows.prompt.tolist(), progress=False)
    again = two_hop.decomposition(model, result, rule="word", progress=False, seed=1).set_index(["example", "method"])
    assert (again.prompt.xs("other", level=1) != rows.prompt.xs("other", level=1)).any()


def test_decomposition_has_no_control_where_nobody_shares_the_relation(model, planned):
    result = run(model, planned.head(3))  # two with one pair of relations, one with the other
    rows = two_hop.decomposition(model, result, progress=False)
    assert rows[rows.method == "other"].example.tolist() == ["q00", "q02"] and len(rows) == 11


def test_all_ways_ask_in_the_style_and_with_the_examples_of_the_result(model, planned):
    result = run(model, planned, shots=1)
    rows = two_hop.decomposition(model, result, progress=False).set_index(["example", "method"])
    assert rows.prompt.xs("latent", level=1).tolist() == two_hop.prompts(model, planned, "composition", shots=1, seed=0)
    assert rows.prompt.xs("oracle", level=1).tolist() == two_hop.prompts(model, planned, "second_hop", shots=1, seed=0)
    said = result.table.query("prompt == 'composition'").set_index("example").said
    assert rows.said.xs("latent", level=1).tolist() == said.loc[planned.example].tolist()
    first = dict(zip(planned.example, two_hop.prompts(model, planned, "first_hop", shots=1, seed=0), strict=True))
    for example in planned.example:
        mine = rows.loc[example].prompt
        shown = {text.split("\n")[0] for text in (mine["explicit"], mine["oracle"], mine["other"])}
        assert len(shown) == 1 and all(text.count("\n") == 1 for text in mine), "the same example before all three"
        length = len(ids_of(model, mine["explicit"])) + len(ids_of(model, first[example])) + 20
        assert rows.tokens[example, "explicit"] == length
    some = two_hop.decomposition(model, result, examples=["q05", "q02"], progress=False)
    assert some.example.unique().tolist() == ["q05", "q02"]
    latent = some[some.method == "latent"].prompt.tolist()
    assert latent == [rows.prompt[example, "latent"] for example in ("q05", "q02")]
    with pytest.raises(ValueError, match="'q99' is not among the 14 answered queries"):
        two_hop.decomposition(model, result, examples=["q00", "q99"], progress=False)
    depths = two_hop.taxonomy_by_depth(model, result, progress=False)
    assert not depths.share.equals(two_hop.taxonomy_by_depth(model, run(model, planned), progress=False).share)


def test_another_bridge_comes_with_its_article(model, planned):
    """As in the second hop of the data: "of the Alba", not "of Alba"."""
    with_article = planned.assign(second_hop=planned.second_hop.str.replace(" of ", " of the "))
    rows = two_hop.decomposition(model, run(model, with_article), progress=False)
    others = rows[rows.method == "other"].prompt
    assert len(others) == len(planned) and set(others) <= set(with_article.second_hop)


def test_shares_of_ways_by_hand():
    rows = pd.DataFrame({
        "example": ["a", "b", "c", "a", "b", "c", "b", "c"], "group": ["A", "B", "C", "A", "B", "C", "B", "C"],
        "method": ["latent"] * 3 + ["explicit"] * 3 + ["other"] * 2, "right": [0, 0, 1, 1, 1, 1, 0, 0],
        "tokens": [10, 20, 30, 30, 40, 50, 7, 9], "passes": 1,
    })  # fmt: skip
    ways = two_hop.shares_of_ways(rows).set_index("method")
    assert ways.n.to_dict() == {"latent": 3, "explicit": 3, "other": 2}
    assert ways.share.to_list() == pytest.approx([1 / 3, 1, 0]) and ways.tokens.to_list() == [20, 40, 8]
    assert ways.difference.to_list() == pytest.approx([0, 2 / 3, -1 / 2])  # the last on its own two queries
    assert ways.loc["latent", ["diff_low", "diff_high"]].tolist() == [0, 0]
    assert ways.loc["explicit", ["low", "high"]].tolist() == [1, 1] and ways.diff_low["other"] == -1


def test_first_phrase():
    heard = (" the Alba, and", " The Alba", "«Alba»", '"Alba" is', " A. B", "", "...")
    assert [first_phrase(said) for said in heard] == [
        *("the Alba", "the Alba", "«Alba»", '"Alba" is', "A", "", "..."),
    ]


def test_taxonomy_at_the_last_depth_is_that_of_the_next_token(model, planned):
    result = run(model, planned)
    table = two_hop.taxonomy_by_depth(model, result, progress=False)
    some = two_hop.taxonomy_by_depth(model, result, examples=["q04", "q02", "q01"], progress=False)
    assert some.not_readable.unique().tolist() == [1]
    with pytest.raises(
        ValueError, match="none of these 2 queries can be read by a lens: an answer of each begins with"
    ):
        two_hop.taxonomy_by_depth(model, result, examples=["q03", "q01"], progress=False)
    assert some.query("depth == 0 and cell in ['IK', 'IG', 'CM_strict', 'RM_strict']").n.sum() == 2
    assert table.depth.unique().tolist() == [0, 1, 2, 3, 4] and table.relative_depth.max() == 1
    right, kept = [], []
    for kind, column in (("first_hop", "e2"), ("second_hop", "e3"), ("composition", "e3")):
        for text, aliases in zip(planned[two_hop.column_of(kind)], planned[f"{column}_aliases"], strict=True):
            token = next_token(model, ids_of(model, text))
            right.append(token in first_of(model, aliases))
            kept.append(bool(first_of(model, aliases)))
    readable = np.array(kept).reshape(3, -1).all(0)
    assert 0 < readable.sum() < len(planned) and table.not_readable.unique().tolist() == [(~readable).sum()]
    first, second, whole = np.array(right).reshape(3, -1)[:, readable]
    assert first.any() and second.any() and whole.any() and not whole.all()
    last = table[table.depth == 4].set_index("cell").n
    assert last["CM_strict"] == (first & second & whole).sum() and last["IG"] == (first & second & ~whole).sum()
    assert last["RM_strict"] == (~(first & second) & whole).sum()
    assert last["IK"] == (~(first & second) & ~whole).sum()


# --- refusals: before the model runs, with nothing written -------------------------------------------------------------


def changed(column: str, value: object, row: int = 1) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def edit(frame: pd.DataFrame) -> pd.DataFrame:
        cells = frame[column].tolist()
        cells[row] = value
        return frame.assign(**{column: pd.Series(cells, dtype=object)})

    return edit


BAD: dict[str, tuple] = {
    "style": (None, {"style": "talk"}, "style='talk': choose one of base, chat"),
    "rule": (None, {"rule": "exact"}, "rule='exact': choose one of word, published, leading"),
    "shots": (None, {"shots": -1}, "shots=-1: give a whole number, at least 0"),
    "tokens": (None, {"max_new_tokens": 0}, "max_new_tokens=0: give a whole number, at least 1"),
    "limit": (None, {"limit": 1}, "limit=1: give a whole number, at least 2 queries"),
    "unknown data": ("two_hops", {}, "no data set 'two_hops'"),
    "no bridge": (lambda f: f.drop(columns="e2"), {}, "has no column 'e2': two-hop queries need text, e1, e2, e3"),
    "no shortcut": (lambda f: f.drop(columns="entity_shortcut"), {}, "column entity_shortcut: the sets are made from"),
    "a missing hop": (changed("first_hop", None), {}, r"has no \(or an incomplete\) column first_hop"),
    "empty hop": (changed("first_hop", " "), {}, "text 1 is empty"),
    "empty alias": (changed("e3_aliases", ["Answer01", " "]), {}, r"e3_aliases in row 1 \(example 'q01'\) contains ' '"),
    "no alias": (changed("e2_aliases", []), {}, "e2_aliases in row 1 .* is an empty list"),
    "e1 not there": (changed("e1", "Bergen"), {}, "e1 'Bergen' of row 1 .* isn't there: e1 must stand in the text"),
    "given away": (changed("e3_aliases", ["river"]), {}, "the answer 'river' of row 1 .* stands in its own text"),
    "too long": (changed("text", "The Oslo " + "x" * 520), {}, "text 1 has 527 tokens, and this model's context holds 512"),
    "no room to answer": (
        changed("text", "The Oslo " + "x" * 500), {}, "507 tokens and 10 new ones do not fit into this model's context of 512",
    ),
    "examples without r2": (lambda f: f.drop(columns="r2"), {"shots": 1}, "shots=1 needs a column r2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_model_runs(model, planned, passes, own_cache, case):
    edit, options, message = BAD[case]
    data = edit(planned) if callable(edit) else planned if edit is None else edit
    with pytest.raises(ValueError, match=message):
        two_hop.run(model, data, progress=False, **options)
    assert passes == []
    assert not os.path.exists(own_cache / "runs")
