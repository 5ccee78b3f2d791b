"""Which engine is asked for: by the recipe, by a user's own DeepSpeed or accelerate file, or by `accelerate launch`.

Such a file says how a model is divided; batches, optimizer, clipping and precision stay the recipe's. What of a file is
not used is said, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import RequestError
from .. import TrainSettings

DECIDED = {  # keys of a DeepSpeed file that the recipe decides
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "zero_allow_untested_optimizer": "train.optimizer",
    "zero_force_ds_cpu_optimizer": "train.optimizer",
}
USED = {"fsdp_offload_params", "fsdp_reshard_after_forward", "fsdp_sharding_strategy", "fsdp_version"}
LAUNCH = {  # keys of an accelerate file that its launcher has used, or that say nothing
    "compute_environment", "debug", "distributed_type", "downcast_bf16", "dynamo_config", "enable_cpu_affinity",
    "deepspeed_config", "fsdp_config", "gpu_ids", "ipex_config", "machine_rank", "main_process_ip",
    "main_process_port", "main_training_function", "mpirun_config", "num_machines", "num_processes", "rdzv_backend",
    "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu",
}  # fmt: skip
DEEPSPEED_USED = {
    "zero_stage", "deepspeed_config_file", "offload_optimizer_device", "offload_param_device", "zero3_init_flag",
    "zero3_save_16bit_model", "deepspeed_multinode_launcher", "deepspeed_hostfile",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """`kind` is auto, ddp, fsdp, zero1, zero2 or zero3; `deepspeed` a user's own settings for it; `notes` lines for
    people."""

    kind: str
    offload: bool = False
    reshard: bool = True  # fsdp: free a layer's parameters after its forward
    deepspeed: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def asked(settings: TrainSettings, environment: Mapping[str, str]) -> Asked:
    """What `train.parallel` means here. Raises RequestError for a file that cannot be read, or asks for what is not
    there."""
    wish, launcher = settings.parallel, _of_launcher(environment)
    if wish != "auto":
        found = _of_file(Path(wish)) if wish.endswith((".json", ".yaml", ".yml")) else Asked(wish)
        if launcher and launcher.kind != found.kind:
            said = f"accelerate launch asks for {launcher.kind}, the recipe for {found.kind}: the recipe decides"
            found = Asked(found.kind, found.offload, found.reshard, found.deepspeed, (*found.notes, said))
    else:
        found = launcher or Asked("auto")
    if settings.offload:
        found = Asked(found.kind, True, found.reshard, found.deepspeed, found.notes)
    return found


def _of_file(path: Path) -> Asked:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(
            f"this file cannot be read: {str(error).splitlines()[0]}",
            where=f"train.parallel: {path}",
            hint="Give a DeepSpeed JSON file, a file of `accelerate config`, or ddp, fsdp, zero1, zero2 or zero3.",
        ) from None
    if not isinstance(values, dict):
        raise RequestError("this file holds no keys", where=f"train.parallel: {path}")
    return _of_deepspeed(values, path.name) if path.suffix == ".json" else _of_accelerate(values, path)


def _of_deepspeed(values: dict[str, Any], name: str) -> Asked:
    given = {key: value for key, value in values.items() if value != "auto"}
    stage = (given.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise RequestError(f"zero_optimization.stage is {stage!r}", where=name, hint="It is 0, 1, 2 or 3.")
    ours = [key for key in given if key in DECIDED]
    notes = tuple(f"{name}: {key} is not used; the recipe's {DECIDED[key]} decides" for key in ours)
    if stage == 0:
        rest = [key for key in given if key not in DECIDED and key != "zero_optimization"]
        return Asked("ddp", notes=notes + tuple(f"{name}: {key} is not used: nothing is divided" for key in rest))
    kept = {key: _without_auto(value) for key, value in given.items() if key not in DECIDED}
    return Asked(f"zero{stage}", deepspeed=kept, notes=notes)


def _without_auto(value: Any) -> Any:
    """DeepSpeed's own defaults where a file says `auto`, as files for transformers do."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}


def _of_accelerate(values: dict[str, Any], path: Path) -> Asked:
    kind, name = str(values.get("distributed_type", "NO")).upper(), path.name
    notes = [f"{name}: {key} is not used" for key in values if key not in LAUNCH and key != "mixed_precision"]
    if str(values.get("mixed_precision", "no")).lower() != "no":
        notes.append(f"{name}: mixed_precision is not used; the recipe's train.precision decides")
    if kind == "FSDP":
        inner = values.get("fsdp_config") or {}
        notes += [f"{name}: {key} is not used" for key in inner if key not in USED]
        offload = _true(inner.get("fsdp_offload_params"))
        return Asked("fsdp", offload, _reshards(inner), notes=tuple(notes))
    if kind == "DEEPSPEED":
        inner = values.get("deepspeed_config") or {}
        if inner.get("deepspeed_config_file"):
            found = _of_file((path.parent / str(inner["deepspeed_config_file"])).resolve())
            return Asked(found.kind, found.offload, found.reshard, found.deepspeed, (*notes, *found.notes))
        for key in inner:
            if key in DECIDED:
                notes.append(f"{name}: {key} is not used; the recipe's {DECIDED[key]} decides")
            elif key not in DEEPSPEED_USED:
                notes.append(f"{name}: {key} is not used")
        zero: dict[str, Any] = {"stage": int(inner.get("zero_stage", 2))}
        for which in ("optimizer", "param"):
            device = str(inner.get(f"offload_{which}_device") or "none").lower()
            if device != "none":
                zero[f"offload_{which}"] = {"device": device}
        found = _of_deepspeed({"zero_optimization": zero}, name)
        return Asked(found.kind, found.offload, found.reshard, found.deepspeed, (*notes, *found.notes))
    if kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return Asked("ddp", notes=tuple(notes))
    raise RequestError(
        f"distributed_type {kind} is not there",
        where=f"train.parallel: {path}",
        hint="There are MULTI_GPU, MULTI_CPU, FSDP and DEEPSPEED.",
    )


def _of_launcher(environment: Mapping[str, str]) -> Asked | None:
    """What `accelerate launch` was told on its command line; it passes that on in these variables."""
    if _true(environment.get("ACCELERATE_USE_FSDP")):
        inner = {key.lower(): value for key, value in environment.items() if key.startswith("FSDP_")}
        return Asked("fsdp", _true(inner.get("fsdp_offload_params")), _reshards(inner))
    if _true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        prefix = "ACCELERATE_DEEPSPEED_"
        inner = {key.removeprefix(prefix): value for key, value in environment.items() if key.startswith(prefix)}
        if inner.get("CONFIG_FILE"):
            return _of_file(Path(inner["CONFIG_FILE"]))
        zero: dict[str, Any] = {"stage": int(inner.get("ZERO_STAGE", 2))}
        for which in ("OPTIMIZER", "PARAM"):
            device = inner.get(f"OFFLOAD_{which}_DEVICE", "none").lower()
            if device != "none":
                zero[f"offload_{which.lower()}"] = {"device": device}
        return _of_deepspeed({"zero_optimization": zero}, "accelerate launch")
    return None


def _reshards(values: Mapping[str, Any]) -> bool:
    given = values.get("fsdp_reshard_after_forward", True)
    if str(given).upper() in ("SHARD_GRAD_OP", "NO_SHARD", "_HYBRID_SHARD_ZERO2"):
        return False
    if str(values.get("fsdp_sharding_strategy")).upper() in ("SHARD_GRAD_OP", "2"):
        return False
    return str(given).lower() != "false"


def _true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on")
