"""What this machine has, will use and lacks; and, for a model, proof that packing keeps documents apart."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

OPTIONAL = {
    "datasets": "hub data sets (hf://): pip install 'fitout[hub]'",
    "modelscope": "ModelScope data sets (ms://): pip install 'fitout[modelscope]'",
    "jieba": "ROUGE and F1 by Chinese words: pip install 'fitout[zh]'",
    "bitsandbytes": "bases in 4 bits (method qlora): pip install 'fitout[qlora]'",
    "gguf": "files for llama.cpp and Ollama: pip install 'fitout[gguf]'",
    "peft": "several adapters as one: pip install 'fitout[peft]'",
    "wandb": "Weights & Biases: pip install 'fitout[wandb]'",
    "mlflow-skinny": "MLflow: pip install 'fitout[mlflow]'",
}

HEADS = {
    "plain": "a linear layer and nothing else: loss in chunks",
    "own": "more than a linear layer: loss in chunks of the model's own forward",
    "whole": "its forward cannot be taken apart: all supervised logits stand in memory at once",
}


def examine(model: str | None) -> dict[str, str]:
    """Facts by name, ready to print."""
    import torch

    from ..model import blocks, native
    from ..model.precision import best_device, decide, faster_products, onednn_multiplies

    device = best_device()
    with faster_products(device):
        precision, by = decide("auto", device), "oneDNN" if onednn_multiplies() else "as PyTorch has it"
    facts = {"python": platform.python_version(), "cores": str(os.cpu_count()), "memory": _memory()}
    for package in ("fitout", "torch", "transformers", "tokenizers", "pyarrow"):
        facts[package] = version(package)
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts["threads"] = str(torch.get_num_threads())
    facts["precision"] = f"{precision.kind} ({precision.why})"
    if device.type == "cpu":
        facts["products in fp32"] = by
        why = native.why_not()
        facts["attention"] = f"by PyTorch's kernels, which take longer: {why}" if why else "compiled for this processor"
        heap = blocks.why_not()
        facts["memory of tensors"] = f"the C library's heap, which has holes: {heap}" if heap else "blocks, used again"
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
    """Whether packed attention computes what the model's own does, and documents in a pack are apart: changes one and
    looks whether the others' logits move."""
    from ..model import rope, varlen
    from ..model.attention import NAME, unlike_own, why_not_packed
    from ..model.head import kind_of_head
    from ..model.load import load_base, resolve

    model = load_base(resolve(name).base)
    why = why_not_packed(model)
    packed = f"NOT used: {why}; samples are computed one by one"
    if why is None:
        gap = unlike_own(model, NAME)
        packed = f"documents do not see each other; logits are within {gap:.1g} of the model's own attention"
        if (switch := rope.switch(model.config)) is not None:
            packed += f"; not used where a sample has more than {switch:,} tokens, which turn all positions otherwise"
    return {
        "model": name,
        "packing": packed,
        **{f"varlen kernel on {device}": f"not used: {reason}" for device, reason in varlen.unused.items()},
        "head": HEADS[kind_of_head(model)],
    }
