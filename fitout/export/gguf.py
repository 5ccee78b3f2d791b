"""A model folder as one GGUF file, for llama.cpp and Ollama: the Llama-like families whose layout is known exactly.

Layout and keys: the GGUF specification of the ggml project, version 3. What the file says is proved by `gguf_check`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ModelError, RequestError
from . import StoredAs

if TYPE_CHECKING:
    from ..chat.render import Chat
    from .gguf_vocab import Vocabulary

STORED: dict[torch.dtype, StoredAs] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ROW_OF_BLOCKS = 32  # q8_0 keeps one scale for so many values of a row


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are laid out in GGUF."""

    arch: str  # general.architecture
    interleaved: bool = False  # rotary pairs lie side by side, so q and k rows are reordered
    norm_shift: float = 0.0  # added to norm weights (Gemma multiplies by 1 + weight)
    activation: str = "silu"
    tied: bool = False  # the head is always the embedding
    biases: tuple[str, ...] = ()  # the projections whose bias the architecture reads


FAMILIES = {
    "llama": Family("llama", interleaved=True, biases=("q_proj", "k_proj", "v_proj", "o_proj")),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_shift=1.0, activation="gelu_pytorch_tanh", tied=True),
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def missing_package() -> str | None:
    """How to get the `gguf` package, when it is not here."""
    return None if importlib.util.find_spec("gguf") else "pip install 'fitout[gguf]'"


def unsupported(config: Any) -> list[str]:
    """Why a model of this configuration cannot be written: empty when it can."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return [f"GGUF is written for {', '.join(FAMILIES)}, not for {config.model_type}"]
    reasons = []
    if getattr(config, "quantization_config", None):
        reasons.append("its weights are quantised")
    if config.hidden_act != family.activation:
        reasons.append(f"its activation is {config.hidden_act}; the engine computes {family.activation}")
    if family.tied and not config.tie_word_embeddings:
        reasons.append("its head is not tied to its embedding")
    if getattr(config, "mlp_bias", False):
        reasons.append("its feed-forward layers have biases")
    if getattr(config, "attention_bias", False) and not family.biases:
        reasons.append("its attention has biases")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        reasons.append(f"it attends through a sliding window of {window}")
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn") and not (kind == "llama3" and family.arch == "llama"):
        reasons.append(f"its rotary scaling is {kind}")
    known_yarn = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    odd = sorted(key for key in rope.keys() - known_yarn if rope[key] is not None)
    if kind == "yarn" and odd:
        reasons.append(f"its yarn scaling sets {', '.join(odd)}")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        reasons.append("only a part of each head is rotated")
    return reasons


def write_gguf(folder: Path, path: Path, chat: Chat, vocabulary: Vocabulary, *, name: str, kind: StoredAs) -> list[str]:
    """Writes the model in `folder` (config.json, *.safetensors) to `path`, one tensor in memory at a time.

    Matrices are stored as `kind`, norms and biases in f32. Returns notes. Raises ModelError for what the format cannot
    hold, RequestError when the `gguf` package is missing.
    """
    from transformers import AutoConfig

    need_package()
    import gguf

    config = AutoConfig.from_pretrained(folder)
    reasons = unsupported(config)
    if reasons:
        raise ModelError(
            f"this model cannot be written as GGUF: {'; '.join(reasons)}",
            where=str(folder),
            harm="The engine would compute another model.",
            hint="Use --for vllm or --for transformers.",
        )
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, family.arch)
    _write_shape(writer, gguf, config, name, kind)
    _write_tokenizer(writer, chat, vocabulary, config)
    plan, odd = _plan(gguf, folder, config, kind)
    for one in plan:
        writer.add_tensor_info(one.name, one.stored_shape, one.numpy_dtype, one.nbytes, one.raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in plan:
        writer.write_tensor_data(one.data(gguf))
    writer.close()
    return [f"{odd} matrices stay in f16: their rows are no multiple of {ROW_OF_BLOCKS}"] if odd else []


def need_package() -> None:
    """Raises RequestError when `gguf` is not installed."""
    how = missing_package()
    if how:
        raise RequestError("writing GGUF needs the `gguf` package", hint=f"Install it: {how}")


# what the file says about the model


def _write_shape(writer: Any, gguf: Any, config: Any, name: str, kind: StoredAs) -> None:
    file_types = gguf.LlamaFileType
    head = head_width(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(
        {"f32": file_types.ALL_F32, "f16": file_types.MOSTLY_F16, "bf16": file_types.MOSTLY_BF16}.get(
            kind, file_types.MOSTLY_Q8_0
        )
    )
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_tokenizer(writer: Any, chat: Chat, vocabulary: Vocabulary, config: Any) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.encode("utf-8") for token in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    tokenizer = chat.tokenizer
    ends = [i for i in chat.stop_ids if i != tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None or ends:
        writer.add_eos_token_id(ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    if ends:
        writer.add_eot_token_id(ends[0])
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# tensors


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: where it comes from and how it is stored."""

    name: str
    source: Path | None  # the safetensors file; None for what is computed
    key: str
    shape: tuple[int, ...]
    raw: Any  # GGMLQuantizationType
    heads: int = 0  # rows are reordered within so many heads
    shift: float = 0.0
    value: np.ndarray | None = None

    @property
    def plain(self) -> bool:
        return self.raw.name in ("F32", "F16")

    @property
    def numpy_dtype(self) -> Any:
        return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(self.raw.name, np.dtype(np.uint8))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In elements, or in bytes along the last axis for packed types."""
        if self.plain:
            return self.shape
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(quant_shape_to_byte_shape(self.shape, self.raw))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape)) * self.numpy_dtype.itemsize

    def data(self, gguf: Any) -> np.ndarray:
        """The values as they are stored."""
        values = self.value if self.source is None else self._read()
        assert values is not None
        return gguf.quants.quantize(values, self.raw) if not self.plain else values.astype(self.numpy_dtype)

    def _read(self) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self.source, "pt") as file:
            values = file.get_tensor(self.key).float().numpy()
        if self.heads:
            values = interleave(values, self.heads)
        return values + np.float32(self.shift) if self.shift else values


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first halves, second halves) of the rotary pairs to pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {k: folder / v for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def gguf_name(key: str) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; None for a name that is not known."""
    stem, _, leaf = key.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{leaf}"
    parts = stem.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 3:
        inner = INNER.get(".".join(parts[3:]))
        return f"blk.{parts[2]}.{inner}.{leaf}" if inner else None
    return None


def _plan(gguf: Any, folder: Path, config: Any, kind: StoredAs) -> tuple[list[Planned], int]:
    """Every tensor in file order, and how many matrices could not take `kind`."""
    family = FAMILIES[config.model_type]
    types = gguf.GGMLQuantizationType
    wanted = {"f32": types.F32, "f16": types.F16, "bf16": types.BF16, "q8_0": types.Q8_0}[kind]
    plan, odd = list(_rope_factors(config, types)), 0
    for key, path, shape in _tensors(folder):
        name = gguf_name(key)
        bias_of = key.split(".")[-2] if key.endswith(".bias") else None
        if name is None or (bias_of is not None and bias_of not in family.biases):
            raise ModelError(
                f"the tensor {key} has no place in GGUF's {family.arch} layout",
                where=str(path),
                harm="Left out, the engine would compute another model.",
                hint="Use --for vllm or --for transformers.",
            )
        if name == "output.weight" and config.tie_word_embeddings:
            continue  # the engine takes the embedding
        raw = types.F32 if len(shape) == 1 else wanted
        if raw == types.Q8_0 and shape[-1] % ROW_OF_BLOCKS:
            raw, odd = types.F16, odd + 1
        heads = 0
        if family.interleaved and ".self_attn.q_proj." in key:
            heads = config.num_attention_heads
        elif family.interleaved and ".self_attn.k_proj." in key:
            heads = config.num_key_value_heads
        shift = family.norm_shift if name.endswith("norm.weight") else 0.0
        plan.append(Planned(name, path, key, shape, raw, heads, shift))
    return plan, odd


def _tensors(folder: Path) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    from safetensors import safe_open

    for key, path in sorted(weight_files(folder).items()):
        with safe_open(path, "pt") as file:
            yield key, path, tuple(file.get_slice(key).get_shape())


def _rope_factors(config: Any, types: Any) -> Iterator[Planned]:
    """Llama 3's scaling as divisors of the rotary frequencies, one for each pair."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head = head_width(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    factors = (plain / scaled.float()).numpy().astype(np.float32)
    yield Planned("rope_freqs.weight", None, "", factors.shape, types.F32, value=factors)
