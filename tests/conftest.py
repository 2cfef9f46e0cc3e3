"""Shared models. The annotated shapes of `lab` are checked at run time in every test (jaxtyping and beartype)."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in `python -m lab`; before anything imports torch
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the other core is the other worker's; also for the notebooks that are started
install_import_hook("lab", "beartype.beartype")  # before anything imports lab

import functools  # noqa: E402
import linecache  # noqa: E402
import re  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jaxtyping  # noqa: E402
import jupytext  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

import lab  # noqa: E402

pytest_plugins = ["served_pages"]  # fixtures of tests/browser; a second conftest would take the name of this one
FAMILIES = ("llama", "gpt2", "neox", "qwen3", "gemma2", "gemma3", "olmo2")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random model of a family in Hugging Face format: four blocks, width 32, one token a byte."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / family
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(family))
        with torch.no_grad():  # at their initial size the blocks add next to nothing, and all norms are alike
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        byte_tokenizer(start_token=family.startswith("gemma")).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[[str], TransformerBridge]:
    """A model of a family through `lab.load`, loaded once: a test that changes its weights must load its own."""
    return functools.cache(lambda family: lab.load(tiny_folder(family), device="cpu"))


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    """The real offline model; its first use downloads and converts it."""
    return lab.load("smollm2-135m", device="cpu")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the ids of each forward pass of any model, noted where embeddings are looked up: a hook that counts would
    make a model one that no cache can vouch for."""
    shapes: list[tuple[int, ...]] = []
    embedding = torch.embedding

    def counted(weight: torch.Tensor, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return embedding(weight, ids, *args)

    monkeypatch.setattr(torch, "embedding", counted)
    return shapes


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as a user makes them: the suite's own shape checks would speak before the messages under test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- figures: what a column of a notebook and a projector show --------------------------------------------------------

DRAWN: list[Figure] = []


def drawn(figure: Figure) -> None:
    """Notes a figure when it is made: an explorer closes its own as soon as they are pictures."""
    DRAWN.append(figure)


@pytest.fixture(autouse=True)
def figures_are_legible() -> Iterator[None]:
    """Whatever a test draws, through whatever function, keeps the rules for figures."""
    DRAWN.clear()
    plt.rcParams["figure.hooks"] = ["conftest:drawn"]
    yield
    plt.rcParams["figure.hooks"] = []
    assert not [fault for figure in DRAWN for fault in faults(figure)]


def faults(figure: Figure) -> Iterator[str]:
    """What makes a figure too wide or too small to read; words in a panel, as in the cells of a heat map, may be smaller."""
    if figure.get_figwidth() > 9:
        yield f"{figure.get_figwidth():g} inches wide, of at most 9: see lab.figures.panels"
    placed = [place for ax in figure.axes if ax.axison and (place := ax.get_subplotspec())]
    columns = Counter(grid for grid, _ in {(place.get_gridspec(), place.colspan.start) for place in placed})
    if max(columns.values(), default=0) > 2:
        yield f"{max(columns.values())} panels side by side, of at most 2"
    inside = {text for ax in figure.axes for text in ax.texts}
    small = [text for text in figure.findobj(Text) if text.get_text() and text.get_fontsize() < 9]
    yield from (f"{text.get_text()!r} in letters of less than 9 points" for text in small if text not in inside)


class _FilesAndNotebooks(LoadScopeScheduling):
    """What stays in one process: the tests of a file, which share fixtures; of the notebooks, those of one notebook."""

    def _split_scope(self, nodeid: str) -> str:
        notebook = re.search(r"test_notebooks\.py::.*\[(\d\d_\w+)\]", nodeid)
        return notebook[1] if notebook else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _FilesAndNotebooks(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")  # the longest first
    if not os.environ.get("LAB_TEST_GEMMA"):
        skip = pytest.mark.skip(reason="set LAB_TEST_GEMMA=1 if you have accepted the Gemma terms")
        for item in items:
            if "gemma3_270m" in item.name:
                item.add_marker(skip)


def byte_tokenizer(*, start_token: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start_token:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _config(family: str) -> PreTrainedConfig:
    special = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return GPT2Config(**special, n_embd=32, n_layer=4, n_head=4, n_positions=128)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    shared = {**special, **size, "max_position_embeddings": 128}
    if family == "neox":
        return GPTNeoXConfig(**shared)
    shared["num_key_value_heads"] = 2
    if family in ("llama", "olmo2"):
        return {"llama": LlamaConfig, "olmo2": Olmo2Config}[family](**shared)
    shared["head_dim"] = 8
    if family == "qwen3":
        return Qwen3Config(**shared)
    return {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}[family](**shared, sliding_window=16)


FORMS = {  # what stands between unembedding and logits in each family; a negative scale turns the order round
    "gemma2": [{"final_logit_softcapping": 0.5}, {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}],
    "granite": [{"logits_scaling": 8.0}, {"logits_scaling": -2.0}],
    "cohere": [{"logit_scale": 0.0625}, {"logit_scale": -0.5}],
    "gemma3": [{"final_logit_softcapping": 2.0}],
}


@pytest.fixture(params=[(family, form) for family, forms in FORMS.items() for form in forms], ids=str)
def formed(request, tmp_path):
    """A model of a family that caps or scales its logits, from a folder."""
    family, form = request.param
    size = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "granite": GraniteConfig, "cohere": CohereConfig}[
        family
    ]
    heads = {"head_dim": 8, "sliding_window": 16} if family.startswith("gemma") else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**size, **heads, **form))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    byte_tokenizer(start_token=False).save_pretrained(tmp_path)
    return lab.load(tmp_path, device="cpu")


# --- the lessons: solutions as they stand in their folded cells --------------------------------------------------------

LESSONS = Path(__file__).resolve().parents[1] / "notebooks" / "lessons"


@pytest.fixture(scope="session")
def solution() -> Callable[..., Any]:
    """`solution(lesson, name, **globals)`: what the folded solution of the exercise `name` defines, as the participant would."""

    def found(lesson: str, name: str, **given: Any) -> Any:
        path = next(LESSONS.glob(f"{lesson}*.py"))
        for cell in jupytext.read(path).cells:
            if "solution" not in cell.metadata.get("tags", []):
                continue
            if code := re.search(r"```python\n(.*?)```", cell.source, re.DOTALL):
                if re.search(rf"^(def {name}\b|{name} *=)", code[1], re.MULTILINE):
                    return written(code[1], **given)[name]
            elif said := re.search(rf"`{name} = (.*?)`", cell.source):
                return eval(said[1], dict(given))
        raise KeyError(f"{path.name} has no solution of {name}")

    return found


def written(code: str, **given: Any) -> dict[str, Any]:
    """Names that a cell defines; its source can be looked up, as in a notebook."""
    file = f"<ipython-cell-{abs(hash(code))}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    names: dict[str, Any] = dict(given)
    exec(compile(code, file, "exec"), names)
    return names
