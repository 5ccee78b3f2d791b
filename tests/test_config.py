"""Recipes that YAML or pydantic would take otherwise than they are meant."""

from __future__ import annotations

import pytest

from fitout.config import load
from fitout.errors import FitoutError, RecipeError, RequestError

RECIPE = "name: x\ndata: {sources: [{path: rows.jsonl}]}\n"


def recipe(tmp_path, more: str):
    (tmp_path / "recipe.yaml").write_text(RECIPE + more)
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("more", ["train: {lr: 1.0e-3, lr: 5.0e-2}\n", "train: {lr: 1.0e-3}\ntrain: {max_steps: 2}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path, more):
    with pytest.raises(RequestError, match="stands twice") as error:
        load(recipe(tmp_path, more))
    assert error.value.where.startswith(f"{tmp_path}/recipe.yaml:")


def test_what_an_anchor_brings_may_be_said_anew(tmp_path):
    more = "train: &shared {lr: 1.0e-3, clip: 2.0}\nevaluate: {limit: 3}\n"
    assert load(recipe(tmp_path, more)).train.clip == 2.0
    merged = "x-y: 1\n"
    with pytest.raises(RecipeError):  # other keys are unknown as ever
        load(recipe(tmp_path, merged))
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ndata:\n  sources: [{<<: &s {path: rows.jsonl, limit: 2}, limit: 3}, {<<: *s, path: b.jsonl}]\n"
    )
    assert [source.limit for source in load(tmp_path / "recipe.yaml").data.sources] == [3, 2]


@pytest.mark.parametrize("text", ["2024-13-45", "1" * 5000, "[" * 5000])
def test_values_that_yaml_cannot_make_are_told(tmp_path, text):
    with pytest.raises(RequestError, match="not YAML"):
        load(recipe(tmp_path, f"chat: {text}\n"))
    with pytest.raises(FitoutError):
        load(recipe(tmp_path, ""), [f"train.lr={text}"])  # there it is text


@pytest.mark.parametrize(
    "key",
    ["train.warmup", "train.epochs", "train.lr", "train.weight_decay", "train.hang_after", "method.alpha",
     "data.sources.0.weight"],
)  # fmt: skip
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_numbers_that_are_none_are_refused(tmp_path, key, value):
    changes = ["method.kind=lora", f"{key}={value}"]
    with pytest.raises(RecipeError) as error:
        load(recipe(tmp_path, ""), changes)
    assert key.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize(
    "change",
    ["train.max_steps=true", "data.sources.0.limit=true", "train.lr=true", "train.micro_batch_tokens=0",
     "train.micro_batch_tokens=-5", "train.betas=[0.9, 1]", "train.seed=99999999999999999999999", "train.seed=-1",
     "data.sources.0.weight=1e9"],
)  # fmt: skip
def test_numbers_out_of_bounds_are_refused(tmp_path, change):
    with pytest.raises(RecipeError, match=change.partition("=")[0].replace("[", "")):
        load(recipe(tmp_path, ""), [change])


def test_a_key_of_a_section_that_is_there_by_default_can_be_set(tmp_path):
    assert load(recipe(tmp_path, ""), ["method.rank=3"]).method.rank == 3
    made = load(recipe(tmp_path, ""), ["method.kind=dora", "method.rank=3"]).method
    assert (made.kind, made.rank) == ("dora", 3)
    assert load(recipe(tmp_path, "method: {kind: full}\n"), ["train.lr=1e-4"]).method.kind == "full"


def test_what_is_true_or_false_may_still_be_said(tmp_path):
    changes = ["train.gradient_checkpointing=true", "data.packing=false", "export.merge=true"]
    assert load(recipe(tmp_path, ""), changes).train.gradient_checkpointing is True
