"""LLaMA-Factory: the YAML of a training and the `dataset_info.json` beside its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.formats.turns import ROLES
from .common import (
    MEDIA,
    OPTIMIZERS,
    PREFERENCE,
    REFERENCE,
    SCHEDULES,
    SHARED,
    Carried,
    Take,
    as_number,
    batch,
    because,
    find_folder,
    flag,
    into,
    keep_to_method,
    listed,
    listeners,
    names,
    needless,
    number,
    one_of,
    read_yaml,
    run_name,
    split,
    template,
)

#: Keys that only steer the other tool.
NEEDLESS = (
    "do_train", "do_eval", "do_predict", "overwrite_output_dir", "overwrite_cache", "logging_steps",
    "plot_loss", "preprocessing_num_workers", "dataloader_num_workers", "ddp_timeout",
    "per_device_eval_batch_size", "eval_strategy", "evaluation_strategy", "save_strategy", "flash_attn",
    "run_name", "save_only_model", "include_num_input_tokens_seen", "remove_unused_columns",
    "load_best_model_at_end", "log_level", "use_fast_tokenizer", "preprocessing_batch_size",
    "print_param_status", "upcast_layernorm", "double_quantization", "quantization_type",
)  # fmt: skip

LLAMA_FACTORY: dict[str, Take] = SHARED | {
    "model_name_or_path": into("model.base", lambda value: isinstance(value, str)),
    "model_revision": lambda carried, key, value: carried.put("model.revision", value) if value != "main" else None,
    "lora_rank": number("method.rank"),
    "lora_alpha": number("method.alpha"),
    "lora_target": names("method.targets"),
    "additional_target": names("method.train_also"),
    "use_rslora": flag("method.rslora"),
    "pissa_init": flag("method.init", then="pissa"),
    "cutoff_len": number("data.max_length"),
    "num_train_epochs": number("train.epochs"),
    "lr_scheduler_type": one_of("train.schedule", SCHEDULES),
    "optim": one_of("train.optimizer", OPTIMIZERS),
    "save_steps": number("train.save_every"),
    "eval_steps": number("train.evaluate_every"),
    "bf16": flag("train.precision", then="bf16"),
    "pure_bf16": flag("train.precision", then="bf16"),
    "fp16": flag("train.precision", then="fp16"),
    "disable_gradient_checkpointing": flag("train.gradient_checkpointing", then=False),
    "enable_thinking": into("chat.template_kwargs.enable_thinking", lambda value: isinstance(value, bool)),
    "report_to": listeners,
    "packing": flag("data.packing", when=False, then=False),
    "neat_packing": needless,  # packing keeps samples apart in any case
    "mask_history": because("mark earlier answers in the rows with `train: false`"),
    "train_on_prompt": because("prompts are context; objective: {kind: pretrain} trains plain text"),
    "default_system": because("put a `system` column into the rows"),
    "resize_vocab": because("chat: {add_tokens: true} adds the template's tokens"),
    "use_unsloth": because("other kernels are not used"),
    "tokenized_path": because("data prepared by another tool are not read"),
    "predict_with_generate": because("`fitout evaluate` generates in any case"),
    "pref_ftx": because("of the objectives on pairs only orpo learns the chosen answers too"),
    "kto_chosen_weight": because(PREFERENCE),
    "reward_model": because(PREFERENCE),
    "ref_model": because(REFERENCE),
    "image_max_pixels": because(MEDIA),
    "video_max_pixels": because(MEDIA),
    "freeze_vision_tower": because(MEDIA),
    **dict.fromkeys(NEEDLESS, needless),
}
#: Read together with others, in `from_llama_factory`.
LLAMA_FACTORY_TOGETHER = {
    "stage", "finetuning_type", "quantization_bit", "quantization_method", "use_dora", "template", "dataset",
    "dataset_dir", "eval_dataset", "val_size", "max_samples", "per_device_train_batch_size",
    "gradient_accumulation_steps", "output_dir", "adapter_name_or_path", "freeze_trainable_layers",
    "mix_strategy", "interleave_probs", "adam_beta1", "adam_beta2", "pref_loss", "pref_beta", "simpo_gamma",
}  # fmt: skip


def from_llama_factory(raw: dict[str, Any], path: Path) -> Carried:
    carried = Carried("LLaMA-Factory")
    carried.put("name", run_name(raw.get("output_dir"), path))
    carried.put("data", {"max_length": 2048, "too_long": "truncate"})  # its defaults
    carried.put("train", {"lr": 5e-5, "epochs": 3, "schedule": "linear", "warmup": 0, "seed": 42, "save_every": 500})
    llama_factory_method(raw, carried)
    for key, value in raw.items():
        if key in LLAMA_FACTORY_TOGETHER:
            continue
        take = LLAMA_FACTORY.get(key, because("unknown to this version"))
        take(carried, key, value)
    keep_to_method(carried)
    stage = raw.get("stage", "sft")
    if stage == "pt":
        carried.put("objective.kind", "pretrain")
    elif stage == "dpo":
        llama_factory_preference(raw, carried)
    elif stage != "sft":
        carried.leave("stage", stage, PREFERENCE)
    template(raw.get("template"), "template", carried)
    if "adam_beta1" in raw or "adam_beta2" in raw:
        carried.put("train.betas", [as_number(raw.get("adam_beta1")) or 0.9, as_number(raw.get("adam_beta2")) or 0.999])
    adapters = raw.get("adapter_name_or_path")
    if isinstance(adapters, str) and "," not in adapters:
        carried.put("model.adapter", adapters)
    elif adapters:
        carried.leave("adapter_name_or_path", adapters, "go on from one; `fitout merge A B` combines several")
    batch(raw.get("per_device_train_batch_size", 8), raw.get("gradient_accumulation_steps", 1), carried)
    carried.recipe["data"]["sources"] = llama_factory_sources(raw, path, carried)
    split(raw.get("val_size"), raw.get("eval_dataset"), "val_size", carried)
    return carried


def llama_factory_preference(raw: dict[str, Any], carried: Carried) -> None:
    kinds = {"sigmoid": "dpo", "orpo": "orpo", "simpo": "simpo"}
    loss = raw.get("pref_loss", "sigmoid")
    kind = kinds.get(loss, "dpo")
    if loss not in kinds:
        carried.leave("pref_loss", loss, f"known here are {', '.join(kinds)}")
    carried.put("objective", {"kind": kind, "beta": as_number(raw.get("pref_beta")) or 0.1})
    if kind == "simpo":
        gamma = as_number(raw.get("simpo_gamma"))
        carried.put("objective.gamma", 0.5 if gamma is None else gamma)
    if kind == "dpo" and raw.get("adapter_name_or_path"):
        carried.notes.append(f"{REFERENCE}, its adapter included; there it is the base without the adapter")


def llama_factory_method(raw: dict[str, Any], carried: Carried) -> None:
    kind = raw.get("finetuning_type", "lora")
    if kind in ("full", "freeze"):
        carried.put("method.kind", "full")
        layers = raw.get("freeze_trainable_layers", 2)
        if kind == "freeze" and isinstance(layers, int) and layers > 0:
            carried.put("method.last_layers", layers)
        elif kind == "freeze":
            carried.leave("freeze_trainable_layers", layers, "only last layers; others by method.freeze")
        return
    if kind != "lora":
        carried.leave("finetuning_type", kind, "methods are full, lora, dora, qlora, adapter, sparse")
    rank = as_number(raw.get("lora_rank")) or 8
    carried.put("method", {"kind": "lora", "rank": int(rank), "alpha": 2 * rank, "targets": "all-linear"})
    bits = raw.get("quantization_bit")
    if bits == 4:
        carried.put("method.kind", "qlora")
    elif bits:
        carried.leave("quantization_bit", bits, "bases are quantised to 4 bits, or not")
    if raw.get("use_dora") is True:
        carried.put("method.dora" if bits == 4 else "method.kind", True if bits == 4 else "dora")


def llama_factory_sources(raw: dict[str, Any], path: Path, carried: Carried) -> list[dict[str, Any]]:
    folder = raw.get("dataset_dir", "data")
    here = find_folder(folder if isinstance(folder, str) else "data", path)
    described = read_yaml(here / "dataset_info.json") if here and (here / "dataset_info.json").exists() else {}
    if not described:
        carried.notes.append(f"no dataset_info.json was found in {folder}; the sources are names to be replaced.")
    sources = []
    limit = raw.get("max_samples")
    wanted: list[tuple[str, str | None]] = [(name, None) for name in listed(raw.get("dataset"))]
    wanted += [(name, "validation") for name in listed(raw.get("eval_dataset"))]
    for name, part in wanted:
        about = described.get(name)
        source: dict[str, Any] = (
            described_source(name, about, here or Path(), raw.get("stage") == "pt", carried)
            if isinstance(about, dict)
            else {"path": name}
        )
        if described and not isinstance(about, dict):
            carried.leave("dataset", name, "not in dataset_info.json")
        if isinstance(limit, int) and limit > 0:
            source["limit"] = min(limit, source.get("limit", limit))
        sources.append(source | ({"split": part} if part else {}))
    if not sources:
        carried.leave("dataset", None, "no data set is named")
        sources = [{"path": "DATA"}]
    shares = [as_number(part) for part in listed(raw.get("interleave_probs"))]
    mixed = str(raw.get("mix_strategy", "concat"))
    if mixed.startswith("interleave") and len(shares) == len(listed(raw.get("dataset"))) and all(shares):
        total = sum(share for share in shares if share)
        for source, share in zip(sources, shares, strict=False):
            source["share"] = (share or 0) / total
    elif mixed != "concat":
        carried.leave("mix_strategy", mixed, "give each source a `share` or a `weight`")
    return sources


def described_source(name: str, about: dict[str, Any], folder: Path, plain: bool, carried: Carried) -> dict[str, Any]:
    """A source from an entry of dataset_info.json."""
    where = f"dataset_info.json: {name}"
    if isinstance(about.get("file_name"), str):
        source: dict[str, Any] = {"path": str(folder / about["file_name"])}
    else:
        hub = next((key for key in ("hf_hub_url", "ms_hub_url") if isinstance(about.get(key), str)), None)
        if hub is None:
            carried.leave(where, sorted(about), "neither a file nor a data set on a hub")
            return {"path": name}
        subset = f"/{about['subset']}" if about.get("subset") else ""
        part = f":{about['split']}" if about.get("split") else ""
        source = {"path": f"{hub[:2]}://{about[hub]}{subset}{part}"}
    theirs = about.get("columns") if isinstance(about.get("columns"), dict) else {}
    tags = about.get("tags") if isinstance(about.get("tags"), dict) else {}
    assert isinstance(theirs, dict) and isinstance(tags, dict)
    if plain:
        source["format"], ours = "text", {"prompt": "text"}
    elif about.get("ranking"):
        source["format"] = "preference"
        ours = {
            "messages": "conversations",
            "prompt": "instruction",
            "query": "input",
            "chosen": "chosen",
            "rejected": "rejected",
        }
    elif about.get("formatting", "alpaca") == "sharegpt":
        spelled = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        forms = {("from", "value"): "sharegpt", ("role", "content"): "openai"}
        if spelled not in forms:
            carried.leave(where, tags, "turns are spelled from/value or role/content")
        source["format"] = forms.get(spelled, "sharegpt")  # type: ignore[arg-type]
        ours = {"messages": "messages" if source["format"] == "openai" else "conversations"}
        strange = [
            word
            for key, word in tags.items()
            if key.endswith("_tag") and key not in ("role_tag", "content_tag") and str(word).lower() not in ROLES
        ]
        if strange:
            carried.leave(where, strange, f"roles are spelled {', '.join(ROLES)}")
    else:
        source["format"], ours = "alpaca", {"prompt": "instruction", "query": "input", "response": "output"}
    ours |= {"system": "system", "tools": "tools", "history": "history"}
    columns = {}
    for key, column in theirs.items():
        if key in ("images", "videos", "audios"):
            carried.leave(where, {key: column}, MEDIA)
        elif key == "kto_tag":
            carried.leave(where, {key: column}, "answers marked as bad are left out; " + PREFERENCE)
        elif key not in ours:
            carried.leave(where, {key: column}, "a column this format does not read")
        elif (
            isinstance(column, str)
            and column != ours[key]
            and not (key == "messages" and column in ("messages", "conversations"))
        ):
            columns[ours[key]] = column
    if columns:
        source["columns"] = columns
    if isinstance(about.get("num_samples"), int):
        source["limit"] = about["num_samples"]
    for key in set(about) - {
        "file_name",
        "hf_hub_url",
        "ms_hub_url",
        "subset",
        "split",
        "columns",
        "tags",
        "formatting",
        "ranking",
        "num_samples",
        "file_sha1",
    }:
        carried.leave(where, {key: about[key]}, "unknown to this version")
    return source
