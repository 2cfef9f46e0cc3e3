"""Lesson 02: what its checks say to right and wrong answers, its maps against plain hooks, and its explorer."""

import ast
import linecache
import re
from collections.abc import Callable
from typing import Any

import jupytext
import matplotlib.pyplot as plt
import pytest
import torch
from clicking import click, press
from lesson_size import LESSONS
from transformer_lens.model_bridge import TransformerBridge

import lab
from lab.lessons import back_patching as check
from lab.lessons import patch

NAMES = ("put", "patched", "rank_map", "random_like", "lent", "carried")
PATH = next(path for path in LESSONS if path.stem == "02_back_patching")
CELLS = jupytext.read(PATH).cells


def written(source: str, **given: Any) -> dict[str, Any]:
    """Names that a cell defines; its source can be looked up, as in a notebook."""
    file = f"<ipython-cell-{abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), given)
    return given


def cell(name: str, tag: str) -> str:
    """The source of what the participant gets (exercise), or of its solution, without the fence."""
    sources = [one.source for one in CELLS if tag in one.metadata.get("tags", [])]
    fences = [re.search(r"```python\n(.*?)```", one, re.DOTALL) for one in sources]
    code = [found[1] if found else source for found, source in zip(fences, sources, strict=True)]
    return next(one for one in code if re.search(rf"^(def {name}\(|{name} = )", one, re.MULTILINE))


def solutions(model: TransformerBridge, solution: Callable[..., Any]) -> dict[str, Any]:
    """The notebook's names on a model, with all its solutions in place."""
    known: dict[str, Any] = {"model": model, "torch": torch, "lab": lab, "n_layers": model.cfg.n_layers}
    tree = ast.parse(PATH.read_text(encoding="utf-8"))
    stream = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "stream")
    known["stream"] = written(ast.unparse(stream), **known)["stream"]
    for name in NAMES:
        known[name] = solution("02", name, **known)
    return known


@pytest.fixture(scope="module")
def solved(smollm2: TransformerBridge, solution: Callable[..., Any]) -> dict[str, Any]:
    return solutions(smollm2, solution)


@pytest.fixture
def says(smollm2: TransformerBridge, capsys: pytest.CaptureFixture) -> Callable[[str, Any], str]:
    """What a check says to an answer."""

    def ask(name: str, answer: Any) -> str:
        capsys.readouterr()
        context = () if name in ("random_like", "carried") else (smollm2,)
        getattr(check, name)(answer, *context)
        return " ".join(capsys.readouterr().out.split())

    return ask


@pytest.mark.parametrize("name", NAMES)
def test_a_skeleton_is_no_answer_and_the_solution_is_right(name: str, says: Any, solved: dict[str, Any]) -> None:
    skeleton = written(cell(name, "exercise"), **solved)[name]
    assert says(name, skeleton) == f"{name}: no answer yet. The lesson goes on with the kit's own."
    assert says(name, solved[name]) == f"{name}: right."


@pytest.mark.parametrize("name", NAMES)
def test_what_the_lesson_goes_on_with_is_itself_right(name: str, says: Any, smollm2: TransformerBridge) -> None:
    own = getattr(check, name)(..., *(() if name in ("random_like", "carried") else (smollm2,)))
    own = (lambda *given, own=own: own(*given)) if callable(own) else str(own)  # without its mark as the kit's
    assert says(name, own) == f"{name}: right."


def hook(*lines: str) -> Callable[..., Any]:
    """An answer to the first exercise whose hook has these lines."""
    body = "\n        ".join(lines)
    source = f"def put(position, vector):\n    def hook_fn(state, hook):\n        {body}\n    return hook_fn\n"
    return written(source, torch=torch)["put"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("state = state.clone()", "state[:, position] = vector"), "returns nothing"),
        (("state[:, position] = vector", "return state"), "Copy it first"),
        (("state = state.clone()", "return state"), "is the old one"),
        (("state = state.clone()", "state[:, 0] = vector", "return state"), "changes position 0"),
        (("state = state.clone()", "state[:] = vector", "return state"), "changes every token"),
        (("state = state.clone()", "state[:, position] += vector", "return state"), "adds the vector"),
        (("return vector",), "Yours returned (6,)"),
        (("return state[hook.layer]",), "Your code stopped"),
    ],
)
def test_put(lines: tuple[str, ...], message: str, says: Any) -> None:
    assert message in says("put", hook(*lines))


def test_put_without_its_last_line(says: Any) -> None:
    assert "must return the inner function" in says("put", lambda position, vector: None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0, -1]", "", "read off at the last position"),
        ("[0, -1]", "[0, 0]", "after the FIRST token"),
        ("return model", "model", "Is there a “return”?"),
        ("hook_resid_post", "hook_resid_pre", "your vector stands before layer"),
        ("[(name, put(position, vector))]", "[]", "without a patch"),
        ("[0, -1]", "[0, -1].softmax(-1)", "probabilities"),
        ("put(position, vector)", "put(position - 1, vector)", "your vector stands at position"),
    ],
)
def test_patched(old: str, new: str, message: str, says: Any, solved: dict[str, Any]) -> None:
    assert message in says("patched", changed("patched", old, new, solved))


def changed(name: str, old: str, new: str, solved: dict[str, Any]) -> Any:
    """A solution with one mistake in it."""
    source = cell(name, "solution")
    assert old in source
    return written(source.replace(old, new), **solved)[name]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    return ranks", "    return None", "Return the table"),
        ("ranks[source, target] = ", "rank = ", "still empty"),
        ("ranks[source, target]", "ranks[target, source]", "lies on its side"),
        ("range(target + step,", "range(target,", "source == target"),
        ("range(target + step, n_layers, step)", "range(target + 1, n_layers, step)", "you tried"),
        (".sum() + 1", ".sum()", "counts from 0"),
        ("vectors[source + 1]", "vectors[source]", "Off by one depth"),
        ("vectors[source + 1]", "vectors[target + 1]", "you have"),
    ],
)
def test_rank_map(old: str, new: str, message: str, says: Any, solved: dict[str, Any]) -> None:
    assert message in says("rank_map", changed("rank_map", old, new, solved))


def test_rank_map_that_goes_forward(says: Any, solved: dict[str, Any]) -> None:
    both = "range(0, n_layers, step):\n            if source == target:\n                continue"
    forward = changed("rank_map", "range(target + step, n_layers, step):", both, solved)
    assert "sources before the target" in says("rank_map", forward)


def random(old: str, new: str) -> Any:
    return changed("random_like", old, new, {"torch": torch})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (" / noise.norm(dim=-1, keepdim=True)", "", "off by one factor"),
        (" * vectors.norm(dim=-1, keepdim=True)", "", "length 1"),
        ("randn(vectors.shape)", "rand(vectors.shape)", "positive"),
        ("randn(vectors.shape)", "randn(vectors.shape[-1:])", "point the same way"),
        ("torch.randn(vectors.shape)", "vectors * 2", "still point"),
        ("torch.randn(vectors.shape)", "vectors[:, torch.randperm(vectors.shape[1])]", "own numbers"),
        ("noise.norm(dim=-1, keepdim=True)", "noise.norm()", "off by one factor"),
        ("vectors.norm(dim=-1, keepdim=True)", "vectors.norm()", "as long as the state"),
        ("return noise", "noise", "you gave None"),
        ("noise / noise", "0 / 0 * noise / noise", "Your code stopped"),
        ("torch.randn(vectors.shape)", "torch.zeros(vectors.shape)", "not finite"),
        ("torch.randn(vectors.shape)", "vectors.normal_()", "writes into"),
    ],
)
def test_random_like(old: str, new: str, message: str, says: Any) -> None:
    assert message in says("random_like", random(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[:, position]", "", "all tokens"),
        ("[:, position]", "[:, 0]", "you took token 0"),
        ("[:, position]", "[:, 13]", "its words stand elsewhere"),
        ("[place]", "['t2']", "Asked for t1"),
        ("[:, position]", "[position]", "one vector for each depth"),
        ("stream(other.text)", "stream(other.text + ' now')", "not the states of the other query"),
    ],
)
def test_lent(old: str, new: str, message: str, says: Any, solved: dict[str, Any]) -> None:
    if "now" in new:  # a text that is longer in front
        new = "stream('Now: ' + other.text)"
    assert message in says("lent", changed("lent", old, new, solved))


def test_carried(says: Any) -> None:
    assert "about Kenya" in says("carried", "a")
    assert "random vector" in says("carried", "b")
    assert "Choose one letter" in says("carried", "Rome")


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_the_kit_s_map_is_that_of_plain_hooks(family: str, tiny_model: Any, solution: Any) -> None:
    model = tiny_model(family)
    known = solutions(model, solution)
    ids, states = known["stream"]("some text")
    plain = known["rank_map"](ids, 4, states[:, 4], 40, 1)
    kit = patch.rank_map(model, ids[0], 4, states[:, 4], 40)
    assert int(kit.isfinite().sum()) == 6
    assert torch.allclose(plain, kit, equal_nan=True)
    coarse = patch.rank_map(model, ids[0], 4, states[:, 4], 40, step=2)
    assert torch.allclose(coarse[::2, ::2], kit[::2, ::2], equal_nan=True)
    assert int(coarse.isfinite().sum()) == 1


def test_figures_name_their_axes() -> None:
    ranks = torch.full((6, 6), torch.nan)
    ranks[4, 0], ranks[2, 0], ranks[4, 2] = 1, 50, 2000
    figure = patch.maps({"own": ranks, "random": ranks}, "Rome", "at t1", chosen=(4, 0))
    axes = figure.axes
    assert [ax.get_xlabel() for ax in axes[:2]] == ["put after layer"] * 2
    assert axes[0].get_ylabel() == "taken after layer"
    assert axes[0].get_title() == "own\n1 of 3 pairs"
    assert "Rome" in figure.legends[0].get_texts()[0].get_text()
    plt.close(figure)


# --- explorer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer(smollm2: TransformerBridge) -> patch.Patch:
    return patch.patch(smollm2)


def test_what_the_lesson_says_of_its_showcase(
    explorer: patch.Patch, smollm2: TransformerBridge, solved: dict[str, Any]
) -> None:
    """The first pair and a few more by own hooks and by the kit; of the whole map, by `sweep`, the text says about 100."""
    text, e1, answer = explorer.asked
    ids, states = solved["stream"](text)
    at = lab.back_patching.places(smollm2, text, e1)["t1"]
    rome = lab.texts.first_tokens(smollm2, text, [answer])[0]
    assert int(solved["patched"](ids, at, 6, states[20, at]).argmax()) == rome
    assert int(smollm2(ids)[0, -1].argmax()) != rome
    whole, own = explorer.maps[explorer.key], solved["rank_map"](ids, at, states[:, at], rome, 9)
    tried = own.isfinite()
    assert int(tried.sum()) == 6 and torch.allclose(whole[tried], own[tried], rtol=0.02)
    assert patch.hits(whole).endswith("of 435 pairs") and 80 < int((whole == 1).sum()) < 130


def test_explorer_reads_another_pair(explorer: patch.Patch) -> None:
    said, picture = explorer.said.value, explorer.picture.value
    assert "Silvio Berlusconi is" in said and "rank 1 " in said
    assert bytes(picture).startswith(b"\x89PNG")
    explorer.source.value = 28
    assert explorer.said.value != said and "rank 1 " not in explorer.said.value
    assert explorer.picture.value != picture
    explorer.target.value = 28
    assert "is not before" in explorer.said.value
    explorer.source.value, explorer.target.value = 19, 6


def test_a_click_in_the_map_chooses_a_pair(explorer: patch.Patch) -> None:
    for (source, target), (x, y) in {(29, 0): (0.01, 29.99), (29, 28): (28.5, 29.5), (1, 0): (0.5, 0.01)}.items():
        said = explorer.said.value
        click(explorer.picture, x, y)
        assert (explorer.source.value, explorer.target.value) == (source, target)
        assert explorer.said.value != said and "has rank" in explorer.said.value
    click(explorer.picture, 20.5, 10.5)
    assert "Layer 20 is not before layer 10" in explorer.said.value
    click(explorer.picture, 5.5, 19.5)
    press(explorer.picture, 1, 0)
    assert (explorer.source.value, explorer.target.value) == (19, 6) and "rank 1 " in explorer.said.value


def test_explorer_takes_another_place_and_another_state(explorer: patch.Patch) -> None:
    picture = explorer.picture.value
    explorer.place.value = "t2"
    assert explorer.picture.value != picture
    explorer.donor.value = "Wangari Maathai"
    assert explorer.tally.value.count("of 435") == 3 and "Wangari Maathai" in explorer.tally.value
    explorer.noise.click()
    counted = re.findall(r"<td[^>]*>(\d+)</td>", explorer.tally.value)
    assert len(counted) == 2 and int(counted[0]) < 10  # for both states: it is the same place
    explorer.donor.value, explorer.place.value = patch.ITSELF, "t1"


def test_explorer_takes_a_query_of_ones_own(explorer: patch.Patch) -> None:
    explorer.query.value = ""
    assert "Type a text" in explorer.said.value and explorer.picture.value == b""
    text, e1, answer = explorer.fields.values()
    text.value, e1.value, answer.value = "The capital of Italy is", "Spain", "Rome"
    explorer.go.click()
    assert "does not stand in text" in explorer.said.value
    e1.value = "Italy"
    explorer.go.click()
    assert "The capital of Italy is" in explorer.said.value and bytes(explorer.picture.value).startswith(b"\x89PNG")
    text.value = "word " * 40
    explorer.go.click()
    assert "Shorten it" in explorer.said.value


def test_explorer_of_a_model_that_spells(tiny_model: Any) -> None:
    explorer = patch.patch(tiny_model("llama"))  # a token a byte: the first one of any answer is a blank
    assert "says nothing of it" in explorer.said.value
    explorer.noise.click()
    assert "says nothing of it" in explorer.said.value and explorer.picture.value == b""
