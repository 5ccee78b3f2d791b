"""The verified merge: the adapter folded into the base, saved, loaded afresh by plain transformers, and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..chat.render import SAMPLE, Chat, open_chat
from ..errors import CheckError, RequestError
from ..files import staged_folder
from ..model.load import DTYPES, load_adapter, load_base, load_config, resolve, save_model
from ..model.methods import saved_in
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
    into: str = "dequantised",
    say: Callable[[str], None] = lambda line: None,
) -> float:
    """Writes base + adapter as a plain model folder in the base's own dtype; returns the largest relative difference of
    logits on probes between merged model and adapter over the base it was trained over.

    An adapter over a quantised base goes into that base's de-quantised weights, or `into` the "original": another base,
    so that the difference to what was trained is more than rounding; it is returned, said and written into the card.
    Raises CheckError, and leaves nothing behind, when merging itself changes the logits by more than rounding;
    RequestError for an adapter that cannot be merged.
    """
    method = saved_in(adapter)
    if method.unmergeable:
        raise RequestError(f"this adapter cannot be merged: {method.unmergeable}", where=str(adapter))
    source: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    dtype = stored_dtype(load_config(base, **source))
    chat = open_chat(adapter)
    trained_over = method.trained_in(adapter)
    model: Any = load_base(
        base,
        dtype=DTYPES[trained_over or "fp32"],
        packed=False,
        extra=method.load_kwargs(DTYPES[trained_over or "fp32"]),
        **source,
    )
    load_adapter(model, adapter)
    method.in_fp32(model)
    probes = probe_ids(chat, model.config.get_text_config().vocab_size)
    trained = before = logits(model, probes)
    if method.plain() is not method and into == "original":
        del model
        model, method = load_base(base, dtype=torch.float32, packed=False, **source), method.plain()
        load_adapter(model, adapter, method)
        before = logits(model, probes)
    method.merge(model)
    if trained_over:
        changed = "into the original weights" if before is not trained else "into the de-quantised weights"
        facts = {**facts, "Merge": {"adapter trained over a quantised base, merged": changed}}
    set_stop_ids(model, chat)
    with staged_folder(target) as folder:
        save_model(model.to(dtype), folder)
        save_chat(chat, folder)
        fresh = logits(load_base(str(folder), dtype=torch.float32, packed=False), probes)
        difference = _apart(fresh, before)
        if not difference <= TOLERANCE[dtype]:
            raise CheckError(
                f"the merged logits differ from the adapter's by {difference:.2g} (allowed: {TOLERANCE[dtype]:g})",
                where=str(target),
                harm="The merged model would not be the one that was trained and evaluated; it was not kept.",
                hint="Serve base and adapter instead, and report this with the model's name.",
            )
        if trained_over:
            difference = _apart(fresh, trained)
            say(
                f"merged {changed}: logits on probes differ by {difference:.2g} of their largest from the adapter's "
                "over the 4-bit base that it was trained over"
            )
            facts["Merge"]["largest difference of logits from what was trained"] = f"{difference:.2g}"
        write_card(folder, name=name, base=base, facts=facts)
    return difference


def _apart(some: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference over the largest size."""
    return float((some - others).abs().max() / others.abs().max())


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


def merge_run(directory: RunDir, recipe: Any, say: Callable[[str], None] = lambda line: None) -> float:
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
        into=recipe.export.merge_into,
        say=say,
    )
