"""QLoRA (Dettmers et al., arXiv 2305.14314): low-rank adapters over a base held in 4 bits by bitsandbytes.

The products over the 4-bit weights are ours: a layer's weight is de-quantised in the forward and again in the backward
and never kept. The quantisation is written beside the adapter, so that what loads the adapter loads the same base.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, RequestError
from ...files import read_json, write_json
from ..fused import adapted_linear
from ..precision import best_device
from . import DoraSettings, LoraSettings, LowRankSettings, QloraSettings
from .base import Method
from .dora import DoraLinear
from .lora import Lora, LoraLinear, adapters
from .lora import create as create_plain

RECORD = "quantisation.json"  # beside adapter_config.json, which has no place for it
FEW = 16  # rows (of tokens generated at once) for which bitsandbytes' own product, in 4 bits throughout, reads less
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def dequantised(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer of bitsandbytes, (out, in): as it was trained over, then in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = base.weight
    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class _FourBit:
    """Reads its base's weight out of 4 bits; where the base is a plain layer (a head), as it is."""

    base: nn.Linear

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantised(self.base, dtype) if is_quantised(self.base) else self.base.weight.to(dtype)


class QloraLinear(_FourBit, LoraLinear):
    """LoRA over a weight in 4 bits."""

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW and computes_in(self.base, x.dtype):
            return self.dropped(x, x, a, b)
        return adapted_linear(x, self.dense, self.base.bias, a, b, self.scale)


class QdoraLinear(_FourBit, DoraLinear):
    """DoRA over a weight in 4 bits."""


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def is_asked_in_4_bits(model: Any) -> bool:
    """Whether the model was loaded by a `load_kwargs`, from 16 bits."""
    return getattr(model.config, "quantization_config", None) is not None


def computes_in(module: Any, dtype: torch.dtype) -> bool:
    """Whether a 4-bit layer's own forward de-quantises as `dequantised` does and computes in `dtype`."""
    return is_quantised(module) and module.weight.quant_state.dtype == dtype == module.compute_dtype


class Qlora(Lora):
    settings: QloraSettings

    def __init__(self, settings: QloraSettings):
        super().__init__(settings)
        self.layer = QdoraLinear if settings.dora else QloraLinear
        self.held = f"in 4 bits, {settings.quant}" + (" with double quantisation" if settings.double_quant else "")

    def load_kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
        if missing:
            raise RequestError(
                f"4-bit bases need {' and '.join(missing)}, not installed here",
                where="method.kind: qlora",
                hint="pip install 'fitout[qlora]', or use method: {kind: lora}.",
            )
        from transformers import BitsAndBytesConfig

        # It warns that a kernel cannot be downloaded which is turned off anyway (model/load.py).
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.settings.quant,
                bnb_4bit_use_double_quant=self.settings.double_quant,
                bnb_4bit_compute_dtype=dtype,
            ),
            "device_map": {"": best_device()},
        }

    def undivided(self, stage: int) -> str | None:
        if stage < 3:
            return None
        return "weights in 4 bits keep their scales beside them, which an engine that divides the weights does not know"

    def trained_in(self, folder: Path) -> str | None:
        return read_json(folder / RECORD)["stored_as"]

    def plain(self) -> Method:
        common = {key: getattr(self.settings, key) for key in LowRankSettings.model_fields}
        return create_plain(DoraSettings(**common) if self.settings.dora else LoraSettings(**common))

    def size(self, model: nn.Module) -> int:
        return sum(p.numel() if (s := getattr(p, "quant_state", None)) is None else s.shape.numel()
                   for p in model.parameters())  # fmt: skip

    def notes(self, model: nn.Module) -> list[str]:
        held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        return [f"what is frozen takes {held / 1e6:,.1f} MB", *super().notes(model)]

    def apply(self, model: Any) -> None:
        self._require_quantised(model)
        super().apply(model)

    def _check_base(self, name: str, base: nn.Linear) -> None:
        """Any base will do."""

    def _require_quantised(self, model: Any) -> None:
        from transformers.pytorch_utils import Conv1D

        states = [m.weight.quant_state for m in model.modules() if is_quantised(m)]
        turned = any(getattr(m, "source_cls", None) is Conv1D for m in model.modules())
        if turned or (not states and is_asked_in_4_bits(model)):
            raise ModelError(
                "this model's layers cannot be held in 4 bits",
                harm="bitsandbytes leaves them as they are, or turns them over.",
                hint="Take method: {kind: lora}.",
            )
        want = (self.settings.quant, self.settings.double_quant)
        have = {(state.quant_type, state.nested) for state in states}
        if have != {want}:
            said = " and ".join(f"{kind}{' with double quantisation' if nested else ''}" for kind, nested in have)
            raise ModelError(
                f"the base is {'in ' + said if states else 'not quantised'}, method.quant asks for {want[0]}"
                + (" with double quantisation" if want[1] else ""),
                harm="The adapter would be trained or used over other weights than it says.",
                hint="Give the 16-bit base, or say its own method.quant and double_quant.",
            )

    def _check_same(self, model: Any, folder: Path) -> None:
        record = read_json(folder / RECORD)
        if (record["quant"], record["double_quant"]) != (self.settings.quant, self.settings.double_quant):
            raise ModelError(
                f"this adapter was trained over {record['quant']} (double_quant: {record['double_quant']}), "
                "the recipe asks for another",
                where=str(folder),
                harm="It would be used over other weights than it was trained over.",
                hint="Take method.quant and double_quant from its quantisation.json.",
            )
        super()._check_same(model, folder)

    def save(self, model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
        super().save(model, folder, base=base, revision=revision)
        state = next(module.weight.quant_state for module in model.modules() if is_quantised(module))
        record = {
            "quant": state.quant_type,
            "double_quant": state.nested,
            "block": state.blocksize,
            "stored_as": NAMES[state.dtype],  # the dtype that was quantised, and that de-quantised weights have
        }
        write_json(folder / RECORD, record)

    def in_fp32(self, model: Any) -> None:
        adapted = {id(layer.base) for layer in adapters(model).values()}
        _dequantise(model, lambda module: id(module) not in adapted)  # their own forward would compute as loaded
        super().in_fp32(model)

    def merge(self, model: Any) -> None:
        """The 4-bit weights de-quantised, in fp32, with the adapter folded in: the model that was trained."""
        _dequantise(model)
        model.hf_quantizer.remove_quantization_config(model)
        super().merge(model)


def _dequantise(model: Any, which: Callable[[nn.Module], bool] = lambda module: True) -> None:
    """Puts plain layers in fp32 in the place of 4-bit ones."""
    for name, module in list(model.named_modules()):
        if is_quantised(module) and which(module):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _plain_layer(module))


def _plain_layer(module: Any) -> nn.Linear:
    layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    layer.weight = nn.Parameter(dequantised(module, torch.float32), requires_grad=False)
    layer.bias = module.bias
    return layer


def settings_from(folder: Path, config: dict[str, Any], common: dict[str, Any]) -> QloraSettings | None:
    """A saved adapter's settings where it is one of ours over a 4-bit base."""
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder / RECORD)
    dora = bool(config.get("use_dora"))
    return QloraSettings(**common, quant=record["quant"], double_quant=record["double_quant"], dora=dora)


def create(settings: QloraSettings) -> Qlora:
    return Qlora(settings)
