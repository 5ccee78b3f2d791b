"""torchtune's side, one process: `PYTHON -m benchmarks.side_torchtune FOLDER OUT OPTIONS`, with options as in side_trl
(per, recompute, sort). PYTHON is that of an environment of its own (README.md).

Its own recipe for LoRA on one device, `recipes/lora_finetune_single_device.py`, told by a configuration as its users
write one, with its Llama 2 (plain rotary positions, as the model here). A tied head becomes a copy: neither is trained.
The rows come in by its `dataset` component; torchtune pairs neighbouring entries where transformers pairs halves of a
head, so its checkpointer turns the rows of q and k, and this module those of B over them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.data import padded_collate_sft

from .side_trl import asked, read_steps, write
from .work import ALPHA, SEED, peak_mb

NAMES = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}  # fmt: skip
seen: list[dict[str, torch.Tensor]] = []


class Rows:
    """The dataset component: rows in the order of the steps, trained where the mask says so."""

    def __init__(self, _tokenizer: Any, folder: str, sort: bool):
        rows = [row for step in read_steps(Path(folder), sort=sort) for row in step]
        self._rows = [
            {"tokens": row["ids"], "labels": [i if on else -100 for i, on in zip(row["ids"], row["mask"], strict=True)]}
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


class Tokenizer:
    """What the recipe asks of one: the id that pads."""

    pad_id = 0


class Watch:
    """The metric logger component: it is told each step's loss at its end."""

    ends: list[float] = []
    losses: list[float] = []
    peaks: list[float] = []

    def log_config(self, _config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        Watch.ends.append(time.time())
        Watch.losses.append(float(payload["loss"]))
        Watch.peaks.append(peak_mb())

    def close(self) -> None: ...


def collate(batch: list[dict[str, list[int]]], padding_idx: int = 0, ignore_idx: int = -100) -> dict[str, Any]:
    """torchtune's own, keeping what it made to hash it afterwards."""
    made = padded_collate_sft(batch, padding_idx, ignore_idx)
    there = torch.zeros_like(made["tokens"])
    for row, one in enumerate(batch):
        there[row, : len(one["tokens"])] = 1
    seen.append({"input_ids": made["tokens"], "labels": made["labels"].clone(), "attention_mask": there})
    return made


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0, last_epoch)


def main(folder: Path, out: Path, text: str) -> None:
    work, options = asked(folder, text)
    if work["method"] != "lora":
        raise SystemExit("only torchtune's LoRA recipe is run here")
    _save_base(folder)
    recipe = _recipe().LoRAFinetuneRecipeSingleDevice
    recipe.save_checkpoint = lambda self, epoch: None  # as the other sides save nothing
    configuration = OmegaConf.create(_configuration(folder, work, options))
    run = recipe(configuration)
    run.setup(configuration)
    _take_our_adapter(run._model, folder / "adapter")
    run.train()
    write(out, Watch, seen, work["batch"] // int(options["per"]))


def _recipe() -> Any:
    """The recipe as torchtune ships it: a file beside the package, which `tune run` starts."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _configuration(folder: Path, work: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    shape, per = work["shape"], int(options["per"])
    read = json.loads((folder / "base" / "config.json").read_text())
    here = "benchmarks.side_torchtune"
    return {
        "output_dir": str(folder / "peer"),
        "model": {
            "_component_": "torchtune.models.llama2.lora_llama2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
            "apply_lora_to_output": False, "lora_rank": work["rank"], "lora_alpha": ALPHA, "lora_dropout": 0.0,
            "vocab_size": shape["vocab_size"], "num_layers": shape["num_hidden_layers"],
            "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"],
            "embed_dim": shape["hidden_size"], "intermediate_dim": shape["intermediate_size"],
            "max_seq_len": read["max_position_embeddings"], "norm_eps": read["rms_norm_eps"],
        },
        "tokenizer": {"_component_": f"{here}.Tokenizer"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder / "untied"),
            "checkpoint_files": ["model.safetensors"], "output_dir": str(folder / "peer"), "model_type": "LLAMA2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {"_component_": f"{here}.Rows", "folder": str(folder), "sort": options["sort"] == "1"},
        "collate_fn": f"{here}.collate",
        "seed": SEED,
        "shuffle": False,
        "batch_size": per,
        "gradient_accumulation_steps": work["batch"] // per,
        "epochs": 1,
        "max_steps_per_epoch": len(work["steps"]),
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": work["lr"], "weight_decay": 0.0},
        "lr_scheduler": {"_component_": f"{here}.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": 1.0,
        "compile": False,
        "metric_logger": {"_component_": f"{here}.Watch"},
        "device": "cpu",
        "dtype": work["precision"],
        "enable_activation_checkpointing": options["recompute"] == "1",
        "enable_activation_offloading": False,
    }  # fmt: skip


def _save_base(folder: Path) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    (folder / "untied").mkdir(exist_ok=True)
    save_file(weights, folder / "untied" / "model.safetensors")
    (folder / "untied" / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())


@torch.no_grad()
def _take_our_adapter(model: Any, folder: Path) -> None:
    """The same initial LoRA weights; every trained tensor must be among them."""
    saved = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        layer, rest = name.split(".layers.")[1].split(".", 1)
        module, part, _ = rest.rsplit(".", 2)
        if part == "lora_B" and module.endswith(("q_proj", "k_proj")):
            value = _turned(value, model.layers[0].attn.head_dim)
        saved[f"layers.{layer}.{NAMES[module]}.{part.lower()}.weight"] = value
    wrapped = "_checkpoint_wrapped_module."  # around each layer that is recomputed
    trained = {n.replace(wrapped, ""): value for n, value in model.named_parameters() if value.requires_grad}
    assert saved.keys() == trained.keys(), sorted(saved.keys() ^ trained.keys())[:4]
    for name, parameter in trained.items():
        parameter.copy_(saved[name])


def _turned(value: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of each head of `size`, halves to neighbours."""
    return value.view(-1, 2, size // 2, value.shape[1]).transpose(1, 2).reshape(value.shape)


if __name__ == "__main__":
    from . import side_torchtune  # by its name, as the configuration does: one and the same module

    side_torchtune.main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
