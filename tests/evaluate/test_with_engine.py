"""The whole room with a real engine on a really pretrained model of 260,000 parameters."""

import json
import math

import pytest

from fitout.evaluate import EvaluateSettings
from fitout.evaluate.suite import evaluate
from fitout.files import read_json

from .fakes import asked

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "


@pytest.fixture(scope="module")
def engine():
    from ..conftest import SHARED

    folder = SHARED / "models" / "stories260K"
    if not folder.exists():
        pytest.skip("needs ../shared")
    from fitout.engine import Engine

    return Engine.open(folder, precision="fp32")


@pytest.fixture(scope="module")
def alpaca():
    from ..conftest import SHARED

    rows = read_json(SHARED / "data" / "llamafactory" / "alpaca_en_demo.json")[:3]
    return [asked(row["instruction"], row["output"], line=line) for line, row in enumerate(rows, 1)]


def test_generated_answers_and_probes(engine, alpaca):
    rows = [*alpaca, asked("word " * 700, "too long for a context of 512")]
    probes = [
        {"prompt": "Once upon a", "answer": "time"},
        {"prompt": "Once upon a time, there was a little", "answer": "xyz"},
    ]
    result = evaluate(engine, engine, rows, EvaluateSettings(max_new_tokens=8, samples=100), probes=probes)
    assert all(score.difference.value == 0 and score.verdict == "no difference shown" for score in result.scores)
    assert result.counts["base"]["finish_reasons"]["error"] == 1
    assert all(row["tuned"].strip() for row in result.rows[:3])
    assert result.retention.overall.base.value == 50  # this model knows how a story begins
    json.dumps(result.as_dict())


def test_chosen_labels_and_perplexity(engine, alpaca, tmp_path):
    """Perplexity equals that of transformers' own loss over the same text."""
    import torch

    (tmp_path / "story.txt").write_text(STORY)
    settings = EvaluateSettings(choices=["yes", "no"], retention=str(tmp_path / "story.txt"), samples=100)
    result = evaluate(engine, engine, [asked("Is it day?", "yes"), asked("word " * 700, "no")], settings)
    assert result.rows[0]["base"] in ("yes", "no")
    assert result.counts["base"]["finish_reasons"] == {"choice": 1, "error": 1}
    ids = torch.tensor([engine.chat.tokenizer(STORY)["input_ids"]])
    with torch.no_grad():
        loss = float(engine.model(input_ids=ids, labels=ids).loss)
    assert result.retention.perplexity.base.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.retention.tokens == ids.shape[1] - 1
