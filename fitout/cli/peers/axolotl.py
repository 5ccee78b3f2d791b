"""Axolotl: its YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data import HUB_ID
from .common import (
    OPTIMIZERS,
    PREFERENCE,
    SCHEDULES,
    SHARED,
    Carried,
    Take,
    as_list,
    as_number,
    batch,
    because,
    flag,
    into,
    keep_to_method,
    names,
    needless,
    number,
    one_of,
    run_name,
    split,
    template,
)

#: Keys that only steer the other tool.
NEEDLESS = (
    "model_type", "strict", "dataset_prepared_path", "dataset_processes", "pad_to_sequence_len",
    "eval_sample_packing", "logging_steps", "flash_attention", "sdp_attention", "xformers_attention",
    "flex_attention", "tf32", "gradient_checkpointing_kwargs", "saves_per_epoch", "save_safetensors",
    "save_strategy", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "local_rank",
    "group_by_length", "eval_batch_size", "eval_table_size", "eval_max_new_tokens", "debug", "evals_per_epoch",
    "is_llama_derived_model", "device_map", "attn_implementation", "save_first_step", "lora_mlp_kernel",
    "lora_qkv_kernel", "lora_o_kernel", "use_tensorboard", "eval_strategy", "dataloader_num_workers",
    "ddp_timeout", "torch_compile", "tokenizer_use_fast", "wandb_run_id",
)  # fmt: skip

AXOLOTL: dict[str, Take] = SHARED | {
    "base_model": into("model.base", lambda value: isinstance(value, str)),
    "revision_of_model": into("model.revision"),
    "lora_r": number("method.rank"),
    "lora_alpha": number("method.alpha"),
    "lora_target_modules": names("method.targets"),
    "lora_target_linear": flag("method.targets", then="all-linear"),
    "lora_modules_to_save": names("method.train_also"),
    "lora_model_dir": into("model.adapter", lambda value: isinstance(value, str)),
    "peft_use_rslora": flag("method.rslora"),
    "peft_init_lora_weights": one_of(
        "method.init",
        {"true": "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "orthogonal": "orthogonal"},
    ),
    "unfrozen_parameters": because("method: {kind: full, freeze: [...]} names what stays fixed"),
    "sequence_len": number("data.max_length"),
    "excess_length_strategy": one_of("data.too_long", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    "num_epochs": number("train.epochs"),
    "lr_scheduler": one_of("train.schedule", SCHEDULES),
    "optimizer": one_of("train.optimizer", OPTIMIZERS),
    "save_steps": number("train.save_every"),
    "eval_steps": number("train.evaluate_every"),
    "early_stopping_patience": number("train.patience"),
    "bf16": lambda carried, key, value: carried.put("train.precision", "bf16") if value is True else None,
    "bfloat16": flag("train.precision", then="bf16"),
    "fp16": lambda carried, key, value: carried.put("train.precision", "fp16") if value is True else None,
    "gradient_checkpointing": lambda carried, key, value: carried.put("train.gradient_checkpointing", bool(value)),
    "sample_packing": flag("data.packing", when=False, then=False),
    "fsdp": lambda carried, key, value: carried.put("train.parallel", "fsdp") if value else None,
    "fsdp_config": because("parallel: fsdp shards every layer"),
    "fsdp_version": needless,
    "wandb_project": lambda carried, key, value: (
        carried.put("train.listeners", ["tensorboard", "wandb"]) if value else None
    ),
    "mlflow_tracking_uri": lambda carried, key, value: (
        carried.put("train.listeners", ["tensorboard", "mlflow"]) if value else None
    ),
    "load_in_8bit": because("bases are quantised to 4 bits, or not"),
    "train_on_inputs": because("prompts are context"),
    "special_tokens": because("the tokenizer's own are used; chat: {add_tokens: true} adds the template's"),
    "tokens": because("the tokenizer's own are used"),
    "tokenizer_type": because("the tokenizer is loaded as its folder says"),
    "reward_model": because(PREFERENCE),
    "hub_model_id": because("`fitout export` writes a folder; uploading is yours"),
    "plugins": because("plugins of other tools are not run"),
    "curriculum_sampling": because("the order is drawn by the seed"),
    "shuffle_merged_datasets": needless,
    "roles_to_train": because("assistant turns are trained; others never"),
    **dict.fromkeys(NEEDLESS, needless),
}
AXOLOTL_TOGETHER = {
    "adapter", "load_in_4bit", "peft_use_dora", "chat_template", "chat_template_jinja", "datasets",
    "test_datasets", "pretraining_dataset", "val_set_size", "micro_batch_size", "gradient_accumulation_steps",
    "output_dir", "batch_size", "adam_beta1", "adam_beta2", "rl", "rl_beta", "dpo_beta", "orpo_alpha", "simpo_gamma",
}  # fmt: skip


def from_axolotl(raw: dict[str, Any], path: Path) -> Carried:
    carried = Carried("Axolotl")
    carried.put("name", run_name(raw.get("output_dir"), path))
    carried.put("data", {"max_length": 512, "too_long": "drop"})  # its defaults
    carried.put("train", {"epochs": 1, "schedule": "cosine", "seed": 42})
    adapter = raw.get("adapter")
    if adapter in (None, ""):
        carried.put("method.kind", "full")
    elif adapter in ("lora", "qlora"):
        carried.put("method", {"kind": "qlora" if adapter == "qlora" or raw.get("load_in_4bit") else "lora"})
        if raw.get("peft_use_dora") is True:
            quantised = carried.recipe["method"]["kind"] == "qlora"
            carried.put("method.dora" if quantised else "method.kind", True if quantised else "dora")
    else:
        carried.leave("adapter", adapter, "methods are full, lora, dora, qlora, adapter, sparse")
    for key, value in raw.items():
        if key not in AXOLOTL_TOGETHER:
            AXOLOTL.get(key, because("unknown to this version"))(carried, key, value)
    keep_to_method(carried)
    jinja = raw.get("chat_template_jinja")
    template(
        jinja if isinstance(jinja, str) and jinja.endswith(".jinja") else raw.get("chat_template"),
        "chat_template",
        carried,
    )
    if isinstance(jinja, str) and not jinja.endswith(".jinja"):
        carried.leave("chat_template_jinja", jinja, "save it as a .jinja file and name that in chat.template")
    if "adam_beta1" in raw or "adam_beta2" in raw:
        carried.put("train.betas", [as_number(raw.get("adam_beta1")) or 0.9, as_number(raw.get("adam_beta2")) or 0.999])
    if raw.get("batch_size"):
        carried.put("train.batch_size", int(as_number(raw["batch_size"]) or 16))
    else:
        batch(raw.get("micro_batch_size", 1), raw.get("gradient_accumulation_steps", 1), carried)
    if raw.get("rl"):
        axolotl_preference(raw, carried)
    plain = raw.get("pretraining_dataset")
    if plain:
        carried.put("objective.kind", "pretrain")
    sources = [axolotl_source(one, path, carried) for one in as_list(plain or raw.get("datasets"))]
    sources += [
        axolotl_source(one, path, carried) | {"split": "validation"} for one in as_list(raw.get("test_datasets"))
    ]
    if any(source.get("format") == "text" for source in sources):
        carried.put("objective.kind", "pretrain")
    if not sources:
        carried.leave("datasets", None, "no data set is named")
    carried.recipe["data"]["sources"] = sources or [{"path": "DATA"}]
    split(raw.get("val_set_size"), raw.get("test_datasets"), "val_set_size", carried)
    return carried


def axolotl_preference(raw: dict[str, Any], carried: Carried) -> None:
    kind = raw["rl"]
    if kind not in ("dpo", "orpo", "simpo"):
        carried.leave("rl", kind, PREFERENCE)
        if kind != "ipo":
            return
        kind = "dpo"  # of which it is a loss
    betas = {"orpo": ("orpo_alpha",)}.get(kind, ("rl_beta", "dpo_beta"))
    beta = next((found for key in betas if (found := as_number(raw.get(key)))), 0.1)
    carried.put("objective", {"kind": kind, "beta": beta})
    if kind == "simpo":
        gamma = as_number(raw.get("simpo_gamma"))
        carried.put("objective.gamma", 0.5 if gamma is None else gamma)  # TRL's default, as there


AXOLOTL_FORMATS = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": None,
    "completion": "text",
    "pretrain": "text",
}


#: Fields of a data set whose value is what happens here in any case.
MEANT_ANYWAY = (("roles_to_train", ["assistant"]), ("train_on_eos", "turn"), ("chat_template", "tokenizer_default"))


def axolotl_source(about: Any, path: Path, carried: Carried) -> dict[str, Any]:
    if isinstance(about, str):
        about = {"path": about}
    if not isinstance(about, dict) or not isinstance(about.get("path"), str):
        carried.leave("datasets", about, "an entry without a path")
        return {"path": "DATA"}
    name = about["path"]
    source: dict[str, Any] = {}
    files = as_list(about.get("data_files"))
    if len(files) == 1 and isinstance(files[0], str):
        name = files[0]
    elif files:
        carried.leave("data_files", files, "name each file as a source of its own")
    local = (
        Path(name).is_absolute() or (path.parent / name).exists() or Path(name).exists() or "." in Path(name).name[1:]
    )
    subset = f"/{about['name']}" if about.get("name") else ""
    part = f":{about['split']}" if about.get("split") not in (None, "train") else ""
    source["path"] = name if local or "/" not in name else f"hf://{name}{subset}{part}"
    if source["path"].startswith("hf://") and not HUB_ID.fullmatch(source["path"]):
        carried.leave("split", about.get("split"), "not the name of a split; `limit:` reads the first rows")
        source["path"] = f"hf://{name}{subset}"
    kind = about.get("type")
    if isinstance(kind, str) and kind.split(".")[0] in AXOLOTL_FORMATS:
        format = AXOLOTL_FORMATS[kind.split(".")[0]]
        if format:
            source["format"] = format
        if "." in kind:
            carried.leave("type", kind, f"read as {format or 'detected'}")
    elif kind is not None:
        carried.leave("type", kind, "the format is detected; `columns:` says which column is which")
    mapping = about.get("message_property_mappings")
    if isinstance(mapping, dict) and mapping not in (
        {"role": "role", "content": "content"},
        {"role": "from", "content": "value"},
    ):
        carried.leave("message_property_mappings", mapping, "turns are spelled role/content or from/value")
    turns = about.get("field_messages")
    if isinstance(turns, str) and turns not in ("messages", "conversations"):
        from_value = isinstance(mapping, dict) and mapping.get("role") == "from"
        source |= {"format": "sharegpt" if from_value else "openai"}
        source["columns"] = {"conversations" if from_value else "messages": turns}
    if isinstance(about.get("field"), str) and about["field"] != "text" and source.get("format") == "text":
        source["columns"] = {"text": about["field"]}
    known = {
        "path",
        "data_files",
        "name",
        "split",
        "type",
        "message_property_mappings",
        "field_messages",
        "field",
        "ds_type",
    }
    for key in about:
        if key not in known and about[key] not in (None, "", [], {}) and (key, about[key]) not in MEANT_ANYWAY:
            carried.leave(f"datasets.{key}", about[key], "has no counterpart in a source")
    return source
