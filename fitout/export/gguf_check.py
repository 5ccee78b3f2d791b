"""Proof of a GGUF file: it is read back, and what it says is compared with the model it was made from.

A plain transformers model is built from the file alone (its keys give the configuration, its tensors the weights),
slowly and without the writer's code, so a wrong key, order of rows or rounding shows as another logit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckError

#: largest difference of a stored value from the source, over the largest value of its row; for Q8_0 half a step and
#: the rounding of the scale itself to half precision
ROUNDING = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "Q8_0": 0.57 / 127,
}
TINY = 2.0**-24  # half-precision numbers lie this far apart near zero

MODELS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma"}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True)
class ReadBack:
    """A GGUF file as transformers names things: values in fp32, and how each was stored."""

    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    stored: dict[str, str]
    rope_factors: torch.Tensor | None


def read_gguf(path: Path) -> ReadBack:
    """Reads keys and tensors; rows of q and k go back to the order of transformers."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    heads = fields[f"{arch}.attention.head_count"]
    heads_kv = fields[f"{arch}.attention.head_count_kv"]
    tensors, stored, factors = {}, {}, None
    for one in reader.tensors:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type), dtype=np.float32))
        if one.name == "rope_freqs.weight":
            factors = values
            continue
        name = _transformers_name(one.name)
        if arch == "llama" and ".q_proj." in name:
            values = _halves(values, heads)
        elif arch == "llama" and ".k_proj." in name:
            values = _halves(values, heads_kv)
        if arch == "gemma" and "norm." in name:
            values = values - 1
        tensors[name], stored[name] = values, one.tensor_type.name
    return ReadBack(fields, tensors, stored, factors)


def _transformers_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return f"{NAMES[parts[0]]}.{parts[1]}"


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head goes to i, row 2i + 1 to i + half; written out row by row."""
    out = torch.empty_like(weight)
    width = weight.shape[0] // heads
    for head in range(heads):
        for row in range(width):
            out[head * width + row // 2 + (row % 2) * (width // 2)] = weight[head * width + row]
    return out


def model_of(read: ReadBack) -> Any:
    """A plain transformers model with the file's configuration and weights, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = read.fields["general.architecture"]

    def key(name: str) -> Any:
        return read.fields.get(f"{arch}.{name}")

    rope = {"rope_type": key("rope.scaling.type") or "default", "rope_theta": key("rope.freq_base")}
    if rope["rope_type"] != "default":
        rope["factor"] = key("rope.scaling.factor")
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = key("rope.scaling.original_context_length")
    biased = "model.layers.0.self_attn.o_proj.bias" in read.tensors
    config = AutoConfig.for_model(
        MODELS[arch],
        vocab_size=len(read.fields["tokenizer.ggml.tokens"]),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        max_position_embeddings=key("context_length"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        tie_word_embeddings="lm_head.weight" not in read.tensors,
        **({"attention_bias": True} if biased else {}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    missing, unknown = model.load_state_dict(read.tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unknown:
        raise _wrong(f"tensors missing {sorted(set(missing) - tied)[:3]}, unknown {sorted(unknown)[:3]}")
    model.tie_weights()
    if read.rope_factors is not None:
        model.model.rotary_emb.inv_freq /= read.rope_factors
    return model


def check_tensors(read: ReadBack, folder: Path) -> float:
    """Compares every tensor with the safetensors it came from: equal up to the rounding of how it is stored.

    Returns the largest relative difference. Raises CheckError for a tensor that is missing, not finite or different.
    """
    from safetensors import safe_open

    worst, left = 0.0, dict(read.tensors)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name == "lm_head.weight" and name not in left:
                    continue  # tied: the engine takes the embedding
                if name not in left:
                    raise _wrong(f"{name} is not in the file")
                worst = max(worst, _compare(name, left.pop(name), file.get_tensor(name).float(), read.stored[name]))
    if left:
        raise _wrong(f"{sorted(left)[0]} is in the file but not in the model")
    return worst


def _compare(name: str, got: torch.Tensor, want: torch.Tensor, stored: str) -> float:
    if got.shape != want.shape or not torch.isfinite(got).all():
        raise _wrong(f"{name} is {tuple(got.shape)} of {tuple(want.shape)}, or not finite as {stored}")
    size = want.abs().amax(-1, keepdim=True)
    difference = (got - want).abs()
    shifted = 2.0**-23 if name.endswith("norm.weight") else 0.0  # a norm may have been shifted by one and back
    if not (difference <= size * (ROUNDING[stored] + 2.0**-22 * (stored != "F32")) + TINY + shifted).all():
        raise _wrong(f"{name} differs by {difference.max():.3g} where it is stored as {stored}")
    return float(difference.max() / want.abs().max().clamp_min(1e-30))


def _wrong(what: str) -> CheckError:
    return CheckError(
        f"the GGUF file does not say what the model says: {what}",
        harm="The engine would compute another model; the file was not kept.",
        hint="Report this with the model's name; use --for vllm or --for transformers meanwhile.",
    )
