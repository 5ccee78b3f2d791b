"""Finding models: what a name means, what is refused, and that an adapter remembers its base, version included."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fitout.config import build
from fitout.errors import ModelError, RequestError
from fitout.model import EMBEDDED
from fitout.model.load import SHELL, grow_vocabulary, load_adapter, load_base, resolve
from fitout.model.methods import LoraSettings, create
from fitout.model.methods.lora import adapters, settings_of
from tests.conftest import tiny_llama


def saved_adapter(folder, **settings):
    model = tiny_llama()
    method = create(LoraSettings(**settings))
    method.apply(model)
    folder.mkdir()
    method.save(model, folder, base="owner/name", revision="v2")
    return folder


def test_names_and_what_they_resolve_to(tmp_path):
    assert resolve(EMBEDDED).base == str(SHELL)
    assert resolve("owner/name").base == "owner/name"
    adapter = saved_adapter(tmp_path / "adapter", rank=4)
    parts = resolve(adapter)
    assert (parts.base, parts.adapter, parts.revision) == ("owner/name", adapter, "v2")
    with pytest.raises(ModelError, match="no such model folder"):
        resolve(tmp_path / "nowhere")


def test_a_run_is_its_merged_model_as_long_as_that_is_what_was_trained_last(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    adapter = saved_adapter(run / "adapter", rank=4)
    tiny_llama().save_pretrained(run / "merged")
    for trained, whole in ((4, True), (40, False)):
        (run / "run.json").write_text(json.dumps({"merged_steps": 4, "trained_steps": trained}))
        parts = resolve(run)
        assert (parts.base, parts.adapter) == ((str(run / "merged"), None) if whole else ("owner/name", adapter))


def test_a_given_adapter_lies_over_what_is_named_and_speaks_as_it_was_trained(tmp_path):
    run, other = tmp_path / "run", saved_adapter(tmp_path / "other", rank=4)
    run.mkdir()
    saved_adapter(run / "adapter", rank=4)
    (run / "run.json").write_text("{}")
    for one in (run, run / "adapter"):
        with pytest.raises(ModelError, match="an adapter itself"):
            resolve(one, adapter=other)
    tiny_llama().save_pretrained(run / "merged")
    for base, found in ((run, str(run / "merged")), (EMBEDDED, str(SHELL)), ("owner/name", "owner/name")):
        parts = resolve(base, adapter=other)
        assert (parts.base, parts.adapter, parts.chat_folder) == (found, other, found)
    shutil.copy(SHELL / "tokenizer.json", other)
    assert {resolve(base, adapter=other).chat_folder for base in (run, EMBEDDED, "owner/name")} == {str(other)}


def test_settings_survive_the_adapter_folder(tmp_path):
    folder = saved_adapter(tmp_path / "adapter", rank=4, alpha=9, dropout=0.25, targets=["q_proj", "v_proj"])
    assert settings_of(folder) == LoraSettings(rank=4, alpha=9, dropout=0.25, targets=["q_proj", "v_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(ModelError, match="bias: all"):
        settings_of(folder)


def test_weights_that_are_missing_or_pickled_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(SHELL / "config.json", folder)
    with pytest.raises(ModelError, match="no weights"):
        load_base(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_base(str(folder))


def test_a_base_that_is_an_unmerged_adapter_is_refused(tmp_path):
    from fitout import verbs

    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    adapter = saved_adapter(tmp_path / "adapter", rank=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(SHELL)}))
    for file in SHELL.glob("*.json*"):
        if not (adapter / file.name).exists():
            shutil.copy(file, adapter)
    shutil.copy(SHELL / "chat_template.jinja", adapter)
    recipe = build({"name": "x", "model": {"base": str(adapter)}, "data": {"sources": [{"path": str(data)}]}})
    with pytest.raises(RequestError, match="not been merged"):
        verbs.train(recipe, out=tmp_path / "run")


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(RequestError, match="q_prog"):
        create(LoraSettings(targets=["q_prog", "v_proj"])).apply(tiny_llama())
    model = tiny_llama()
    create(LoraSettings(targets=["q_proj"])).apply(model)
    assert {name.rpartition(".")[2] for name in adapters(model)} == {"q_proj"}


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_at_the_mean_and_are_trained_with_the_adapter(tied):
    model = tiny_llama(tied=tied)
    mean = model.get_input_embeddings().weight.detach().mean(0)
    grow_vocabulary(model, 101)
    for row in model.get_input_embeddings().weight[97:]:
        torch.testing.assert_close(row, mean)
    create(LoraSettings()).apply(model)
    assert model.get_input_embeddings().weight.requires_grad
    assert model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("how", ["itself", "another", "a run's", "nothing"])
def test_an_adapter_over_no_whole_model_is_refused(tmp_path, how):
    folder = saved_adapter(tmp_path / "adapter", rank=4)
    base = {"itself": folder, "another": tmp_path / "other", "a run's": tmp_path / "run", "nothing": None}[how]
    if how == "another":
        saved_adapter(tmp_path / "other", rank=4)
    if how == "a run's":
        (tmp_path / "run").mkdir()
        saved_adapter(tmp_path / "run" / "adapter", rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base and str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not name its base" if base is None else "itself an adapter"):
        resolve(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["../model.safetensors"], "no safetensors file of this folder"),
        (["/model.safetensors"], "no safetensors file of this folder"),
        (["model.safetensors", "pytorch_model.bin"], "no safetensors file of this folder"),
        (["part-1.safetensors", "part-2.safetensors"], "1 of 2 files of weights are not there .*part-2"),
        ([7], "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_an_index_names_only_weights_beside_it(tmp_path, names, words):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    shutil.copy(folder / "model.safetensors", tmp_path)
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {f"weight.{at}": name for at, name in enumerate(names)}} if names else []
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        load_base(str(folder))


def test_weights_in_parts_are_loaded(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    loaded = load_base(str(tmp_path / "model"))
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in model.state_dict().items())


def test_damaged_weights_are_told(tmp_path):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    adapter = saved_adapter(tmp_path / "adapter", rank=4)
    for file in (folder / "model.safetensors", adapter / "adapter_model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_base(str(folder))
    with pytest.raises(ModelError, match="the adapter's weights cannot be read"):
        load_adapter(tiny_llama(), adapter)
