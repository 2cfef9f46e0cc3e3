"""How long the lessons are: words, figures, exercises, hooks. Fails where a lesson outgrows what a class has time for.

python tests/lessons/lesson_size.py
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import jupytext

LESSONS = sorted((Path(__file__).resolve().parents[2] / "notebooks" / "lessons").glob("*.py"))
ENGINE = r"\b(collect_states|sweep|skip|rewritten|quantized|replicas|probe_depths|fit_batched)\(|\.run\("
MOST = {"words": 700, "figures": 6, "exercises": 6, "lines a piece": 15}


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def prose(cells: list[Any]) -> str:
    """What is read in class: without notes for instructors, what is folded, code in fences, formulas and addresses."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown" and "instructor" not in tags(cell))
    for left_out in (r"<details>.*?</details>", r"```.*?```", r"\]\([^)]*\)", r"\$[^$]*\$", r"[|#*`\[\]]"):
        text = re.sub(left_out, " ", text, flags=re.DOTALL)
    return text


def measure(path: Path) -> dict[str, Any]:
    """What stands in a lesson."""
    cells = jupytext.read(path).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    source = "\n".join(cell.source for cell in code)
    asked = [cell.source for cell in cells if re.search(r"^### Exercise \d", cell.source, re.MULTILINE)]
    solved = [re.search(r"```python\n(.*?)```", cell.source, re.DOTALL) for cell in cells if "solution" in tags(cell)]
    written = [
        cell.source for cell in cells if cell.cell_type == "code" or "solution" in tags(cell)
    ]  # by the participant, too
    hooks = [i for i, text in enumerate(written) if "fwd_hooks" in text]
    engine = [i for i, text in enumerate(written) if re.search(ENGINE, text)]
    return {
        "words": len(re.findall(r"\w[\w'’-]*", prose(cells))),
        "figures": len(re.findall(r"\.then\(|^figure = ", source, re.MULTILINE)),
        "predictions": sum("prediction" in tags(cell) for cell in code),
        "exercises": len(asked),
        "of code": sum(bool(re.search(r"minutes?, code", text)) for text in asked),
        "hook cells": len(hooks),
        "hook first": bool(hooks) and (not engine or hooks[0] < engine[0]),
        "lines a piece": max(len(found[1].strip().splitlines()) for found in solved if found),
    }


def faults(path: Path) -> list[str]:
    """What is against the rules in a lesson."""
    found, cells = measure(path), jupytext.read(path).cells
    wrong = [f"{found[name]} {name}, at most {most}" for name, most in MOST.items() if found[name] > most]
    wrong += [] if found["exercises"] >= 4 else ["fewer than 4 exercises"]
    wrong += [] if 2 * found["of code"] >= found["exercises"] else ["fewer than half of the exercises are code"]
    wrong += [] if found["hook first"] else ["no hook of the participant's before the engine"]
    wrong += [] if found["predictions"] else ["no prediction"]
    marks = [[mark for mark in ("exercise", "hint", "check", "solution") if mark in tags(cell)] for cell in cells]
    order = [mark for one in marks for mark in one]
    for mark in ("exercise", "check", "solution"):
        if order.count(mark) != found["exercises"]:
            wrong.append(f"{order.count(mark)} cells tagged {mark} for {found['exercises']} exercises")
    for name in ("hint", "solution"):
        wrong += [
            f"a {name} that is not folded" for cell in cells if name in tags(cell) and "<details>" not in cell.source
        ]
    for part in (
        "**Question**",
        "**Time**",
        "**You will be able to**",
        "**You need**",
        "**Key points**",
        "**Exit question.**",
    ):
        wrong += [] if any(part in cell.source for cell in cells) else [f"no {part}"]
    for cell in cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
    return wrong


def main() -> int:
    rows = {path.stem: measure(path) for path in LESSONS}
    for name, found in rows.items():
        print(f"{name:26}", ", ".join(f"{value} {key}" for key, value in found.items()))
        for fault in faults(next(path for path in LESSONS if path.stem == name)):
            print("   !", fault)
    return sum(len(faults(path)) for path in LESSONS)


if __name__ == "__main__":
    sys.exit(main())
