"""Finding and loading models: a folder, a hub id, the embedded one, or a run directory with what it trained."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError
from ..files import atomic_path, errors_of_the_system, read_json
from ..rundir import RunDir
from . import EMBEDDED
from .attention import NAME as PACKED
from .attention import register, take, takes_others

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHELL = Path(__file__).parents[1] / "demo" / "shell"


@dataclass(frozen=True)
class Resolved:
    """Where a model's parts are: weights (of a hub id, at `revision`), an adapter over them, tokenizer and template."""

    base: str
    adapter: Path | None
    chat_folder: str
    revision: str | None = None


def resolve(what: str | Path, *, adapter: str | Path | None = None) -> Resolved:
    """Finds what a user means: `embedded:shell`, a run directory, an adapter folder, a model folder, or a hub id; with
    `adapter` the whole model that this is, and that adapter over it."""
    name = str(what)
    if name == EMBEDDED:
        return _with(str(SHELL), adapter)
    path = Path(what)
    if not path.exists():
        if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise ModelError(
                "there is no such model folder or run",
                where=name,
                hint="Give a folder with config.json and *.safetensors, a run directory, a hub id (owner/name), "
                f"or {EMBEDDED}.",
            )
        return _with(name, adapter)
    run = RunDir(path)
    if run.exists():
        if whole := _whole(run):
            return _with(str(whole), adapter)
        if not (run.adapter / "adapter_config.json").exists():
            raise ModelError(
                "this run has no adapter/, model/ or merged/ yet",
                where=name,
                hint="Let it finish with `fitout run` or `fitout train --resume`.",
            )
        path = run.adapter
    if not (path / "adapter_config.json").exists():
        return _with(name, adapter)
    if adapter is not None:
        raise ModelError(
            "this is an adapter itself, over which another one is to lie",
            where=name,
            harm="One of the two would be left out.",
            hint="Merge it first (`fitout merge`), or give the other one over the base model.",
        )
    return _of_adapter(path)


def _with(base: str, adapter: str | Path | None) -> Resolved:
    given = adapter_folder(adapter) if adapter else None
    return Resolved(base, given, _speaks(given, base))


def _speaks(adapter: Path | None, base: str) -> str:
    """Whose tokenizer and template are meant: the adapter's, which it was trained in, where it has them."""
    own = adapter is not None and any((adapter / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return str(adapter) if own else base


def _whole(run: RunDir) -> Path | None:
    """A run's model that needs no other: of full fine-tuning, or merged of what it trained last."""
    status = run.read_status()
    if (run.merged / "config.json").exists() and status.get("merged_steps") == status.get("trained_steps"):
        return run.merged
    return run.model if (run.model / "config.json").exists() else None


def _of_adapter(folder: Path) -> Resolved:
    """An adapter's model: the base that it names, which may not be an adapter again."""
    config = read_json(folder / "adapter_config.json")
    config = config if isinstance(config, dict) else {}
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str | None):
        raise ModelError(
            f"what the adapter names as its base is no name: {str(name)[:100]}",
            where=str(folder / "adapter_config.json"),
            hint="Let it name the model: a folder, or a hub id (owner/name).",
        )
    if not name or _only_adapts(Path(name)):
        raise ModelError(
            f"the adapter's base is itself an adapter ({name})" if name else "the adapter does not name its base",
            where=str(folder / "adapter_config.json"),
            harm="An adapter is a change of the weights of a whole model; there are none.",
            hint="Let base_model_name_or_path name the model; `fitout merge` makes one out of a base and an adapter.",
        )
    base = resolve(name).base
    return Resolved(base, folder, _speaks(folder, base), config.get("revision"))


def _only_adapts(path: Path) -> bool:
    """Whether this is an adapter folder, or a run that has an adapter and no whole model."""
    run = RunDir(path)
    return (path / "adapter_config.json").exists() or (
        _whole(run) is None and (run.adapter / "adapter_config.json").exists()
    )


def adapter_folder(adapter: str | Path) -> Path:
    """The folder with adapter_config.json: the one given, or a run's."""
    path = Path(adapter)
    for folder in (path, RunDir(path).adapter):
        if (folder / "adapter_config.json").exists():
            return folder
    raise ModelError(
        "there is no adapter_config.json here",
        where=str(adapter),
        hint="Give an adapter folder in PEFT's format, or a run that trained one.",
    )


def _check_folder(base: str) -> None:
    """A local folder must hold a config and safetensors weights; pickled weights are never opened."""
    folder = Path(base)
    if not folder.exists():
        return
    if not (folder / "config.json").exists():
        raise ModelError("this folder has no config.json", where=base, hint="Give a Hugging Face model folder.")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        _check_index(index)
    if list(folder.glob("*.safetensors")):
        return
    pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
    if pickled:
        raise ModelError(
            f"the weights are pickled ({pickled[0]}) and are not opened",
            where=base,
            harm="Loading a pickle runs code of whoever made the file.",
            hint="Convert it to safetensors where it came from, or take a safetensors copy.",
        )
    raise ModelError(
        "this folder has a config.json but no weights (*.safetensors)",
        where=base,
        harm="Training would start from random numbers.",
        hint="Copy the weights into it, or give another model.base.",
    )


def _check_index(index: Path) -> None:
    """Every file that an index of weights names must be safetensors and lie beside it."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        wrong = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        lacking = [name for name in names if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the index of the weights cannot be read: {error!r}", where=str(index), hint="Copy the model again."
        ) from error
    if wrong:
        raise ModelError(
            f"the index of the weights names {wrong[0]!r}, which is no safetensors file of this folder",
            where=str(index),
            harm="A file from elsewhere, or a pickle that runs code, would be loaded as weights.",
            hint="Do not use this copy, or take one whose index names only its own *.safetensors.",
        )
    if lacking:
        raise ModelError(
            f"{len(lacking)} of {len(names)} files of weights are not there (first: {lacking[0]})",
            where=str(index),
            harm="Their weights would be random numbers.",
            hint="Copy the model again; a download may have been cut short.",
        )


def load_base(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    extra: dict[str, Any] | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """A causal language model with its weights in `dtype`; `packed` gives it our attention, else transformers' SDPA.

    `extra` goes to `from_pretrained` as it is (a method's `load_kwargs`). An `empty` one has shapes and no values, on
    `meta`, for a rank that is given them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_folder(base)
    register()
    logging.disable_progress_bar()
    asked = PACKED if packed else "sdpa"
    if empty:
        config = load_config(base, revision=revision, trust_remote_code=trust_remote_code)

        def made(attention: str) -> Any:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
                )

        shape = _or_eager(made, asked)
        shape.config.use_cache = False
        return shape

    def loaded(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attention,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **(extra or {}),
        )

    try:
        model, info = _or_eager(loaded, asked)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _cannot_load(base, error) from error
    if packed and not takes_others(model):
        take(model, "eager")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from the files (first: {missing[0]})",
            where=base,
            harm="They would be random numbers.",
            hint="Take a complete copy of the model.",
        )
    model.config.use_cache = False
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "output_router_logits", False):  # for a balancing loss of transformers' own, which none here asks
        text.output_router_logits, model.fitout_balances = False, True
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack 4-bit weights, with a loss and
            module.support_avx512bf16_for_cpu = False  # without a way back, in the first forward of an evaluation
    if extra and packed:
        _require_computes(model, base)
    return model.to(device)


@torch.no_grad()
def _require_computes(model: Any, base: str) -> None:
    """Before it is trained, a model whose weights a method had loaded in another form must compute with them: Mamba's
    code multiplies by a weight itself, which in 4 bits has another shape."""
    before = model.config._attn_implementation
    take(model, "eager")
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            "this model's own code does not compute with quantised weights: it reads them itself",
            where=base,
            hint="Take method: {kind: lora}.",
        ) from error
    finally:
        take(model, before)


def _or_eager(make: Callable[[str], Any], attention: str) -> Any:
    """A model with the attention, or its own where its architecture knows none of the name (Falcon) or one (Bloom)."""
    try:
        return make(attention)
    except (KeyError, ValueError):
        return make("eager")


def load_config(base: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration. Raises ModelError when there is none."""
    from transformers import AutoConfig

    _check_folder(base)
    try:
        return AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_load(base, error) from error


def _cannot_load(base: str, error: Exception) -> ModelError:
    return ModelError(
        f"the model cannot be loaded: {str(error).strip().splitlines()[0]}",
        where=base,
        hint="If you trust who made it: --trust-remote-code (chat, serve, export), or model.trust_remote_code: true in "
        "the recipe."
        if "trust_remote_code" in str(error)
        else "Check the folder or hub id; for hub ids the network, HF_TOKEN (gated models) and HF_ENDPOINT.",
    )


def hidden_width(config: Any) -> int:
    """The model's hidden size, from its configuration; 512 where it does not say."""
    return getattr(config.get_text_config(decoder=True), "hidden_size", 512)


@torch.no_grad()
def grow_vocabulary(model: Any, size: int) -> None:
    """Readies the model for tokens added to its tokenizer (now of `size`): rows that are lacking start at the mean of
    the others, and embeddings are marked as trained and saved with an adapter, also where there were rows to spare."""
    old = model.get_input_embeddings().weight.shape[0]
    if size > old:
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[old:] = module.weight[:old].float().mean(0).to(module.weight.dtype)
    model.fitout_grown_vocabulary = True


def embeddings(model: Any) -> dict[str, Any]:
    """Input embedding, and the head where it is not tied to it, by name."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        if module is model.get_input_embeddings() or module is model.get_output_embeddings():
            if id(module.weight) not in seen:
                found[name] = module
            seen.add(id(module.weight))
    return found


def untie(model: Any) -> None:
    """Gives the head a weight of its own, equal to the embedding's that it shared, and has the config say so."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def load_adapter(model: PreTrainedModel, folder: Path, method: Any = None) -> Any:
    """Applies the adapter in `folder` to the model; returns the method, whose `merge` folds it in.

    `method` is the one that made it unless another that reads its files is given (`Method.plain`).
    """
    from .methods import saved_in, saved_shapes

    ends = tuple(f".{name}.weight" for name in embeddings(model))
    grown = [shape[0] for name, shape in saved_shapes(folder).items() if f".{name}".endswith(ends)]
    method = method or saved_in(folder)
    for size in grown:  # embeddings that were trained for added tokens
        grow_vocabulary(model, size)
    method.apply(model)
    method.load(model, folder)
    return method


def open_model(
    what: str | Path,
    *,
    adapter: str | Path | None = None,
    precision: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    like: Path | None = None,
) -> PreTrainedModel:
    """The model for inference: base and adapter put together, eval mode, SDPA attention, on the best device.

    The base is held as the adapter's method holds it (in 4 bits, say); without one, as that of the adapter in the
    folder `like`.
    """
    from .methods import saved_in
    from .precision import best_device, decide, use_threads

    parts = resolve(what, adapter=adapter)
    source: Any = {"revision": revision or parts.revision, "trust_remote_code": trust_remote_code}
    device = best_device()
    folder = parts.adapter or like
    method = saved_in(folder) if folder else None
    if method is not None and folder is not None and precision == "auto":
        precision = method.trained_in(folder) or precision
    width = hidden_width(load_config(parts.base, **source))
    use_threads(width, device)
    dtype = DTYPES[decide(precision, device, width=width).kind]
    extra = method.load_kwargs(dtype) if method is not None else None
    model: Any = load_base(parts.base, dtype=dtype, packed=False, device=device, extra=extra, **source)
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    model.fitout_held = method.held if method is not None else None  # for who says what it talks with
    return model.eval()


@dataclass(frozen=True)
class Pending:
    """A tensor that is divided over ranks; `fetch`, which all ranks must call in turn, brings it together."""

    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]


def in_order(tensors: Mapping[str, torch.Tensor | Pending]) -> list[str]:
    """The names in the order of a file: wide numbers first, so that each stands at a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | Pending], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically, straight from the tensors: a copy in memory first would make saving a full
    fine-tuning's optimizer the largest moment of the run (measured: 4.5 instead of 2.8 GB at 135 M parameters).
    Tensors that are divided over ranks are brought together and written one at a time."""
    from safetensors.torch import save_file

    if any(isinstance(tensor, Pending) for tensor in tensors.values()):
        with atomic_path(path) as staging:
            _stream(staging, tensors, {"format": "pt", **(metadata or {})})
        return
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    with atomic_path(path) as staging, errors_of_the_system(path):
        save_file(plain, staging, {"format": "pt", **(metadata or {})})


DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _stream(path: Path, tensors: Mapping[str, torch.Tensor | Pending], metadata: dict[str, str]) -> None:
    """The safetensors format, one tensor at a time: eight bytes of header length, a JSON header, the bytes in its order
    (github.com/huggingface/safetensors, README, "Format")."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at, names = 0, in_order(tensors)
    for name in names:
        tensor = tensors[name]
        end = at + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            whole = tensor.fetch() if isinstance(tensor, Pending) else tensor.detach().cpu()
            if whole.shape != tensor.shape or whole.dtype != tensor.dtype:  # the header would lie
                raise OSError(errno.EIO, f"{name} came as {whole.dtype} {tuple(whole.shape)}")
            file.write(whole.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def save_model(model: Any, folder: Path) -> None:
    """Writes a plain Hugging Face folder (config.json, generation_config.json, *.safetensors) into `folder`."""
    if not torch.cuda.is_available():  # transformers imports DeepSpeed here, where it is installed, which guesses aloud
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_cache, model.config.use_cache = model.config.use_cache, True
    text, balances = model.config.get_text_config(decoder=True), getattr(model, "fitout_balances", False)
    if balances:
        text.output_router_logits = True
    try:
        with errors_of_the_system(folder):
            model.save_pretrained(folder, save_original_format=False)
    finally:
        model.config.use_cache = use_cache
        if balances:
            text.output_router_logits = False
