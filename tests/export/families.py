"""Small models for export: random ones of the families that GGUF is written for, adapters, and a finished run."""

from __future__ import annotations

from pathlib import Path

import torch

from fitout.chat import ChatSettings
from fitout.chat.render import Chat, open_chat
from fitout.config import build
from fitout.export.merge import merge_adapter
from fitout.export.write import save_chat
from fitout.model import methods
from fitout.model.load import SHELL, grow_vocabulary, load_base
from fitout.model.methods import AdapterSettings, LoraSettings
from fitout.rundir import RunDir

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 32, "num_hidden_layers": 1}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-3}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
}


def save_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Chat:
    """A random model of `SHAPES[name]` whose weights are large enough that a wrong rotation or norm shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = SHAPES[name]
    chat = open_chat(SHELL)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(chat.tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **changes,
        },
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(dtype).save_pretrained(folder)
    save_chat(chat, folder)
    return chat


def save_lora(
    folder: Path, *, base: Path = SHELL, settings: ChatSettings | None = None, seed: int = 3, **lora: object
) -> Chat:
    """A LoRA adapter with a random B, large enough to change every logit; added tokens' embeddings are trained too."""
    chat = open_chat(base, settings)
    model = load_base(str(base), packed=False)
    if chat.grown:
        grow_vocabulary(model, len(chat.tokenizer))
    method = methods.create(LoraSettings(**{"rank": 4, "alpha": 16, **lora}))
    torch.manual_seed(seed)
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif parameter.requires_grad and "lora_" not in name:  # what the added tokens' embeddings have learned
            with torch.no_grad():
                parameter[-3:] += 0.1 * torch.randn_like(parameter[-3:])
    folder.mkdir(parents=True)
    method.save(model, folder, base=str(base))
    save_chat(chat, folder)
    return chat


def save_bottleneck(folder: Path) -> None:
    """A nonlinear adapter whose way up is random, so that it adds something."""
    chat, model = open_chat(SHELL), load_base(str(SHELL), packed=False)
    method = methods.create(AdapterSettings())
    torch.manual_seed(3)
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("up.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir(parents=True)
    method.save(model, folder, base=str(SHELL))
    save_chat(chat, folder)


def save_run(folder: Path, **lora: object) -> RunDir:
    """A run directory as a finished run leaves it: recipe, status, adapter, merged, some test rows."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    recipe = {"name": "small", "model": {"base": "embedded:shell"}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    run.recipe.write_text(build(recipe).to_yaml(), encoding="utf-8")
    run.update_status(status="done", trained_steps=3, merged_steps=3, training={"steps": 3}, seed=0)
    save_lora(run.adapter, **lora)
    merge_adapter(str(SHELL), run.adapter, run.merged, name="small", facts={})
    return run
