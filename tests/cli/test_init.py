"""`fitout init`: what it asks, chooses and why; what it writes runs; it never waits where nobody answers."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fitout.cli import ask
from fitout.cli.app import app
from fitout.config import load
from fitout.model.load import SHELL
from fitout.rundir import RunDir
from tests.cli.command import ENVIRONMENT, fitout, rows


def labelled(path, count=60):
    lines = [{"instruction": f"Is {n} even?", "output": "yes" if n % 2 == 0 else "no"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def chatty(path, count=40):
    lines = [{"instruction": f"Tell me of {n}.", "output": f"Once there was {n}. " * 12} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Calls `fitout init` as if on a terminal, with these lines typed."""
    monkeypatch.setattr(ask, "on_a_terminal", lambda: True)
    monkeypatch.chdir(tmp_path)

    def typed(*lines, options=()):
        return CliRunner().invoke(app, ["init", *options], input="".join(f"{line}\n" for line in lines))

    return typed


def reasons(path):
    """The comment of each key: beside it, or in the lines above."""
    found, above = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, why = line.partition("   # ")
        if line.strip().startswith("#"):
            above.append(line.strip(" #"))
        elif line.strip():
            found[key.split(":")[0].strip()] = why or " ".join(above)
            above = []
        else:
            above = []
    return found


def runs(folder, name="recipe.yaml"):
    """`fitout run` on what was written, shortened, to the end."""
    short = ("train.max_steps=2", "train.listeners=[]", "evaluate.limit=2", "evaluate.samples=100",
             "evaluate.max_new_tokens=2", "evaluate.retention=off")  # fmt: skip
    sets = [word for change in short for word in ("--set", change)]
    done = fitout("run", name, "--out", "run", *sets, cwd=folder)
    assert done.code == 0, done.err
    run = RunDir(folder / "run")
    assert run.read_status()["status"] == "done"
    return run


def test_the_questions_lead_to_a_recipe_that_runs(answer, tmp_path):
    rows(tmp_path / "rows.jsonl", 60)
    done = answer("rows.jsonl", "", "", "")
    assert done.exit_code == 0, done.output
    for said in ("60 samples, read as alpaca", "3.2 M parameters", "memory free", "What should the tuned model do?",
                 "Method: lora", "next: fitout run recipe.yaml"):  # fmt: skip
        assert said in done.output, said
    made, why = load(tmp_path / "recipe.yaml"), reasons(tmp_path / "recipe.yaml")
    assert (made.method.kind, made.objective.kind, made.model.base) == ("lora", "sft", "embedded:shell")
    assert made.evaluate.metrics == ["exact_match", "f1"] and made.train.batch_size == 4
    for key in ("kind", "rank", "lr", "batch_size", "epochs", "max_length", "split", "retention", "merge"):
        assert why[key], key
    runs(tmp_path)


def test_a_wrong_answer_is_told_and_asked_again(answer, tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = answer("rowz.jsonl", "rows.jsonl", "./nowhere", "", "cray-1", "cpu-24g", "9", "2")
    assert done.exit_code == 0, done.output
    for said in (
        "there is no rowz.jsonl",
        "rows.jsonl",
        "no such model folder",
        "no device called cray-1",
        "none of 1 to",
    ):
        assert said in done.output, said
    assert "cpu-24g" in (tmp_path / "recipe.yaml").read_text() and load(tmp_path / "recipe.yaml").method.rank == 16


def test_classification_takes_its_labels_from_the_data(answer, tmp_path):
    labelled(tmp_path / "even.jsonl")
    done = answer("even.jsonl", "", "", "")  # the look of the data suggests it
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "recipe.yaml").evaluate.choices == ["yes", "no"]
    scores = json.loads(runs(tmp_path).evaluation_report.read_text())
    assert "accuracy" in json.dumps(scores)


def test_new_knowledge_gets_an_honest_word(answer, tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = answer("rows.jsonl", "", "", "knowledge")
    assert done.exit_code == 0, done.output
    assert "facts badly" in done.output and "2405.05904" in (tmp_path / "recipe.yaml").read_text()
    assert load(tmp_path / "recipe.yaml").method.rank == 32


def test_plain_text_is_not_asked_for_an_aim(answer, tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Once there was a cat called {n}. It slept." for n in range(30)))
    done = answer("book.txt", "", "")
    assert done.exit_code == 0, done.output
    made = load(tmp_path / "recipe.yaml")
    assert made.objective.kind == "pretrain" and made.data.split.test == 0
    runs(tmp_path)


def test_answers_that_end_write_nothing(answer, tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = answer("rows.jsonl", "")
    assert done.exit_code != 0 and "Aborted" in done.output
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_recipe_that_is_there_is_told_before_any_question(answer, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    done = answer()
    assert "exists already" in str(done.exception) and (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_real_terminal_is_asked(tmp_path):
    rows(tmp_path / "rows.jsonl")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fitout.cli.app", "init", "--model", "embedded:shell", "--aim", "chat"],
        cwd=tmp_path, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"rows.jsonl\ncpu-24g\n")
    said = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        said += piece
        if not piece:
            break
    assert process.wait(60) == 0, said.decode()
    assert b"Your data" in said and b"base model" not in said and load(tmp_path / "recipe.yaml").method.rank == 16


def test_nobody_is_asked_without_a_terminal(tmp_path):
    """Standard input stays open and says nothing: waiting for it would take forever."""
    reading, writing = os.pipe()
    try:
        for words in ((), ("--json",), ("--model", "embedded:shell")):
            done = subprocess.run(
                [sys.executable, "-m", "fitout.cli.app", "init", *words],
                cwd=tmp_path, env=ENVIRONMENT, stdin=reading, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 2 and "which data?" in done.stderr
    finally:
        os.close(reading)
        os.close(writing)


def test_arguments_leave_nothing_to_ask(answer, tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = answer(
        options=("rows.jsonl", "--method", "sparse", "--machine", "rtx3090-24g", "--to", "new.yaml", "--json")
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["recipe"] == "new.yaml" and told["method"] == "sparse" and told["fits"] is True
    assert any("rtx3090-24g" in line and "data sheet" in line for line in told["about"])
    assert load(tmp_path / "new.yaml").method.density == 0.05


@pytest.mark.parametrize("method", ["full", "dora", "qlora", "adapter", "sparse"])
def test_every_method_can_be_asked_for(method, tmp_path):
    chatty(tmp_path / "rows.jsonl")
    assert fitout("init", "rows.jsonl", "--method", method, cwd=tmp_path).code == 0
    made = load(tmp_path / "recipe.yaml")
    assert made.method.kind == method and made.evaluate.metrics == ["rouge", "bleu"]
    runs(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--aim", "text"), "does not go with these data"),
        (("--aim", "labels"), "no label set"),
        (("--aim", "fame"), "is not one of form"),
        (("--method", "magic"), "is not one of auto"),
        (("--machine", "cray-1"), "no device called cray-1"),
        (("--model", "./nowhere"), "no such model folder"),
    ],
)
def test_wishes_that_do_not_go_together(words, said, tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = fitout("init", "rows.jsonl", *words, cwd=tmp_path)
    assert done.code == 2 and said in done.err and not (tmp_path / "recipe.yaml").exists()


def test_preference_pairs_get_a_recipe_that_runs(tmp_path):
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
    pairs = [row | {"prompt": f"Hi, I am number {number}."} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    done = fitout("init", "pairs.jsonl", cwd=tmp_path)
    assert done.code == 0, done.err
    made = load(tmp_path / "recipe.yaml", [])
    assert made.objective.kind == "orpo" and made.train.lr == pytest.approx(0.4 * lr_of_answers(tmp_path, pairs))
    done = fitout("train", "recipe.yaml", "--set", "train.max_steps=2", cwd=tmp_path)
    assert done.code == 0, done.err


def lr_of_answers(folder, pairs):
    """The rate for the chosen answers alone."""
    alone = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (folder / "alone.jsonl").write_text("".join(json.dumps(one) + "\n" for one in alone))
    assert fitout("init", "alone.jsonl", "--to", "alone.yaml", cwd=folder).code == 0
    return load(folder / "alone.yaml", []).train.lr


def test_bad_rows_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        rows(tmp_path / "rows.jsonl").read_text() + '{"instruction": "a", "output": ""}\n{"br\n'
    )
    done = fitout("init", "rows.jsonl", cwd=tmp_path)
    assert "30 samples, read as alpaca; 2 bad rows go to quarantine" in done.out


def test_max_length_holds_the_longest_sample(tmp_path):
    """By the tokens that the run itself counts: none is too long."""
    chatty(tmp_path / "rows.jsonl", 300)
    assert fitout("init", "rows.jsonl", cwd=tmp_path).code == 0
    limit = load(tmp_path / "recipe.yaml").data.max_length
    done = fitout("data", "prepare", "recipe.yaml", "--json", "--out", "run", cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert done.code == 0 and "too long" not in report["removed"] and limit % 64 == 0
    longest = max(high for part in report["parts"].values() for _, high, count in part["lengths"] if count)
    assert limit - 128 < longest <= limit


def test_a_model_that_does_not_fit_is_written_with_a_warning(tmp_path, monkeypatch):
    """By config.json alone: 70 billion parameters on a card of 12 GB, at a guessed length; and 7 billion take qlora."""
    rows(tmp_path / "rows.jsonl")
    sizes = {"large": (8192, 80, 28672, 64), "seven": (4096, 32, 11008, 32)}
    for name, (hidden, layers, ffn, heads) in sizes.items():
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 32000,
                  "intermediate_size": ffn, "num_attention_heads": heads, "max_position_embeddings": 4096}  # fmt: skip
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    where = ("--machine", "rtx3060-12g")
    large = fitout("init", "rows.jsonl", "--model", "large", *where, "--to", "large.yaml", cwd=tmp_path)
    assert large.code == 0 and "no way of training fits" in large.out and "lengths are guessed" in large.out
    seven = fitout("init", "rows.jsonl", "--model", "seven", *where, "--to", "seven.yaml", cwd=tmp_path)
    assert seven.code == 0, seven.err
    assert load(tmp_path / "seven.yaml").method.kind == "qlora" and "not lora: it needs" in seven.out
    assert load(tmp_path / "seven.yaml").train.lr == 2e-4


def test_a_hub_model_that_is_not_here_has_no_plan(tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = fitout("init", "rows.jsonl", "--model", "nobody/nothing-7b", cwd=tmp_path)
    assert done.code == 0 and "No plan: it is not on this machine yet" in done.out
    made = load(tmp_path / "recipe.yaml")
    assert made.model.base == "nobody/nothing-7b" and made.method.kind == "lora" and made.train.lr == 2e-4


def test_a_local_model_is_named_by_its_whole_path(tmp_path):
    rows(tmp_path / "rows.jsonl")
    (tmp_path / "base").symlink_to(SHELL)
    assert fitout("init", "rows.jsonl", "--model", "base", cwd=tmp_path).code == 0
    assert load(tmp_path / "recipe.yaml").model.base == str(SHELL)


def test_hub_ids_are_looked_at_like_files(tmp_path, monkeypatch):
    """A path type would fold the two slashes of hf:// into one."""
    rows_there = [json.loads(line) for line in labelled(tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: iter(rows_there)))
    checked = CliRunner().invoke(app, ["data", "check", "--json", "hf://owner/parity"])
    assert checked.exit_code == 0 and json.loads(checked.stdout)["errors"] == 0
    recipe = tmp_path / "recipe.yaml"
    made = CliRunner().invoke(app, ["init", "hf://owner/parity", "--to", str(recipe), "--json"])
    assert made.exit_code == 0, made.output
    drawn = load(recipe)
    assert drawn.name == "parity" and drawn.data.sources[0].path == "hf://owner/parity"
