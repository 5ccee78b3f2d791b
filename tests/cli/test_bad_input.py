"""Bad input through the real command line: a clear message, the design's exit code, nothing lost or half-written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from fitout.model.load import SHELL
from fitout.rundir import RunDir
from tests.cli.command import Done, fitout, half_written, recipe, rows


def told(done: Done, folder: Path, *parts: str, code: int = 2, lines: int = 2) -> str:
    """Checks that a command ended as a user's mistake should; returns its message."""
    assert done.code == code, done.err
    assert "Traceback" not in done.out + done.err
    message = done.err.strip()
    assert message.startswith("error ")
    for part in parts:
        assert part in message, message
    assert len(message.splitlines()) >= lines, message  # beside the cause, the harm or the remedy
    assert half_written(folder) == []
    return message


def test_a_missing_recipe(tmp_path):
    recipe(tmp_path)
    message = told(fitout("run", "recipes.yaml", cwd=tmp_path), tmp_path, "no such recipe", "Did you mean recipe.yaml")
    assert "recipes.yaml" in message


def test_a_failure_is_one_object_for_machines_too(tmp_path):
    recipe(tmp_path)
    done = fitout("run", "recipes.yaml", "--json", cwd=tmp_path)
    told(done, tmp_path, "no such recipe")
    found = json.loads(done.out)
    assert found["exit_code"] == 2 and "no such recipe" in found["error"] and "recipe.yaml" in found["hint"]
    done = fitout("plan", "recipe.yaml", "--set", "train.lr=-1", "--json", cwd=tmp_path)
    assert "train.lr" in json.loads(done.out)["error"] and done.code == 2


def test_a_missing_data_file(tmp_path):
    rows(tmp_path / "train.jsonl")
    done = fitout("data", "prepare", recipe(tmp_path, "trian.jsonl"), cwd=tmp_path)
    told(done, tmp_path, "there is no trian.jsonl", "nothing to train on", "train.jsonl", lines=3)


def test_an_empty_data_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    told(fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path), tmp_path, "rows.jsonl", "empty")


def test_broken_json_as_a_whole_names_the_line(tmp_path):
    (tmp_path / "rows.json").write_text('[\n {"instruction": "a", "output": "b"},\n {"instruction": "c", "output"\n]\n')
    done = fitout("data", "prepare", recipe(tmp_path, "rows.json"), cwd=tmp_path)
    assert "Traceback" not in done.err and done.code == 2
    quarantine = tmp_path / "runs" / "tiny" / "data" / "quarantine.jsonl"
    seen = done.err + (quarantine.read_text() if quarantine.exists() else "")
    assert "rows.json" in seen and ("3" in seen or "4" in seen)


def test_a_broken_line_goes_to_quarantine_with_its_number(tmp_path):
    path = rows(tmp_path / "rows.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[6] = '{"instruction": "broken", '
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = fitout("data", "prepare", recipe(tmp_path), "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    [bad] = RunDir(tmp_path / "runs" / "tiny").quarantine.read_text().splitlines()
    bad = json.loads(bad)
    assert bad["line"] == 7 and bad["file"].endswith("rows.jsonl") and "JSON" in bad["reason"]
    assert "broken" in str(bad["row"])


def test_repairs_from_the_command_line(tmp_path):
    """Suggested, accepted by rule, written by hand: each time what was accepted is in, and the rest is told."""
    path = rows(tmp_path / "rows.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[6] = '{"instruction": "broken", "output": "off"'
    lines[7] = '{"instruction": "empty", "output": ""}'
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = recipe(tmp_path)
    first = fitout("data", "repair", asked, cwd=tmp_path)
    assert first.code == 0 and "unreadable row: 1 quarantined, 1 with a suggested repair" in first.out
    told(fitout("data", "repair", asked, "--accept", "no such", cwd=tmp_path), tmp_path, "no row is quarantined under")
    second = fitout("data", "repair", asked, "--accept", "unreadable row", cwd=tmp_path)
    assert "1 accepted repairs went in again" in second.out and "unreadable row:" not in second.out
    run = RunDir(tmp_path / "runs" / "tiny")
    mine = [json.loads(line) for line in run.repairs.read_text().splitlines()]
    for line in mine:
        if line["rule"] == "empty answer":
            line |= {"accept": True, "row": {"instruction": "empty", "output": "no longer"}}
    run.repairs.write_text("".join(json.dumps(line) + "\n" for line in mine))
    third = fitout("data", "repair", asked, "--json", cwd=tmp_path)
    done = json.loads(third.out)
    assert done["admitted"] == 2 and done["rules"] == [] and done["report"]["quarantined"] == {}


def test_a_column_of_places_that_no_row_has(tmp_path):
    path = rows(tmp_path / "rows.jsonl")
    asked = ("data", "prepare", recipe(tmp_path), "--set", "data.position.field=evidence")
    for _ in range(2):  # also when the data are there already
        told(fitout(*asked, cwd=tmp_path), tmp_path, "data.position.field", "no sample has the column", lines=3)
    one, *others = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([one[:-1] + ', "evidence": "tail"}', *others]), encoding="utf-8")
    assert fitout(*asked, cwd=tmp_path).code == 0


def test_a_file_of_repairs_that_is_not_there(tmp_path):
    """Refused where it is to be read, made where it is to be written."""
    rows(tmp_path / "rows.jsonl")
    asked = (recipe(tmp_path), "--set", f"data.repairs={tmp_path / 'mine.jsonl'}")
    told(fitout("data", "prepare", *asked, cwd=tmp_path), tmp_path, "data.repairs", "there is no file", lines=3)
    assert fitout("data", "repair", *asked, cwd=tmp_path).code == 0
    assert fitout("data", "prepare", *asked, cwd=tmp_path).code == 0


def test_the_wrong_encoding(tmp_path):
    text = "".join(json.dumps({"instruction": f"第{n}", "output": "对"}, ensure_ascii=False) + "\n" for n in range(9))
    (tmp_path / "rows.jsonl").write_bytes(text.encode("gb18030"))
    done = fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path)
    assert "encoding" in told(done, tmp_path, "rows.jsonl").lower()


def test_an_unknown_format_names_the_keys_and_the_formats(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"zebra": 1, "yak": 2}\n' * 5)
    done = fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path)
    told(done, tmp_path, "zebra", "yak", "alpaca", "sharegpt", "openai", "prompt_completion", "text")


def test_three_mistakes_are_told_at_once(tmp_path):
    path = recipe(tmp_path)
    text = path.read_text().replace("max_steps: 2", "max_stepz: 2").replace("rank: 2", "rank: 0")
    path.write_text(text.replace("kind: lora", "kind: lora, alhpa: 3"))
    message = told(fitout("train", path, cwd=tmp_path, alone=True), tmp_path, "3 mistakes")
    assert "train.max_stepz" in message and "did you mean max_steps?" in message
    assert "method.alhpa" in message and "did you mean alpha?" in message
    assert "method.rank" in message
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_not_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\ndata: {sources: [\n")
    told(fitout("train", "recipe.yaml", cwd=tmp_path), tmp_path, "not YAML", "recipe.yaml:")


@pytest.mark.parametrize("change", ["train.lr", "train.lr.x=3", "data.sources.7.path=x", "nonsense=1"])
def test_a_wrong_set(tmp_path, change):
    told(fitout("train", recipe(tmp_path, more="train: {lr: 1.0e-3}"), "--set", change, cwd=tmp_path), tmp_path)


def test_a_base_without_weights(tmp_path):
    rows(tmp_path / "rows.jsonl")
    base = tmp_path / "base"
    shutil.copytree(SHELL, base, ignore=shutil.ignore_patterns("*.safetensors"))
    done = fitout("train", recipe(tmp_path, base=str(base)), cwd=tmp_path)
    told(done, tmp_path, "no weights", "random numbers", "model.base", lines=3)
    assert RunDir(tmp_path / "runs" / "tiny").read_status()["status"] == "failed"


def test_pickled_weights_are_not_opened(tmp_path):
    rows(tmp_path / "rows.jsonl")
    base = tmp_path / "base"
    shutil.copytree(SHELL, base, ignore=shutil.ignore_patterns("*.safetensors"))
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    told(fitout("train", recipe(tmp_path, base=str(base)), cwd=tmp_path), tmp_path, "pickled", "safetensors", lines=3)
    assert not (tmp_path / "pwned").exists()


def test_a_base_that_is_not_there(tmp_path):
    rows(tmp_path / "rows.jsonl")
    told(fitout("train", recipe(tmp_path, base="./nowhere"), cwd=tmp_path), tmp_path, "no such model folder")


CODE_OF_ITS_OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_a_model_with_code_of_its_own(tmp_path, monkeypatch, verb):
    """Refused with the flag that lets it run, and loaded with it."""
    base = tmp_path / "base"
    shutil.copytree(SHELL, base)
    (base / "own.py").write_text(CODE_OF_ITS_OWN)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    told(fitout(verb, base, cwd=tmp_path), tmp_path, "--trust-remote-code")
    opened = []
    monkeypatch.setattr("fitout.cli.talk.talk", lambda engine, **_: opened.append(engine) or 0)
    monkeypatch.setattr("fitout.serve.app.serve", lambda engine, *_, **__: opened.append(engine))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert fitout(verb, base, "--trust-remote-code", cwd=tmp_path).code == 0
    assert type(opened[0].model).__name__ == "Model"


def test_a_template_that_does_not_render(tmp_path):
    rows(tmp_path / "rows.jsonl")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}")
    path = recipe(tmp_path, more="chat: {template: mine.jinja}")
    told(fitout("data", "prepare", path, cwd=tmp_path), tmp_path, "does not render", "mine.jinja", "plain", lines=3)


# a disk that is full: the kernel refuses to write past a size, with EFBIG in place of ENOSPC


def full_after(size: int):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_while_preparing(tmp_path):
    rows(tmp_path / "rows.jsonl", 200)
    path = recipe(tmp_path)
    done = fitout("data", "prepare", path, cwd=tmp_path, before=full_after(4000))
    told(done, tmp_path, "cannot write", "free some space".capitalize(), code=1, lines=3)
    run = RunDir(tmp_path / "runs" / "tiny")
    assert run.read_status()["status"] == "failed" and not (run.data / "fingerprint.json").exists()
    again = fitout("data", "prepare", path, cwd=tmp_path)  # with space, the same command goes on
    assert again.code == 0, again.err


def test_a_full_disk_while_training(tmp_path):
    rows(tmp_path / "rows.jsonl")
    path = recipe(tmp_path)
    done = fitout("train", path, "--set", "method.targets=all-linear", "--set", "method.rank=16", cwd=tmp_path,
                  before=full_after(60_000))  # fmt: skip
    told(done, tmp_path, "cannot write", code=1, lines=3)
    run = RunDir(tmp_path / "runs" / "tiny")
    assert run.read_status()["status"] == "failed" and not run.adapter.exists()
    assert not list(run.checkpoints.glob("step-*"))


@pytest.mark.parametrize("method", ["{kind: lora, rank: 8}", "{kind: full}"])
def test_a_disk_without_room_is_told_before_training(tmp_path, monkeypatch, method):
    """What is asked for is what a run really writes: its checkpoints, with one more in writing, and its end."""
    rows(tmp_path / "rows.jsonl")
    changes = ["--set", f"method={method}", "--set", "train.save_every=1", "--set", "train.max_steps=6"]
    whole = fitout("train", recipe(tmp_path), *changes, "--out", "whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    run = RunDir(tmp_path / "whole")
    one = sum(file.stat().st_size for file in (run.checkpoints / "step-6").iterdir())
    end = sum(file.stat().st_size for folder in (run.adapter, run.model) for file in folder.glob("*.safetensors"))
    merged = 0 if "full" in method else sum(f.stat().st_size for f in (Path(SHELL)).glob("*.safetensors"))
    wants = 4 * one + end + merged  # keep_last 2, the best, one in writing

    def left(free: float):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1e12, used=0, free=int(free)))

    left(0.9 * wants)
    done = fitout("train", recipe(tmp_path), *changes, cwd=tmp_path)
    told(done, tmp_path, "MB free", "4 checkpoints", "until a save fails", "--out", code=1, lines=3)
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").glob("*"))
    left(1.1 * wants)
    assert fitout("train", recipe(tmp_path), *changes, "--resume", cwd=tmp_path).code == 0
    left(0.9 * wants)  # now enough: what is there already counts
    assert fitout("train", recipe(tmp_path), *changes, "--resume", "--set", "train.max_steps=7", cwd=tmp_path).code == 0


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_an_out_that_is_a_file(tmp_path, verb, out):
    rows(tmp_path / "rows.jsonl")
    (tmp_path / "taken").write_text("mine")
    told(fitout(verb, recipe(tmp_path), "--out", tmp_path / out, cwd=tmp_path), tmp_path, "Not a directory", "--out")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_second_process_on_the_same_run(tmp_path):
    rows(tmp_path / "rows.jsonl")
    run = RunDir(tmp_path / "runs" / "tiny")
    with run.owned():
        before = sorted(p.name for p in run.path.iterdir())
        done = fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path, alone=True)
        told(done, tmp_path, "another process", "Two writers", "--out", lines=3)
        assert sorted(p.name for p in run.path.iterdir()) == before


@pytest.mark.parametrize("verb", ["merge", "evaluate"])
def test_a_folder_that_is_no_run(tmp_path, verb):
    told(fitout(verb, tmp_path, cwd=tmp_path), tmp_path, "not a run directory")
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_is_too_short(tmp_path):
    rows(tmp_path / "rows.jsonl")
    done = fitout("train", recipe(tmp_path), "--set", "data.max_length=99999", cwd=tmp_path)
    told(done, tmp_path, "positions", "Set data.max_length", lines=3)


def test_a_base_that_was_changed_under_a_run_is_told(tmp_path):
    """Also where only the end of its weights changed, as a merge leaves it: the embeddings at the beginning stay."""
    base = tmp_path / "base"
    shutil.copytree(SHELL, base)
    rows(tmp_path / "rows.jsonl")
    path = recipe(tmp_path, base=str(base))
    assert fitout("train", path, "--set", "train.save_every=1", cwd=tmp_path).code == 0
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for at in range(len(content) - len(content) // 8, len(content), 4):
        content[at] ^= 1
    weights.write_bytes(content)
    done = fitout("train", path, "--resume", "--set", "train.max_steps=3", cwd=tmp_path)
    told(done, tmp_path, "another base", "mix two trainings", code=1, lines=3)
