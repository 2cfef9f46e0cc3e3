"""How much faster than the published path is a back-patch of all pairs, with the same successes? No test: it takes long.

    python tests/benchmarks/benchmark_back_patching.py [--model smollm2-135m] [--queries 20] [--cells 24] [--positions t1 t2]
                                            [--full-matrix] [--scaling]

Set OMP_NUM_THREADS=1 for one thread. In one run, on the same queries (the first of the sets correct and incorrect):

(a) published: an untouched Hugging Face model, a forward hook on a decoder layer, a `generate` of ten tokens for each of
    the L x L pairs (also those whose source is not after its target); the states are taken once;
(b) hooks: the same through the Bridge, `lab.interventions.patch` and ten tokens with keys and values, L(L-1)/2 pairs;
(c) ours: all L(L-1)/2 pairs by `lab.runs`, as `patching.run` does it: rule "leading" (tries that are decided are
    not decoded on) and rule "word" (every try is decoded to its end);
(d) published, batched: (a) with up to 32 queries in one `generate`, padded on the left, as the published code can do it.

(a), (b), (d) are timed on a random sample of pairs and scaled to all of theirs: each pair costs them the same. Successes of
all ways must agree on every sampled pair; with --full-matrix on all pairs of each query.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import lab
from lab.back_patching import patching, two_hop
from lab.back_patching.answers import Answer
from lab.interventions import patch
from lab.models import CACHE, plain_twin
from lab.runs import clean_run
from lab.texts import tokenize

STEPS, TARGET = 10, 150
WAYS = ("published", "hooks", "batched", "leading", "word")


@dataclass(frozen=True)
class Query:
    """One prompt, what is looked for, and where it is patched."""

    prompt: str
    answer: Answer
    ids: torch.Tensor
    places: dict[str, int]


@dataclass
class Times:
    """Seconds a query for all pairs, and tokens decoded, for each way and position."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    tokens: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    compared: Counter = field(default_factory=Counter)

    def note(self, way: str, position: str, seconds: float, tokens: float) -> None:
        self.seconds.setdefault((way, position), []).append(seconds)
        self.tokens.setdefault((way, position), []).append(round(tokens))


# --- the published path -------------------------------------------------------------------------------------------------


def decoder_layers(plain: torch.nn.Module) -> torch.nn.ModuleList:
    base = plain.base_model
    return base.layers if hasattr(base, "layers") else base.h


def states_after(plain: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[layer position d_model]. By hooks: the last of Hugging Face's `hidden_states` is after the final norm."""
    kept: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda module, given, out: kept.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer in decoder_layers(plain)
    ]
    with torch.inference_mode():
        plain(ids[None])
    for handle in handles:
        handle.remove()
    return torch.stack(kept)


@contextmanager
def replaced(
    plain: torch.nn.Module, targets: Sequence[int], positions: Sequence[int], values: torch.Tensor
) -> Iterator[None]:
    """In the prompt's pass, put `values[row]` after layer `targets[row]` at `positions[row]`, for each row of the batch."""

    def write(layer: int) -> Callable:
        rows = [row for row, target in enumerate(targets) if target == layer]
        at = [positions[row] for row in rows]

        def hook(module: Any, given: Any, out: Any) -> Any:
            state = out[0] if isinstance(out, tuple) else out
            if state.shape[1] > 1:  # later passes hold the newest token only
                state[rows, at] = values[rows].to(state)

        return hook

    handles = [decoder_layers(plain)[layer].register_forward_hook(write(layer)) for layer in sorted(set(targets))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(plain: Any, tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[str], int]:
    with torch.inference_mode():
        out = plain.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = out[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts, new.numel()


def published(
    plain: Any, tokenizer: Any, query: Query, states: torch.Tensor, position: str, pair: tuple[int, int]
) -> tuple[str, int]:
    at, ids = query.places[position], query.ids[None]
    with replaced(plain, [pair[1]], [at], states[pair[0], at][None]):
        texts, tokens = generate(plain, tokenizer, ids, torch.ones_like(ids))
    return texts[0], tokens


def batched(
    plain: Any,
    tokenizer: Any,
    queries: Sequence[Query],
    states: Sequence[torch.Tensor],
    position: str,
    pair: tuple[int, int],
) -> tuple[list[str], int]:
    """One pair of layers for several queries."""
    width = max(len(query.ids) for query in queries)
    ids = torch.full((len(queries), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, query in enumerate(queries):
        ids[row, width - len(query.ids) :], mask[row, width - len(query.ids) :] = query.ids, 1
    at = [width - len(query.ids) + query.places[position] for query in queries]
    values = torch.stack([s[pair[0], query.places[position]] for s, query in zip(states, queries, strict=True)])
    with replaced(plain, [pair[1]] * len(queries), at, values):
        return generate(plain, tokenizer, ids, mask)


def whole_matrix(
    plain: Any, tokenizer: Any, query: Query, states: torch.Tensor, position: str, pairs: Sequence[tuple[int, int]]
) -> list[str]:
    """The published path for all pairs of a query: 32 pairs in one batch, each row hooked at its own layer. For checking."""
    at, texts = query.places[position], []
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        ids = query.ids[None].repeat(len(part), 1)
        values = states[[source for source, _ in part], at]
        with replaced(plain, [target for _, target in part], [at] * len(part), values):
            texts += generate(plain, tokenizer, ids, torch.ones_like(ids))[0]
    return texts


# --- through the Bridge ---------------------------------------------------------------------------------------------------


def hooks(model: Any, query: Query, states: torch.Tensor, position: str, pair: tuple[int, int]) -> tuple[str, int]:
    at, said = query.places[position], []
    with torch.inference_mode():
        with patch(model, "resid_post", layer=pair[1], value=states[pair[0], at], position=at):
            out = model.original_model(query.ids[None], use_cache=True)
        while True:
            said.append(int(out.logits[0, -1].argmax()))
            if len(said) == STEPS or said[-1] in end_tokens(model):
                break
            out = model.original_model(torch.tensor([said[-1:]]), **{CACHE: out[CACHE]}, use_cache=True)
    text = model.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text, len(said)


def end_tokens(model: Any) -> list[int]:
    end = model.original_model.generation_config.eos_token_id
    return end if isinstance(end, list) else [end]


def ours(model: Any, query: Query, position: str, rule: str) -> tuple[list[str], int, float]:
    """All pairs, as `patching.run` does it, from the clean run on."""
    begun = time.perf_counter()
    clean = clean_run(model, query.ids)
    pairs, at = patching.cells(clean.n_layers), query.places[position]
    values = clean.states[[source + 1 for source, _ in pairs], at][:, None]
    found = patching._tries(model, clean, [at], pairs, values, query.answer, (), rule, STEPS, True)
    return found.texts, sum(map(len, found.ids)), time.perf_counter() - begun


# --- measured side by side ------------------------------------------------------------------------------------------------


def agree(texts: dict[str, str], query: Query, where: str) -> None:
    """The same success in every way; `leading` stops early, so its text can be judged by its own rule only."""
    leads = {way: query.answer.leads(text) for way, text in texts.items()}
    words = {way: query.answer.word(text) for way, text in texts.items() if way != "leading"}
    assert len(set(leads.values())) == 1 and len(set(words.values())) == 1, f"{where}: {texts}"


def measure(
    model: Any,
    plain: Any,
    queries: Sequence[Query],
    positions: Sequence[str],
    n_cells: int,
    seed: int,
    *,
    say: bool = True,
) -> Times:
    times, rng, tokenizer = Times(), np.random.default_rng(seed), model.tokenizer
    n, pairs = model.cfg.n_layers, patching.cells(model.cfg.n_layers)
    index = {pair: i for i, pair in enumerate(pairs)}
    everywhere = [pairs[i] for i in rng.choice(len(pairs), min(n_cells, len(pairs)), replace=False)]  # for (d)
    for position in positions:  # warm up
        states = states_after(plain, queries[0].ids)
        published(plain, tokenizer, queries[0], states, position, pairs[0])
        hooks(model, queries[0], states, position, pairs[0])
        ours(model, queries[0], position, "leading")
    said: dict[tuple[str, str], list[list[str]]] = {}
    all_states = []
    for number, query in enumerate(queries):
        begun = time.perf_counter()
        states = states_after(plain, query.ids)
        once = time.perf_counter() - begun
        all_states.append(states)
        for position in positions:
            for rule in ("leading", "word"):
                texts, tokens, took = ours(model, query, position, rule)
                said.setdefault((rule, position), []).append(texts)
                times.note(rule, position, took, tokens)
            chosen = [pairs[i] for i in rng.choice(len(pairs), min(n_cells, len(pairs)), replace=False)]
            found: dict[str, list[tuple[str, int]]] = {}
            for way, number_of_pairs, call in (
                ("published", n * n, lambda pair: published(plain, tokenizer, query, states, position, pair)),  # noqa: B023
                ("hooks", len(pairs), lambda pair: hooks(model, query, states, position, pair)),  # noqa: B023
            ):
                begun = time.perf_counter()
                found[way] = [call(pair) for pair in chosen]
                scale = number_of_pairs / len(chosen)
                took = once + scale * (time.perf_counter() - begun)
                times.note(way, position, took, scale * sum(tokens for _, tokens in found[way]))
            for i, pair in enumerate(chosen):
                texts_of = {way: texts[i][0] for way, texts in found.items()}
                texts_of |= {rule: said[rule, position][-1][index[pair]] for rule in ("leading", "word")}
                agree(texts_of, query, f"query {number}, {position}, pair {pair}")
                times.compared["published, hooks and ours, both rules"] += 1
        if say:
            print(f"  query {number + 1} of {len(queries)}: {len(query.ids)} tokens, "
                  + ", ".join(f"{way} {position} {times.seconds[way, position][-1]:.1f} s"
                              for way in ("published", "leading") for position in positions), flush=True)  # fmt: skip
    for position in positions:
        for start in range(0, len(queries), 32):
            part, states = queries[start : start + 32], all_states[start : start + 32]
            begun = time.perf_counter()
            found_texts = [batched(plain, tokenizer, part, states, position, pair) for pair in everywhere]
            scale = n * n / len(everywhere) / len(part)
            took, tokens = time.perf_counter() - begun, sum(tokens for _, tokens in found_texts)
            for row, query in enumerate(part):
                times.note("batched", position, scale * took, scale * tokens)
                for pair, (texts, _) in zip(everywhere, found_texts, strict=True):
                    texts_of = {"batched": texts[row]}
                    texts_of |= {rule: said[rule, position][start + row][index[pair]] for rule in ("leading", "word")}
                    agree(texts_of, query, f"query {start + row}, {position}, pair {pair}, batched")
                    times.compared["published in batches and ours, both rules"] += 1
    return times


def compare_everything(model: Any, plain: Any, queries: Sequence[Query], positions: Sequence[str]) -> None:
    pairs, compared, right = patching.cells(model.cfg.n_layers), 0, Counter()
    for number, query in enumerate(queries):
        states = states_after(plain, query.ids)
        for position in positions:
            theirs = whole_matrix(plain, model.tokenizer, query, states, position, pairs)
            leading, word = (ours(model, query, position, rule)[0] for rule in ("leading", "word"))
            for pair, *texts in zip(pairs, theirs, leading, word, strict=True):
                agree(
                    dict(zip(("published", "leading", "word"), texts, strict=True)),
                    query,
                    f"{number} {position} {pair}",
                )
            compared += len(pairs)
            right[position] += sum(map(query.answer.leads, theirs))
    print(f"whole matrices: {compared} pairs compared, all successes equal; successes {dict(right)}")


def report(times: Times, positions: Sequence[str], n_layers: int) -> dict[str, float]:
    names = {
        "published": f"(a) published, {n_layers**2} pairs",
        "hooks": f"(b) hooks, {n_layers * (n_layers - 1) // 2} pairs",
        "leading": "(c) ours, rule leading",
        "word": "(c) ours, rule word",
        "batched": f"(d) published in batches, {n_layers**2} pairs",
    }
    print(
        f"{'seconds a query: median (range)':36}"
        + "".join(f"{p:>28}" for p in positions)
        + "   tokens a query, "
        + ", ".join(positions)
    )
    for way, name in names.items():
        cells = [times.seconds[way, p] for p in positions]
        tokens = ", ".join(f"{np.median(times.tokens[way, p]):.0f}" for p in positions)
        spans = "".join(f"{np.median(c):12.2f} ({min(c):.2f} to {max(c):.2f})".rjust(28) for c in cells)
        print(f"  {name:34}{spans}   {tokens}")
    ratios = {}
    for rule in ("leading", "word"):
        for way in ("published", "hooks", "batched"):
            shown = []
            for which in (*([p] for p in positions), list(positions)):
                above, below = (np.sum([times.seconds[w, p] for p in which], axis=0) for w in (way, rule))
                each = above / below
                ratios[f"{way}/{rule} {'+'.join(which)}"] = float(above.sum() / below.sum())
                shown.append(
                    f"{'+'.join(which)} {above.sum() / below.sum():.0f} (by query {each.min():.0f} to {each.max():.0f})"
                )
            target = f"   target {TARGET}" if (way, rule) == ("published", "leading") else ""
            print(f"  {way} / ours, rule {rule}: " + ", ".join(dict.fromkeys(shown)) + target)
    for what, number in times.compared.items():
        print(f"  {number} sampled pairs compared ({what}): all successes equal")
    return ratios


# --- what is measured -----------------------------------------------------------------------------------------------------


def queries_of(model: Any, n: int) -> list[tuple[str, str, Answer]]:
    data = lab.datasets.load("two_hop").query("r2 in ['capital', 'currency', 'language']")
    answers = two_hop.run(model, data, limit=max(80, 12 * n), progress=False)
    chosen = patching.chosen_queries(model, answers, n)[1]
    print(f"{len(chosen)} queries, {int((chosen.set == 'correct').sum())} of them correct without a patch", flush=True)
    return [(query.prompt, query.e1, two_hop.answer_of(query, "e3")) for query in chosen.itertuples()]


def prepared(model: Any, texts: Sequence[tuple[str, str, Answer]], filler: int = 0) -> list[Query]:
    found = []
    for prompt, e1, answer in texts:
        prompt = "It was a mild day, and the streets were quiet. " * filler + prompt
        where = patching.positions_of(model, pd.DataFrame({"example": ["it"], "prompt": [prompt], "e1": [e1]})).iloc[0]
        ids = tokenize(model, [prompt]).ids[0]
        found.append(Query(prompt, answer, ids, {"t1": int(where.t1), "t2": int(where.t2)}))
    return found


def truncated(model: Any, n_layers: int, folder: Path) -> Any:
    """The same model without its last blocks."""
    plain = plain_twin(model)
    plain.base_model.layers = decoder_layers(plain)[:n_layers]
    plain.config.num_hidden_layers = n_layers
    if getattr(plain.config, "layer_types", None):
        plain.config.layer_types = plain.config.layer_types[:n_layers]
    plain.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return lab.load(folder, device="cpu")


def scaling(model: Any, texts: Sequence[tuple[str, str, Answer]], arguments: argparse.Namespace) -> None:
    rows = []

    def one(name: str, model: Any, filler: int) -> None:
        queries = prepared(model, texts, filler)
        times = measure(
            model, plain_twin(model), queries, arguments.positions, arguments.cells, arguments.seed, say=False
        )
        print(f"\n{name}: {model.cfg.n_layers} layers, {np.median([len(q.ids) for q in queries]):.0f} tokens")
        ratios = report(times, arguments.positions, model.cfg.n_layers)
        rows.append({"what": name, "layers": model.cfg.n_layers, "tokens": np.median([len(q.ids) for q in queries]),
                     **{key: round(ratio) for key, ratio in ratios.items() if key.startswith("published/leading")}})  # fmt: skip

    for filler in (0, 4, 16):
        one(f"{filler} sentences in front", model, filler)
    for n_layers in sorted({10, 20, model.cfg.n_layers}):
        if n_layers < model.cfg.n_layers:
            with tempfile.TemporaryDirectory() as folder:
                one(f"first {n_layers} blocks", truncated(model, n_layers, Path(folder) / "model"), 0)
    print("\npublished / ours, rule leading, by size\n" + pd.DataFrame(rows).to_string(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--cells", type=int, default=24, help="sampled pairs a query and position, for the slow ways")
    parser.add_argument("--positions", nargs="+", choices=patching.POSITIONS, default=list(patching.POSITIONS))
    parser.add_argument("--full-matrix", action="store_true", help="compare the successes of all pairs, too")
    parser.add_argument(
        "--scaling", action="store_true", help="ratio by prompt length and by number of layers, instead"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = lab.load(arguments.model, device="cpu")
    texts = queries_of(model, arguments.queries)
    if arguments.scaling:
        scaling(model, texts, arguments)
        return
    plain, queries = plain_twin(model), prepared(model, texts)
    times = measure(model, plain, queries, arguments.positions, arguments.cells, arguments.seed)
    print(f"{arguments.model}, {model.cfg.n_layers} layers, {torch.get_num_threads()} threads, {STEPS} tokens a try; (a), (b) "
          f"and (d) from {arguments.cells} sampled pairs a query and position, scaled to all of theirs; (d) with "
          f"{min(32, len(queries))} queries a batch")  # fmt: skip
    report(times, arguments.positions, model.cfg.n_layers)
    if arguments.full_matrix:
        compare_everything(model, plain, queries, arguments.positions)


if __name__ == "__main__":
    main()
