"""Loading a tokenizer and choosing its template; every choice made is said aloud in `notes`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, TemplateError
from . import BUNDLED, ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
ROLE_TOKEN = re.compile(r"<\|[a-z0-9_]+\|>")


@dataclass
class LoadedTokenizer:
    """A tokenizer with its template set. `grown`: tokens were added that the base has no embedding for."""

    tokenizer: Any
    template: str  # where the template came from: "the tokenizer's own", "plain", a path
    grown: bool = False
    notes: list[str] = field(default_factory=list)


def load_tokenizer(
    base: str, settings: ChatSettings, *, revision: str | None = None, trust_remote_code: bool = False
) -> LoadedTokenizer:
    """Loads the tokenizer of `base` (a folder or hub id) and settles template and special tokens.

    Raises ModelError when there is no (fast) tokenizer, TemplateError when a template asks for tokens it lacks.
    """
    tokenizer = _open(base, revision, trust_remote_code)
    loaded = LoadedTokenizer(tokenizer, "the tokenizer's own")
    source = _template_text(tokenizer, settings, loaded)
    if source is not None:
        wanted = sorted(set(ROLE_TOKEN.findall(source)))
        missing = [token for token in wanted if token not in tokenizer.get_vocab()]
        if missing and not settings.add_tokens:
            raise TemplateError(
                f"the template {loaded.template} uses {', '.join(missing)}, which this tokenizer does not have",
                where=base,
                harm="Each would be split into ordinary pieces, and no engine would know where a turn ends.",
                hint="Set chat.add_tokens: true (their embeddings are trained and saved), or chat.template: plain.",
            )
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing})
            loaded.grown = True
            loaded.notes.append(f"added {', '.join(missing)} to the tokenizer; their embeddings are trained")
            ends = [token for token in missing if "end" in token and "header" not in token or "eot" in token]
            if ends:
                tokenizer.eos_token = ends[0]
        starts = _begins_with_bos(tokenizer)
        tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + source
    if settings.template_kwargs and tokenizer.chat_template:
        tokenizer.chat_template = _baked(settings.template_kwargs) + tokenizer.chat_template
    if tokenizer.eos_token is None:
        loaded.notes.append("this tokenizer has no end-of-text token; texts are separated by attention alone")
    return loaded


def _open(base: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}",
            where=base,
            hint="The folder must hold tokenizer.json and tokenizer_config.json."
            if Path(base).exists()
            else "Check the hub id; the network, HF_TOKEN (gated models) and HF_ENDPOINT (a mirror).",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "this tokenizer has no fast form (tokenizer.json)",
            where=base,
            harm="Without character offsets nobody can tell which tokens are the answer's.",
            hint="Convert it with transformers and save it into the model folder.",
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _template_text(tokenizer: PreTrainedTokenizerFast, settings: ChatSettings, loaded: LoadedTokenizer) -> str | None:
    """The template to set, or None to keep the tokenizer's own."""
    name = settings.template
    if name == "auto":
        if tokenizer.chat_template:
            return None
        name = "plain"
        loaded.notes.append("the tokenizer has no chat template; the plain one is used")
    loaded.template = name
    if name in BUNDLED:
        return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    path = Path(name)
    if not path.is_file():
        raise TemplateError(
            f"there is no template {name!r}",
            where="chat.template",
            hint=f"Give auto, {', '.join(BUNDLED)}, or the path of a Jinja file.",
        )
    return path.read_text(encoding="utf-8")


def _baked(values: dict[str, Any]) -> str:
    """Template arguments as `set` statements at its beginning, so that every engine that loads it obeys them."""
    lines = []
    for name, value in values.items():
        if not name.isidentifier():
            raise TemplateError(f"{name!r} is not a name a template can use", where="chat.template_kwargs")
        lines.append(f"{{%- set {name} = {_literal(value)} -%}}")
    return "".join(lines)


def _literal(value: Any) -> str:
    """A plain value as Jinja writes it: as JSON does, but for `none`."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value)


def _begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether this tokenizer puts its beginning-of-text token before every text."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
