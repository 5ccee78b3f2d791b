"""The door of the evaluate room: settings, and what they refuse."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fitout.evaluate import EvaluateSettings


def test_defaults():
    settings = EvaluateSettings()
    assert settings.metrics == ["exact_match", "f1", "rouge", "bleu"]
    assert (settings.max_new_tokens, settings.limit, settings.retention, settings.choices) == (
        256,
        None,
        "default",
        None,
    )
    assert (settings.words, settings.batch_size, settings.samples, settings.seed) == ("auto", 16, 1000, 0)


def test_a_label_set_means_classification_unless_metrics_are_named():
    assert EvaluateSettings(choices=["yes", "no"]).metrics == ["accuracy"]
    assert EvaluateSettings(choices=["yes", "no"], metrics=["f1"]).metrics == ["accuracy", "f1"]
    assert EvaluateSettings(choices=["yes", "no"], metrics=["f1", "accuracy"]).metrics == ["f1", "accuracy"]


def test_yaml_reads_off_as_false():
    assert EvaluateSettings(retention=False).retention == "off"


@pytest.mark.parametrize(
    "wrong",
    [
        {"metric": ["f1"]},
        {"metrics": ["meteor"]},
        {"choices": ["yes"]},
        {"choices": ["yes", "yes"]},
        {"choices": ["yes", " "]},
        {"limit": 0},
        {"max_new_tokens": 0},
        {"samples": 10},
        {"seed": -1},
        {"retention": ""},
    ],
)
def test_refused(wrong):
    with pytest.raises(ValidationError):
        EvaluateSettings(**wrong)


def test_a_missing_word_cutter_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr("fitout.evaluate.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match="pip install jieba"):
        EvaluateSettings(words="jieba")


def test_the_door_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'numpy', 'sacrebleu', 'rouge_score', 'jieba'}"
    code = f"import sys, fitout.evaluate; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
