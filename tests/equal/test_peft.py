"""Our LoRA, DoRA and QLoRA equal PEFT's: trained side by side, and through each other's files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fitout.errors import ModelError, RequestError
from fitout.model import methods
from fitout.model.load import load_adapter, load_base
from fitout.model.methods import DoraSettings, LoraSettings, QloraSettings
from fitout.model.methods.lora import adapters, settings_of
from tests.conftest import tiny_llama

from .small import LOW_RANK, adapted, job_of, losses, random_part, tiny_base, train

peft = pytest.importorskip("peft")

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2]])
STEPS = 20
KINDS = {
    **LOW_RANK,
    "gaussian": LoraSettings(rank=4, alpha=8, init="gaussian"),
    "orthogonal": LoraSettings(rank=4, alpha=8, init="orthogonal", targets=["q_proj", "lm_head"]),
    "dora pissa": DoraSettings(rank=4, alpha=8, init="pissa"),
    "olora": LoraSettings(rank=4, alpha=8, init="olora", rslora=True, rank_pattern={"v_proj": 2}),
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tied")
    tiny_llama(packed=False, tied=True).save_pretrained(folder)
    return str(folder)


def plain(settings=None, base=None):
    """Plain transformers, over the same 4-bit layers where the method has them."""
    from transformers import LlamaForCausalLM

    extra = methods.create(settings).load_kwargs(torch.float32) if settings else {}
    model = LlamaForCausalLM.from_pretrained(base or tiny_base(), attn_implementation="eager", **extra)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' own evaluation on CPU is in bf16
    return model


def saved(folder, settings, base=None):
    model, method = adapted(settings, base=base)
    folder.mkdir(parents=True)
    method.save(model, folder, base=base or tiny_base())
    return model, method


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


# trained side by side


@pytest.mark.parametrize("kind", LOW_RANK)
def test_twenty_steps_equal_a_naive_loop_over_peft(tmp_path, kind):
    settings = LOW_RANK[kind]
    start = "default" if settings.init == "default" else settings.init
    model, method = _begun(settings, tmp_path / "start")
    part = random_part(tmp_path, 30)
    job = job_of(
        tmp_path / "run", model, part, method=method, total=STEPS, lr=2e-3, schedule="constant", warmup=0
    )  # fmt: skip
    train(job)
    method.save(model, tmp_path / "run" / "adapter", base=tiny_base())

    if start == "default":
        theirs = peft.PeftModel.from_pretrained(plain(settings), str(tmp_path / "start"), is_trainable=True).train()
    else:  # PEFT takes the beginning off the base itself: off a plain copy of a 4-bit one, which it would quantise anew
        theirs = peft.get_peft_model(_dequantised(settings), _peft_config(settings)).train()
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    faster = [p for n, p in named.items() if "lora_B" in n]
    others = [p for n, p in named.items() if "lora_B" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": faster, "lr": 2e-3 * settings.lr_ratio}], lr=2e-3, weight_decay=0
    )
    want = [_naive_step(theirs, job.batches.rows(step), part, optimizer, list(named.values())) for step in range(STEPS)]

    assert [x for _, x in losses(job.run.log)] == pytest.approx(want, abs=1e-5)
    assert want[-1] < want[0]
    close(logits_of(model), logits_of(theirs), 2e-5)
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(ours) == len(named) >= 2 * 7 * 2
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, named[_peft_name(name)], rtol=0, atol=1e-5, msg=name)


def _begun(settings, folder):
    """As `saved`, but a beginning that is a part of the weight is left where it is."""
    if settings.init == "default":
        return saved(folder, settings)
    method = methods.create(settings)
    model = load_base(tiny_base(), extra=method.load_kwargs(torch.float32))
    method.apply(model)
    method.begin(model, lambda: None)
    return model, method


def _dequantised(settings):
    model = plain(settings)
    return model.dequantize() if getattr(model, "is_quantized", False) else model


def _peft_config(settings, **more):
    dora = isinstance(settings, DoraSettings) or getattr(settings, "dora", False)
    return peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM",
        init_lora_weights=settings.init, use_rslora=settings.rslora, use_dora=dora, **more,
    )  # fmt: skip


def _peft_name(name):
    for leaf in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if name.endswith(leaf):
            return f"base_model.model.{name}.default.weight"
    return "base_model.model." + name.removesuffix(".weight") + ".modules_to_save.default.weight"


def _naive_step(model, rows, part, optimizer, parameters):
    total = sum(int(part.train_on(row)[1:].sum()) for row in rows)
    loss = 0.0
    for row in rows:
        ids = torch.from_numpy(part.ids(row).astype(np.int64))
        labels = ids.masked_fill(torch.tensor(part.train_on(row) == 0), -100)
        logits = model(input_ids=ids[None]).logits[0]
        loss = loss + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dora", "qdora", "qlora", "lora"])
def test_forward_and_gradients_equal_pefts_with_dropout_too(tmp_path, kind, dropout):
    settings = LOW_RANK[kind].model_copy(update={"dropout": dropout, "targets": ["down_proj"], "init": "default"})
    model, _ = saved(tmp_path / "adapter", settings)
    theirs = peft.PeftModel.from_pretrained(plain(settings), str(tmp_path / "adapter"), is_trainable=True)
    ours, theirs = model.model.layers[1].mlp.down_proj.train(), theirs.base_model.model.model.layers[1].mlp.down_proj
    theirs.train()
    gradients = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        x = torch.randn(7, 64, requires_grad=True)
        torch.manual_seed(4)
        out = layer(x)
        (out * torch.arange(32)).sum().backward()
        trained = {_leaf(n): p.grad for n, p in layer.named_parameters() if p.requires_grad}
        gradients.append({"out": out.detach(), "x": x.grad, **trained})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 4
    for name, tensor in gradients[0].items():
        torch.testing.assert_close(tensor, gradients[1][name], rtol=1e-5, atol=1e-5, msg=name)


def _leaf(name):
    return next(leaf for leaf in ("lora_A", "lora_B", "lora_magnitude_vector") if leaf in name)


# through each other's files


@pytest.mark.parametrize("kind", KINDS)
def test_ours_loads_in_plain_peft_over_the_unmodified_base(tmp_path, kind):
    settings = KINDS[kind]
    model, _ = saved(tmp_path / "adapter", settings)
    want = logits_of(model)
    assert (want - logits_of(plain(settings))).abs().max() > 1e-3
    close(logits_of(peft.PeftModel.from_pretrained(plain(settings), str(tmp_path / "adapter"))), want)
    again = load_base(tiny_base(), extra=methods.create(settings).load_kwargs(torch.float32))
    method = load_adapter(again, tmp_path / "adapter")
    assert type(method) is type(methods.create(settings))
    close(logits_of(again), want, 1e-6)
    method.merge(again)
    close(logits_of(again), want)
    if settings.init == "default":
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert "lora_A" not in str(config) and (config["rank_pattern"], config["r"]) == (settings.rank_pattern, 4)


PEFTS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "full names": {"target_modules": ["layers.1.self_attn.q_proj"]},
    "expression": {"target_modules": r".*\.1\..*(q_proj|up_proj)"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 3}, "alpha_pattern": {r"1\..*_proj": 9, "x": 1}},
    "dora": {"use_dora": True},
    "dora rslora patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 7}},
    "excluded": {"exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "names that are not there": {"target_modules": ["q_proj", "query_key_value"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "whole block": {"modules_to_save": ["layers.0.mlp"]},
    "pissa, not converted": {"init_lora_weights": "pissa"},
    "olora, not converted": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", PEFTS)
def test_pefts_loads_in_ours(tmp_path, kind):
    _theirs_in_ours(tmp_path, None, **PEFTS[kind])


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
             {"modules_to_save": ["lm_head", "embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}],
)  # fmt: skip
def test_pefts_over_tied_embeddings_loads_in_ours_and_merges(tmp_path, tied, more):
    """PEFT trains a copy: the head and the embedding part, unless they were trained alike."""
    from transformers import AutoModelForCausalLM

    from fitout.model.load import save_model

    model, want = _theirs_in_ours(tmp_path, tied, **more)
    save_model(model, tmp_path / "merged")
    close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")), want)


def _theirs_in_ours(tmp_path, base, **config):
    torch.manual_seed(6)
    config = peft.LoraConfig(
        **{"r": 5, "lora_alpha": 20, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    )
    theirs = peft.get_peft_model(plain(base=base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    if "init_lora_weights" in str(config) and config.init_lora_weights in ("pissa", "olora"):
        theirs = peft.PeftModel.from_pretrained(plain(base=base), str(tmp_path / "adapter"))
    want = logits_of(theirs)
    model = load_base(base or tiny_base())
    method = load_adapter(model, tmp_path / "adapter")
    assert (want - logits_of(plain(base=base))).abs().max() > 1e-3
    close(logits_of(model), want)
    method.merge(model)
    close(logits_of(model), want)
    return model, want


def test_tied_embeddings_trained_whole_stay_tied_and_are_saved_as_both(tmp_path, tied):
    settings = LoraSettings(rank=4, alpha=8, train_also=["embed_tokens"])
    model, method = adapted(settings, base=tied)
    assert any("share one weight" in note for note in method.notes(model))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.05 * torch.randn(97, 32))
    (tmp_path / "adapter").mkdir()
    method.save(model, tmp_path / "adapter", base=tied)
    want = logits_of(model)
    close(logits_of(peft.PeftModel.from_pretrained(plain(base=tied), str(tmp_path / "adapter"))), want)
    again = load_base(tied)
    load_adapter(again, tmp_path / "adapter")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    close(logits_of(again), want)


# what is refused


@pytest.mark.parametrize("kind", [{"bias": "all"}, {"lora_bias": True, "target_modules": ["q_proj"]},
                                  {"trainable_token_indices": [3]}, {"target_modules": ["q_proj", "embed_tokens"]},
                                  {"init_lora_weights": "pissa_niter_2"},
                                  {"layer_replication": [(0, 2), (0, 2)]}])  # fmt: skip
def test_what_ours_does_not_compute_is_refused_by_name(tmp_path, kind):
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kind})
    peft.get_peft_model(plain(), config).save_pretrained(tmp_path / "adapter")
    name = "embedding" if "embed_tokens" in str(kind) else next(iter(kind))
    with pytest.raises(ModelError, match=name):
        load_adapter(load_base(tiny_base()), tmp_path / "adapter")


def test_a_key_that_nobody_knows_yet_is_refused(tmp_path):
    saved(tmp_path / "adapter", LOW_RANK["lora"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_newra": True}))
    with pytest.raises(ModelError, match="use_newra"):
        settings_of(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"rank_pattern": {"q_prog": 2}}, "q_prog"), ({"alpha_pattern": {"lm_head": 2}}, "lm_head"),
     ({"train_also": ["lm_heads"]}, "lm_heads"), ({"init": "pissa", "rank": 40}, "32 by 32"),
     ({"train_also": ["layers"], "targets": ["q_proj"]}, "no linear layer")],
)  # fmt: skip
def test_settings_that_change_nothing_or_cannot_be_are_refused(change, said):
    with pytest.raises(RequestError, match=said):
        methods.create(LoraSettings(**change)).apply(tiny_llama())


def test_going_on_with_settings_that_mean_something_else_is_refused(tmp_path):
    saved(tmp_path / "adapter", LoraSettings(rank=4, alpha=8))
    for change in ({"alpha": 9}, {"rslora": True}, {"init": "olora"}):
        method = methods.create(LoraSettings(**{"rank": 4, "alpha": 8, **change}))
        model = tiny_llama()
        method.apply(model)
        with pytest.raises(ModelError, match="scaled|method.init"):
            method.load(model, tmp_path / "adapter")


def test_a_quantised_base_is_refused_by_others_and_another_quantisation_by_qlora(tmp_path):
    settings = QloraSettings(rank=4, alpha=8)
    saved(tmp_path / "adapter", settings)
    base = load_base(tiny_base(), extra=methods.create(settings).load_kwargs(torch.float32))
    with pytest.raises(ModelError, match="stored quantised"):
        methods.create(LoraSettings()).apply(base)
    with pytest.raises(RequestError, match="held in 4 bits"):
        methods.create(QloraSettings(train_also=["layers.0.mlp"])).apply(base)
    with pytest.raises(ModelError, match="not quantised"):
        load_adapter(load_base(tiny_base()), tmp_path / "adapter")
    with pytest.raises(ModelError, match="nf4 with double"):
        methods.create(QloraSettings(quant="fp4")).apply(base)


# by the papers


def test_dora_is_the_papers_formula():
    """Equation 5: W' = m (V + s B A) / |V + s B A|, row by row, and m = |W| at first, so that W' = W."""
    method = methods.create(DoraSettings(rank=4, alpha=8))
    model = load_base(tiny_base())
    method.apply(model)
    close(logits_of(model), logits_of(plain()), 1e-6)
    model, _ = adapted(LOW_RANK["dora"])
    for layer in adapters(model).values():
        directed = layer.base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
        want = layer.lora_magnitude_vector.double()[:, None] * directed / directed.norm(dim=1, keepdim=True)
        x = torch.randn(3, directed.shape[1])
        torch.testing.assert_close(layer(x), (x.double() @ want.t()).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.merged(), want.float(), rtol=1e-5, atol=1e-6)


def test_dora_over_a_bf16_base_keeps_its_norm_in_fp32_and_a_row_of_zeros_finite():
    base = torch.nn.Linear(256, 64, bias=True).bfloat16()
    base.weight.data[3] = 0
    layer = methods.dora.DoraLinear(base, rank=8, scale=2.0, dropout=0.0)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.05)
        layer.lora_B[3] = 0
    true = (base.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    kept = true > 0
    torch.testing.assert_close(layer.norms().double()[kept], true[kept], rtol=1e-6, atol=0)
    x = torch.randn(5, 256, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    for tensor in (x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.lora_magnitude_vector.grad):
        assert tensor.isfinite().all()


def test_doras_norm_is_found_anew_when_its_factors_change():
    model, _ = adapted(LOW_RANK["dora"])
    before = logits_of(model)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.mul_(3)
    after = logits_of(model)
    model.train()
    assert not torch.equal(after, before)
    close(logits_of(model), after, 0)


def test_lora_plus_speeds_up_b_alone():
    model, method = adapted(LOW_RANK["patterns"])
    rates = method.rates(model)
    assert rates and set(rates.values()) == {4} and all(name.endswith("lora_B") for name in rates)
    assert rates.keys() == {n for n, p in model.named_parameters() if n.endswith("lora_B")}
    assert methods.create(LoraSettings()).rates(model) == {}


def test_first_values_are_drawn_as_pefts():
    """Default: A uniform with the bound 1 / sqrt(in) (Kaiming with a = sqrt 5), B zero. Gaussian: 1 / rank. Orthogonal:
    B A is zero though neither is."""
    layers = {}
    for init in ("default", "gaussian", "orthogonal"):
        model = load_base(tiny_base())
        methods.create(LoraSettings(rank=64, init=init)).apply(model)
        theirs = peft.get_peft_model(
            plain(), peft.LoraConfig(r=64, target_modules=["down_proj"], init_lora_weights=init == "default" or init)
        ).base_model.model.model.layers[0].mlp.down_proj  # fmt: skip
        ours = model.model.layers[0].mlp.down_proj
        layers[init] = ours, SimpleNamespace(a=theirs.lora_A["default"].weight, b=theirs.lora_B["default"].weight)
    ours, theirs = layers["default"]
    assert ours.lora_A.abs().max().item() == pytest.approx(64**-0.5, rel=0.02)
    assert theirs.a.abs().max().item() == pytest.approx(64**-0.5, rel=0.02)
    assert not ours.lora_B.any()
    ours, theirs = layers["gaussian"]
    assert ours.lora_A.std().item() == pytest.approx(1 / 64, rel=0.05) == pytest.approx(theirs.a.std().item(), rel=0.1)
    assert not ours.lora_B.any()
    ours, theirs = layers["orthogonal"]
    for which in ("lora_A", "lora_B"):
        assert getattr(ours, which).std().item() == pytest.approx(getattr(theirs, which[-1].lower()).std().item(), 0.1)
    assert ours.delta().abs().max() < 1e-5 < ours.lora_B.abs().max()


@pytest.mark.parametrize("kind", ["pissa", "qdora"])
def test_a_beginning_taken_from_the_weight_is_restored_not_found_anew(kind):
    settings = LOW_RANK[kind]
    model, method = adapted(settings)
    state = {name: tensor + 0.01 for name, tensor in method.state(model).items()}
    assert len(state) == 2 * len(adapters(model))
    other, again = load_base(tiny_base(), extra=method.load_kwargs(torch.float32)), methods.create(settings)
    again.apply(other)
    again.restore(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state(other).items())
    assert len(again.state(other)) == len(state)


def test_the_4_bit_base_is_recorded(tmp_path):
    saved(tmp_path / "adapter", LOW_RANK["qdora"])
    record = json.loads((tmp_path / "adapter" / "quantisation.json").read_text())
    assert record == {"quant": "fp4", "double_quant": False, "block": 64, "stored_as": "fp32"}
    found = settings_of(tmp_path / "adapter")
    assert isinstance(found, QloraSettings) and (found.dora, found.quant, found.rank) == (True, "fp4", 8)
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) > {
        "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    }


def test_an_evaluation_leaves_the_4_bit_weights_as_they_are():
    """Layers without an adapter too: bitsandbytes would repack them on a CPU, and training would lose its gradients."""
    model, _ = adapted(QloraSettings(rank=4, alpha=8, targets=["q_proj"]))

    def gradients():
        model.zero_grad()
        loss = model.train()(input_ids=IDS, use_cache=False).logits.square().sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    logits_of(model)
    after = gradients()
    assert all(torch.equal(after[name], tensor) and tensor.any() for name, tensor in before.items())
