"""How fast are states collected, and in how much memory? Prints a table; it is no test (timings need a quiet machine).

    python tests/benchmarks/benchmark_states.py [--data FILE.csv --column statement] [--n 1496] [--model smollm2-135m]

Speed, in real tokens a second (padding is not counted), medians of alternating repeats in this process:

(a) bare: the Hugging Face base model without unembedding and without hooks, eager attention, on the same batches;
(b) `collect_states`, every depth of `resid`, and with `mlp_in` as well;
(c) one text at a time through `run_with_cache` as TransformerLens has it by default (every activation), on 60 texts.

Memory: fresh processes collect n and 4n texts; the growth of the peak beyond what one batch and the result take must not
depend on the number of texts.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import lab
from lab.models import plain_twin
from lab.states import _batches, collect_states
from lab.texts import tokenize


def bare(plain: torch.nn.Module, tokens, batch_tokens: int) -> None:
    with torch.inference_mode():
        for batch in _batches(tokens.lengths, np.arange(len(tokens.texts)), batch_tokens):
            rows, width = torch.as_tensor(batch), int(tokens.lengths[batch].max())
            mask = tokens.mask[rows, :width].long()
            plain.base_model(input_ids=tokens.ids[rows, :width], attention_mask=mask, use_cache=False)


def one_at_a_time(model, texts: list[str]) -> None:
    with torch.inference_mode():
        for text in texts:
            model.run_with_cache(tokenize(model, [text]).ids)


def speed(arguments: argparse.Namespace, texts: list[str]) -> None:
    model = lab.load(arguments.model, device="cpu")
    plain, tokens = plain_twin(model), tokenize(model, texts)
    sdpa = plain_twin(model)
    sdpa.set_attn_implementation("sdpa")
    few = texts[:: max(1, len(texts) // 60)][:60]
    some, every = int(tokenize(model, few).lengths.sum()), int(tokens.lengths.sum())
    size = arguments.batch_tokens
    runs = {
        "bare Hugging Face, eager": (every, lambda: bare(plain, tokens, size)),
        "bare Hugging Face, sdpa": (every, lambda: bare(sdpa, tokens, size)),
        "collect_states, resid": (every, lambda: collect_states(model, texts, batch_tokens=size, progress=False)),
        "collect_states, resid and mlp_in": (
            every,
            lambda: collect_states(model, texts, sites=["resid", "mlp_in"], batch_tokens=size, progress=False),
        ),
        "run_with_cache, one at a time": (some, lambda: one_at_a_time(model, few)),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, (count, call) in runs.items():
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            print(f"  round {repeat} of {arguments.repeats}: {name}, {took:.1f} s", flush=True)
            if repeat:  # the first round warms up
                rates[name].append(count / took)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"{arguments.model}, {len(texts)} texts, {every} tokens, batches of {size} tokens, {torch.get_num_threads()} threads"
    )
    for name, values in rates.items():
        print(f"  {name:34} {rate[name]:8.0f} tokens/s  (from {min(values):.0f} to {max(values):.0f})")
    ours, slow = rate["collect_states, resid"], rate["run_with_cache, one at a time"]
    print(f"  collect_states / bare eager: {ours / rate['bare Hugging Face, eager']:.2f} (target 0.9)")
    print(
        f"  with mlp_in   / bare eager: {rate['collect_states, resid and mlp_in'] / rate['bare Hugging Face, eager']:.2f}"
    )
    print(f"  collect_states / bare sdpa: {ours / rate['bare Hugging Face, sdpa']:.2f}")
    print(f"  collect_states / run_with_cache: {ours / slow:.1f} (target 15)")


def resident(kind: str) -> int:
    """Resident memory of this process in bytes: now (`VmRSS`), or the peak since it was last reset (`VmHWM`)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])


def memory_child(arguments: argparse.Namespace, texts: list[str]) -> None:
    """Growth of the peak beyond the result, in bytes, once the weights are in memory and the first batches went through.

    The peak is reset first: loading a model takes more than running it.
    """
    model = lab.load(arguments.model, device="cpu")
    collect_states(model, sorted(texts, key=len)[-150:], batch_tokens=arguments.batch_tokens, progress=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    values = collect_states(model, texts, batch_tokens=arguments.batch_tokens, progress=False)["resid"].values
    print(resident("VmHWM") - before - values.nbytes, values.nbytes)


def memory(arguments: argparse.Namespace) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("peak memory is measured on Linux only")
        return
    print("peak memory beyond the result, fresh processes")
    found = []
    for times in (1, 4):
        command = [sys.executable, __file__, "--memory-child", "--n", str(times * arguments.memory_n)]
        command += ["--model", arguments.model, "--data", str(arguments.data), "--column", arguments.column]
        command += ["--batch-tokens", str(arguments.batch_tokens)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        beyond, result = map(int, said.split()[-2:])
        found.append(beyond)
        print(
            f"  {times * arguments.memory_n:6} texts: result {result / 1e6:7.1f} MB, beyond it {beyond / 1e6:7.1f} MB"
        )
    print(f"  growth from {arguments.memory_n} to {4 * arguments.memory_n} texts: {(found[1] - found[0]) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "data" / "cities.csv")
    parser.add_argument("--column", default="text")
    parser.add_argument("--n", type=int, default=1496)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the one that warms up")
    parser.add_argument("--memory-n", type=int, default=400)
    parser.add_argument("--only-memory", action="store_true")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    column = list(pd.read_csv(arguments.data)[arguments.column].astype(str))
    texts = (column * (arguments.n // len(column) + 1))[: arguments.n]  # a short file is read several times
    if arguments.memory_child:
        memory_child(arguments, texts)
        return
    if not arguments.only_memory:
        speed(arguments, texts)
    memory(arguments)


if __name__ == "__main__":
    main()
