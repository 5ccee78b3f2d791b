"""`fitout export`: what one engine needs, in one folder, checked after writing."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..chat.render import SAMPLE
from ..errors import CheckError, RequestError
from ..files import explain_os_errors, read_json, sha256_file, staged_folder, write_json, write_text
from ..model.load import DTYPES, load_adapter, load_base
from ..model.methods import saved_in
from . import Engine, StoredAs
from .engines import Parts, vllm_rank
from .gguf import STORED, write_gguf
from .gguf_check import check_tensors, model_of, read_gguf
from .gguf_vocab import describe
from .merge import TOLERANCE, logits, merge_adapter, probe_ids, stored_dtype
from .modelfile import left_out, modelfile, translate
from .write import write_card

LOSSY = {"f32": 1e-4, "f16": 5e-3, "bf16": 3e-2, "q8_0": 0.1}  # largest relative difference of logits allowed
VLLM = ("python", "-m", "vllm.entrypoints.openai.api_server")
LEFT_BEHIND = {"README.md", "training_args.bin"}


@dataclass
class Exported:
    """What was written: how it differs from what was trained, and how to start it."""

    folder: Path
    checked: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """One export: for which engine, where to, from which merged folder, as what."""

    engine: Engine
    to: Path
    name: str
    kind: StoredAs | None
    facts: Mapping[str, Any]
    texts: tuple[str, ...]
    into: str = "dequantised"  # which weights the adapter of a quantised base was merged into


def export_merged(parts: Parts, plain: Path, wanted: Wanted) -> Exported:
    """Writes the plain model folder `plain` in the engine's form and compares what was written with base + adapter.

    Raises CheckError, and leaves nothing behind, when the logits or the token ids are not those of what was trained.
    """
    probes = probe_ids(parts.chat, parts.config.vocab_size)
    truth = true_logits(parts, plain, probes, wanted.into)
    with staged_folder(wanted.to) as folder:
        if wanted.engine in ("ollama", "llamacpp"):
            exported = _write_gguf_folder(parts, plain, folder, wanted, truth, probes)
        else:
            exported = _copy_model(parts, plain, folder, wanted, truth, probes)
        facts = {**wanted.facts, "Checked after writing": exported.checked}
        write_card(folder, name=wanted.name, base=parts.base, facts=facts)
    return exported


def export_unmerged(parts: Parts, wanted: Wanted) -> Exported:
    """The adapter with its template and stop ids, to be served over its base by vLLM."""
    assert parts.adapter is not None
    with staged_folder(wanted.to) as folder:
        _copy(parts.adapter, folder)
        ids = list(parts.chat.stop_ids)
        write_json(folder / "generation_config.json", {"eos_token_id": ids if len(ids) != 1 else ids[0]})
        exported = Exported(wanted.to, commands=[_serve_adapter(parts, wanted)])
        exported.checked["adapter files"] = _equal_files(parts.adapter, folder, "adapter_")
        write_card(folder, name=wanted.name, base=parts.base, facts=wanted.facts)
    return exported


def true_logits(parts: Parts, plain: Path, probes: list[torch.Tensor], into: str) -> torch.Tensor:
    """The logits of what was trained: of base + adapter, computed afresh, where there is an adapter.

    A base that was quantised in training is so here too, unless the adapter went `into` the "original" weights.
    """
    if parts.adapter is None:
        return logits(load_base(str(plain), packed=False), probes)
    method = saved_in(parts.adapter)
    trained_over = method.trained_in(parts.adapter)
    if trained_over and into == "original":
        method, trained_over = method.plain(), None
    dtype = DTYPES[trained_over or "fp32"]
    model = load_base(
        parts.base,
        dtype=dtype,
        packed=False,
        extra=method.load_kwargs(dtype),
        revision=parts.revision,
        trust_remote_code=parts.trust_remote_code,
    )
    load_adapter(model, parts.adapter, method)
    method.in_fp32(model)
    return logits(model, probes)


def export_with_code(parts: Parts, wanted: Wanted) -> Exported:
    """Base and an adapter that cannot be merged, as one folder with the code that puts them together."""
    from .patched import write_patched

    assert parts.adapter is not None and parts.unmergeable is not None
    difference = write_patched(
        parts.base,
        parts.adapter,
        wanted.to,
        name=wanted.name,
        facts=dict(wanted.facts),
        revision=parts.revision,
        trust_remote_code=parts.trust_remote_code,
    )
    exported = Exported(wanted.to, notes=[f"not merged: {parts.unmergeable.why}"])
    exported.checked["logits of the folder, loaded afresh"] = f"largest relative difference {difference:.2g}"
    exported.notes.append("the folder brings code: transformers loads it with trust_remote_code=True")
    return exported


@contextmanager
def merged_beside(parts: Parts, to: Path) -> Iterator[Path]:
    """The plain model of an adapter that has none yet, merged into a folder that goes away afterwards."""
    assert parts.adapter is not None
    with explain_os_errors(to, "write"):
        to.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{to.name}.", suffix=".merge", dir=to.parent) as folder:
        merge_adapter(
            parts.base,
            parts.adapter,
            Path(folder) / "merged",
            name=to.name,
            facts={},
            revision=parts.revision,
            trust_remote_code=parts.trust_remote_code,
        )
        yield Path(folder) / "merged"


def require_free(to: Path) -> None:
    """An export never takes the place of something else."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RequestError(
            "this folder is there already and is not empty",
            where=str(to),
            harm="What is in it would be lost.",
            hint="Give another --to, or remove it yourself.",
        )


def _copy(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in LEFT_BEHIND and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def _equal_files(source: Path, folder: Path, prefix: str) -> str:
    """Hashes what was copied. Raises CheckError when a file is not the one it was made from."""
    names = sorted(path.name for path in source.iterdir() if path.name.startswith(prefix))
    for name in names:
        if sha256_file(source / name) != sha256_file(folder / name):
            raise CheckError(
                f"{name} was not copied as it is",
                where=str(folder),
                harm="The engine would load another adapter; it was not kept.",
                hint="Look at the disk, then export again.",
            )
    return f"SHA-256 of {', '.join(names)} equal to the source's"


# transformers, vLLM


def _copy_model(
    parts: Parts, plain: Path, folder: Path, wanted: Wanted, truth: torch.Tensor, probes: list[torch.Tensor]
) -> Exported:
    """The folder as it is, loaded afresh by plain transformers in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _copy(plain, folder)
    exported = Exported(wanted.to)
    dtype = stored_dtype(parts.config)
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    difference = _compare(logits(fresh, probes), truth, TOLERANCE[dtype], wanted.to)
    exported.checked["logits, plain transformers in fp32"] = f"largest relative difference {difference:.2g}"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = [message.as_dict() for message in SAMPLE[:1]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    stops = read_json(folder / "generation_config.json").get("eos_token_id")
    stops = set(stops if isinstance(stops, list) else [stops])
    if ids != parts.chat.prompt_ids(SAMPLE[:1]) or not set(parts.chat.stop_ids) <= stops:
        raise CheckError(
            "the exported tokenizer or generation config does not say what was trained",
            where=str(wanted.to),
            harm="The engine would send other ids, or not stop where the model was trained to.",
            hint="Merge again (fitout merge), then export.",
        )
    exported.checked["prompt ids and stop ids"] = f"equal; stops {sorted(parts.chat.stop_ids)}"
    if wanted.engine == "vllm":
        serve = [*VLLM, "--model", wanted.to.resolve(), "--served-model-name", wanted.name]
        exported.commands.append(_line(*serve, "--generation-config", "auto"))
    else:
        exported.commands.append(_line("fitout", "chat", wanted.to))
    return exported


def _serve_adapter(parts: Parts, wanted: Wanted) -> str:
    folder = wanted.to.resolve()
    command: list[Any] = [*VLLM, "--model", parts.base, *(["--revision", parts.revision] if parts.revision else [])]
    command += ["--tokenizer", folder, "--enable-lora", "--max-lora-rank", vllm_rank(parts)]
    command += ["--lora-modules", f"{wanted.name}={folder}"]
    if parts.chat.tokenizer.chat_template:
        command += ["--chat-template", folder / "chat_template.jinja"]
    return _line(*command, "--generation-config", folder)


def _line(*words: Any) -> str:
    """A command as it is typed."""
    return shlex.join(map(str, words))


# llama.cpp, Ollama


def _write_gguf_folder(
    parts: Parts, plain: Path, folder: Path, wanted: Wanted, truth: torch.Tensor, probes: list[torch.Tensor]
) -> Exported:
    kind: StoredAs = wanted.kind or STORED[stored_dtype(parts.config)]
    path = folder / f"{wanted.name}.gguf"
    exported = Exported(wanted.to)
    vocabulary = describe(parts.chat, _rows(plain), wanted.texts)
    exported.notes += vocabulary.notes[1:]
    exported.notes += write_gguf(plain, path, parts.chat, vocabulary, name=wanted.name, kind=kind)
    read = read_gguf(path)
    worst = check_tensors(read, plain)
    exported.checked["tensors read back"] = f"{len(read.tensors)}, largest relative difference {worst:.2g} ({kind})"
    difference = _compare(logits(model_of(read), probes), truth, LOSSY[kind], wanted.to)
    exported.checked["logits from the file's own keys and tensors"] = f"largest relative difference {difference:.2g}"
    exported.checked["token ids"] = vocabulary.notes[0]
    if wanted.engine == "ollama":
        write_text(folder / "Modelfile", modelfile(parts.chat, path))
        exported.notes += left_out(parts.chat, translate(parts.chat))
        exported.checked["Ollama template"] = "renders as the tokenizer's own"
        exported.commands.append(_line("ollama", "create", wanted.name, "-f", wanted.to.resolve() / "Modelfile"))
        exported.commands.append(_line("ollama", "run", wanted.name))
    else:
        exported.commands.append(_line("llama-server", "-m", wanted.to.resolve() / path.name, "--jinja"))
    return exported


def _rows(plain: Path) -> int:
    return read_json(plain / "config.json")["vocab_size"]


def _compare(got: torch.Tensor, want: torch.Tensor, allowed: float, where: Path) -> float:
    """The largest difference over the largest size; refuses more than `allowed`."""
    same = got.shape == want.shape
    difference = float((got - want).abs().max() / want.abs().max()) if same else float("inf")
    if not difference <= allowed:
        raise CheckError(
            f"the exported model's logits differ from what was trained by {difference:.2g} (allowed: {allowed:g})",
            where=str(where),
            harm="It would not be the model that was trained and evaluated; it was not kept.",
            hint="Merge again (fitout merge) and export again; if that does not help, report the model's name.",
        )
    return difference
