"""Time of replicas trained as one batch against the same nets trained one after another, at the size of the quick preset.

    python tests/benchmarks/benchmark_transfer.py [--replicas 8] [--steps 40] [--threads 2] [--task D]

Four ways to train the same nets on the same batches, in one run: `plain` is a module for one net with PyTorch's AdamW as
it comes (nanoGPT's manner), one net after another; `alone` is `lab.nets.replicas` with one replica at a time; `vmap` is
`torch.func.vmap` over the plain module with stacked weights; `batch` is `lab.nets.replicas` with all at once. Printed:
milliseconds for a step of all nets, the factor to `batch`, and the largest difference of a weight from `batch`. Each is
timed `--rounds` times, in turn, and the least is taken. Not collected by pytest.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from lab.nets import replicas
from lab.nets.replicas import Recipe, Shape, Weights
from lab.transfer import curves, tasks


class Plain(nn.Module):
    """One net, in PyTorch's own layers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, d = shape, shape.d_model
        self.embedding = nn.Linear(shape.n_inputs, d, bias=False) if shape.patches else nn.Embedding(shape.n_inputs, d)
        self.positions = nn.Parameter(torch.empty(shape.n_positions, d))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "qkv": nn.Linear(d, 3 * d, bias=False), "out": nn.Linear(d, d, bias=False),
                "mlp_in": nn.Linear(d, 2 * d, bias=False),
                "mlp_out": nn.Linear(2 * d, d, bias=False),
                "norm_1": nn.LayerNorm(d, elementwise_affine=False), "norm_2": nn.LayerNorm(d, elementwise_affine=False),
            })
            for _ in range(shape.n_blocks)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, shape.n_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.embedding(inputs) + self.positions
        batch, length, d = x.shape
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm_1"](x)).chunk(3, dim=-1)
            q, k, v = (part.view(batch, length, self.shape.n_heads, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.shape.causal)
            x = x + block["out"](mixed.transpose(1, 2).reshape(batch, length, d))
            x = x + block["mlp_out"](block["mlp_in"](block["norm_2"](x)).relu())
        return self.head(self.norm(x[:, -1]))

    def take(self, weights: Weights, replica: int) -> "Plain":
        """The weights of one replica."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                value = weights[our_name(name)][replica]
                turned = name.endswith("weight") and value.ndim == 2 and name != "norm.weight"
                turned = turned and not (name == "embedding.weight" and not self.shape.patches)
                parameter.copy_(value.T if turned else value)
        return self


def our_name(name: str) -> str:
    """Name of a parameter of `Plain` in `lab.nets.replicas`."""
    own = {"embedding.weight": "embedding", "norm.weight": "norm_gain", "norm.bias": "norm_bias", "head.weight": "head",
           "head.bias": "head_bias"}  # fmt: skip
    return own.get(name, name.removeprefix("blocks.").removesuffix(".weight"))


def optimizer_of(named: dict[str, torch.Tensor], recipe: Recipe, **options: bool) -> torch.optim.Optimizer:
    """AdamW without decay of the norm and the bias."""
    small = ("norm.weight", "norm.bias", "head.bias")
    groups = [
        {"params": [value for name, value in named.items() if name not in small], "weight_decay": recipe.decay},
        {"params": [value for name, value in named.items() if name in small], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), **options)


def step(optimizer: torch.optim.Optimizer, rate: float, loss: torch.Tensor) -> None:
    """One step at a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--task", default="D", choices=list(tasks.DISTANCES))
    parser.add_argument("--batch", type=int, help="examples a step instead of the preset's")
    parser.add_argument("--cpu", action="store_true", help="processor time instead of the clock, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    preset = curves.PRESETS["quick"][options.task]
    task = tasks.make(options.task, **preset.sizes)
    shape = curves._shape(task, preset.n_blocks, preset.d_model, preset.n_heads)
    recipe = Recipe(options.steps, options.batch or preset.recipe.batch, preset.recipe.rate, preset.recipe.decay)
    train = task.sides["B"].train
    inputs, labels = torch.as_tensor(train.inputs), torch.as_tensor(train.labels)
    count = options.replicas
    weights = replicas.initial(shape, range(count))
    order = replicas.orders([np.arange(len(labels))] * count, list(range(count)), recipe)

    def batch() -> Weights:
        return replicas.train(shape, weights, inputs, labels, order, recipe, at_once=count).weights

    def alone() -> Weights:
        parts = [
            replicas.train(shape, replicas.pick(weights, [i]), inputs, labels, order[[i]], recipe).weights
            for i in range(count)
        ]
        return replicas.join(parts)

    def gathered(nets: list[dict[str, torch.Tensor]]) -> Weights:
        found: Weights = {}
        for name in nets[0]:
            ours = our_name(name)
            values = torch.stack([net[name].detach() for net in nets])
            found[ours] = values.transpose(1, 2) if values.shape != weights[ours].shape else values
            if values.ndim == 3 and values.shape[1] == values.shape[2] and name.endswith("out.weight"):
                found[ours] = values.transpose(1, 2)  # a square matrix does not show which way round it is
        return found

    def plain() -> Weights:
        nets = []
        for i in range(count):
            net = Plain(shape).take(weights, i)
            optimizer = optimizer_of(dict(net.named_parameters()), recipe)
            for number, seen in enumerate(order[i]):
                step(optimizer, recipe.rate_at(number), functional.cross_entropy(net(inputs[seen]), labels[seen]))
            nets.append(dict(net.named_parameters()))
        return gathered(nets)

    def vmapped() -> Weights:
        one = Plain(shape)
        values, buffers = stack_module_state([Plain(shape).take(weights, i) for i in range(count)])
        optimizer = optimizer_of(values, recipe, fused=True)

        def loss(values: dict, buffers: dict, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(functional_call(one, (values, buffers), (inputs,)), labels)

        for number in range(recipe.steps):
            seen = order[:, number]
            losses = vmap(loss, in_dims=(0, 0, 0, 0))(values, buffers, inputs[seen], labels[seen])
            step(optimizer, recipe.rate_at(number), losses.sum())
        return gathered([{name: value[i] for name, value in values.items()} for i in range(count)])

    ways: dict[str, Callable[[], Weights]] = {"plain": plain, "alone": alone, "vmap": vmapped, "batch": batch}
    clock = time.process_time if options.cpu else time.perf_counter
    seconds, results = {name: np.inf for name in ways}, {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = clock()
            results[name] = way()
            seconds[name] = min(seconds[name], clock() - start)
    print(
        f"task {options.task}, {count} replicas, {shape.n_blocks} blocks, d_model {shape.d_model}, {recipe.batch} examples "
        f"of {shape.n_positions} positions, {torch.get_num_threads()} threads"
    )
    print("        ms a step   factor   largest difference")
    for name in ways:
        apart = max(float((results[name][key] - value).abs().max()) for key, value in results["batch"].items())
        print(
            f"{name:6} {1e3 * seconds[name] / recipe.steps:9.1f} {seconds[name] / seconds['batch']:9.2f} {apart:16.1e}"
        )


if __name__ == "__main__":
    main()
