"""JupyterLab as `python -m lab open` uses it: one server a folder, with this Python, and without questions about news."""

import json
import os
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import quote

COMMAND = [sys.executable, "-m", "jupyterlab"]
# What JupyterLab takes where the user has set nothing: else it asks, on top of the notebook, whether to fetch news.
DEFAULTS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}


def start_or_show(folder: Path, notebook: Path, arguments: list[str]) -> int:
    """Open a notebook in the JupyterLab that runs on a folder, or start one and wait for it; returns an exit status."""
    path = notebook.relative_to(folder).as_posix()
    if server := running(folder):
        page = f"{server['url']}lab/tree/{quote(path)}"
        page += f"?token={server['token']}" if server["token"] else ""
        print(f"JupyterLab already runs on {folder}: {page}")
        if unused := [argument for argument in arguments if argument != "--no-browser"]:
            print(f"Not used: {' '.join(unused)}. To start another, stop that one first (its menu: File, Shut Down).")
        if "--no-browser" not in arguments:
            webbrowser.open(page)
        return 0
    print(f"Opening {folder} in JupyterLab. Stop it with Ctrl-C in this window.", flush=True)
    with tempfile.TemporaryDirectory(prefix="depth-lab-") as settings:
        (Path(settings) / "labconfig").mkdir()
        (Path(settings) / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(DEFAULTS))
        paths = [*filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")]), settings]
        ours = {"JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}
        ours["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel registered elsewhere may run another Python
        command = [*COMMAND, path, *arguments]
        server_process = subprocess.Popen(command, cwd=folder, env={**os.environ, **ours})
        while True:
            try:
                return server_process.wait()
            except KeyboardInterrupt:  # JupyterLab got it too, and asks or stops by itself
                continue


def running(folder: Path) -> dict[str, Any] | None:
    """What Jupyter notes about a server that `start_or_show`, with this Python, started on this folder and that still runs."""
    import psutil  # type: ignore[import-untyped] # ipykernel needs it
    from jupyter_server.serverapp import list_running_servers

    for server in list_running_servers():
        try:
            command = psutil.Process(server["pid"]).cmdline()
        except psutil.Error:  # it ended just now, or is somebody else's
            continue
        if command[: len(COMMAND)] == COMMAND and Path(server["root_dir"]).resolve() == folder.resolve():
            return server
    return None
