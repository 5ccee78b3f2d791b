"""Which engine can load what was trained, and why not: said beforehand, from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.render import open_chat
from ..errors import FitoutError, RequestError
from ..files import read_json
from ..model.load import load_config, resolve
from ..model.methods import SAVED, saved_in
from . import Engine
from .card import adapter_tensors

if TYPE_CHECKING:
    from ..chat.render import Chat

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
VLLM_RANK = 16  # without the flag
MERGE = "export it merged (without --unmerged)"
SERVE = "serve base and adapter with `fitout serve`, or use --for transformers, which writes code beside the weights"


@dataclass(frozen=True)
class Obstacle:
    """Why an engine cannot load something, and what to do instead."""

    why: str
    remedy: str


@dataclass(frozen=True)
class Parts:
    """What is to be exported, as its files say; no weights are loaded. `adapter` is None for a plain model."""

    what: Path
    base: str
    revision: str | None
    config: Any  # of the language model
    adapter: Path | None
    adapter_config: dict[str, Any]
    adapter_names: tuple[str, ...]
    chat: Chat
    unmergeable: Obstacle | None = None  # why the adapter cannot be folded into its base
    trust_remote_code: bool = False

    @property
    def kind(self) -> str | None:
        """The adapter's `peft_type`."""
        return self.adapter_config.get("peft_type")

    @property
    def rank(self) -> int:
        return max([self.adapter_config.get("r", 0), *(self.adapter_config.get("rank_pattern") or {}).values()])


def look(what: str | Path, *, trust_remote_code: bool = False) -> Parts:
    """The parts of a run, an adapter folder or a model. A run with an adapter is its adapter, merged or not."""
    from ..rundir import RunDir

    path = Path(what)
    run = RunDir(path)
    adapted = run.exists() and (run.adapter / "adapter_config.json").exists()
    found = resolve(run.adapter if adapted else what)
    config = load_config(found.base, revision=found.revision, trust_remote_code=trust_remote_code)
    return Parts(
        what=path,
        base=found.base,
        revision=found.revision,
        config=config.get_text_config(decoder=True),
        adapter=found.adapter,
        adapter_config=read_json(found.adapter / "adapter_config.json") if found.adapter else {},
        adapter_names=tuple(adapter_tensors(found.adapter)) if found.adapter else (),
        chat=open_chat(found.chat_folder, revision=found.revision, trust_remote_code=trust_remote_code),
        unmergeable=_unmergeable(found.adapter) if found.adapter else None,
        trust_remote_code=trust_remote_code,
    )


def obstacles(engine: Engine, parts: Parts, *, unmerged: bool = False, texts: tuple[str, ...] = ()) -> list[Obstacle]:
    """Every reason why `engine` cannot load this, in the form asked for: empty when it can."""
    if unmerged:
        return _unmerged(engine, parts)
    found = [parts.unmergeable] if parts.unmergeable and not carries_code(engine, parts) else []
    if engine in ("ollama", "llamacpp"):
        found += _gguf(engine, parts, texts)
    if getattr(parts.config, "auto_map", None):
        found.append(
            Obstacle(
                "the model needs code of its own (auto_map), which plain transformers does not run",
                SERVE + " and --trust-remote-code",
            )
        )
    return found


def carries_code(engine: Engine, parts: Parts) -> bool:
    """Whether the folder brings the code that puts base and adapter together, for what weights alone cannot say."""
    return engine == "transformers" and parts.kind in SAVED and parts.unmergeable is not None


def notes(parts: Parts, *, unmerged: bool = False) -> list[str]:
    """What to know about a form that loads."""
    lines = []
    if unmerged and parts.rank > VLLM_RANK:
        lines.append(f"rank {parts.rank} is above vLLM's default of {VLLM_RANK}: --max-lora-rank {vllm_rank(parts)}")
    if unmerged and quantised(parts):
        lines.append("it was trained over a quantised base; vLLM computes with the base it is given")
    return lines


def quantised(parts: Parts) -> bool:
    """Whether the adapter's method holds its base in fewer bits."""
    import torch

    return parts.adapter is not None and bool(saved_in(parts.adapter).load_kwargs(torch.float32))


def refuse(found: list[Obstacle], engine: Engine, parts: Parts) -> None:
    """Raises RequestError when there is an obstacle."""
    if found:
        raise RequestError(
            f"{engine} cannot load this: " + "; ".join(one.why for one in found),
            where=str(parts.what),
            harm="It would refuse the files, or compute another model. Nothing was written.",
            hint="; ".join(dict.fromkeys(one.remedy for one in found)).capitalize() + ".",
        )


def vllm_rank(parts: Parts) -> int:
    """The smallest --max-lora-rank that takes this adapter."""
    return next(rank for rank in VLLM_RANKS if rank >= parts.rank)


def _unmergeable(adapter: Path) -> Obstacle | None:
    try:
        reason = saved_in(adapter).unmergeable
    except FitoutError as error:  # made by another tool, in a way that is not computed here
        return Obstacle(error.message, error.hint.rstrip("."))
    return Obstacle(reason, SERVE) if reason else None


def _unmerged(engine: Engine, parts: Parts) -> list[Obstacle]:
    """Base and adapter apart: vLLM's LoRA, and what it does not take."""
    if parts.adapter is None:
        return [Obstacle("there is no adapter: the method trained the model itself", MERGE)]
    if engine != "vllm":
        return [Obstacle(f"{engine} takes a whole model; only vLLM is given base and adapter", MERGE)]
    if parts.kind != "LORA":
        remedy = parts.unmergeable.remedy if parts.unmergeable else MERGE
        return [Obstacle(f"vLLM computes LoRA adapters, not {parts.kind}", remedy)]
    config = parts.adapter_config
    whole = sorted({name for name in parts.adapter_names if ".lora_" not in name})
    found = []
    if config.get("use_dora"):
        found.append(Obstacle("vLLM does not compute DoRA", MERGE))
    if config.get("modules_to_save"):
        found.append(Obstacle(f"whole modules were trained ({', '.join(config['modules_to_save'])}); vLLM takes "
                              "none from an adapter", MERGE))  # fmt: skip
    elif whole and any("embed" in name or "lm_head" in name for name in whole):
        found.append(Obstacle("tokens were added and their embeddings trained; vLLM takes none from an adapter", MERGE))
    if config.get("bias", "none") != "none":
        found.append(Obstacle("biases were trained; vLLM takes none from an adapter", MERGE))
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    if patterns:  # it takes one scale from lora_alpha / r for all layers, and says nothing
        found.append(
            Obstacle(f"layers have scales of their own ({', '.join(patterns)}), which vLLM does not read", MERGE)
        )
    if parts.rank > VLLM_RANKS[-1]:
        found.append(Obstacle(f"rank {parts.rank} is above the {VLLM_RANKS[-1]} that vLLM takes", MERGE))
    return found


def _gguf(engine: Engine, parts: Parts, texts: tuple[str, ...]) -> list[Obstacle]:
    from . import gguf, gguf_vocab, modelfile

    other = "use --for vllm or --for transformers"
    found = [Obstacle(why, other) for why in gguf.unsupported(parts.config)]
    how = gguf.missing_package()
    if how:
        found.append(Obstacle("writing GGUF needs the `gguf` package", f"install it: {how}"))
    checks: list[Callable[[], Any]] = [
        lambda: gguf_vocab.describe(parts.chat, max(parts.config.vocab_size, len(parts.chat.tokenizer)), texts)
    ]
    if engine == "ollama":
        checks.append(lambda: modelfile.translate(parts.chat))
    for check in checks:
        try:
            check()
        except FitoutError as error:
            found.append(Obstacle(error.message, error.hint.rstrip(".")))
    return found
