"""Applications: one explorer on a page of its own, in large type and without code, served on this machine by Voila."""

import difflib
import importlib.util
import json
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lab.cache import cache_folder

if TYPE_CHECKING:
    from nbformat import NotebookNode

MODEL = "smollm2-135m"
PORTS = range(8866, 8916)
# Of JupyterLab's extensions those that draw widgets; others have nothing to do on the page.
EXTENSIONS = ("anywidget", "@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8")


class App(NamedTuple):
    """What stands over an explorer, what to do there, and how it is called, with its module of `lab.lessons` in front."""

    title: str
    todo: str
    call: str


APPS = {
    "watch": App("Watch a model think", "Type a sentence and click a cell: which words would the model say if it stopped "
                 "there?", "watch.watch(model)"),
    "read": App("Where can it be read?", "Type statements and click a depth: what does a probe there make of them, and "
                "what is it sure of and wrong about?", "read.read(model, {})"),
    "patch": App("Send a state back", "Type a query and click a pair of layers: a later state goes back to an earlier "
                 "layer. Does the answer come?", "patch.patch(model)"),
    "layers": App("Keep Madrid", "Click layers away: how many can go while the model still says Madrid?",
                  "layers.layers(model)"),
    "spend": App("Spend the bits", "Drag the budget and choose a rule: which blocks keep their bits, and what does the model "
                 "still say?", "spend.spend(model)"),
    "transfer": App("Layers from another task", "Choose the digits of task B and click a layer: are another task's first "
                    "layers worth more than random ones?", "carry.carry()"),
}  # fmt: skip
# Voila's own page fetches an icon font from elsewhere, so its block is written anew without it.
PAGE = """{% extends "voila/templates/lab/index.html.j2" %}
{% import "spinner.macro.html.j2" as spinner %}
{% block notebook_css %}
{{ resources.include_js("static/voila-style.js") }}
{{ spinner.css() }}
{{ super.super() }}
<style>
  #rendered_cells { --jp-widgets-font-size: 16px; --jp-content-font-size1: 18px; --jp-widgets-inline-height: 34px; }
  #rendered_cells { max-width: 1200px; margin: 0 auto; padding: 0 20px 40px; }
  #rendered_cells h1 { font-size: 30px; margin: 0; } #rendered_cells p { margin: 8px 0; }
  body, #main { background: white !important; }
  .jupyter-widgets img { max-height: 92vh; width: auto !important; max-width: 100%; }
  .widget-box > .widget-vbox:last-child { position: sticky; top: 8px; }
  .jp-InputPrompt, .jp-OutputPrompt, .jp-mod-noOutputs.jp-mod-noInput { display: none !important; }
  .widget-box.widget-hbox { flex-wrap: wrap; }
  #loading_text { font-size: 0; } #loading_text::after { content: "One moment ..."; font-size: 24px; }
</style>
{% endblock %}
"""


def listed() -> str:
    """The applications, one a line."""
    return "\n".join(f"{name:10}{app.todo}" for name, app in APPS.items())


def notebook_of(app: App) -> "NotebookNode":
    """Title, one sentence, and a cell that loads what the explorer needs and shows it."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    load = f"    model = lab.load({MODEL!r})\n" if "model" in app.call else ""
    code = (
        f"import lab\nfrom lab.lessons import {app.call.partition('.')[0]}\nfrom IPython.utils.io import capture_output\n"
        "from transformers.utils import logging\n\nlogging.disable_progress_bar()\n"
        f"with capture_output(display=False):  # other progress bars\n{load}    explorer = {app.call}\nexplorer"
    )
    about = {"title": app.title, "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[new_markdown_cell(f"# {app.title}\n\n{app.todo}"), new_code_cell(code)], metadata=about)


def serve(name: str, *, port: int | None = None, browser: bool = True) -> int:
    """Serve an application on 127.0.0.1 until it is stopped; returns an exit status.

    Raises:
        ValueError: there is no such application, Voila is not installed, or the port cannot be had.
    """
    if name not in APPS:
        near = difflib.get_close_matches(name, APPS, n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise ValueError(f"no application {name!r}; {hint} {', '.join(APPS)}")
    if importlib.util.find_spec("voila") is None:
        raise ValueError('an application needs Voila, which is not installed: run `python -m pip install -e ".[apps]"` in '
                         "the kit's folder, or `python -m pip install voila`")  # fmt: skip
    port = _free(PORTS if port is None else [port])
    if "model" in APPS[name].call and not any((cache_folder() / "models").glob(f"{MODEL}-*/lab.json")):
        from lab.catalogue import CATALOGUE, prepare  # the first time it is fetched here, where one sees how far it is

        prepare(CATALOGUE[MODEL])
    import nbformat
    from voila.app import Voila

    with tempfile.TemporaryDirectory(prefix="depth-lab-") as made:
        notebook, template = Path(made) / f"{name}.ipynb", Path(made) / "voila" / "templates" / "depth-lab"
        nbformat.write(notebook_of(APPS[name]), notebook)
        template.mkdir(parents=True)
        (template / "conf.json").write_text(json.dumps({"base_template": "lab"}))
        (template / "index.html.j2").write_text(PAGE)
        os.environ["JUPYTER_PATH"] = os.pathsep.join([made, *filter(None, [os.environ.get("JUPYTER_PATH")])])
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel registered elsewhere may run another Python
        print(f"“{APPS[name].title}” at http://127.0.0.1:{port}/ (stop it with Ctrl-C)", flush=True)
        options = ["--template=depth-lab", "--Voila.ip=127.0.0.1", f"--port={port}", "--Voila.port_retries=0",
                   "--Voila.log_level=ERROR", "--KernelManager.transport_encryption=auto",
                   *(f"--VoilaConfiguration.extension_allowlist={one}" for one in EXTENSIONS)]  # fmt: skip
        Voila.launch_instance([str(notebook), *options, *([] if browser else ["--no-browser"])])
    return 0


def _free(ports: Iterable[int]) -> int:
    """The first of some ports that nobody uses."""
    tried = list(ports)
    for port in tried:
        if not 1 <= port <= 65535:
            raise ValueError(f"port {port}: give a number from 1 to 65535")
        with socket.socket() as test:
            if test.connect_ex(("127.0.0.1", port)):
                return port
    raise ValueError(f"port {tried[0]} is in use: stop what uses it, or choose another with --port")
