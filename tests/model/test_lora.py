"""LoRA's beginnings; that they are PEFT's is in tests/equal/test_peft.py."""

from __future__ import annotations

from fitout.model.methods import LoraSettings, create
from fitout.model.methods.lora import LoraLinear, adapters
from tests.conftest import tiny_llama


def test_a_beginning_that_takes_long_says_before_each_layer_that_it_is_alive(monkeypatch):
    model, method = tiny_llama(), create(LoraSettings(rank=2, init="pissa"))
    method.apply(model)
    done, begin = [], LoraLinear.begin

    def noted(layer, how):
        done.append("layer")
        begin(layer, how)

    monkeypatch.setattr(LoraLinear, "begin", noted)
    method.begin(model, lambda: iter(()), lambda: done.append("alive"))
    assert done == ["alive", "layer"] * len(adapters(model)) and len(done) == 28
