"""The golden record: what every experiment gives on tiny models with fixed seeds, to hold a changed kit against.

    python tests/golden.py record FOLDER              # each experiment: its tables and its figure (a minute or two)
    python tests/golden.py record FOLDER --notebooks  # and each notebook with quick settings (some ten minutes)
    python tests/golden.py compare OLD NEW            # equal to the last bit, or what differs and by how much
    python tests/golden.py numbers                    # writes golden.json, which test_golden.py holds on any machine

On one machine and one set of versions two records of the same numbers are equal byte by byte. On another machine the last
digits differ, so the test compares means, spreads and extremes of all columns with a tolerance.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
NUMBERS = HERE / "golden.json"
Make = Callable[[str], Any]  # of a family of models, or "talking"


# --- what is run ----------------------------------------------------------------------------------------------------


def experiments(model: Make) -> dict[str, Callable[[], Any]]:
    """Each experiment by name, as a call that gives a Result or a table."""
    from test_concept_depth import letters
    from test_two_hop import planned_queries

    from lab import back_patching, concept_depth, depth_budget, depth_efficiency, transfer
    from lab.back_patching import stages, two_hop
    from lab.depth_budget import (
        additivity,
        depth_policy,
        macaron,
        nested,
        pruning,
        quantisation,
        submodularity,
        triples,
    )
    from lab.depth_efficiency import attributions, integrator
    from lab.depth_efficiency.linear_maps import fit_maps
    from lab.transfer import ensemble, merging, pretrained, probe_transfer, scaling, stitching, tuned

    quiet: dict[str, Any] = {"progress": False, "resume": False}
    rng = np.random.default_rng(0)
    words = "the sum of two and three is five today a cat sat on mat in sun all day we went home by train".split()
    documents = [" ".join(rng.choice(words, rng.integers(6, 14))) for _ in range(24)]
    texts = pd.DataFrame({"text": ["Ana had 3 pears, and Bo had 4.", "The lamp was out; he sang a low song.",
                                   "Rain fell on the sea all day.", "We went home by train, all five of us."]})  # fmt: skip
    prompts = pd.DataFrame({"prompt": [f"{' and '.join(words[i : i + n])} is" for i in range(3) for n in (2, 4)],
                            "level": [1, 2] * 3, "answer": ["a", "b", "c"] * 2, "group": list("abcdef")})  # fmt: skip
    other = letters(40, seed=1).assign(group=lambda frame: "h" + frame.group)
    turned = letters().assign(
        text=lambda f: "no " + f.text, label=lambda f: 1 - f.label, example=lambda f: "no-" + f.example
    )
    sizes = {"train": 24, "validation": 8, "test": 12, "documents": (3, 4), "length": 8, "steps": 4, "batch": 8}
    small = {"steps": 4, "gate": 0.0, "train_per_class": 150}
    tune = {"n": [2, 4], "steps": 20, "rate": 1e-3, "head_rate": 1e-2}
    stories = pd.DataFrame({"text": [" ".join(rng.choice(words, 12)) for _ in range(16)]})
    asked: list[Any] = []
    short: dict[str, Any] = {"n_tokens": 14, "first": 4, **quiet}

    def removed() -> Any:
        return depth_budget.pair_table(model("llama"), stories, sizes=(4, 5), permutations=20, **short)

    def answers() -> Any:
        if not asked:
            asked.append(two_hop.run(model("talking"), planned_queries(model("talking")), **quiet))
        return asked[0]

    return {
        "concept_depth": lambda: concept_depth.run(model("llama"), letters(), repeats=4, **quiet),
        "concept_depth_conditions": lambda: concept_depth.run(
            model("gemma2"), letters(), repeats=2, noise=True, bits=4, group_size=16, null=False, solver="sklearn", **quiet
        ),
        "two_hop": answers,
        "taxonomy_by_depth": lambda: two_hop.taxonomy_by_depth(model("talking"), answers(), progress=False),
        "decomposition": lambda: two_hop.decomposition(model("talking"), answers(), progress=False),
        "back_patching": lambda: back_patching.run(model("talking"), answers(), n=8, rule="word", **quiet),
        "sweep": lambda: back_patching.sweep(model("talking"), "The capital of Peru is", ["Lima", "ba"], positions=[3]),
        "hop_stages": lambda: stages.run(model("talking"), answers(), n=3, target_layers=[1, 3], **quiet),
        "depth_efficiency": lambda: depth_efficiency.run(model("llama"), texts, n=4, n_cuts=2, n_read=3, **quiet),
        "depth_scores": lambda: depth_efficiency.depth_scores(model("llama"), prompts, n_per_level=3, progress=False),
        "erasure": lambda: attributions.erasure(model("llama"), "the sum", " of two", background=documents[:3]),
        "integrated_gradients": lambda: attributions.integrated_gradients(model("gemma2"), "the sum", " of two", nodes=8),
        "integrator": lambda: integrator.run(
            model("llama"), texts, layers=[1, 2], n_texts=4, n_tokens=8, n_step_texts=2, substeps=8, progress=False
        ),
        "maps": lambda: fit_maps(model("llama"), model("gpt2"), documents, draws=20, progress=False),
        "stitching": lambda: stitching.run(
            model("llama"), model("gpt2"), documents, pairs=[(1, 2), (3, 4)], draws=20, progress=False
        ),
        "probe_transfer": lambda: probe_transfer.run(
            model("llama"), {"letters": letters(), "turned": turned, "other": other}, repeats=2, draws=20, **quiet
        ),
        "transfer": lambda: transfer.run("D", n=[0, 2], splits=2, targets=["A", "B"], **small, **quiet),
        "transfer_pretrained": lambda: pretrained.run(model("llama"), letters(), **tune, **quiet),
        "transfer_tuned": lambda: tuned.run(model("llama"), letters(), [turned], repeats=2, **tune, **quiet),
        "tuned_scaling": lambda: scaling.run(
            model("llama"), letters(), [turned.assign(group="t" + turned.group)], sizes=sizes, grid=[1.0, 0.0],
            permutations=1, frozen=[0.5], draws=20, **quiet,
        ),
        "layer_ensemble": lambda: ensemble.run(
            model("llama"), letters(), other, seeds=1, steps=5, rates=[1e-2], draws=20, progress=False
        ),
        "merging": lambda: merging.run(gate=0.0, splits=1, seeds=1, **quiet),
        "layer_bits": lambda: quantisation.run(
            model("llama"), stories, pairs=[(4, 2)], step=2, group_size=16, n_random=2, most=2, sizes=(4, 5, 3), **short
        ),
        "rate_distortion": lambda: pruning.run(
            model("llama"), stories, sizes=(4, 5, 3), rates=[0.3, 0.7, 1.0], budgets=[0.3], n_random=2, n_swaps=2, **short
        ),
        "additivity": lambda: additivity.run(
            model("llama"), stories, n_texts=4, n_pairs=2, sizes=(3,), n_sets=2, group_size=16, **short
        ),
        "prefix_exits": lambda: depth_budget.prefix_exits(model("llama"), stories, n_texts=5, n_random=2, step=2, **short),
        "fixed_norms": lambda: depth_budget.norms(
            model("llama"), stories, n_texts=5, n_calibration=3, layers=[0, 3], **short
        ),
        "pair_table": removed,
        "block_search": lambda: depth_budget.block_search(
            model("llama"), removed(), stories, evaluations=8, seeds=2, window=2, shift=1, population=4, **quiet
        ),
        "submodularity": lambda: submodularity.run(
            model("llama"), removed(), stories, n_chains=3, n_sets=2, n_added=2, **quiet
        ),
        "nested": lambda: nested.run(seeds=[0, 1], n_layers=2, d_model=8, steps=4, batch=2, length=16, sampled=1, **quiet),
        "macaron": lambda: macaron.run(seeds=[0, 1], rates=[4e-3], n_layers=1, steps=4, batch=2, length=16, **quiet),
        "triples": lambda: triples.run(n=4, seeds=[0, 1], steps=4, batch=4, tested=20, **quiet),
        "depth_policy": lambda: depth_policy.run(model("llama"), "sentiment_words", repeats=2, limit=60, folds=2, **quiet),
    }  # fmt: skip


def models(folder: Path) -> Make:
    """Tiny random models, each loaded once: families of the tests, and one that says something else to each prompt."""
    import torch
    from conftest import _config, byte_tokenizer
    from test_two_hop import talking_model
    from transformers import AutoModelForCausalLM

    import lab

    found: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in found:
            if name == "talking":
                talking_model(folder / name)
            else:
                torch.manual_seed(0)
                hf = AutoModelForCausalLM.from_config(_config(name))
                with torch.no_grad():
                    for parameter in hf.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                hf.save_pretrained(folder / name)
                byte_tokenizer(start_token=name.startswith("gemma")).save_pretrained(folder / name)
            found[name] = lab.load(folder / name, device="cpu")
        return found[name]

    return make


def tables(found: Any) -> Iterator[tuple[str, pd.DataFrame]]:
    """All tables of what an experiment gives, by name."""
    if isinstance(found, pd.DataFrame):
        yield "table", found
        return
    for name, value in {**vars(found), **getattr(found, "tables", {})}.items():
        if isinstance(value, pd.DataFrame):
            yield name, value.drop(columns="seconds", errors="ignore")  # another in each run


# --- record and compare ---------------------------------------------------------------------------------------------


def record(folder: Path, *, notebooks: bool, only: str = "") -> None:
    """Tables as csv (floats to the last digit) and figures as png, a folder an experiment."""
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("MPLBACKEND", "agg")
        for name, call in experiments(models(Path(scratch))).items():
            if not re.search(only, name):
                continue
            found, place = call(), folder / name
            place.mkdir(parents=True, exist_ok=True)
            for table, frame in tables(found):
                frame.to_csv(place / f"{table}.csv")
            if not isinstance(found, pd.DataFrame) and name not in NO_FIGURE:
                found.plot().savefig(place / "figure.png", metadata={"Software": None})
                plt.close("all")
            print(name, flush=True)
    if notebooks:
        command = [sys.executable, "-m", "lab", "run", "--quick", "--out", str(folder / "notebooks")]
        subprocess.run(command, cwd=HERE.parent, check=True)


NO_FIGURE = ("depth_scores", "maps")


def compare(old: Path, new: Path) -> int:
    """What differs between two records; the number of files that do."""
    names = sorted({str(path.relative_to(root)) for root in (old, new) for path in root.rglob("*") if path.is_file()})
    names = [name for name in names if re.search(r"\.(csv|png)$", name)]
    differ = 0
    for name in names:
        if not (old / name).exists() or not (new / name).exists():
            differ += 1
            print(f"{name}: only in {old if (old / name).exists() else new}")
        elif (old / name).read_bytes() != (new / name).read_bytes():
            differ += 1
            print(f"{name}: {_apart(old / name, new / name)}")
    print(f"{len(names) - differ} of {len(names)} files are equal to the last bit.")
    return differ


def _apart(old: Path, new: Path) -> str:
    if old.suffix == ".png":
        return "another picture"
    a, b = pd.read_csv(old), pd.read_csv(new)
    if list(a) != list(b) or len(a) != len(b):
        return f"columns {list(a)} and {list(b)}, {len(a)} and {len(b)} rows"
    worst = {}
    for column in a:
        if a[column].dtype.kind in "if" and b[column].dtype.kind in "if":
            gap = (a[column] - b[column]).abs().max() / max(a[column].abs().max(), 1e-30)
            worst[column] = float(gap) if a[column].isna().equals(b[column].isna()) else float("inf")
        else:
            worst[column] = float((a[column].astype(str) != b[column].astype(str)).mean())
    return ", ".join(f"{column} {gap:.1e}" for column, gap in worst.items() if gap)


# --- the part that holds on any machine -----------------------------------------------------------------------------


def summary(found: Any) -> dict[str, dict[str, Any]]:
    """For each table its rows, and for each column what does not depend on the last digits."""
    return {name: {"rows": len(frame), **{str(column): _column(frame[column]) for column in frame}}
            for name, frame in tables(found)}  # fmt: skip


def _column(values: pd.Series) -> list[Any]:
    if pd.api.types.is_numeric_dtype(values) and values.dtype != bool:
        numbers = values.astype(float)
        finite = numbers[np.isfinite(numbers)]
        return [int(numbers.isna().sum()), *(float(f"{value:.6g}") for value in
                (finite.mean(), finite.std(ddof=0), finite.min(), finite.max()) if len(finite))]  # fmt: skip
    text = "\n".join(map(str, values.tolist()))
    return [hashlib.sha256(text.encode()).hexdigest()[:12]]


def main() -> int:
    sys.path[:0] = [str(HERE), *map(str, HERE.glob("*/"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record")
    command.add_argument("folder", type=Path)
    command.add_argument("--notebooks", action="store_true")
    command.add_argument("--only", default="", help="experiments whose name has this pattern")
    command = commands.add_parser("compare")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    commands.add_parser("numbers")
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, notebooks=options.notebooks, only=options.only)
        return 0
    if options.command == "compare":
        return int(compare(options.old, options.new) > 0)
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: summary(call()) for name, call in experiments(models(Path(scratch))).items()}
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
