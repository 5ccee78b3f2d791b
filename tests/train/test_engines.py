"""Which engine is asked for, waiting without a collective, and files written of tensors that come one at a time."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from fitout.errors import FitoutError, RequestError
from fitout.model import methods
from fitout.model.load import Pending, in_order, write_tensors
from fitout.model.methods import LoraSettings, QloraSettings, SparseSettings
from fitout.train import TrainSettings
from fitout.train.backend import Backend
from fitout.train.engines.asked import asked


def wish(parallel="auto", environment=None, **more):
    return asked(TrainSettings(parallel=str(parallel), **more), environment or {})


def test_by_name():
    assert wish().kind == "auto" and wish("ddp").kind == "ddp"
    assert wish("zero2", offload=True).offload and not wish("zero2").offload
    with pytest.raises(ValueError, match="is not one of auto, ddp"):
        TrainSettings(parallel="zero4")


def test_a_deepspeed_file_says_how_to_divide_and_the_recipe_all_else(tmp_path):
    file = tmp_path / "mine.json"
    zero = {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({
        "zero_optimization": zero, "train_batch_size": 64, "gradient_clipping": 0.3, "bf16": {"enabled": True},
        "optimizer": "auto", "steps_per_print": 100,
    }))  # fmt: skip
    found = wish(file)
    assert found.kind == "zero3"
    assert found.deepspeed == {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "steps_per_print": 100,
    }
    assert [note.partition(" is not used")[0] for note in found.notes] == [
        "mine.json: train_batch_size", "mine.json: gradient_clipping", "mine.json: bf16",
    ]  # fmt: skip
    file.write_text('{"zero_optimization": {"stage": 5}}')
    with pytest.raises(RequestError, match="stage is 5"):
        wish(file)
    file.write_text("{")
    with pytest.raises(RequestError, match="cannot be read"):
        wish(file)


@pytest.mark.parametrize(
    ("values", "kind", "more"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 8}, "ddp", {}),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "fsdp",
         {"offload": True}),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard_after_forward": False}}, "fsdp",
         {"reshard": False}),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"}},
         "zero2", {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}}),
    ],
)  # fmt: skip
def test_an_accelerate_file(tmp_path, values, kind, more):
    file = tmp_path / "default_config.yaml"
    file.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", **values}))
    found = wish(file)
    assert found.kind == kind and not found.notes
    assert {key: getattr(found, key) for key in more} == more


def test_an_accelerate_file_is_not_dropped_in_silence(tmp_path):
    file = tmp_path / "a.yaml"
    inner = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    file.write_text(yaml.safe_dump({"distributed_type": "FSDP", "fsdp_config": inner, "mixed_precision": "bf16"}))
    told = " ".join(wish(file).notes)
    assert "fsdp_auto_wrap_policy is not used" in told and "train.precision decides" in told
    file.write_text(yaml.safe_dump({"distributed_type": "TPU"}))
    with pytest.raises(RequestError, match="TPU"):
        wish(file)


def test_accelerate_launch_is_heard_where_the_recipe_says_auto():
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    assert wish(environment=environment).kind == "fsdp" and wish(environment=environment).offload
    kept = wish("ddp", environment)
    assert kept.kind == "ddp" and "the recipe decides" in kept.notes[0]
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert wish(environment=zero).kind == "zero3"


def test_methods_say_what_cannot_be_divided():
    reasons = {
        name: [methods.create(settings).undivided(stage) is not None for stage in (1, 2, 3)]
        for name, settings in {
            "lora": LoraSettings(),
            "qlora": QloraSettings(),
            "sparse": SparseSettings(),
            "redrawn": SparseSettings(redraw_every=3),
        }.items()
    }
    assert reasons == {
        "lora": [False, False, False],
        "qlora": [False, False, True],
        "sparse": [False, False, True],
        "redrawn": [True, True, True],
    }


def test_the_others_wait_for_the_first_rank_without_a_collective(monkeypatch):
    """There is no process group here at all: whoever waits asks the store."""
    store = dist.HashStore()
    monkeypatch.setattr(Backend, "_store", store)
    first, second = Backend(torch.device("cpu")), Backend(torch.device("cpu"))
    first.ranks = second.ranks = 2
    second.rank = 1
    order = []

    def later():
        with second.main_first("data"):
            order.append("second")

    waiting = threading.Thread(target=later)
    waiting.start()
    with first.main_first("data"):
        time.sleep(0.5)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_a_lost_peer_ends_in_an_error_that_says_so():
    backend = Backend(torch.device("cpu"))
    backend.ranks = 2
    with pytest.raises(FitoutError, match="another rank is gone"), backend:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:19110")
    with pytest.raises(RuntimeError, match="something else"), backend:
        raise RuntimeError("something else")


def test_tensors_that_come_one_at_a_time_make_the_same_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(7, generator=generator).bfloat16(),
        "n": torch.arange(6).reshape(2, 3),
        "step": torch.tensor(4.0),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
    }
    fetched = []

    def pending(name: str) -> Pending:
        def fetch():
            fetched.append(name)
            return tensors[name].t().contiguous().t() if tensors[name].ndim == 2 else tensors[name]

        return Pending(tensors[name].shape, tensors[name].dtype, fetch)

    mixed = {name: pending(name) if name != "n" else tensor for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", mixed)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert fetched == [name for name in in_order(mixed) if name != "n"]


def test_a_tensor_that_comes_in_another_shape_is_refused(tmp_path):
    wrong = {"w": Pending(torch.Size([4]), torch.float32, lambda: torch.zeros(0))}
    with pytest.raises(FitoutError, match="w came as"):
        write_tensors(tmp_path / "x.safetensors", wrong)
    assert not list(tmp_path.iterdir())
