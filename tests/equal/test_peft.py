"""Our LoRA equals PEFT's: trained side by side, and through each other's files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fitout.errors import ModelError
from fitout.model import methods
from fitout.model.load import load_adapter, load_base
from fitout.model.methods import LoraSettings
from tests.conftest import tiny_llama

from .small import job_of, losses, random_part, train

peft = pytest.importorskip("peft")

SETTINGS = LoraSettings(rank=4, alpha=8)
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2]])
STEPS = 20


@pytest.fixture
def base(tmp_path) -> str:
    folder = tmp_path / "base"
    tiny_llama(packed=False).save_pretrained(folder)
    return str(folder)


def plain(base):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")


def our_adapter(base, folder, settings=SETTINGS):
    """A saved adapter of ours with a random B, and the model that has it."""
    model = load_base(base)
    method = methods.create(settings)
    torch.manual_seed(5)
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    method.save(model, folder, base=base)
    return model, method


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_twenty_steps_equal_a_naive_loop_over_peft(tmp_path, base):
    model, method = our_adapter(base, tmp_path / "start")
    part = random_part(tmp_path, 30)
    job = job_of(tmp_path / "run", model, part, total=STEPS, lr=2e-3, schedule="constant", warmup=0, weight_decay=0.01)
    train(job)
    method.save(model, tmp_path / "run" / "adapter", base=base)

    theirs = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "start"), is_trainable=True).train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    want = []
    for step in range(STEPS):
        rows = job.batches.rows(step)
        total = sum(int(part.train_on(row)[1:].sum()) for row in rows)
        loss = 0.0
        for row in rows:
            ids = torch.from_numpy(part.ids(row).astype(np.int64))
            labels = ids.masked_fill(torch.tensor(part.train_on(row) == 0), -100)
            logits = theirs(input_ids=ids[None]).logits[0]
            loss = loss + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append(loss.item())

    assert [x for _, x in losses(job.run.log)] == pytest.approx(want, abs=1e-5)
    assert want[-1] < want[0]
    final = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    ours = method._tensors(model, with_embeddings=False)
    assert ours.keys() == final.keys() and len(ours) == 2 * 7 * 2
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, final[name].detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_ours_loads_in_plain_peft(tmp_path, base, targets):
    settings = LoraSettings(rank=4, alpha=12, targets=targets)
    model, _ = our_adapter(base, tmp_path / "adapter", settings)
    theirs = peft.PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"))
    assert (logits_of(model) - logits_of(plain(base))).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=0, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["layers.1.self_attn.q_proj"]])
def test_pefts_loads_in_ours(tmp_path, base, targets):
    torch.manual_seed(6)
    config = peft.LoraConfig(r=5, lora_alpha=20, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(plain(base), config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_base(base)
    method = load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=0, atol=1e-5)
    method.merge(model)
    torch.testing.assert_close(logits_of(model), logits_of(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}},
                                  {"modules_to_save": ["lm_head"]}, {"bias": "all"}])  # fmt: skip
def test_what_ours_does_not_compute_is_refused(tmp_path, base, kind):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kind)
    peft.get_peft_model(plain(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=next(iter(kind))):
        load_adapter(load_base(base), tmp_path / "adapter")


def test_first_values_are_drawn_as_pefts(base):
    """A uniform with the bound 1 / sqrt(in) (Kaiming with a = sqrt 5), B zero."""
    model = load_base(base)
    methods.create(LoraSettings(rank=64)).apply(model)
    theirs = peft.get_peft_model(plain(base), peft.LoraConfig(r=64, target_modules=["down_proj"]))
    want = theirs.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.abs().max()
    layer = model.model.layers[0].mlp.down_proj
    assert layer.lora_A.abs().max().item() == pytest.approx(64**-0.5, rel=0.02) == pytest.approx(want.item(), rel=0.02)
    assert not layer.lora_B.any()
