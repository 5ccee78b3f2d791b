"""Adapter and sparse fine-tuning against slow obvious computations: a written-out formula, and dense autograd
with masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fitout.errors import ModelError, RequestError
from fitout.files import read_json
from fitout.model import methods
from fitout.model.load import grow_vocabulary, load_adapter, load_base
from fitout.model.methods import AdapterSettings, SparseSettings, sparse
from fitout.model.methods.base import trainable
from fitout.model.methods.sparse import sparse_layers
from tests.conftest import tiny_llama

from .small import METHODS_UNDER_TEST, adapted, job_of, losses, random_part, train

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2]])
STYLES = [
    AdapterSettings(style="houlsby", reduction=4, activation="gelu"),
    AdapterSettings(style="pfeiffer", reduction=3, activation="relu"),
    AdapterSettings(style="parallel", reduction=8, activation="silu", scale=2.5),
]
KINDS = {kind: settings for kind, settings in METHODS_UNDER_TEST.items() if settings.kind in ("adapter", "sparse")}


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def naive_gradients(model, part, rows):
    """Each row alone through plain SDPA, shifted logits, F.cross_entropy, one mean over the step's targets."""
    total, loss = sum(int(part.train_on(row)[1:].sum()) for row in rows), 0.0
    for row in rows:
        ids = torch.from_numpy(part.ids(row).astype(np.int64))
        labels = ids.masked_fill(torch.tensor(part.train_on(row) == 0), -100)
        logits = model(input_ids=ids[None]).logits[0]
        loss = loss + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / total
    loss.backward()
    return float(loss.detach())


class Written(nn.Module):
    """A block with its adapter as the papers write it; `of` says whether the formula is of its input or its output."""

    def __init__(self, block, settings, tensors):
        super().__init__()
        self.block, self.settings = block, settings
        self.own = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(t.clone()) for name, t in tensors.items()})

    def forward(self, x):
        y, p = self.block(x), self.own
        act = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}[self.settings.activation]
        of = x if self.settings.style == "parallel" else y
        return y + self.settings.scale * (
            act(of @ p["down_weight"].T + p["down_bias"]) @ p["up_weight"].T + p["up_bias"]
        )


def written_out(model, settings):
    """A plain model with `model`'s adapters: after the feed-forward, and around attention's last projection."""
    plain = tiny_llama(packed=False).requires_grad_(False)
    for ours, layer in zip(model.model.layers, plain.model.layers, strict=True):
        layer.mlp = Written(layer.mlp, settings, ours.mlp.adapter.state_dict())
        if settings.style == "houlsby":
            layer.self_attn.o_proj = Written(layer.self_attn.o_proj, settings, ours.self_attn.adapter.state_dict())
    return plain


@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
def test_an_adapter_trains_as_its_formula_written_out(tmp_path, settings):
    model, method = adapted(settings)
    plain = written_out(model, settings)
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=1e-5)
    assert (logits_of(model) - logits_of(tiny_llama())).abs().max() > 1e-4
    part = random_part(tmp_path, 30)
    job = job_of(tmp_path, model, part, total=20, lr=2e-3, schedule="constant", warmup=0, weight_decay=0.01,
                 method=method)  # fmt: skip
    train(job)
    own = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    matrices = [p for p in own.values() if p.ndim == 2]
    vectors = [p for p in own.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    want = []
    for step in range(20):
        want.append(naive_gradients(plain, part, job.batches.rows(step)))
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert [x for _, x in losses(job.run.log)] == pytest.approx(want, abs=1e-5) and want[-1] < want[0]
    ours = list(trainable(model).values())
    theirs = {n.replace(".self_attn.o_proj.own.", ".self_attn.adapter.").replace(".mlp.own.", ".mlp.adapter."): p
              for n, p in own.items()}  # fmt: skip
    assert len(ours) == len(theirs) == 2 * 4 * (2 if settings.style == "houlsby" else 1)
    for name, tensor in trainable(model).items():
        head, _, leaf = name.rpartition("adapter.")
        torch.testing.assert_close(tensor, theirs[f"{head}adapter.{leaf.replace('.', '_')}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("select", ["magnitude", "gradient", "random"])
def test_sparse_trains_as_dense_gradients_under_a_mask(tmp_path, select):
    settings = SparseSettings(density=0.02, select=select)
    torch.manual_seed(11)
    model, method = adapted(settings)
    part = random_part(tmp_path, 30)
    job = job_of(tmp_path, model, part, total=20, lr=3e-3, schedule="constant", warmup=0, weight_decay=0.01,
                 method=method)  # fmt: skip
    plain = tiny_llama(packed=False)
    dense = {name: plain.get_submodule(name).weight for name in sparse_layers(model)}
    assert len(dense) == 14 and "lm_head" not in dense
    score = {name: torch.zeros_like(w) for name, w in dense.items()}
    for step in range(8):
        plain.zero_grad()
        naive_gradients(plain, part, job.batches.rows(step))
        for name, weight in dense.items():
            score[name] += weight.grad**2
    train(job)
    masks = {}
    for name, layer in sparse_layers(model).items():
        count = round(0.02 * layer.weight.numel())
        masks[name] = torch.zeros(layer.weight.numel(), dtype=torch.bool)
        masks[name][layer.flat.long()] = True
        assert len(layer.values) == masks[name].sum() == count  # no place twice
        masks[name] = masks[name].view_as(layer.weight)
        if select == "random":
            continue
        wanted = score[name] if select == "gradient" else dense[name].detach().abs()
        assert torch.equal(masks[name], wanted >= wanted.flatten().sort(descending=True).values[count - 1])

    changes = {name: torch.zeros(int(mask.sum()), requires_grad=True) for name, mask in masks.items()}
    start = {name: weight.detach().clone() for name, weight in dense.items()}
    optimizer = torch.optim.AdamW(changes.values(), lr=3e-3, weight_decay=0.0)
    want = []
    for step in range(20):
        plain.zero_grad()
        want.append(naive_gradients(plain, part, job.batches.rows(step)))
        for name, change in changes.items():
            change.grad = dense[name].grad[masks[name]]
        torch.nn.utils.clip_grad_norm_(changes.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, change in changes.items():
                dense[name][masks[name]] = start[name][masks[name]] + change
    assert [x for _, x in losses(job.run.log)] == pytest.approx(want, abs=1e-5) and want[-1] < want[0]
    for name, layer in sparse_layers(model).items():
        torch.testing.assert_close(layer.values, changes[name], rtol=0, atol=1e-5)
        assert layer.base.weight.grad is None
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("values"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_layers_gradients(dtype):
    """Against autograd through the dense weight; AdamW and clipping would hide a wrong factor."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, dtype=dtype).requires_grad_(False)
    layer = sparse.SparseLinear(base, 0.05)
    layer.place(torch.randperm(960)[:48].sort().values)
    nn.init.normal_(layer.values)
    x, slope = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True), torch.randn(2, 9, 40, dtype=dtype)
    out = layer(x)
    out.backward(slope)
    weight, seen = base.weight.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    want = F.linear(seen, weight, base.bias)
    want.backward(slope)
    assert torch.equal(out, want) and torch.equal(x.grad, seen.grad) and layer.values.grad.dtype == torch.float32
    entries = weight.grad.flatten()[layer.flat.long()].float()
    torch.testing.assert_close(layer.values.grad, entries, rtol=1e-5, atol=1e-5)
    assert base.weight.grad is None


@pytest.mark.parametrize("select", ["magnitude", "gradient", "random"])
def test_a_redraw_by_hand(select):
    """One layer of 2048 entries, 102 of them trained: after step 10 of 50, 0.2 * 0.8 * 102, so 16 of them move."""
    torch.manual_seed(0)
    model = tiny_llama()
    method = methods.create(
        SparseSettings(density=0.05, select=select, redraw_every=10, targets=["layers.0.mlp.up_proj"])
    )
    method.apply(model)
    [layer] = sparse_layers(model).values()
    base = layer.weight.detach().clone().flatten()
    known = torch.randn(layer.weight.shape)

    def gradients():
        for step in range(99):
            layer.weight.grad = known * (step + 1)
            yield

    method.begin(model, gradients)
    optimizer = torch.optim.AdamW([layer.values], lr=0.1)
    for _ in range(3):
        layer.values.grad = torch.randn_like(layer.values)
        optimizer.step()
    values, places = layer.values.detach().clone(), layer.flat.long().clone()
    moments = {k: optimizer.state[layer.values][k].clone() for k in ("exp_avg", "exp_avg_sq")}
    count = len(values)
    method.after_step(model, optimizer, 9, 50, gradients)
    assert torch.equal(layer.flat.long(), places)
    method.after_step(model, optimizer, 45, 50, gradients)  # no full round is left
    assert torch.equal(layer.flat.long(), places)
    method.after_step(model, optimizer, 10, 50, gradients)

    swapped = round(0.2 * 0.8 * count)
    stay = values.abs().argsort(descending=True)[: count - swapped]
    free = torch.ones(layer.weight.numel(), dtype=torch.bool)
    free[places] = False
    now = layer.flat.long()
    assert torch.equal(now, now.sort().values) and len(now.unique()) == count
    come = now[free[now]]
    assert len(come) == swapped == 16 and set(now.tolist()) == set(come.tolist()) | set(places[stay].tolist())
    if select != "random":
        score = (known if select == "gradient" else base).abs().flatten() * free
        assert set(come.tolist()) == set(score.topk(swapped).indices.tolist())
    new = torch.isin(now, come)
    old_slot = torch.searchsorted(places, now[~new])
    assert not layer.values[new].any() and torch.equal(layer.values[~new], values[old_slot])
    state = optimizer.state[layer.values]
    assert not state["exp_avg"][new].any()
    assert torch.equal(state["exp_avg"][~new], moments["exp_avg"][old_slot])
    assert torch.equal(state["exp_avg_sq"][~new], moments["exp_avg_sq"][old_slot])
    assert state["exp_avg_sq"][new].unique().item() == pytest.approx(moments["exp_avg_sq"][stay].mean().item())
    want = base.clone()
    want[now] += layer.values
    assert torch.equal(layer.weight.detach().flatten(), want)  # what left is the base's own number again
    assert not layer.weight.requires_grad and layer.values.requires_grad and layer.weight.grad is None


def test_groups_of_layers_choose_what_all_at_once_would(tmp_path, monkeypatch):
    chosen = []
    for room in (1 << 30, 1 << 14, 1):
        monkeypatch.setattr(sparse, "SCORE_BYTES", room)
        model, method = adapted(SparseSettings(density=0.01, select="gradient", redraw_every=2))
        train(job_of(tmp_path / str(room), model, random_part(tmp_path / str(room), 26), total=7, method=method))
        chosen.append(method.state(model))
    for other in chosen[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in chosen[0].items())


def test_the_gradients_that_choose_recompute_where_training_does(tmp_path, monkeypatch):
    chosen, forwards = [], []
    for recompute in (False, True):
        model, method = adapted(SparseSettings(density=0.01, select="gradient"))
        job = job_of(tmp_path / str(recompute), model, random_part(tmp_path / str(recompute), 26), total=7,
                     gradient_checkpointing=recompute, method=method)  # fmt: skip
        passes = 0

        def counted(*_):
            nonlocal passes
            passes += 1

        begin = method.begin

        def beginning(*given, begin=begin, model=model):
            hook = model.model.layers[0].self_attn.register_forward_hook(counted)
            begin(*given)
            hook.remove()

        monkeypatch.setattr(method, "begin", beginning)
        train(job)
        chosen.append(method.state(model))
        forwards.append(passes)
    assert forwards[1] == 2 * forwards[0] > 0
    assert all(torch.equal(chosen[1][name], tensor) for name, tensor in chosen[0].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_the_logits_are_the_bases_own(kind, dtype):
    model = tiny_llama(packed=False).to(dtype)
    want = logits_of(model)
    methods.create(KINDS[kind]).apply(model)
    assert torch.equal(logits_of(model), want)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    model.train()
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits.float(), want)


@pytest.fixture
def base(tmp_path) -> str:
    tiny_llama(packed=False).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def trained(base, kind, tmp_path, dtype=torch.float32, grown=0):
    model = load_base(base, dtype=dtype)
    if grown:
        grow_vocabulary(model, grown)
    torch.manual_seed(1)
    method = methods.create(KINDS[kind])
    method.apply(model)
    train(job_of(tmp_path / "run", model, random_part(tmp_path / "run", 26), total=8, lr=2e-2, method=method))
    (tmp_path / "adapter").mkdir()
    method.save(model, tmp_path / "adapter", base=base)
    return model, method


@pytest.mark.parametrize("grown", [0, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_logits(tmp_path, base, kind, grown):
    model, _ = trained(base, kind, tmp_path, grown=grown)
    fresh = load_base(base)
    without = logits_of(fresh)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(fresh), logits_of(model))
    assert (logits_of(fresh)[..., :97] - without).abs().max() > 0.01
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["peft_type"] in ("BOTTLENECK", "SPARSE") and config["base_model_name_or_path"] == base
    other = methods.saved_in(tmp_path / "adapter")
    smaller = tiny_llama()
    smaller.model.layers.pop(1)
    smaller.config.num_hidden_layers = 1
    other.apply(smaller)
    with pytest.raises(ModelError, match="does not fit"):
        other.load(smaller, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_merge_is_exact(tmp_path, base, dtype):
    """Computed in training, merged, and W + D rounded once: the same, bit for bit; no other entry is touched."""
    model, method = trained(base, "sparse", tmp_path, dtype)
    before = {name: p.clone() for name, p in load_base(base, dtype=dtype).named_parameters()}
    layers, want = dict(sparse_layers(model)), logits_of(model)
    changed = 0
    method.merge(model)
    assert torch.equal(logits_of(model), want) and not sparse_layers(model)
    for name, p in model.named_parameters():
        expected = before[name]
        if name.removesuffix(".weight") in layers:
            layer = layers[name.removesuffix(".weight")]
            delta = torch.zeros(expected.numel()).index_put((layer.flat.long(),), layer.values).view_as(expected)
            changed += int((delta != 0).sum())
            expected = (expected.float() + delta).to(dtype)
        assert torch.equal(p, expected), name
    assert changed > 200


def test_an_adapter_says_why_it_is_not_merged(tmp_path, base):
    from fitout.export.merge import merge_adapter

    _, method = trained(base, "adapter", tmp_path)
    assert "nonlinear" in str(method.unmergeable)
    with pytest.raises(RequestError, match="nonlinear"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", name="m", facts={})
    assert not (tmp_path / "merged").exists()
    assert "PEFT has no such adapter" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_and_16_bit_bases(tmp_path, kind):
    outcomes = []
    for recompute, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        model, method = adapted(KINDS[kind])
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
        for layer in sparse_layers(model).values():
            layer.original = layer.original.to(dtype)
        folder = tmp_path / f"{recompute}{dtype}"
        job = job_of(folder, model, random_part(folder, 26), total=8, gradient_checkpointing=recompute, lr=3e-3,
                     method=method)  # fmt: skip
        train(job)
        assert all(p.dtype == torch.float32 for p in trainable(model).values())
        outcomes.append([x for _, x in losses(job.run.log)])
    assert outcomes[0] == outcomes[1]
    assert outcomes[2] == pytest.approx(outcomes[0], abs=0.03)


def test_generation_with_a_cache_is_that_without():
    model, _ = adapted(STYLES[0], packed=False)
    model.eval()
    with_cache, without = (model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


FAMILIES = {
    "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {}, "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8},
    "Phi3": {"pad_token_id": 0}, "GPTNeoX": {}, "Phi": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", STYLES[:2], ids=lambda s: s.style)
def test_families_of_models(family, settings):
    """At first nothing changes; then it is the formula around the blocks that transformers' layer calls."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation="eager", **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    want, plain = logits_of(model), copy.deepcopy(model)
    method = methods.create(settings)
    method.apply(model)
    assert torch.equal(logits_of(model), want)
    for p in trainable(model).values():
        nn.init.normal_(p, std=0.05)
    layers = model.get_decoder().layers
    for ours, layer in zip(layers, plain.get_decoder().layers, strict=True):
        layer.mlp = Written(layer.mlp, settings, ours.mlp.adapter.state_dict())
        if settings.style == "houlsby":
            attention = layer.attention if family == "GPTNeoX" else layer.self_attn
            own = getattr(ours, "attention" if family == "GPTNeoX" else "self_attn").adapter.state_dict()
            last = next(n for n in ("o_proj", "dense") if hasattr(attention, n))
            setattr(attention, last, Written(getattr(attention, last), settings, own))
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=1e-5)
    assert (logits_of(model) - want).abs().max() > 1e-3


def test_a_model_without_such_blocks_is_refused():
    from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                   num_attention_heads=4, word_embed_proj_dim=32))  # fmt: skip
    with pytest.raises(RequestError, match=r"layers\.0 of OPTForCausalLM has no submodule mlp") as error:
        methods.create(STYLES[1]).apply(opt)
    assert "self_attn" in error.value.hint
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(RequestError, match="residual"):  # its blocks add the residual themselves
        methods.create(STYLES[1]).apply(bloom)
