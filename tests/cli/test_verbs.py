"""The verbs through the real command line: what they write, what they print, and how they end."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from fitout.config import load
from fitout.rundir import RunDir
from tests.cli.command import fitout, half_written, recipe, rows


def one_object(text: str) -> dict:
    """What a machine reads: exactly one JSON object on standard output."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, done by `fitout run --json`."""
    folder = tmp_path_factory.mktemp("run")
    rows(folder / "rows.jsonl", 40)
    done = fitout("run", recipe(folder), "--json", cwd=folder)
    assert done.code == 0, done.err
    return folder, RunDir(folder / "runs" / "tiny"), done


def test_run_leaves_what_the_design_names(finished):
    _, run, _ = finished
    assert run.read_status()["status"] == "done" and run.read_status()["trained_steps"] == 2
    for path in (run.recipe, run.data_page, run.data_report, run.quarantine, run.log, run.checkpoints / "LATEST",
                 run.adapter / "adapter_config.json", run.merged / "config.json", run.merged / "README.md",
                 run.evaluation_page, run.evaluation_report, run.predictions):  # fmt: skip
        assert path.exists(), path
    assert half_written(run.path) == []
    steps = [row for row in map(json.loads, run.log.read_text().splitlines()) if "loss" in row and "event" not in row]
    assert [row["step"] for row in steps] == [1, 2]


def test_json_is_one_object(finished):
    _, _, done = finished
    assert one_object(done.out)


def test_run_again_is_complete_already(finished):
    folder, run, _ = finished
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    merged = (run.merged / "config.json").stat().st_mtime_ns
    again = fitout("run", folder / "recipe.yaml", cwd=folder)
    assert again.code == 0, again.err
    said = again.out
    assert "training is complete already" in said and "evaluation is complete already" in said
    assert "merged model is there already" in said
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert (run.merged / "config.json").stat().st_mtime_ns == merged


def test_train_refuses_an_existing_run(finished):
    folder, run, _ = finished
    before = run.status.read_bytes()
    done = fitout("train", folder / "recipe.yaml", cwd=folder)
    assert done.code == 2 and "exists already" in done.err and "--resume" in done.err
    assert run.status.read_bytes() == before


def test_train_takes_data_that_are_prepared_already(tmp_path):
    """Looking first (data prepare, data xray), or a first attempt that failed, is no training that could be mixed."""
    rows(tmp_path / "rows.jsonl")
    run = RunDir(tmp_path / "runs" / "tiny")
    assert fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path).code == 0
    assert run.exists() and not run.has_training()
    done = fitout("train", recipe(tmp_path), cwd=tmp_path)
    assert done.code == 0 and run.has_training(), done.err


@pytest.mark.parametrize("verb", ["evaluate", "merge"])
def test_a_run_without_training_has_nothing_to_look_at(tmp_path, verb):
    rows(tmp_path / "rows.jsonl")
    assert fitout("data", "prepare", recipe(tmp_path), cwd=tmp_path).code == 0
    done = fitout(verb, tmp_path / "runs" / "tiny", cwd=tmp_path)
    assert done.code == 2 and "nothing is trained here yet" in done.err, done.err


def test_another_recipe_is_refused(finished):
    folder, run, _ = finished
    done = fitout("run", folder / "recipe.yaml", "--set", "train.lr=0.01", cwd=folder)
    assert done.code == 2 and "another recipe" in done.err and "train.lr" in done.err
    assert load(run.recipe).train.lr is None


def test_a_trained_run_without_checkpoints_is_still_what_it_was_trained_as(tmp_path):
    """They are large, and people delete them. Neither another recipe nor other data make it another run."""
    rows(tmp_path / "rows.jsonl")
    run = RunDir(tmp_path / "runs" / "tiny")
    assert fitout("train", recipe(tmp_path), cwd=tmp_path).code == 0
    shutil.rmtree(run.checkpoints)
    before = {path.name: path.read_bytes() for path in run.data.glob("*.arrow")}
    done = fitout("run", recipe(tmp_path), "--set", "method.rank=8", cwd=tmp_path)
    assert done.code == 2 and "another recipe" in done.err and "method.rank" in done.err
    rows(tmp_path / "rows.jsonl", 50)
    for verb in (("run",), ("data", "prepare"), ("data", "xray")):
        done = fitout(*verb, recipe(tmp_path), cwd=tmp_path)
        assert done.code == 2 and "no longer those that this run was trained on" in done.err, verb
    done = fitout("data", "repair", recipe(tmp_path), "--accept", "all", cwd=tmp_path)
    assert done.code == 2 and "has begun training" in done.err
    assert {path.name: path.read_bytes() for path in run.data.glob("*.arrow")} == before
    rows(tmp_path / "rows.jsonl")
    assert fitout("run", recipe(tmp_path), cwd=tmp_path).code == 0


def test_an_evaluation_that_is_asked_otherwise_is_made_again(finished):
    folder, run, _ = finished
    report = run.evaluation_report.read_bytes()
    again = fitout("run", folder / "recipe.yaml", "--set", "evaluate.limit=1", cwd=folder)
    assert again.code == 0 and "evaluation is complete already" not in again.out
    assert json.loads(run.evaluation_report.read_text())["settings"]["limit"] == 1
    assert fitout("run", folder / "recipe.yaml", cwd=folder).code == 0
    assert json.loads(report)["settings"] == json.loads(run.evaluation_report.read_text())["settings"]


def test_the_card_says_what_was_done(finished):
    _, run, _ = finished
    card = (run.merged / "README.md").read_text(encoding="utf-8")
    head, text = yaml.safe_load(card.split("---\n")[1]), card.split("---\n", 2)[2]
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fitout"]}
    assert "`embedded:shell`" in text  # said to people; as `base_model` it would be a broken link on a hub
    status = run.read_status()
    for fact in (
        "# tiny",
        "| steps | 2 |",
        str(status["data_fingerprint"]),
        "| seed | 0 |",
        "lora (rank 2,",
        "exact_match",
    ):
        assert fact in card, fact
    adapter = (run.adapter / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in adapter and "exact_match" in adapter


def test_the_merged_folder_is_plain_transformers(finished):
    """Loaded without Fitout: generation stops at the end of turn, and the template is the one that was trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from fitout.chat.render import open_chat
    from fitout.model.load import SHELL

    _, run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    chat = open_chat(SHELL)
    assert tokenizer.chat_template == chat.tokenizer.chat_template
    stop = GenerationConfig.from_pretrained(run.merged).eos_token_id
    assert set([stop] if isinstance(stop, int) else stop) == set(chat.stop_ids)
    model = AutoModelForCausalLM.from_pretrained(run.merged)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert json.loads((run.merged / "config.json").read_text())["use_cache"] is True


def test_xray_writes_a_page(finished):
    folder, _, _ = finished
    page = folder / "tokens.html"
    done = fitout("data", "xray", folder / "recipe.yaml", "--row", 2, "--html", page, "--out", folder / "x", cwd=folder)
    assert done.code == 0, done.err
    assert "supervised:" in done.out and "row 2" in done.out
    html = page.read_text(encoding="utf-8")
    assert "<span class=trained" in html and "What is number" in html and "row 1," not in html


def test_xray_of_a_row_that_is_not_there(finished):
    folder, _, _ = finished
    done = fitout("data", "xray", folder / "recipe.yaml", "--row", 9999, "--out", folder / "x", cwd=folder)
    assert done.code == 2 and "training part has" in done.err


def test_prepare_json(finished):
    folder, _, _ = finished
    done = fitout("data", "prepare", folder / "recipe.yaml", "--json", "--out", folder / "p", cwd=folder)
    assert done.code == 0, done.err
    report = one_object(done.out)
    assert "40" in json.dumps(report)


def test_init_writes_a_recipe_that_loads(tmp_path):
    rows(tmp_path / "my rows.jsonl")
    done = fitout("init", "my rows.jsonl", "--to", "new.yaml", "--method", "full", cwd=tmp_path)
    assert done.code == 0, done.err
    made = load(tmp_path / "new.yaml")
    assert made.name == "my-rows" and made.method.kind == "full" and made.objective.kind == "sft"
    assert made.data.sources[0].path == str(tmp_path / "my rows.jsonl") and made.train.lr == 3e-4
    again = fitout("init", "my rows.jsonl", "--to", "new.yaml", cwd=tmp_path)
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.parametrize("name", ["a: b.jsonl", "rows #1.jsonl", "it's.jsonl"])
def test_init_with_a_name_that_yaml_would_misread(tmp_path, name):
    rows(tmp_path / name)
    done = fitout("init", name, "--to", "new.yaml", cwd=tmp_path)
    assert done.code == 0, done.err
    assert load(tmp_path / "new.yaml").data.sources[0].path == str(tmp_path / name)


def test_init_for_plain_text_pretrains(tmp_path):
    (tmp_path / "book.txt").write_text("Once there was a cat.\n\nThen a dog came.\n")
    assert fitout("init", "book.txt", cwd=tmp_path).code == 0
    assert load(tmp_path / "recipe.yaml").objective.kind == "pretrain"


def test_check_json_and_its_exit_code(tmp_path):
    rows(tmp_path / "good.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "broken\n' * 3)
    good, bad = (fitout("data", "check", name, "--json", cwd=tmp_path) for name in ("good.jsonl", "bad.jsonl"))
    assert good.code == 0 and one_object(good.out)["errors"] == 0
    assert bad.code == 1 and one_object(bad.out)["errors"] > 0
    findings = one_object(bad.out)["files"]["bad.jsonl"]
    assert any("bad.jsonl:2" in origin for finding in findings for origin in finding["origins"])


def test_check_names_the_lines_below_the_file_and_reads_a_recipes_sources(tmp_path):
    folder = tmp_path / "a folder with a long name" / "and another one within it, longer than a column"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "broken\n' * 3)
    path = recipe(tmp_path, data=json.dumps(str(folder / "rows.jsonl")))
    for what in (folder / "rows.jsonl", path):
        drawn = fitout("data", "check", what, cwd=tmp_path)
        assert drawn.code == 1 and str(folder / "rows.jsonl") in drawn.out and "line 2, line 4" in drawn.out
        assert "…" not in drawn.out


def test_doctor_json(tmp_path):
    done = fitout("doctor", "--model", "embedded:shell", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    facts = one_object(done.out)
    assert facts["packing"].startswith("documents do not see each other; logits are within ")
    assert {"python", "torch", "device", "precision", "cores", "memory"} <= facts.keys()


def test_no_arguments_shows_the_help(tmp_path):
    done = fitout("--help", cwd=tmp_path)
    assert done.code == 0
    for verb in ("demo", "init", "run", "train", "evaluate", "merge", "chat", "serve", "doctor", "data"):
        assert verb in done.out
    assert fitout("trian", cwd=tmp_path).code == 2
