"""How large the kit is, and what it may grow to: fails where a budget is passed.

python tests/lab_size.py [--all]     # --all: every file
"""

import ast
import sys
from pathlib import Path

LAB = Path(__file__).resolve().parents[1] / "lab"
CORE = "models texts states interventions runs lenses probes statistics results checks".split()
BUDGET = {
    "core": 3180,
    "longest file": 575,
    "longest function": 105,
    "deepest nesting": 5,
    "all": 25300,
    "lessons": 3300,
}
NESTS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)


def nesting(node: ast.AST, level: int = 0) -> int:
    return max([level, *(nesting(child, level + isinstance(child, NESTS)) for child in ast.iter_child_nodes(node))])


def measure(path: Path) -> dict[str, int]:
    """Lines of a file, of its docstrings, of its longest function, and how deep a function nests."""
    text = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    texts = [node.body[0] for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
             and ast.get_docstring(node)]  # fmt: skip
    return {
        "lines": text.count("\n"),
        "docstrings": sum((one.end_lineno or 0) - one.lineno + 1 for one in texts),
        "function": max((1 + (one.end_lineno or 0) - one.lineno for one in functions), default=0),
        "nesting": max(map(nesting, functions), default=0),
    }


def sizes() -> dict[str, int]:
    """What the budgets are about."""
    found = {path: measure(path) for path in LAB.rglob("*.py")}
    return {
        "files": len(found),
        "all": sum(one["lines"] for path, one in found.items() if path.parent.name != "lessons"),
        "lessons": sum(one["lines"] for path, one in found.items() if path.parent.name == "lessons"),
        "docstrings": sum(one["docstrings"] for one in found.values()),
        "core": sum(found[LAB / f"{name}.py"]["lines"] for name in CORE),
        "longest file": max(one["lines"] for one in found.values()),
        "longest function": max(one["function"] for one in found.values()),
        "deepest nesting": max(one["nesting"] for one in found.values()),
    }


def main() -> int:
    if "--all" in sys.argv:
        for path in sorted(LAB.rglob("*.py"), key=lambda path: -measure(path)["lines"]):
            print(f"{path.relative_to(LAB)!s:40}", *(f"{name} {value:4}" for name, value in measure(path).items()))
    over = 0
    for name, value in sizes().items():
        allowed = BUDGET.get(name)
        over += allowed is not None and value > allowed
        print(f"{name:18}{value:7}" + (f"  of at most {allowed}" if allowed else ""))
    return int(over > 0)


if __name__ == "__main__":
    raise SystemExit(main())
