"""The verified merge: the adapter folded into the base, saved, loaded afresh by plain transformers, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..chat.render import SAMPLE, Chat, open_chat
from ..errors import CheckError
from ..files import staged_folder
from ..model.load import load_adapter, load_base, load_config, resolve, save_model
from .card import facts_of
from .write import save_chat, set_stop_ids, write_card

if TYPE_CHECKING:
    from ..rundir import RunDir

# largest difference of logits over their largest size; 16-bit weights are rounded once after the merge
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def merge_adapter(
    base: str,
    adapter: Path,
    target: Path,
    *,
    name: str,
    facts: dict[str, Any],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Writes base + adapter as a plain model folder in the base's own dtype; returns the largest relative difference of
    logits on probes between adapter and merged model.

    Raises CheckError, and leaves nothing behind, when the difference is more than rounding.
    """
    source: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    dtype = stored_dtype(load_config(base, **source))
    chat = open_chat(adapter)
    model: Any = load_base(base, dtype=torch.float32, packed=False, **source)
    method = load_adapter(model, adapter)
    probes = probe_ids(chat, model.config.get_text_config().vocab_size)
    before = logits(model, probes)
    method.merge(model)
    set_stop_ids(model, chat)
    with staged_folder(target) as folder:
        save_model(model.to(dtype), folder)
        save_chat(chat, folder)
        write_card(folder, name=name, base=base, facts=facts)
        fresh = load_base(str(folder), dtype=torch.float32, packed=False)
        difference = float((logits(fresh, probes) - before).abs().max() / before.abs().max())
        if not difference <= TOLERANCE[dtype]:
            raise CheckError(
                f"the merged logits differ from the adapter's by {difference:.2g} (allowed: {TOLERANCE[dtype]:g})",
                where=str(target),
                harm="The merged model would not be the one that was trained and evaluated; it was not kept.",
                hint="Serve base and adapter instead, and report this with the model's name.",
            )
    return difference


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype a model's weights are stored in."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype if dtype in TOLERANCE else torch.float32


def probe_ids(chat: Chat, vocab: int) -> list[torch.Tensor]:
    """A conversation as it is served, and seeded random ids that reach the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(vocab, (1, 48), generator=generator) for _ in range(3)]
    return [torch.tensor([chat.prompt_ids(SAMPLE[:1])]), *random]


@torch.no_grad()
def logits(model: Any, probes: list[torch.Tensor]) -> torch.Tensor:
    """All logits on the probes, flat, fp32."""
    model.eval()
    return torch.cat([model(input_ids=ids, use_cache=False).logits.float().flatten() for ids in probes])


def merge_run(directory: RunDir, recipe: Any) -> float:
    """Merges a run's adapter into merged/, with a card that says what was measured."""
    facts = facts_of(directory, recipe)
    base = resolve(recipe.model.base).base
    return merge_adapter(
        base,
        directory.adapter,
        directory.merged,
        name=recipe.name,
        facts=facts,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
