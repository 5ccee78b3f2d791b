"""What this machine has, what will be used, what is missing; and, for a model, proof that packing keeps documents apart."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OPTIONAL = {
    "datasets": "hub data sets (hf://): pip install 'fitout[hub]'",
    "modelscope": "ModelScope data sets (ms://): pip install 'fitout[modelscope]'",
    "jieba": "ROUGE and F1 by Chinese words: pip install 'fitout[zh]'",
    "wandb": "Weights & Biases: pip install 'fitout[wandb]'",
    "mlflow-skinny": "MLflow: pip install 'fitout[mlflow]'",
}


def examine(model: str | None) -> dict[str, str]:
    """Facts by name, ready to print."""
    import torch

    from ..model.precision import best_device, decide

    device = best_device()
    precision = decide("auto", device)
    facts = {"python": platform.python_version(), "cores": str(os.cpu_count()), "memory": _memory()}
    for package in ("fitout", "torch", "transformers", "tokenizers", "pyarrow"):
        facts[package] = version(package)
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts["threads"] = str(torch.get_num_threads())
    facts["precision"] = f"{precision.kind} ({precision.why})"
    facts["free disk here"] = f"{shutil.disk_usage('.').free / 1e9:.0f} GB"
    for package, use in OPTIONAL.items():
        facts[package] = _installed(package) or f"not installed; {use}"
    if model:
        facts.update(isolation(model))
    return facts


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.0f} GiB"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def isolation(name: str) -> dict[str, str]:
    """Packs three random documents, changes the second, and looks whether the others' logits move."""
    import numpy as np
    import torch

    from ..data.pack import lay_out
    from ..model.load import load_base, resolve
    from ..objectives.base import inputs, plain_head

    model: Any = load_base(resolve(name).base).eval()
    vocab = model.config.get_text_config(decoder=True).vocab_size
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab, n).astype(np.int32) for n in (23, 31, 17)]
    changed = [documents[0], (documents[1] + 1) % vocab, documents[2]]

    def logits(samples: list[Any]) -> Any:
        layout = lay_out(samples, [np.ones(len(s), np.uint8) for s in samples], range(3))
        with torch.no_grad():
            return model(**inputs(layout, torch.device("cpu"))).logits[0]

    before, after = logits(documents), logits(changed)
    others = torch.ones(len(before), dtype=torch.bool)
    others[23:54] = False
    moved = float((before[others] - after[others]).abs().max())
    alone = max(
        float((before[a : a + len(d)] - logits([d])).abs().max()) for a, d in zip((0, 23, 54), documents, strict=True)
    )
    apart = moved == 0 and not torch.equal(before[~others], after[~others])
    return {
        "model": name,
        "packing": "documents do not see each other" if apart else f"NOT isolated: logits moved by {moved:.2g}",
        "packed against alone": f"largest difference of logits {alone:.2g}",
        "head": "plain: loss in chunks" if plain_head(model) else "its own forward computes the logits",
    }
