"""Two-hop figures and the explorer, on small tables with known numbers: each number stands where it belongs."""

import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from clicking import click, press
from test_concept_figures import controls

import lab
from lab.back_patching import figures as plots
from lab.back_patching import patching as bp
from lab.back_patching import stages, statistics, two_hop
from lab.back_patching.explorer import back_patching_explorer

matplotlib.use("Agg")

N_LAYERS = 6
ABOUT = {"model": "tiny", "dataset": "two_hop", "n_layers": N_LAYERS, "n_queries": 40, "rule": "word"}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def shares(values, **columns) -> dict:
    """Shares as an aggregated table holds them."""
    values = np.asarray(values, float)
    return columns | {"share": values, "low": values - 0.05, "high": values + 0.05}


def answered() -> lab.Result:
    kinds = list(two_hop.PROMPTS)
    values = np.linspace(0.1, 0.8, 15)
    pairs = list(itertools.product(kinds, two_hop.RULES))
    named = {"prompt": [kind for kind, _ in pairs], "rule": [rule for _, rule in pairs]}
    rng = np.random.default_rng(0)
    first, second, whole = (rng.random(40) < p for p in (0.6, 0.5, 0.3))
    taxonomy = statistics.taxonomy(first, second, whole, np.arange(40), draws=50).reset_index()
    n = [7 if kind.endswith("shortcut") else 40 for kind in named["prompt"]]
    return lab.Result(
        "two_hop", pd.DataFrame(), pd.DataFrame(shares(values, **named, n=n)), ABOUT, {"taxonomy": taxonomy}
    )


def patched(positions=("t1", "t2")) -> lab.Result:
    """Four incorrect queries and one correct; the pair (4, 1) helps two of the four at t1, (5, 0) one of them at t2."""
    queries = pd.DataFrame({"example": list("abcde"), "set": ["incorrect"] * 4 + ["correct"]})
    hits = [("a", "t1", "own", 4, 1), ("b", "t1", "own", 4, 1), ("e", "t1", "own", 3, 0), ("c", "t2", "own", 5, 0)]
    hits += [("a", "t1", "random", 2, 1), ("a", "t1", "forward", 1, 2)]
    hits = pd.DataFrame(hits, columns=["example", "position", "condition", "source_layer", "target_layer"])
    hits = hits[hits.position.isin(positions)].assign(draw=0, said=" Paris")
    rows = [(kind, at, condition) for kind, conditions in (("correct", ["own"]), ("incorrect", list(bp.CONDITIONS)))
            for at in positions for condition in conditions]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["set", "position", "condition"])
    success = np.linspace(0.6, 0.1, len(rows))
    summary = summary.assign(n=4, success=success, low=success - 0.05, high=success + 0.05)
    parameters = ABOUT | {"positions": list(positions), "conditions": list(bp.CONDITIONS)}
    table = summary.merge(queries, on="set").assign(draw=0)
    return lab.Result("back_patching", table, summary, parameters, {"hits": hits, "queries": queries})


def staged() -> lab.Result:
    rng = np.random.default_rng(0)
    rows = [(f"{kind}{i}", kind, stage, int(layer)) for kind in ("correct", "incorrect") for i in range(10)
            for where, stage in enumerate(stages.STAGES) for layer in [min(5, where + rng.integers(3))]
            if not (kind == "incorrect" and stage == "answer at t2")]  # fmt: skip
    table = pd.DataFrame(rows, columns=["example", "set", "stage", "layer"])
    table = pd.concat([table, table[table.stage == "moved"].assign(layer=5)])  # a later window, too
    summary = pd.DataFrame(itertools.product(("correct", "incorrect"), stages.STAGES), columns=["set", "stage"])
    reached = np.where((summary.set == "incorrect") & (summary.stage == "answer at t2"), 0.0, 0.85)
    return lab.Result("hop_stages", table, summary.assign(**shares(reached), n=10), ABOUT)


def lens_rows(queries: int) -> pd.DataFrame:
    rows = itertools.product(range(queries), ("t1", "t2"), range(N_LAYERS + 1), ("e2", "e3"))
    frame = pd.DataFrame(rows, columns=["example", "position", "depth", "what"])
    rank = 4 ** (N_LAYERS - frame.depth + (frame.what == "e2")) * (1 + frame.example) - 1
    return frame.assign(rank=rank)


def by_depth() -> pd.DataFrame:
    frame = pd.DataFrame(itertools.product(range(N_LAYERS + 1), [*statistics.CELLS, "RM_expected"]),
                         columns=["depth", "cell"])  # fmt: skip
    frame = frame.assign(relative_depth=frame.depth / N_LAYERS, n=9)
    return frame.assign(**shares(np.linspace(0.1, 0.8, len(frame))))


def ways() -> pd.DataFrame:
    names = ["latent", "explicit", "oracle", "other", "mine"]
    return pd.DataFrame(shares([0.2, 0.35, 0.6, 0.1, 0.3], method=names, n=40, tokens=[24.4, 48.8, 21, 21, 99]))


def swept(shift: int = 0) -> pd.DataFrame:
    """The pair (5, 2) gives the answer, the pair (3, 1) nearly does."""
    table = pd.DataFrame(bp.cells(N_LAYERS), columns=["source_layer", "target_layer"])
    at = list(zip(table.source_layer, table.target_layer, strict=True))
    table = table.assign(said=[f" said {s}-{t}" for s, t in at], right=[pair == (5, 2) for pair in at])
    return table.assign(rank=[0 if pair == (5, 2) else 9 if pair == (3, 1) else 999 + shift for pair in at])


# --- figures ---------------------------------------------------------------------------------------------------------


def words(figure) -> str:
    """All that is written on a figure, and nothing drawn sticks out of the page."""
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def markers(ax, label) -> np.ndarray:
    """x of the markers with a label."""
    return np.concatenate([line.get_xdata() for line in ax.get_lines() if line.get_label() == label])


def test_names_are_those_of_the_experiments():
    assert set(plots.RULES) == set(two_hop.RULES)
    assert list(plots.CONDITIONS) == list(bp.CONDITIONS) and list(plots.PLACES) == list(bp.POSITIONS)
    assert list(plots.STAGES) == list(stages.STAGES)
    assert set(plots.CELLS) < set(statistics.CELLS)


def test_two_hop_shows_each_share_and_the_expected_cell():
    result = answered()
    figure = result.plot()
    ax, bars = figure.axes
    for rule, (label, *_) in plots.RULES.items():
        rows = result.summary[result.summary.rule == rule]
        assert np.allclose(markers(ax, label), rows.share)
    cells = result.tables["taxonomy"].set_index("cell").share
    assert np.allclose([bar.get_height() for bar in bars.patches], cells[list(plots.CELLS)])
    expected = next(line for line in bars.get_lines() if "independent" in line.get_label())
    assert np.allclose(expected.get_ydata(), cells["RM_expected"])
    written = words(figure)
    assert "entity shortcut\n(asked of few: n = 7)" in written and "first hop\n(n = 40)" in written
    assert "tiny on two_hop, n = 40" in written and "IG\nhops known,\nquery wrong" in written


def grid(ax) -> np.ndarray:
    """[source target] as drawn; nan where nothing is."""
    (image,) = ax.get_images()
    assert image.origin == "lower" and ax.get_xlabel().startswith("target")
    assert ax.get_ylabel().startswith("source") or not ax.get_subplotspec().is_first_col()
    return np.ma.filled(image.get_array(), np.nan)


def test_back_patching_maps_count_the_right_hits_in_the_right_cell():
    result = patched()
    figure = result.plot()
    t1, t2, oracle = figure.axes[0], figure.axes[1], figure.axes[2]
    assert np.array_equal(np.isnan(grid(t1)), ~np.tri(N_LAYERS, k=-1, dtype=bool))
    assert {(4, 1): 0.5} == {tuple(map(int, at)): grid(t1)[tuple(at)] for at in np.argwhere(grid(t1) > 0)}
    assert {(5, 0): 0.25} == {tuple(map(int, at)): grid(t2)[tuple(at)] for at in np.argwhere(grid(t2) > 0)}
    assert t1.get_images()[0].get_clim() == t2.get_images()[0].get_clim() == (0, 0.5)
    for ax in (t1, t2):  # the same numbers as the experiment's own matrix
        matrix, _, pairs = bp.success_matrix(result, "t1" if ax is t1 else "t2", sets=("incorrect",))
        assert np.allclose([grid(ax)[pair] for pair in pairs], matrix.mean(0))
    rows = result.summary[result.summary.set == "incorrect"]
    drawn = np.concatenate([line.get_xdata() for line in oracle.get_lines()])
    assert np.allclose(np.sort(drawn), np.sort(rows.success))
    assert [label.get_text() for label in oracle.get_yticklabels()] == list(plots.CONDITIONS.values())
    assert "tiny on two_hop: set incorrect, n = 4" in words(figure)


def test_back_patching_of_another_set_and_of_one_position():
    figure = patched().plot(set="correct")
    assert grid(figure.axes[0])[3, 0] == 1 and np.nansum(grid(figure.axes[1])) == 0
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["own later state"]
    figure = patched(("t2",)).plot()
    assert len(figure.axes) == 3 and grid(figure.axes[0])[5, 0] == 0.25  # map, oracle, colour bar
    assert "patched at t2" in words(figure)
    with pytest.raises(ValueError, match="set='wrong' has no queries in this result: there are correct, incorrect"):
        patched().plot(set="wrong")
    result = patched()
    result.parameters["conditions"] = ["random"]
    with pytest.raises(ValueError, match="own was not tried, only random"):
        result.plot()


def test_stages_box_the_first_layers_and_say_who_reaches_them():
    result = staged()
    figure = result.plot()
    (ax,) = figure.axes
    first = result.table.groupby(["set", "stage", "example"]).layer.min().groupby(["set", "stage"]).median()
    medians = [
        line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() in ("o", "s") and len(line.get_xdata())
    ]
    assert sorted(medians) == sorted(first) and len(medians) == 11  # nobody of one set reaches one stage
    assert [label.get_text() for label in ax.get_yticklabels()] == list(plots.STAGES.values())
    written = words(figure)
    assert written.count("85%  [80%, 90%]") == 11 and written.count("  0%  [-5%, 5%]") == 1
    assert "incorrect (10 queries)" in written
    short = lab.Result("hop_stages", result.table, pd.DataFrame(), ABOUT)  # too few queries for intervals
    assert "incorrect (10 queries)" in words(short.plot())


@pytest.mark.parametrize("queries", [1, 5])
def test_lens_strip_draws_ranks_or_their_median(queries):
    table = lens_rows(queries)
    figure = plots.lens_strip(table, n_layers=N_LAYERS)
    assert [ax.get_title() for ax in figure.axes] == ["t1, end of e1", "t2, end of prompt"]
    for ax, at in zip(figure.axes, ("t1", "t2"), strict=True):
        for what, line in zip(("e2", "e3"), ax.get_lines(), strict=True):
            rows = table[(table.position == at) & (table.what == what)]
            assert np.allclose(line.get_ydata(), 1 + rows.groupby("depth")["rank"].median())
            assert line.get_xdata().tolist() == list(range(N_LAYERS + 1))
        low, high = ax.get_ylim()
        assert low > 1 + table["rank"].max() and high < 1 and ax.get_yscale() == "log"  # the top is what is said
    assert "bridge (e2)" in words(figure)
    table["rank"] = table["rank"].astype("Int64").mask(table.what == "e3")  # its first token says nothing of it
    figure = plots.lens_strip(table, n_layers=N_LAYERS)
    bridge, answer = figure.axes[0].get_lines()
    assert np.isnan(np.asarray(answer.get_ydata(), float)).all() and np.isfinite(bridge.get_ydata()).all()
    assert "answer (e3): its first token says nothing" in words(figure) and figure.axes[0].get_ylim()[0] > 1


def test_taxonomy_by_depth_and_methods():
    table = by_depth()
    figure = plots.taxonomy_by_depth(table)
    lines = {line.get_label().split(":")[0]: line for line in figure.axes[0].get_lines()}
    assert list(lines) == ["IK", "IG", "CM", "RM", "RM if independent"]
    assert np.allclose(lines["CM"].get_ydata(), table[table.cell == "CM_strict"].share)
    assert np.allclose(lines["CM"].get_xdata(), np.arange(N_LAYERS + 1) / N_LAYERS)
    assert "RM: query right, hop unknown" in words(figure)
    figure = plots.methods(ways())
    assert np.allclose([line.get_xdata()[0] for line in figure.axes[0].get_lines()], ways().share)
    written = words(figure)
    assert "20%   24 tokens, n = 40" in written and "mine" in written and "oracle\n(right bridge put in)" in written


def test_success_map_of_one_query():
    figure = plots.success_map(swept(), n_layers=N_LAYERS, chosen=(3, 1))
    ax = figure.axes[0]
    assert grid(ax)[5, 2] == 0 and grid(ax)[3, 1] == 1 and grid(ax)[1, 0] == 3 and np.isnan(grid(ax)[2, 2])
    (dots,) = ax.get_lines()
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([2], [5])
    assert {patch.get_xy() for patch in ax.patches} == {(0.5, 2.5)}
    assert "the answer is given (pairs that give it: 1)" in words(figure)
    part = swept().query("source_layer < 5")  # a pair that was not tried is no pair that failed
    assert np.isnan(grid(plots.success_map(part, n_layers=N_LAYERS).axes[0])[5]).all()
    ax = plots.success_map(swept(), n_layers=N_LAYERS, value="right").axes[0]
    assert np.argwhere(grid(ax) == 1).tolist() == [[5, 2]]
    unread = swept().assign(rank=pd.Series(pd.NA, index=swept().index, dtype="Int64"))
    assert np.array_equal(grid(plots.success_map(unread, n_layers=N_LAYERS).axes[0]), grid(ax), equal_nan=True)
    with pytest.raises(ValueError, match="value='ranks': choose rank or right"):
        plots.success_map(swept(), n_layers=N_LAYERS, value="ranks")


def test_no_setting_is_left_behind():
    before = dict(plt.rcParams)
    patched().plot()
    assert dict(plt.rcParams) == before


# --- the explorer ----------------------------------------------------------------------------------------------------


def shipped() -> pd.DataFrame:
    return pd.DataFrame({
        "example": ["a", "b"], "set": ["incorrect", "correct"], "e1": ["Mumbai", "Lyon"], "e2": ["India", "France"],
        "text": ["The capital of the country of Mumbai is", "The capital of the country of Lyon is"],
        "e3": ["New Delhi", "Paris"], "e3_aliases": [["New Delhi", "Delhi, India"], ["Paris"]], "plain": [" Mumbai", " P."],
    })  # fmt: skip


class Asked:
    """Callbacks that note how they were called."""

    def __init__(self) -> None:
        self.sweeps, self.generations, self.lenses = [], [], []

    def sweep(self, prompt, e1, names, position):
        self.sweeps.append((prompt, e1, names, position))
        if e1 not in prompt:
            raise ValueError(f"{e1!r} is not in the <prompt>")
        return swept()

    def generate(self, prompt, e1, position, source, target):
        self.generations.append((prompt, e1, position, source, target))
        return f" whole\ntext {source}-{target}"

    def lens(self, prompt, e1, e2_names, e3_names):
        self.lenses.append((prompt, e1, e2_names, e3_names))
        return lens_rows(1)


MUMBAI = "The capital of the country of Mumbai is"


def test_explorer_runs_on_demand_and_follows_the_sliders():
    asked = Asked()
    explorer = back_patching_explorer(shipped(), asked.sweep, generate=asked.generate, lens=asked.lens)
    message, found = explorer.children[4], explorer.children[-1]
    _, _, picture, said, strip = found.children
    at = controls(explorer)
    assert "Not run yet" in message.value and found.children[2].layout.display == "none" and asked.sweeps == []
    at["Run"].click()
    names = ["New Delhi", "Delhi, India"]
    assert asked.sweeps == [(MUMBAI, "Mumbai", names, "t1")]
    assert asked.lenses == [(MUMBAI, "Mumbai", ["India"], names)]
    assert message.value == "" and found.children[2].layout.display == "" and at["Run"].layout.display == "none"
    assert bytes(picture.value).startswith(b"\x89PNG") and bytes(strip.value).startswith(b"\x89PNG")
    source, target = at["source layer"], at["target layer"]
    assert (source.value, source.max, target.value, target.max) == (5, 5, 2, 4)  # the pair that gives the answer
    assert asked.generations == [(MUMBAI, "Mumbai", "t1", 5, 2)]
    for part in (
        MUMBAI,
        " Mumbai<",
        " whole ↵ text 5-2",
        ">yes<",
        ">1 (1 = it is said next)",
        "after layer 5 put after layer 2",
    ):
        assert part in said.value
    drawn = bytes(picture.value)
    source.value = 2
    assert (target.value, target.max) == (1, 1) and asked.generations[1:] == [(MUMBAI, "Mumbai", "t1", 2, 1)]
    assert bytes(picture.value) != drawn and ">no<" in said.value and ">1,000 (1 =" in said.value
    click(picture, -0.4, 5.4)
    assert (source.value, target.value, target.max) == (5, 0, 4) and asked.generations.pop()[3:] == (5, 0)
    click(picture, 5, 1)  # forward: the layer before the source
    assert (source.value, target.value) == (1, 0) and asked.generations.pop()[3:] == (1, 0)
    press(picture, 0, 1)
    assert (source.value, target.value) == (2, 0) and asked.generations.pop()[3:] == (2, 0)
    source.value = 5
    target.value = 2
    target.value = 1
    assert target.max == 4 and asked.generations[2:] == [(MUMBAI, "Mumbai", "t1", 5, 1)]  # 5-2 is remembered
    at["patched at"].value = "t2"
    assert "Not run yet" in message.value and len(asked.sweeps) == 1
    at["Run"].click()
    assert asked.sweeps[1:] == [(MUMBAI, "Mumbai", names, "t2")] and len(asked.lenses) == 1
    at["patched at"].value = "t1"
    assert message.value == "" and len(asked.sweeps) == 2  # remembered, too


def test_explorer_takes_a_query_of_ones_own_and_shows_errors():
    asked = Asked()
    explorer = back_patching_explorer(shipped(), asked.sweep, lens=asked.lens)
    message, found = explorer.children[4], explorer.children[-1]
    at = controls(explorer)
    assert explorer.children[1].layout.display == "none"
    at["query"].value = -1
    assert explorer.children[1].layout.display == ""
    at["Run"].click()
    assert message.value == "Fill in first: query, e1, answer e3." and asked.sweeps == []
    at["your query"].value, at["e1"].value, at["answer e3"].value = (
        "The capital of Peru is",
        "Cuzco",
        " Lima, City of Kings,",
    )
    at["Run"].click()
    assert message.value == "<b>ValueError</b>: &#x27;Cuzco&#x27; is not in the &lt;prompt&gt;"
    assert asked.sweeps == [("The capital of Peru is", "Cuzco", ["Lima", "City of Kings"], "t1")]
    assert found.children[2].layout.display == "none" and not at["Run"].disabled
    at["e1"].value = "Peru"
    at["Run"].click()
    assert message.value == "" and found.children[2].layout.display == "" and asked.lenses == []
    said = found.children[3].value
    assert " said 5-2 [...]" in said and "(not known)" in said
    assert found.children[4].layout.display == "none" and at["Run"].layout.display == "none"
    at["bridge e2"].value = "South America"
    assert at["Run"].layout.display == ""
    at["Run"].click()
    assert asked.lenses == [("The capital of Peru is", "Peru", ["South America"], ["Lima", "City of Kings"])]
    assert found.children[4].layout.display == "" and len(asked.sweeps) == 2
    with pytest.raises(ValueError, match="queries has no column e3, set"):
        back_patching_explorer(shipped().drop(columns=["e3", "set"]), asked.sweep)


def test_explorer_asks_anew_for_another_e1_in_the_same_text():
    asked = Asked()
    explorer = back_patching_explorer(shipped(), asked.sweep, generate=asked.generate)
    at = controls(explorer)
    at["query"].value = -1
    at["your query"].value, at["e1"].value, at["answer e3"].value = "From Lima to Quito it is", "Lima", "far"
    at["Run"].click()
    at["e1"].value = "Quito"
    at["Run"].click()
    at["e1"].value = "Lima"  # remembered
    assert [e1 for _, e1, _, _ in asked.sweeps] == [e1 for _, e1, *_ in asked.generations] == ["Lima", "Quito"]


def test_explorer_tells_what_goes_wrong_while_looking():
    def generate(prompt, e1, position, source, target):
        raise RuntimeError("no memory")

    explorer = back_patching_explorer(shipped(), Asked().sweep, generate=generate)
    controls(explorer)["Run"].click()
    assert explorer.children[4].value == "<b>RuntimeError</b>: no memory"
    assert " said 5-2 [...]" in explorer.children[-1].children[3].value and "bridge e2" not in controls(explorer)


def test_explorer_on_a_real_model(tiny_model):
    model = tiny_model("llama")

    def sweep(prompt, e1, names, position):
        return bp.sweep(model, prompt, names, positions=[bp.places(model, prompt, e1)[position]])

    def generate(prompt, e1, position, source, target):
        at = bp.places(model, prompt, e1)[position]
        return bp.patch_once(model, prompt, position=at, source_layer=source, target_layer=target)

    def lens(prompt, e1, e2_names, e3_names):
        return stages.lens(model, prompt, bp.places(model, prompt, e1), {"e2": e2_names, "e3": e3_names})

    explorer = back_patching_explorer(shipped(), sweep, generate=generate, lens=lens)
    at, message, found = controls(explorer), explorer.children[4], explorer.children[-1]
    at["Run"].click()
    assert message.value == "" and found.children[2].layout.display == ""
    assert at["source layer"].max == 3 and bytes(found.children[4].value).startswith(b"\x89PNG")
    at["query"].value = -1
    at["your query"].value, at["e1"].value, at["answer e3"].value = "The capital of Peru is", "Cuzco", "Lima"
    at["Run"].click()
    assert message.value.startswith("<b>ValueError</b>: ") and "Cuzco" in message.value


def test_explorer_opens_on_what_was_swept_already():
    asked, before = Asked(), Asked()
    table = before.sweep(MUMBAI, "Mumbai", ["New Delhi", "Delhi, India"], "t2")
    explorer = back_patching_explorer(shipped(), asked.sweep, swept={(MUMBAI, "t2"): table})
    found, at = explorer.children[-1], controls(explorer)
    assert asked.sweeps == [] and found.children[2].layout.display == "" and not at["source layer"].disabled
    assert "at t2" in found.children[3].value
