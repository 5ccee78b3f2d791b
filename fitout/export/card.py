"""What a model card says: metadata for the hub, how to load the folder, and a run's record in tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..files import read_json
from ..model.load import SHELL

if TYPE_CHECKING:
    from ..rundir import RunDir

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FORMAT = "## Files"
TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""
PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(BASE){grow}
model = PeftModel.from_pretrained(model, folder)
messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=100, do_sample=False{stop})[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""
OWN = """\
```
fitout chat FOLDER
fitout serve FOLDER
```

This kind of adapter is Fitout's own; PEFT does not load it."""


def named(base: str) -> str:
    """The base as others can find it; no path of this machine where there is a better name."""
    return "embedded:shell" if Path(base) == SHELL else base


def is_hub_id(base: str) -> bool:
    return HUB_ID.fullmatch(base) is not None and not Path(base).exists()


def adapter_type(folder: Path) -> str | None:
    """`peft_type` of an adapter folder; None for a model folder."""
    path = folder / "adapter_config.json"
    return read_json(path).get("peft_type") if path.exists() else None


def head(folder: Path, base: str) -> str:
    """The YAML front matter. `base_model` and `license` are only given where they are known."""
    kind = adapter_type(folder)
    values: dict[str, Any] = {}
    if is_hub_id(base):
        values["base_model"] = base
        values["base_model_relation"] = "adapter" if kind else "finetune"
    declared = _declared_licence(base)
    if declared:
        values["license"] = declared
    values["library_name"] = "peft" if kind == "LORA" else "transformers"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["fitout", *([kind.lower()] if kind else [])]
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---"


def opening(folder: Path, base: str) -> str:
    what = "An adapter for" if adapter_type(folder) else "A fine-tuned version of"
    return f"{what} `{named(base)}`, made with Fitout."


def usage(folder: Path, base: str) -> list[str]:
    """How to load it, and the template and stop ids it was trained with."""
    kind = adapter_type(folder)
    gguf = sorted(folder.glob("*.gguf"))
    chat = _chat_facts(folder)
    if gguf:
        text = f"`{gguf[0].name}` is for llama.cpp: `llama-server -m {gguf[0].name} --jinja`."
        if (folder / "Modelfile").exists():
            text += " For Ollama: `ollama create NAME -f Modelfile`, then `ollama run NAME`."
    elif kind == "LORA":
        grow = "\nmodel.resize_token_embeddings(len(tokenizer))" if _has_embeddings(folder) else ""
        stop = f", eos_token_id={chat['stop ids']}" if chat.get("stop ids") else ""
        text = PEFT.replace("BASE", json.dumps(base)).replace("{grow}", grow).replace("{stop}", stop)
    else:
        code = ", trust_remote_code=True" if _brings_code(folder) else ""
        model = TRANSFORMERS.replace("from_pretrained(folder)\nmessages", f"from_pretrained(folder{code})\nmessages")
        text = OWN.replace("FOLDER", str(folder.name)) if kind else model
    parts = [f"## How to use it\n\n{text}"]
    if chat:
        stops = ", ".join(f"{i} (`{t}`)" for i, t in zip(chat["stop ids"], chat["stop texts"], strict=True))
        parts.append(
            "It was trained with the chat template in this folder and answers only as trained when asked with it. "
            f"A turn ends with token {stops}. A question is sent as:\n\n```\n{chat['asked']}\n```"
        )
    return parts


def licence(base: str) -> str:
    declared = _declared_licence(base)
    if declared:
        return f"## Licence\n\nThe base model's card declares `{declared}`; what was trained from it is bound by that."
    near = "" if is_hub_id(base) else _licence_file(base)
    return (
        f"## Licence\n\nThe licence of `{named(base)}` is not known to Fitout{near}. Check it, and that of the data, "
        "before you pass this on."
    )


def _licence_file(base: str) -> str:
    found = sorted(p.name for p in Path(base).glob("LICENSE*")) if Path(base).is_dir() else []
    return f" (its folder has a {found[0]})" if found else ""


def _declared_licence(base: str) -> str | None:
    """What the base folder's own card declares."""
    path = Path(base) / "README.md"
    if not path.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        values = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def _brings_code(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and "auto_map" in read_json(path)


def _has_embeddings(folder: Path) -> bool:
    return any(".lora_" not in name and "embed" in name for name in adapter_tensors(folder))


def adapter_tensors(folder: Path) -> list[str]:
    """The tensor names of an adapter folder; none where it holds no adapter's weights."""
    from ..model.methods import saved_shapes

    return list(saved_shapes(folder)) if (folder / "adapter_model.safetensors").exists() else []


def _chat_facts(folder: Path) -> dict[str, Any]:
    if not (folder / "tokenizer_config.json").exists():
        return {}
    from ..chat.render import SAMPLE, open_chat

    chat = open_chat(folder)
    texts = [chat.tokenizer.decode([i]) for i in chat.stop_ids]
    return {"stop ids": list(chat.stop_ids), "stop texts": texts, "asked": chat.prompt_text(SAMPLE[:1]).rstrip("\n")}


def kept(folder: Path) -> str:
    """What a method wrote about its files in README.md: all of it, or the last section of a card written before."""
    path = folder / "README.md"
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        return text.strip()
    return text.partition(f"\n{FORMAT}\n")[2].strip()


# a run's record


def facts_of(directory: RunDir, recipe: Any) -> dict[str, Any]:
    """Everything the run directory holds about how its model came to be, as tables."""
    status = directory.read_status()
    report = read_json(directory.data_report) if directory.data_report.exists() else {}
    scores = read_json(directory.evaluation_report) if directory.evaluation_report.exists() else {}
    return {
        "Data": _data(status, report),
        "Training": _training(status, recipe),
        "Scores, with 95 % intervals": _scores(scores),
        "Kept from the base, with 95 % intervals": _retention(scores),
        "Hardware and software": _machine(status),
    }


def _data(status: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    if not report:
        return {}
    part = report["parts"]["train"]
    facts: dict[str, Any] = {"fingerprint": status.get("data_fingerprint")}
    for source in report["sources"]:
        facts[f"source {Path(source['path']).name}"] = f"{source['samples']:,} samples, format {source['format']}"
    facts["samples"] = f"{report['samples']:,}"
    facts["kept"] = ", ".join(f"{name} {count:,}" for name, count in report["kept"].items())
    for what in ("quarantined", "removed", "repaired"):
        facts[what] = "; ".join(f"{count:,} {why}" for why, count in report[what].items()) or "0"
    facts["training tokens"] = f"{part['tokens']:,}, of them supervised {part['supervised']:,}"
    facts["longest allowed"] = f"{report['max_length']:,} tokens; longer ones: {report['too_long']}"
    for line in (report.get("tasks") or {}).get("grid", ()):
        counts = ", ".join(f"{part} {line[part]['samples']:,}" for part in report["kept"])
        facts[f"task {' / '.join(filter(None, (line['task'], line['subtask'])))}"] = counts
    return facts


def _training(status: dict[str, Any], recipe: Any) -> dict[str, Any]:
    training, train = status.get("training", {}), recipe.train
    method = {k: v for k, v in recipe.method.model_dump(mode="json").items() if k != "kind" and v not in (None, [], {})}
    return {
        "base": named(recipe.model.base) + (f" at {recipe.model.revision}" if recipe.model.revision else ""),
        "method": f"{recipe.method.kind} ({', '.join(f'{k} {v}' for k, v in method.items())})"
        if method
        else recipe.method.kind,
        "objective": recipe.objective.kind,
        "learning rate": recipe.lr,
        "batch": f"{train.batch_tokens} tokens" if train.batch_tokens else f"{train.batch_size} examples",
        "steps": training.get("steps"),
        "epochs asked for": None if train.max_steps else train.epochs,
        "supervised tokens": training.get("supervised_tokens"),
        "trained parameters": _share(training),
        "precision": status.get("precision"),
        "validation loss, base": _rounded(training.get("base_loss")),
        "validation loss, best": _rounded(training.get("best_loss")),
        "best step": training.get("best_step"),
        "seed": status.get("seed"),
        "seconds": training.get("seconds"),
    }


def _share(training: dict[str, Any]) -> str | None:
    trained, whole = training.get("trained_parameters"), training.get("parameters")
    return f"{trained:,} of {whole:,} ({100 * trained / whole:.2f} %)" if trained and whole else None


def _rounded(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def _scores(report: dict[str, Any]) -> list[list[Any]]:
    """Base against tuned on the held-out test part; every figure with its 95 % interval."""
    rows = [[score["name"], *_compared(score)] for score in report.get("scores", [])]
    return [["", "n", "base", "tuned", "change", ""], *rows] if rows else []


def _retention(report: dict[str, Any]) -> list[list[Any]]:
    retention = report.get("retention")
    if not retention:
        return []
    rows = [[name, *_compared(score)] for name, score in retention["groups"].items()]
    source = Path(retention["source"]).name  # a file's folder is nobody's business
    if retention["overall"]:
        rows.append([f"all ({source})", *_compared(retention["overall"])])
    if retention.get("perplexity"):
        rows.append([f"perplexity of {source}, lower is better", *_compared(retention["perplexity"])])
    return [["probes", "n", "base", "tuned", "change", ""], *rows]


def _compared(score: dict[str, Any]) -> list[Any]:
    figures = [f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})" for one in
               (score["base"], score["tuned"])]  # fmt: skip
    change = score["difference"]
    return [
        score["base"]["n"],
        *figures,
        f"{change['value']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})",
        score["verdict"],
    ]


def _machine(status: dict[str, Any]) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in status.get("versions", {}).items())
    hardware = status.get("hardware") or status.get("device")
    return {"hardware": hardware, "processes": status.get("ranks"), "versions": versions or None}
