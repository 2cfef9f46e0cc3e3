"""The two ends of the versions that pyproject.toml allows, each in a virtual environment of its own (minutes, some GB).

python tests/versions.py FOLDER              # makes FOLDER/lowest and FOLDER/highest, and runs the core's tests in both
python tests/versions.py FOLDER --only lowest
"""

import argparse
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDS = {
    "lowest": ("torch==2.6.0", "transformers==5.9.0"),
    "highest": ("torch==2.15.0", "transformers==5.24.0"),
}
TESTS = ["tests/core/test_checks.py", "tests/core/test_runs.py", "tests/core/test_states.py",
         "tests/core/test_interventions.py", "tests/core/test_lenses.py", "tests/core/test_identity.py"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=ENDS)
    options = parser.parse_args()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    print(*(line for line in declared if line.startswith(("torch", "transformers"))), sep="\n")
    failed = []
    for end in [options.only] if options.only else ENDS:
        place = options.folder / end
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.exists():
            venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ENDS[end], "-e", f"{ROOT}[test]"], check=True)
        print(f"{end}: {', '.join(ENDS[end])}", flush=True)
        ours = {"LAB_CACHE": str(place / "cache")}  # the offline model is converted at each end, too
        if subprocess.run([python, "-m", "pytest", "-q", *TESTS], cwd=ROOT, env=os.environ | ours).returncode:
            failed.append(end)
    print("both ends work" if not failed and not options.only else f"failed: {failed or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
