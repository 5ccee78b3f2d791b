"""What carrying over from either tool needs: the recipe as it grows, the ways a key can go, reading YAML."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...chat import BUNDLED
from ...config import parse_yaml
from ...errors import RequestError

LARGEST = 1 << 20  # bytes of a configuration
short = reprlib.Repr()
short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother = 2, 4, 4, 60, 60


@dataclass
class Carried:
    """The recipe as plain values; `left` are (key, value, why) of what could not be carried over; `needless` the keys
    that only steer the other tool; `notes` what is meant differently here."""

    tool: str
    recipe: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        at = self.recipe
        *path, last = key.split(".")
        for step in path:
            at = at.setdefault(step, {})
        at[last] = value

    def leave(self, key: str, value: Any, why: str) -> None:
        self.left.append((key, short.repr(value), why))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise RequestError("this file is too large for a configuration", where=str(path))
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read it: {error.strerror}", where=str(path)) from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RequestError(f"this is not YAML: {str(error).splitlines()[0][:200]}", where=where) from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise RequestError("a configuration is a YAML mapping", where=str(path))
    return raw


Take = Callable[[Carried, str, Any], None]


def into(place: str, check: Callable[[Any], bool] = lambda value: True) -> Take:
    """The value as it is."""

    def take(carried: Carried, key: str, value: Any) -> None:
        if check(value):
            carried.put(place, value)
        else:
            carried.leave(key, value, f"not a value of {place}")

    return take


def number(place: str) -> Take:
    """A number, also one that YAML 1.1 reads as text, such as 1e-4."""

    def take(carried: Carried, key: str, value: Any) -> None:
        found = as_number(value)
        if found is None:
            carried.leave(key, value, "not a number")
        else:
            carried.put(place, found)

    return take


def as_number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def flag(place: str, when: bool = True, then: Any = True) -> Take:
    """A switch that means `then` when it is set to `when`; its other position is the default."""

    def take(carried: Carried, key: str, value: Any) -> None:
        if value is when:
            carried.put(place, then)
        elif value not in (None, not when):
            carried.leave(key, value, "neither true nor false")

    return take


def one_of(place: str, words: Mapping[str, Any]) -> Take:
    """A word and what it is called here."""

    def take(carried: Carried, key: str, value: Any) -> None:
        if str(value).lower() in words:
            carried.put(place, words[str(value).lower()])
        else:
            carried.leave(key, value, f"known here are {', '.join(dict.fromkeys(map(str, words.values())))}")

    return take


def names(place: str) -> Take:
    """A list, or text with commas."""

    def take(carried: Carried, key: str, value: Any) -> None:
        listed = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if isinstance(listed, list) and listed and all(isinstance(name, str) and name for name in listed):
            carried.put(place, "all-linear" if listed in (["all"], ["all-linear"]) else listed)
        else:
            carried.leave(key, value, "not a list of names")

    return take


def because(why: str) -> Take:
    """A key that has no counterpart; a value that switches it off needs none."""

    def take(carried: Carried, key: str, value: Any) -> None:
        if value not in (None, False, "", [], {}, 0):
            carried.leave(key, value, why)

    return take


def needless(carried: Carried, key: str, value: Any) -> None:
    carried.needless.append(key)


def listeners(carried: Carried, key: str, value: Any) -> None:
    wanted = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    known = [name for name in wanted if name in ("tensorboard", "wandb", "mlflow")]
    unknown = [name for name in wanted if name not in ("tensorboard", "wandb", "mlflow", "none")]
    if known:
        carried.put("train.listeners", known)
    if unknown:
        carried.leave(key, unknown, "listeners are tensorboard, wandb and mlflow")


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant"}
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
PREFERENCE = "objectives on pairs are orpo, dpo and simpo; there is no reward model"
REFERENCE = "the reference is the model as training begins"
MEDIA = "training on more than text is not there yet"

SHARED: dict[str, Take] = {
    "trust_remote_code": flag("model.trust_remote_code"),
    "learning_rate": number("train.lr"),
    "max_steps": lambda carried, key, value: (
        number("train.max_steps")(carried, key, value) if value not in (-1, None) else None
    ),
    "warmup_ratio": lambda carried, key, value: number("train.warmup")(carried, key, value) if value else None,
    "warmup_steps": lambda carried, key, value: number("train.warmup")(carried, key, value) if value else None,
    "weight_decay": number("train.weight_decay"),
    "max_grad_norm": lambda carried, key, value: carried.put("train.clip", as_number(value) or None),
    "seed": number("train.seed"),
    "save_total_limit": number("train.keep_last"),
    "deepspeed": into("train.parallel", lambda value: isinstance(value, str) and value.endswith(".json")),
    "loraplus_lr_ratio": number("method.lr_ratio"),
    "lora_dropout": number("method.dropout"),
    "neftune_noise_alpha": because("noise on embeddings is not there"),
    "resume_from_checkpoint": because("`fitout run` goes on where it stopped; checkpoints of other tools are not read"),
}


def keep_to_method(carried: Carried) -> None:
    """Keys of low-rank methods that a full training has no use for are named, not kept."""
    method = carried.recipe.get("method", {})
    if method.get("kind") == "full":
        for key in [key for key in method if key not in ("kind", "freeze", "last_layers")]:
            carried.leave(f"method.{key}", method.pop(key), "of no effect when all weights are trained")
    if "rank" in method:
        method["rank"] = int(method["rank"])
    train = carried.recipe["train"]
    for key in ("seed", "save_every", "evaluate_every", "keep_last", "max_steps", "patience"):
        if key in train:
            value = as_number(train[key])
            if value is None or value != int(value) or (value < 1 and key != "seed"):
                carried.leave(key, train.pop(key), "a whole number of steps is needed")
            else:
                train[key] = int(value)
    if "max_length" in carried.recipe["data"]:
        carried.recipe["data"]["max_length"] = int(carried.recipe["data"]["max_length"])


def template(name: Any, key: str, carried: Carried) -> None:
    if name in (None, "", "auto", "tokenizer_default"):
        return
    if isinstance(name, str) and (name in BUNDLED or name.endswith(".jinja")):
        carried.put("chat.template", name)
    else:
        carried.leave(key, name, "the tokenizer's own template is used; a .jinja file can be named in chat.template")


def batch(each: Any, steps: Any, carried: Carried) -> None:
    size = int(as_number(each) or 1) * int(as_number(steps) or 1)
    carried.put("train.batch_size", max(1, size))
    carried.notes.append(
        f"train.batch_size {size} is that of one device; on several, multiply it by their number: it is over all."
    )


def split(share: Any, other: Any, key: str, carried: Carried) -> None:
    value = as_number(share) or 0
    if 0 < value < 1:
        test = min(value, 1 - value)
        train = round(1 - value - test, 6)
        if train > 0:
            carried.put("data.split", {"train": train, "validation": value, "test": round(1 - train - value, 6)})
            carried.notes.append(
                f"as many rows as for validation ({value:g}) are kept for the test, which the other tool lacks."
            )
        else:
            carried.leave(key, share, "more than half of the rows")
    elif value >= 1:
        carried.leave(key, share, "a share below 1 is needed: data.split")
    elif other:
        carried.put("data.split", {"train": 0.9, "validation": 0, "test": 0.1})
    else:
        carried.notes.append("nothing was held out; here a tenth each is for validation and test (data.split).")


def run_name(folder: Any, path: Path) -> str:
    stem = Path(str(folder)).name if folder else path.stem
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return name.strip("-._") or "my-run"


def find_folder(name: str, path: Path) -> Path | None:
    """The folder of data sets: from where one stands, beside the file, or beside a folder above it."""
    beside = [parent / name for parent in list(path.resolve().parents)[:4]]
    return next((folder for folder in (Path(name), *beside) if (folder / "dataset_info.json").exists()), None)


def listed(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "", {}) else [value]
