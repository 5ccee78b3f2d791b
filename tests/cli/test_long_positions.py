"""A model that turns all positions of a long sample otherwise (LongRoPE) is not trained on packs of long and short."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from fitout.data.store import open_prepared
from fitout.model.load import SHELL
from fitout.rundir import RunDir
from tests.cli.command import fitout, recipe


def a_base(folder, switch: int):
    """A random model whose samples of more than `switch` tokens are turned by other factors."""
    vocabulary = len(AutoTokenizer.from_pretrained(SHELL))
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": switch, **factors}
    config = Phi3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=switch, pad_token_id=0,
        eos_token_id=0,
        initializer_range=0.4, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SHELL / name, folder)


@pytest.mark.parametrize("switch", [24, 200])
def test_the_loss_is_that_of_each_sample_alone(tmp_path, switch):
    answers = ["yes" * (1 + n % 2 * 12) for n in range(20)]
    rows = [{"instruction": f"What is number {n}?", "output": one} for n, one in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a_base(tmp_path / "base", switch)
    more = ["train.batch_size=100", "train.max_steps=1", "method.targets=all-linear"]
    path = recipe(tmp_path, base=str(tmp_path / "base"))
    done = fitout("train", path, *(x for one in more for x in ("--set", one)), cwd=tmp_path)
    assert done.code == 0, done.err
    run = RunDir(tmp_path / "runs" / "tiny")
    part = open_prepared(run.data).part("train")
    assert part.lengths.min() < 24 < part.lengths.max() < 200
    told = "turns positions otherwise in samples of more than 24 tokens" in done.out
    assert told == (switch == 24)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    summed, count = 0.0, 0
    for row in range(len(part)):
        ids, trained = torch.tensor(part.ids(row)).long(), torch.tensor(part.train_on(row)).bool()[1:]
        losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[trained]
        summed, count = summed + float(losses.detach().sum()), count + len(losses)
    [step] = [json.loads(line) for line in run.log.read_text().splitlines() if '"loss"' in line][:1]
    assert step["loss"] == pytest.approx(summed / count, rel=1e-5)
