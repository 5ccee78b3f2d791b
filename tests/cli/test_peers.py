"""Configurations of LLaMA-Factory and Axolotl become recipes that load; nothing in them is lost without a name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitout.cli.peers import carry_over, write_carried
from fitout.cli.peers.axolotl import AXOLOTL, AXOLOTL_TOGETHER
from fitout.cli.peers.llama_factory import LLAMA_FACTORY, LLAMA_FACTORY_TOGETHER
from fitout.config import load
from fitout.errors import RequestError

LF = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "q_proj,v_proj",
    "dataset": "one,two",
    "template": "llama3",
    "cutoff_len": 4096,
    "max_samples": 500,
    "output_dir": "saves/x/lora/sft",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": "1e-4",
    "num_train_epochs": 2.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "val_size": 0.1,
    "report_to": "wandb",
    "logging_steps": 10,
}
AX = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}],
    "val_set_size": 0.05,
    "sequence_len": 2048,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "learning_rate": 2e-4,
    "optimizer": "adamw_bnb_8bit",
    "bf16": "auto",
    "flash_attention": True,
    "output_dir": "./outputs/out",
}
INFO = {
    "one": {"file_name": "one.json", "columns": {"prompt": "ask", "response": "output"}},
    "two": {
        "hf_hub_url": "owner/two",
        "formatting": "sharegpt",
        "subset": "s",
        "split": "dev",
        "num_samples": 100,
        "columns": {"messages": "turns", "tools": "tools"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "ranked": {"file_name": "r.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "pictures": {"file_name": "p.json", "columns": {"images": "img"}},
}


def made(folder, raw, name="peer.yaml"):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (folder / name).write_text(yaml.safe_dump(raw))
    carried = write_carried(folder / name, folder / "recipe.yaml")
    return carried, load(folder / "recipe.yaml")


def left(carried):
    return {key for key, _, _ in carried.left}


def test_llama_factory(tmp_path):
    carried, recipe = made(tmp_path, LF)
    assert carried.tool == "LLaMA-Factory" and not carried.left
    assert carried.needless == ["do_train", "logging_steps"]
    assert recipe.name == "sft" and recipe.model.base == LF["model_name_or_path"] and recipe.chat.template == "llama3"
    assert (recipe.method.kind, recipe.method.rank, recipe.method.alpha) == ("lora", 8, 16)  # alpha: twice the rank
    assert recipe.method.targets == ["q_proj", "v_proj"]
    one, two = recipe.data.sources
    assert one.path.endswith("data/one.json") and one.columns == {"instruction": "ask"} and one.limit == 500
    assert two.path == "hf://owner/two/s:dev" and two.format == "openai" and two.columns == {"messages": "turns"}
    assert two.limit == 100
    assert recipe.data.max_length == 4096 and recipe.data.too_long == "truncate"
    assert recipe.data.split.validation == recipe.data.split.test == 0.1
    train = recipe.train
    assert (train.lr, train.epochs, train.batch_size, train.warmup) == (1e-4, 2, 16, 0.1)
    assert (train.schedule, train.precision, train.seed, train.save_every) == ("cosine", "bf16", 42, 500)
    assert train.listeners == ["wandb"]


def test_llama_factory_defaults_are_written_out(tmp_path):
    _, recipe = made(tmp_path, {"model_name_or_path": "m", "dataset": "one"})
    train = recipe.train
    assert (train.lr, train.epochs, train.schedule, train.warmup, train.batch_size) == (5e-5, 3, "linear", 0, 8)
    assert recipe.data.max_length == 2048


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"finetuning_type": "full"}, {"kind": "full"}),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 3}, {"kind": "full", "last_layers": 3}),
        ({"use_dora": True}, {"kind": "dora"}),
        ({"quantization_bit": 4}, {"kind": "qlora"}),
        ({"quantization_bit": 4, "use_dora": True}, {"kind": "qlora", "dora": True}),
        ({"pissa_init": True, "use_rslora": True}, {"kind": "lora", "init": "pissa", "rslora": True}),
        ({"loraplus_lr_ratio": 16, "lora_alpha": 64}, {"kind": "lora", "lr_ratio": 16, "alpha": 64}),
    ],
)
def test_llama_factory_methods(tmp_path, changes, method):
    carried, recipe = made(tmp_path, LF | changes)
    found = recipe.method.model_dump()
    assert {key: found[key] for key in method} == method
    assert left(carried) == ({"method.rank", "method.targets"} if method["kind"] == "full" else set())


def test_what_llama_factory_has_and_we_do_not_is_named(tmp_path):
    changes = {
        "stage": "kto",
        "galore_rank": 8,
        "quantization_bit": 8,
        "dataset": "ranked,pictures,absent",
        "template": "qwen",
        "mask_history": True,
        "optim": "lion",
        "val_size": 100,
    }
    carried, recipe = made(tmp_path, LF | changes)
    assert left(carried) == {
        "stage",
        "galore_rank",
        "quantization_bit",
        "dataset_info.json: pictures",
        "dataset",
        "template",
        "mask_history",
        "optim",
        "val_size",
    }
    assert recipe.data.sources[0].format == "preference"
    assert recipe.data.sources[0].columns == {"instruction": "q", "chosen": "good", "rejected": "bad"}
    text = (tmp_path / "recipe.yaml").read_text()
    assert all(f"# not carried over: {key}: " in text for key in left(carried))


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({"stage": "dpo"}, {"kind": "dpo", "beta": 0.1}),
        ({"stage": "dpo", "pref_loss": "orpo", "pref_beta": "0.2"}, {"kind": "orpo", "beta": 0.2}),
        ({"stage": "dpo", "pref_loss": "simpo", "pref_beta": 2}, {"kind": "simpo", "beta": 2.0, "gamma": 0.5}),
    ],
)
def test_llama_factory_on_pairs(tmp_path, changes, objective):
    carried, recipe = made(tmp_path, LF | {"dataset": "ranked"} | changes)
    assert recipe.objective.model_dump() == objective and not carried.left
    carried = carry_over_of(tmp_path, LF | {"stage": "dpo", "pref_loss": "ipo", "adapter_name_or_path": "there"})
    assert "pref_loss" in left(carried) and "its adapter included" in " ".join(carried.notes)


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ({"rl": "dpo", "rl_beta": 0.3}, {"kind": "dpo", "beta": 0.3}),
        ({"rl": "orpo", "orpo_alpha": 0.2}, {"kind": "orpo", "beta": 0.2}),
        ({"rl": "simpo", "rl_beta": 2, "simpo_gamma": 0.7}, {"kind": "simpo", "beta": 2.0, "gamma": 0.7}),
        ({"rl": "simpo", "rl_beta": 2}, {"kind": "simpo", "beta": 2.0, "gamma": 0.5}),
    ],
)
def test_axolotl_on_pairs(tmp_path, changes, objective):
    carried, recipe = made(tmp_path, AX | changes)
    assert recipe.objective.model_dump() == objective and not carried.left


def test_interleaved_sources_are_shares(tmp_path):
    _, recipe = made(tmp_path, LF | {"mix_strategy": "interleave_under", "interleave_probs": "0.2,0.6"})
    assert [source.share for source in recipe.data.sources] == [pytest.approx(0.25), pytest.approx(0.75)]


def test_axolotl(tmp_path):
    carried, recipe = made(tmp_path, AX)
    assert carried.tool == "Axolotl" and not carried.left and carried.needless == ["flash_attention"]
    assert (recipe.method.kind, recipe.method.rank, recipe.method.alpha) == ("qlora", 32, 16)
    assert recipe.method.targets == "all-linear" and recipe.train.optimizer == "adamw_8bit"
    assert recipe.data.sources[0].path == "hf://teknium/GPT4-LLM-Cleaned" and recipe.data.sources[0].format == "alpaca"
    assert recipe.data.too_long == "drop" and recipe.train.batch_size == 8 and recipe.train.lr == 2e-4
    assert recipe.data.split.validation == 0.05 and recipe.name == "out"


def test_axolotl_other_forms(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    datasets = [
        {"path": "rows.jsonl", "type": "chat_template", "roles_to_train": ["assistant"]},
        {"path": "owner/name", "name": "cfg", "split": "train[:10%]", "type": "completion", "field": "body"},
        {"path": "json", "data_files": ["turns.json"], "type": "chat_template", "field_messages": "turns"},
        {"path": "x/y", "type": {"field_instruction": "q"}},
    ]
    raw = AX | {
        "adapter": None,
        "datasets": datasets[:1],
        "rl": "kto",
        "deepspeed": "ds.json",
        "early_stopping_patience": 3,
    }
    carried, recipe = made(tmp_path, raw)
    assert recipe.method.kind == "full" and recipe.train.parallel == "ds.json" and recipe.train.patience == 3
    assert left(carried) == {"rl", "method.rank", "method.alpha", "method.targets"}
    (tmp_path / "recipe.yaml").unlink()
    carried = carry_over_of(tmp_path, AX | {"datasets": datasets[1:]})
    assert carried.recipe["data"]["sources"] == [
        {"path": "hf://owner/name/cfg", "format": "text", "columns": {"text": "body"}},
        {"path": "turns.json", "format": "openai", "columns": {"messages": "turns"}},
        {"path": "hf://x/y"},
    ]
    assert left(carried) == {"type", "split"} and carried.recipe["objective"] == {"kind": "pretrain"}


def carry_over_of(folder, raw):
    (folder / "x.yaml").write_text(yaml.safe_dump(raw))
    return carry_over(folder / "x.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1\n", "neither a LLaMA-Factory nor an Axolotl"),
        ("- 1\n", "YAML mapping"),
        ("a: [1\n", "not YAML"),
        ("\ud800", "not YAML"),
        ("[" * 3000, "not YAML"),
        (
            "a: &a [x,x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 9}]\n" for n in range(20)),
            "neither",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    (tmp_path / "x.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RequestError, match=says):
        carry_over(tmp_path / "x.yaml")


def test_nested_aliases_do_not_unfold(tmp_path):
    content = "base_model: m\nzz: &a [x,x]\n" + "".join(
        f"z{n}: &{chr(98 + n)} [{f'*{chr(97 + n)},' * 9}]\n" for n in range(20)
    )
    (tmp_path / "x.yaml").write_text(content)
    carried = carry_over(tmp_path / "x.yaml")
    assert len(carried.left) >= 21 and all(len(value) < 500 for _, value, _ in carried.left)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10_000),
    st.floats(-1, 2),
    st.text(max_size=6),
    st.sampled_from(["1e-4", "lora", "qlora", "full", "all", "a,b", "cosine", "x.json", "x.jinja"]),
    st.lists(st.sampled_from(["a", "b", 1, None]), max_size=3),
    st.dictionaries(st.sampled_from(["path", "type", "a"]), st.text(max_size=3)),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from(["model_name_or_path", "base_model"]),
    raw=st.dictionaries(
        st.sampled_from(sorted({*LLAMA_FACTORY, *LLAMA_FACTORY_TOGETHER, *AXOLOTL, *AXOLOTL_TOGETHER})),
        VALUES,
        max_size=12,
    ),
)
def test_any_values_give_a_recipe_or_a_typed_error(base, raw):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.yaml").write_text(yaml.safe_dump({**raw, base: "m"}))
        try:
            write_carried(Path(folder) / "x.yaml", Path(folder) / "recipe.yaml")
        except RequestError as error:
            assert error.message
