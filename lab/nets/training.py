"""What the small models share: Llama-shaped, a token a word, trained in minutes on one CPU core and kept in the cache folder.

They are written in Hugging Face format, so that `lab.load(folder)` reads them like any other model. A model is trained
once: the name of its folder is a hash of its parameters, its text, the versions of torch and transformers, and `RECIPE`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import require
from lab.cache import cache_folder, made_once

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
RECIPE = 1  # a change of training that changes weights raises it, so that no old model is taken for a new one
SPLITTER = pre_tokenizers.Whitespace()  # at white space, and between letters and punctuation


def width(d_model: int) -> int:
    """A multiple of 16, as a head is 16 wide."""
    if (d_model := require.whole("d_model", d_model, 16)) % 16:
        raise ValueError(f"d_model={d_model}: pass a multiple of 16, such as 64 (a head is 16 wide)")
    return d_model


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, a start token in front of every text."""
    known = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocab=known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = SPLITTER
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", known["<s>"])])
    special = {f"{role}_token": text for role, text in zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def made(kind: str, parameters: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, made by `make(folder)` when it is not there, and what `lab.json` in it says."""
    made_by = [RECIPE, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([kind, parameters, made_by], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / "small_models" / f"{kind}-{key}"

    def make_and_tell(partial: Path) -> None:
        start = time.perf_counter()
        found = make(partial)
        about = {"name": folder.name, "parameters": parameters, "seconds": time.perf_counter() - start}
        about["bytes"] = (partial / "model.safetensors").stat().st_size
        (partial / "lab.json").write_text(json.dumps({**about, **found}, indent=1))

    made_once(folder, f"training {folder.name}", make_and_tell)
    return folder, json.loads((folder / "lab.json").read_text())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """In Hugging Face format."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Run:
    """One training: its model and optimizer, seeded, and the bar. `step` follows the loss down a little."""

    def __init__(self, n_tokens: int, parameters: dict[str, Any], context: int, bar: tqdm) -> None:
        heads, width = parameters["d_model"] // 16, parameters["d_model"]
        config = LlamaConfig(
            vocab_size=n_tokens,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=parameters["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            **{f"{role}_token_id": i for i, role in enumerate(("pad", "bos", "eos"))},
        )
        self.model, self.rate, self.bar = LlamaForCausalLM(config).train(), parameters["learning_rate"], bar
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(self, loss: torch.Tensor, step: int, end: int, tail: int, /, **shown: Any) -> None:
        """The learning rate goes up over 50 steps, stays, then falls in a line to 0 over the last `tail` steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (step + 1) / 50, (end - step) / max(tail, 1))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.bar.update()
        self.bar.set_postfix(**shown, refresh=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, sums are always in the same order, so that a training repeats; afterwards all is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def run(n_tokens: int, parameters: dict[str, Any], total: int, *, context: int, progress: bool) -> Iterator[Run]:
    """A training that repeats: one thread, seeded."""
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(parameters["seed"])
        with tqdm(total=total, desc="Training (at most)", unit="step", disable=not progress, leave=False) as bar:
            yield Run(n_tokens, parameters, context, bar)
