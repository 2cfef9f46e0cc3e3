"""`lab.check`: does the hooked model compute what the plain model computes, and do the hooks do what they say?"""

import re
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lab.interventions import patch
from lab.models import SITES, alone, facts, hooks_left, name_of, plain_twin
from lab.runs import greedy_ids
from lab.states import collect_states
from lab.texts import tokenize

# Three lengths, so that padding matters; the first two have the same number of tokens in no tokenizer by chance alone.
_TEXTS = ("The city of Paris is in France.", "A coin is heads up. Maya flips the coin.", "Water boils")


def check(model: TransformerBridge) -> pd.DataFrame:
    """Health table of a model: columns check, value, limit, ok; `ok` is `value <= limit` (a site that does not exist has
    no value and says so).

    Differences are relative: the largest absolute difference over the largest absolute value of the reference. The
    reference is the weights as they are in memory in plain Hugging Face with eager attention; for a model that runs more
    than its architecture (a hook, a layer of somebody else's) its own forward pass, and a line says so. Takes a few
    seconds, and memory for a second copy of the model while it runs. Doing nothing must do nothing, and a patch must do
    the right thing: all positions of one depth taken from another prompt must give that prompt's logits.

    Raises:
        ValueError: a model without a final norm.
    """
    with alone(model):
        return _check(model)


def _check(model: TransformerBridge) -> pd.DataFrame:
    if not hasattr(model, "ln_final"):
        raise ValueError(
            f"{name_of(model)} cannot be checked: its head does not read the last state through a final norm alone (OPT-350m "
            "has a projection there), so no lens reads it either"
        )
    rows: list[tuple[str, float, float]] = []
    limit = {torch.float32: 1e-5, torch.float64: 1e-12}.get(model.cfg.dtype, 2e-2)
    n_layers, parallel = model.cfg.n_layers, "resid_mid" not in facts(model)["sites"]
    tokens = tokenize(model, _TEXTS)
    device = model.cfg.device
    batch = {"attention_mask": tokens.mask.long().to(device), "use_cache": False}
    ids, length = tokens.ids.to(device), tokens.lengths
    with torch.inference_mode():
        try:
            plain, whose = plain_twin(model), "plain Hugging Face"
        except ValueError as error:  # what was put into the model on purpose belongs to it
            plain, whose = model.original_model, "the model's own forward"
            print(f"{str(error)[0].upper()}{str(error)[1:]}. It is held against its own forward pass.")
        received: dict[int, torch.Tensor] = {}
        for module_name, module in plain.named_modules():
            if plain is not model.original_model and (found := re.fullmatch(r".*\.(\d+)\.mlp", module_name)):
                module.register_forward_pre_hook(_keeper(received, int(found[1])))
        reference = plain(ids, output_hidden_states=plain is not model.original_model, **batch)
        logits, cache = model.run_with_cache(ids, names_filter=_reads(model), **batch)
        real = tokens.mask.to(device)
        rows.append((f"logits = {whose}", _difference(logits[real], reference.logits[real]), limit))
        if plain is not model.original_model:  # else the states would be held against themselves
            worst = 0.0
            for depth in range(n_layers):
                ours = cache[SITES["resid_pre"].format(layer=depth)]
                worst = max(worst, _difference(ours[real], reference.hidden_states[depth][real]))
            last = cache[SITES["resid_post"].format(layer=n_layers - 1)]  # Hugging Face's last is after the final norm
            worst = max(worst, _difference(model.ln_final(last)[real], reference.hidden_states[n_layers][real]))
            rows.append((f"states at depths 0 to {n_layers} = {whose}", worst, limit))
        if len(received) == n_layers:  # blocks that name their MLP otherwise (mixtures of experts) are not looked at
            reads = [(cache[SITES["mlp_in"].format(layer=i)][real], received[i][real]) for i in range(n_layers)]
            rows.append(("mlp_in = what the plain model's MLPs read", max(_difference(*pair) for pair in reads), limit))
        del reference, plain, received

        for side in ("right", "left"):
            # at least 1e-6: both are rounded to 32 bits, as `collect_states` keeps them
            rows.append(
                (f"batch = one at a time, padding {side}", _padding_difference(model, side), max(1e-6, 10 * limit))
            )
        gap, mid = 0.0, 0.0
        for layer in range(n_layers):
            pre, attn, mlp, post = (
                cache[SITES[site].format(layer=layer)] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
            )
            gap = max(gap, _difference((pre + attn + mlp)[real], post[real]))
            if not parallel:
                mid = max(mid, _difference((pre + attn)[real], cache[SITES["resid_mid"].format(layer=layer)][real]))
        rows.append(("resid_pre + attn_out + mlp_out = resid_post", gap, limit))
        if parallel:
            rows.append(("resid_mid: no such site (attention and MLP run in parallel)", np.nan, np.nan))
        else:
            rows.append(("resid_pre + attn_out = resid_mid", mid, limit))

        middle, first, other = n_layers // 2, ids[:1, : length[0]], ids[1:2, : length[0]]
        if other.shape[1] < first.shape[1] or not tokens.mask[1, : length[0]].all():
            first, other = ids[:1, : length[1]], ids[1:2, : length[1]]
        clean, wanted = model(first), model(other)
        name = SITES["resid_pre"].format(layer=middle)
        _, own = model.run_with_cache(first, names_filter=[name])
        _, theirs = model.run_with_cache(other, names_filter=[name])
        with patch(model, "resid_pre", layer=middle, value=own[name]):
            rows.append(
                (f"a state patched with itself (depth {middle}) changes no bit", _difference(model(first), clean), 0.0)
            )
        with patch(model, "resid_pre", layer=middle, value=theirs[name]):
            patched = model(first)
        rows.append((f"depth {middle} taken from another prompt gives its logits", _difference(patched, wanted), limit))
        # The partner of "changes nothing": the two prompts must differ, or the line above would say little.
        changed = _difference(patched, clean)
        rows.append(
            ("... and those differ from the clean ones (1 / difference)", 1 / changed if changed else np.inf, 1e3)
        )
        rows.append(
            (
                "continuation with kept keys and values = without (tokens that differ)",
                _cache_difference(model, first),
                0.0,
            )
        )
    rows.append(("hooks left behind", float(hooks_left(model)), 0.0))
    table = pd.DataFrame(rows, columns=["check", "value", "limit"])
    table["ok"] = (table.value <= table.limit) | table.limit.isna()
    return table


def _keeper(received: dict[int, torch.Tensor], layer: int) -> Any:
    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        received[layer] = inputs[0].detach()

    return keep


def _reads(model: TransformerBridge) -> list[str]:
    return [SITES[site].format(layer=layer) for site in facts(model)["sites"] for layer in range(model.cfg.n_layers)]


def _padding_difference(model: TransformerBridge, side: str) -> float:
    """Largest difference over all depths between the last token's state in a padded batch and in a text alone."""
    tokens = tokenize(model, _TEXTS, padding_side=side)
    names = [SITES["resid_post"].format(layer=layer) for layer in range(model.cfg.n_layers)]
    mask = tokens.mask.long().to(model.cfg.device)
    # Positions are counted from the first real token, whichever side is padded (Hugging Face leaves it to the caller).
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    _, cache = model.run_with_cache(
        tokens.ids.to(model.cfg.device),
        names_filter=names,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
    )
    worst = 0.0
    for i, text in enumerate(_TEXTS):
        alone = collect_states(model, [text], progress=False)["resid"].values[0, 1:]
        last = int(torch.nonzero(tokens.mask[i])[-1])
        batched = np.stack([cache[name][i, last].float().cpu().numpy() for name in names])
        worst = max(worst, float(np.abs(batched - alone).max() / np.abs(alone).max()))
    return worst


def _cache_difference(model: TransformerBridge, ids: torch.Tensor) -> float:
    """How many of five greedy tokens change when keys and values are kept. A Bridge that does not see the cache under the
    name that Hugging Face gives it forgets the prompt without a word (TransformerLens 4.3 with transformers 5.24)."""
    everywhere = torch.ones(ids.shape, dtype=torch.bool)
    said = [
        greedy_ids(model, ids.cpu(), everywhere, max_new_tokens=5, ends=set(), use_cache=kept) for kept in (True, False)
    ]
    return float((said[0] != said[1]).sum())


def _difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())
