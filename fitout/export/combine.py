"""Several adapters as one, in PEFT's format.

linear       sum of weight x (what the adapter adds to each weight), exactly: their low-rank factors side by side
ties         TIES (Yadav et al., arXiv 2306.01708) on the factors: trimmed, signs elected, those that agree summed
dare_linear  DARE (Yu et al., arXiv 2311.03099) on the factors: entries dropped at random, the rest scaled up, summed
dare_ties    the same dropping, then TIES

The arithmetic is PEFT's `add_weighted_adapter`. PEFT's own "linear" adds factors, not products, so that it gives cross
terms A1 B2; its "cat" is the sum that the name promises, and is what `linear` is here.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..chat.render import open_chat
from ..errors import ModelError, RequestError
from ..files import read_json, write_json
from ..model.load import adapter_folder, load_base, write_tensors
from ..model.methods import saved_in
from . import How
from .card import adapter_tensors
from .write import save_chat

SEED = 0  # what DARE drops


def combine(
    adapters: Sequence[str | Path], folder: Path, *, how: How, weights: Sequence[float] = (), density: float = 0.5
) -> dict[str, Any]:
    """Writes the combination into `folder` (adapter_config.json, adapter_model.safetensors, tokenizer and template).

    `weights`: one an adapter, by default equal shares that sum to 1. `density`: the share of entries that ties and
    dare keep. Returns what was combined, for the card. Raises RequestError or ModelError for adapters that do not go
    together.
    """
    if not importlib.util.find_spec("peft"):
        raise RequestError("combining adapters needs the `peft` package", hint="Install it: pip install 'fitout[peft]'")
    found = [adapter_folder(one) for one in adapters]
    weights = list(weights) or [1 / len(found)] * len(found)
    configs = [read_json(one / "adapter_config.json") for one in found]
    _check_request(found, weights, density)
    _check_fit(found, configs, how)

    base = configs[0]["base_model_name_or_path"]
    plain = load_base(base, packed=False, revision=configs[0].get("revision"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own, of what transformers renames
        try:
            model = _summed(plain, found, weights, how, density)
        except ValueError as error:  # DeepSeek's experts, Mamba's out_proj
            raise ModelError(
                f"PEFT does not combine adapters of this model: {error}",
                where=base,
                hint="Merge one of them (`fitout merge`), and train the other on the merged model.",
            ) from error
    _save(model, folder, found[0], base, configs[0].get("revision"))
    return {
        "adapters": ", ".join(map(str, adapters)),
        "combined by": how if how == "linear" else f"{how}, density {density:g}",
        "weights": ", ".join(f"{weight:g}" for weight in weights),
    }


def _summed(plain: Any, found: list[Path], weights: Sequence[float], how: How, density: float) -> Any:
    """PEFT's model with an adapter "combined"."""
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(plain, str(found[0]), adapter_name=_name(0))
    for i, one in enumerate(found[1:], 1):
        model.load_adapter(str(one), adapter_name=_name(i))
    model.peft_config[_name(0)].use_rslora = False  # PEFT copies it to the sum, whose factors hold all scaling already
    torch.manual_seed(SEED)
    model.add_weighted_adapter(
        [_name(i) for i in range(len(found))],
        weights,
        "combined",
        combination_type="cat" if how == "linear" else how,
        density=None if how == "linear" else density,
    )
    return model


def _name(i: int) -> str:
    return f"part{i}"  # a bare number would be taken for the number of a layer in PEFT's file names


def _save(model: Any, folder: Path, first: Path, base: str, revision: str | None) -> None:
    """PEFT's files for the combination alone."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["combined"].inference_mode = True
    model.peft_config["combined"].save_pretrained(str(folder))
    config = read_json(folder / "adapter_config.json")
    targets = config.get("target_modules")
    config |= {"base_model_name_or_path": base, "revision": revision, "target_modules": sorted(targets or [])}
    write_json(folder / "adapter_config.json", config)
    write_tensors(folder / "adapter_model.safetensors", get_peft_model_state_dict(model, adapter_name="combined"))
    save_chat(open_chat(first), folder)


def _check_request(found: list[Path], weights: Sequence[float], density: float) -> None:
    if len(found) < 2:
        raise RequestError("one adapter is no combination", hint="Name two or more runs or adapter folders.")
    if len(weights) != len(found):
        raise RequestError(
            f"{len(weights)} weights for {len(found)} adapters", where="--weights", hint="Give one for each."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise RequestError("a weight is no number", where="--weights", hint="Give a number for each adapter.")
    if not 0 < density <= 1:
        raise RequestError(f"a density of {density:g}", where="--density", hint="Give a share above 0, at most 1.")


def _check_fit(found: list[Path], configs: list[dict[str, Any]], how: How) -> None:
    """Adapters go together when they are plain LoRA over one base, spoken to in one template."""
    for folder, config in zip(found, configs, strict=True):
        odd = [] if config.get("peft_type") == "LORA" else [f"of type {config.get('peft_type')}"]
        odd += ["with DoRA's magnitudes"] if config.get("use_dora") else []
        odd += ["with biases"] if config.get("bias", "none") != "none" else []
        odd += ["with modules trained whole"] if config.get("modules_to_save") else []
        if not odd and any(".lora_" not in name for name in adapter_tensors(folder)):
            odd.append("with trained embeddings for added tokens")
        if odd:
            raise ModelError(
                f"an adapter {' and '.join(odd)} cannot be combined",
                where=str(folder),
                harm="What is not low-rank would be left out.",
                hint="Merge it into the base, and train the others on the merged model.",
            )
        if held := saved_in(folder).held:
            raise ModelError(
                f"an adapter over a base that is held {held} cannot be combined",
                where=str(folder),
                harm="It would be added to the 16-bit base, which is not the one it was trained over.",
                hint="Merge it (`fitout merge` de-quantises the base), and train the others on the merged model.",
            )
    bases = {(config["base_model_name_or_path"], config.get("revision")) for config in configs}
    if len(bases) > 1:
        raise ModelError(
            f"the adapters belong to different bases: {', '.join(sorted(base for base, _ in bases))}",
            harm="What one adds to its base means nothing in another.",
            hint="Combine adapters of one base.",
        )
    ranks = sorted({config["r"] for config in configs})
    if how != "linear" and (len(ranks) > 1 or any(config.get("rank_pattern") for config in configs)):
        raise ModelError(
            f"{how} needs adapters of one rank; these have {', '.join(map(str, ranks))}",
            hint="Use --how linear, which takes any ranks, or train them with one rank.",
        )
    chats = [open_chat(folder).fingerprint for folder in found]
    if any(chat != chats[0] for chat in chats[1:]):
        raise ModelError(
            "the adapters were trained with different tokenizers or chat templates",
            harm="Asked in either template, the other adapter would meet prompts it was not trained on.",
            hint="Train them with the same chat.template.",
        )
