"""Model folders, adapters and checkpoints made by somebody who means harm: each is refused, and its canary is silent.

The canary is a file that the attack would make. `test_the_canaries_sing` shows that they would, were they let.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fitout.chat import ChatSettings
from fitout.chat.tokenizer import load_tokenizer
from fitout.errors import FitoutError, ModelError
from fitout.files import sha256_file, write_json
from fitout.model.load import SHELL, load_adapter, load_base, load_config, open_model
from fitout.train.checkpoint import Checkpoints
from tests.conftest import tiny_llama
from tests.model.test_load import saved_adapter

CODE = "import pathlib\npathlib.Path({canary!r}).write_text('sang')\n"


class Gadget:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the attacker was run"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(SHELL, folder)
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, offsets, dtype="F32", name="model.embed_tokens.weight") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "longer than the file": safetensors(b"{}", length=1 << 40),
    "of more than all memory": safetensors(b"{}", length=(1 << 63) + 5),
    "not JSON": safetensors(b"{'a': __import__('os')}"),
    "not UTF-8": safetensors(b"{\xff\xfe}"),
    "nested 10^5 deep": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "offsets that end before they begin": safetensors(entry([4], [16, 0]), bytes(16)),
    "offsets behind the end": safetensors(entry([1 << 20], [0, 4 << 20]), bytes(16)),
    "offsets below nought": safetensors(entry([4], [-16, 0]), bytes(16)),
    "a shape whose product overflows": safetensors(entry([1 << 33, 1 << 33], [0, 16]), bytes(16)),
    "a shape that is not its bytes": safetensors(entry([400], [0, 16]), bytes(16)),
    "a kind of number that is none": safetensors(entry([4], [0, 16], dtype="os.system"), bytes(16)),
    "two tensors over the same bytes": safetensors(
        json.dumps({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in ("a", "b")}).encode(), bytes(16)
    ),
    "bytes that belong to none": safetensors(entry([4], [0, 16]), bytes(64)),
    "a pickle under its name": pickle.dumps({"weight": [1.0]}),
    "nothing": b"",
}


@pytest.mark.parametrize("file", HEADERS.values(), ids=HEADERS)
def test_headers_of_safetensors(base, file):
    (base / "model.safetensors").write_bytes(file)
    with pytest.raises(ModelError):
        load_base(str(base))


@pytest.mark.parametrize("file", HEADERS.values(), ids=HEADERS)
def test_headers_in_an_adapter(tmp_path, file):
    folder = saved_adapter(tmp_path / "adapter", rank=4)
    (folder / "adapter_model.safetensors").write_bytes(file)
    with pytest.raises(FitoutError):
        load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize("file", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors"])
def test_headers_in_a_checkpoint_whose_hashes_agree(tmp_path, file, name):
    """Its maker wrote the manifest too."""
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, {"w": torch.ones(2)}, {"w|exp_avg": torch.ones(2)}, {"progress": {}})
    (path / name).write_bytes(file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(file), "sha256": sha256_file(path / name)}
    write_json(path / "manifest.json", manifest)
    newest, _ = checkpoints.newest()
    with pytest.raises(FitoutError):
        newest.weights() if name.startswith("w") else newest.optimizer()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth"])
def test_pickled_weights(base, canary, name):
    torch.save(Gadget(canary), base / name)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_base(str(base))


def test_pickles_beside_good_weights_are_left_alone(base, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (base / name).write_bytes(pickle.dumps(Gadget(canary)))
    load_base(str(base))
    load_tokenizer(str(base), ChatSettings())


def test_a_pickled_adapter(tmp_path, canary):
    folder = saved_adapter(tmp_path / "adapter", rank=4)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Gadget(canary), folder / "adapter_model.bin")
    with pytest.raises(FitoutError):
        load_adapter(tiny_llama(), folder)


def test_pickles_in_a_checkpoint_are_no_part_of_it(tmp_path, canary):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, {"w": torch.ones(2)}, {"w|exp_avg": torch.ones(2)}, {"progress": {}})
    for name in ("optimizer.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save(Gadget(canary), path / name)
    newest, _ = checkpoints.newest()
    assert newest.weights()["w"].tolist() == [1, 1] and set(newest.optimizer()) == {"w|exp_avg"}


# code beside the weights

AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Slow", "evil.Fast"]}


def with_code(base: Path, canary: Path) -> None:
    (base / "evil.py").write_text(CODE.format(canary=str(canary)))


@pytest.mark.parametrize("kind", ["a kind of its own", "a known kind"])
def test_auto_map_of_a_configuration(base, canary, kind):
    """A known kind has code of its own in transformers, which is taken; another is refused."""
    with_code(base, canary)
    change(base / "config.json", auto_map=AUTO, **({} if kind == "a known kind" else {"model_type": "evil"}))
    if kind == "a known kind":
        load_base(str(base))
        open_model(str(base))
        return
    for load in (load_config, load_base, open_model):
        with pytest.raises(ModelError):
            load(str(base))


def test_auto_map_of_a_tokenizer(base, canary):
    with_code(base, canary)
    change(base / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
    with suppress(ModelError):  # refused, or read from tokenizer.json without the code: either is well
        load_tokenizer(str(base), ChatSettings())


def test_the_canaries_sing(base, tmp_path):
    """The same folders, opened by who trusts them."""
    sang = tmp_path / "sang"
    with_code(base, sang)
    change(base / "config.json", auto_map=AUTO, model_type="evil")
    with pytest.raises(AttributeError):
        AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    assert sang.exists()
    sang.unlink()
    torch.save(Gadget(sang), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert sang.exists()


KINDS = ["llama\nimport os", "../../evil", "llama\x00", "__import__('os')", "", "llama/../evil", ["llama"], None, {}]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models_that_are_none(base, canary, kind):
    with_code(base, canary)
    change(base / "config.json", model_type=kind, architectures=None)
    for load in (load_config, load_base):
        with pytest.raises(ModelError):
            load(str(base))


@pytest.mark.parametrize("name", ["base_model_name_or_path", "revision"])
@pytest.mark.parametrize("value", ["../../etc/passwd", "a/b\nc", "a\x00b/c", "https://elsewhere/x", 7, ["a/b"]])
def test_what_an_adapter_names_as_its_base(tmp_path, name, value):
    folder = saved_adapter(tmp_path / "adapter", rank=4)
    change(folder / "adapter_config.json", **{name: value})
    with pytest.raises(FitoutError):
        open_model(str(folder))


@pytest.mark.parametrize("config", ['["a", "b"]', '"owner/name"', "null", "7"])
def test_an_adapter_whose_configuration_is_none(tmp_path, config):
    folder = saved_adapter(tmp_path / "adapter", rank=4)
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(FitoutError):
        open_model(str(folder))


def test_a_tokenizer_that_is_no_json(base):
    (base / "tokenizer.json").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(ModelError):
        load_tokenizer(str(base), ChatSettings())
