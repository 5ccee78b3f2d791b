"""A model's shape, read from its config.json: layers, widths, heads, vocabulary, every parameter by name. No torch.

Parameter names and counts are those of transformers' own modules for the families in FAMILIES (held exactly by
tests/model/test_shape.py); another family is refused rather than guessed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import read_json


@dataclass(frozen=True)
class Family:
    """What a config.json leaves unsaid: how this family's layers are built, and the defaults of its keys."""

    tied: bool = False
    head_dim: int | None = None  # None: hidden width / heads
    query_bias: bool | None = None  # of q, k and v; None: as `attention_bias` says
    output_bias: bool | None = None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norm: bool = False  # q and k are normalised head by head
    width_norm: bool = False  # q and k are normalised over their whole width
    joined: bool = False  # q, k, v in one matrix, gate and up in another


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(query_bias=False, output_bias=False),
    "qwen2": Family(query_bias=True, output_bias=False),
    "qwen3": Family(head_dim=128, head_norm=True),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(tied=True, head_dim=256, norms=SANDWICH),
    "gemma3_text": Family(tied=True, head_dim=256, norms=SANDWICH, head_norm=True),
    "phi3": Family(query_bias=False, output_bias=False, joined=True),
    "olmo2": Family(norms=("post_attention_layernorm", "post_feedforward_layernorm"), width_norm=True),
    "granite": Family(),
    "smollm3": Family(tied=True),
}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block; `reads` names the input it shares with others (attention, output, ffn, down)."""

    name: str  # q_proj
    path: str  # self_attn.q_proj
    inputs: int
    outputs: int
    bias: bool
    reads: str

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer; `linears` are those of one layer, all layers are alike."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    linears: tuple[Linear, ...]
    vectors: tuple[tuple[str, int], ...]  # norms of one layer, by path
    context: int | None = None
    file_bytes: int | None = None  # size of the weights on disk, where known
    file_width: int | None = None  # bytes a number there

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def layer_weights(self) -> int:
        """Numbers in one layer's linear matrices, without biases."""
        return sum(linear.weights for linear in self.linears)

    @property
    def linear_weights(self) -> int:
        """Numbers in all layers' linear matrices: what a 4-bit base quantises, and what a token is multiplied with."""
        return self.layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        """Numbers in the matrix that gives the logits (the embedding itself when tied)."""
        return self.vocab * self.hidden

    @cached_property
    def parameters(self) -> int:
        return sum(size for _, size in self.tensors())

    @cached_property
    def layer_parameters(self) -> int:
        return sum(size for name, size in self.tensors() if name.startswith("model.layers.0."))

    def tensors(self) -> Iterator[tuple[str, int]]:
        """(name, numbers) of every parameter, named as transformers names it; a tied head once."""
        yield "model.embed_tokens.weight", self.head_weights
        for layer in range(self.layers):
            for linear in self.linears:
                yield f"model.layers.{layer}.{linear.path}.weight", linear.weights
                if linear.bias:
                    yield f"model.layers.{layer}.{linear.path}.bias", linear.outputs
            for path, size in self.vectors:
                yield f"model.layers.{layer}.{path}.weight", size
        yield "model.norm.weight", self.hidden
        if not self.tied:
            yield "lm_head.weight", self.head_weights


def read_shape(base: str, *, revision: str | None = None) -> Shape:
    """The shape of the model in folder `base`, or of hub id `base` (its config.json is fetched, no weights).

    Raises ModelError when there is no config.json or the family is not one of FAMILIES.
    """
    config = _config_file(base, revision)
    try:
        values = read_json(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=base) from error
    size, width = _stored(config.parent) if Path(base).exists() else (None, None)
    return shape_of(values, where=base, file_bytes=size, file_width=width)


def shape_of(
    values: Mapping[str, Any], *, where: str = "config.json", file_bytes: int | None = None,
    file_width: int | None = None,
) -> Shape:  # fmt: skip
    """The shape that a config.json (as a mapping) describes. Raises ModelError for a family that is not known."""
    config = values.get("text_config") or values
    name = config.get("model_type") or values.get("model_type") or "none"
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(
            f"the planner does not know models of type {name}",
            where=where,
            harm="A guessed size could be wrong by any factor.",
            hint=f"Known: {', '.join(FAMILIES)}. Training itself does not need a plan.",
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        layers, ffn, vocab = (int(config[k]) for k in ("num_hidden_layers", "intermediate_size", "vocab_size"))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json lacks a size: {error}", where=where) from error
    head_dim = int(config.get("head_dim") or family.head_dim or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    tied = config.get("tie_word_embeddings", values.get("tie_word_embeddings", family.tied))
    return Shape(
        family=name,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=bool(tied),
        linears=_linears(family, config, hidden, ffn, heads * head_dim, kv_heads * head_dim),
        vectors=_vectors(family, hidden, heads * head_dim, kv_heads * head_dim, head_dim),
        context=config.get("max_position_embeddings"),
        file_bytes=file_bytes,
        file_width=file_width,
    )


def _linears(
    family: Family, config: Mapping[str, Any], hidden: int, ffn: int, attention: int, kv: int
) -> tuple[Linear, ...]:
    asked = bool(config.get("attention_bias", False))
    bias = asked if family.query_bias is None else family.query_bias
    out_bias = asked if family.output_bias is None else family.output_bias
    mlp_bias = bool(config.get("mlp_bias", False))
    if family.joined:
        first = [Linear("qkv_proj", "self_attn.qkv_proj", hidden, attention + 2 * kv, bias, "attention")]
        middle = [Linear("gate_up_proj", "mlp.gate_up_proj", hidden, 2 * ffn, mlp_bias, "ffn")]
    else:
        widths = (("q_proj", attention), ("k_proj", kv), ("v_proj", kv))
        first = [Linear(name, f"self_attn.{name}", hidden, width, bias, "attention") for name, width in widths]
        middle = [Linear(name, f"mlp.{name}", hidden, ffn, mlp_bias, "ffn") for name in ("gate_proj", "up_proj")]
    output = Linear("o_proj", "self_attn.o_proj", attention, hidden, out_bias, "output")
    down = Linear("down_proj", "mlp.down_proj", ffn, hidden, mlp_bias, "down")
    return (*first, output, *middle, down)


def _vectors(family: Family, hidden: int, attention: int, kv: int, head_dim: int) -> tuple[tuple[str, int], ...]:
    norms = [(name, hidden) for name in family.norms]
    if family.head_norm:
        norms += [("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)]
    if family.width_norm:
        norms += [("self_attn.q_norm", attention), ("self_attn.k_norm", kv)]
    return tuple(norms)


def _config_file(base: str, revision: str | None) -> Path:
    if Path(base).exists():
        path = Path(base) / "config.json"
        if not path.exists():
            raise ModelError("this folder has no config.json", where=base, hint="Give a Hugging Face model folder.")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(base, "config.json", revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"its config.json cannot be fetched: {str(error).strip().splitlines()[0]}",
            where=base,
            hint="Check the folder or hub id; for hub ids the network, HF_TOKEN (gated models) and HF_ENDPOINT.",
        ) from error


WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def _stored(folder: Path) -> tuple[int | None, int | None]:
    """(bytes of the weights on disk, bytes a number), from the SafeTensors headers; (None, None) without files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None, None
    size = sum(file.stat().st_size for file in files)
    with open(files[0], "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
    return size, WIDTHS.get(max(set(kinds), key=kinds.count)) if kinds else None
