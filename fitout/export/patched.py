"""A bottleneck adapter as a model folder of its own: base and adapter weights, and the code that puts them together.

Plain transformers loads it with `trust_remote_code=True` and needs nothing of Fitout; without, it refuses (the folder's
model_type is its own) rather than load the base alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..chat.render import open_chat
from ..errors import CheckError, RequestError
from ..files import read_json, staged_folder, write_json, write_text
from ..model.load import load_adapter, load_base, load_config, save_model
from ..model.methods import AdapterSettings, saved_in
from ..model.methods.adapter import Bottleneck, settings_of
from .merge import TOLERANCE, logits, probe_ids, stored_dtype
from .write import save_chat, set_stop_ids, write_card

CODE = Path(__file__).with_name("patched_model.py")  # goes into the folder, with a last line that names classes


def write_patched(
    base: str,
    adapter: Path,
    target: Path,
    *,
    name: str,
    facts: dict[str, Any],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Writes base + bottleneck adapter as one model folder in the base's own dtype; returns the largest relative
    difference of logits on probes between what was trained and the folder, loaded afresh.

    Raises RequestError for an adapter of another kind (merge that one), CheckError, leaving nothing behind, when the
    difference is more than rounding.
    """
    if saved_in(adapter).unmergeable is None:
        raise RequestError("this adapter can be merged, and needs no code of its own", where=str(adapter))
    source: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    dtype = stored_dtype(load_config(base, **source))
    chat = open_chat(adapter)
    model: Any = load_base(base, dtype=torch.float32, packed=False, **source)
    names = type(model.config).__name__, type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        raise RequestError(
            "the base brings code of its own, which the folder's code cannot build on",
            where=base,
            hint="Serve base and adapter with Fitout.",
        )
    load_adapter(model, adapter)
    probes = probe_ids(chat, model.config.get_text_config().vocab_size)
    before = logits(model, probes)
    set_stop_ids(model, chat)
    with staged_folder(target) as folder:
        save_model(model.to(dtype), folder)
        save_chat(chat, folder)
        last = f'\n\nBottleneckConfig, BottleneckForCausalLM = classes("{names[0]}", "{names[1]}")\n'
        write_text(folder / CODE.name, CODE.read_text(encoding="utf-8") + last)
        write_json(folder / "config.json", read_json(folder / "config.json") | _config(model, settings_of(adapter)))
        how = {"How to load": {"transformers": "AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)"}}
        write_card(folder, name=name, base=base, facts={**how, **facts})
        difference = float((logits(_load(folder, names), probes) - before).abs().max() / before.abs().max())
        if not difference <= TOLERANCE[dtype]:
            raise CheckError(
                f"the written model's logits differ from the adapter's by {difference:.2g} "
                f"(allowed: {TOLERANCE[dtype]:g})",
                where=str(target),
                harm="It would not be the model that was trained and evaluated; it was not kept.",
                hint="Serve base and adapter instead, and report this with the model's name.",
            )
    return difference


def _load(folder: Path, names: tuple[str, str]) -> Any:
    """The folder's model by the same classes, from this package: nothing in a folder is run."""
    from .patched_model import classes

    _, model_class = classes(*names)
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckError(f"the written tensors are not the model's: {info}", where=str(folder))
    return model


def _config(model: Any, settings: AdapterSettings) -> dict[str, Any]:
    """What config.json says besides the base's: where the adapters are, and which code knows them."""
    module = CODE.stem
    blocks = {
        name.removesuffix(".adapter"): [block.down.in_features, block.down.out_features]
        for name, block in model.named_modules()
        if isinstance(block, Bottleneck)
    }
    return {
        "model_type": "fitout_bottleneck",
        "architectures": ["BottleneckForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.BottleneckConfig",
            "AutoModelForCausalLM": f"{module}.BottleneckForCausalLM",
        },
        "bottleneck": {
            "blocks": blocks,
            "activation": settings.activation,
            "parallel": settings.style == "parallel",
            "scale": settings.scale,
        },
    }
