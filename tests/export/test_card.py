"""The model card: metadata as the hub reads it, snippets that run, and the run's record."""

from __future__ import annotations

import json
import re
import runpy

import pytest
import torch
import yaml

from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.config import build
from fitout.export import card
from fitout.export.card import facts_of
from fitout.export.merge import logits, probe_ids
from fitout.export.write import save_chat, table, write_card
from fitout.model.load import SHELL, load_adapter, load_base, save_model
from fitout.rundir import RunDir
from tests.export.families import save_lora


def read(folder) -> tuple[dict, str]:
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_is_markdown_with_a_yaml_head(tmp_path):
    facts = {"Training": {"steps": 3, "note": "a | b\nc"}, "Scores": [], "More": [["", "n"], ["f1", 7]]}
    write_card(tmp_path, name="my-run", base="owner/name", facts=facts)
    head, body = read(tmp_path)
    assert head == {
        "base_model": "owner/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fitout"],
    }
    assert "# my-run" in body and "| steps | 3 |" in body and "| note | a \\| b c |" in body
    assert "## Scores" not in body and "|  | n |\n|---|---|\n| f1 | 7 |" in body
    assert "is not known to Fitout. Check it" in body


def test_the_hub_reads_the_metadata(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    save_lora(tmp_path / "adapter")
    write_card(tmp_path / "adapter", name="x: y", base="Qwen/Qwen3-0.6B", facts={})
    data = hub.ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert data.base_model == "Qwen/Qwen3-0.6B" and data.library_name == "peft"
    assert data.tags == ["fitout", "lora"] and data.pipeline_tag == "text-generation" and data.license is None


def test_a_folder_is_no_hub_id_and_its_card_declares_the_licence(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    write_card(tmp_path, name="m", base=str(base), facts={})
    head, body = read(tmp_path)
    assert "base_model" not in head and head["license"] == "mit" and "declares `mit`" in body
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    (base / "LICENSE.txt").write_text("")
    write_card(tmp_path, name="m", base=str(base), facts={})
    assert "(its folder has a LICENSE.txt)" in read(tmp_path)[1]


def test_what_a_method_wrote_about_its_files_stays(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK"}))
    (tmp_path / "README.md").write_text("The block gives `y`.\n\n## More\n\nx\n")
    for _ in range(3):
        write_card(tmp_path, name="m", base="owner/name", facts={"Training": {"steps": 1}})
    head, body = read(tmp_path)
    assert body.count("The block gives `y`.\n\n## More\n\nx\n") == 1 and body.count("## Files") == 1
    assert "fitout serve" in body and "PEFT does not load it" in body and head["tags"] == ["fitout", "bottleneck"]


def run_snippet(folder, monkeypatch) -> dict:
    """Runs the card's Python in its own folder, as a reader does; returns its variables."""
    code = re.search(r"```python\n(.*?)```", read(folder)[1], re.S).group(1)
    (folder / "snippet.py").write_text(code)
    monkeypatch.chdir(folder)
    return runpy.run_path("snippet.py")


def test_the_snippet_of_a_model_runs(tmp_path, monkeypatch, capsys):
    save_model(load_base(str(SHELL), packed=False), tmp_path)
    save_chat(open_chat(SHELL), tmp_path)
    write_card(tmp_path, name="m", base=str(SHELL), facts={})
    run_snippet(tmp_path, monkeypatch)
    assert capsys.readouterr().out.strip()
    assert "ends with token 0 (`<|endoftext|>`)" in read(tmp_path)[1]
    assert "User: Which way is north?\nAssistant:" in read(tmp_path)[1]


def test_the_snippet_of_an_adapter_gives_the_trained_model(tmp_path, monkeypatch):
    """Loaded by plain PEFT as the card says, added tokens and their embeddings included."""
    pytest.importorskip("peft")
    save_lora(tmp_path / "adapter", settings=ChatSettings(template="chatml", add_tokens=True))
    write_card(tmp_path / "adapter", name="m", base=str(SHELL), facts={})
    assert "resize_token_embeddings" in read(tmp_path / "adapter")[1]
    theirs = run_snippet(tmp_path / "adapter", monkeypatch)["model"]
    ours = load_base(str(SHELL), packed=False)
    load_adapter(ours, tmp_path / "adapter")
    probes = probe_ids(open_chat(tmp_path / "adapter"), 2946)
    torch.testing.assert_close(logits(theirs, probes), logits(ours, probes), rtol=1e-4, atol=1e-4)


def test_a_runs_record(tmp_path):
    run = RunDir(tmp_path / "run")
    run.update_status(
        data_fingerprint="abc", precision="fp32", hardware="a chip, 2 cores", ranks=1, seed=4, versions={"torch": "2"},
        training={"steps": 9, "supervised_tokens": 70, "base_loss": 2.0, "best_loss": 1.0, "best_step": 8,
                  "trained_parameters": 10, "parameters": 1000, "seconds": 3.5},
    )  # fmt: skip
    run.data.mkdir()
    report = {
        "samples": 12, "kept": {"train": 8, "test": 2}, "quarantined": {"empty": 1}, "removed": {"duplicate": 1},
        "repaired": {}, "sources": [{"path": "/a/b.json", "samples": 12, "format": "alpaca"}],
        "parts": {"train": {"tokens": 100, "supervised": 40}}, "max_length": 64, "too_long": "drop",
        "tasks": {
            "grid": [
                {"task": "geography", "subtask": "capitals", "train": {"samples": 6}, "test": {"samples": 1}},
            ]
        },
    }  # fmt: skip
    run.data_report.write_text(json.dumps(report))
    run.evaluation.mkdir()

    def one(value):
        return {"value": value, "low": value - 1, "high": value + 1, "n": 2}

    score = {"name": "f1", "base": one(5.0), "tuned": one(90.0), "difference": one(85.0), "verdict": "better"}
    retention = {"source": "probes", "groups": {"facts": score}, "overall": score}
    run.evaluation_report.write_text(json.dumps({"scores": [score], "retention": retention}))
    recipe = build({"name": "r", "model": {"base": "embedded:shell"}, "data": {"sources": [{"path": "rows.jsonl"}]}})
    facts = facts_of(run, recipe)
    assert facts["Data"]["quarantined"] == "1 empty" and facts["Data"]["source b.json"] == "12 samples, format alpaca"
    assert facts["Data"]["task geography / capitals"] == "train 6, test 1"
    assert facts["Training"]["trained parameters"] == "10 of 1,000 (1.00 %)"
    assert facts["Training"]["base"] == "embedded:shell" and "rank 8" in facts["Training"]["method"]
    row = ["f1", 2, "5.0 (4.0 to 6.0)", "90.0 (89.0 to 91.0)", "+85.0 (+84.0 to +86.0)", "better"]
    assert facts["Scores, with 95 % intervals"][1] == row
    assert [r[0] for r in facts["Kept from the base, with 95 % intervals"]] == ["probes", "facts", "all (probes)"]
    assert facts["Hardware and software"]["hardware"] == "a chip, 2 cores"
    assert all(table(values).startswith("|") for values in facts.values())


def test_a_run_that_knows_nothing_yet_has_a_card(tmp_path):
    run = RunDir(tmp_path / "run")
    recipe = build({"name": "r", "model": {"base": "embedded:shell"}, "data": {"sources": [{"path": "rows.jsonl"}]}})
    facts = facts_of(run, recipe)
    assert facts["Data"] == {} and facts["Scores, with 95 % intervals"] == []
    write_card(tmp_path, name="r", base="owner/name", facts=facts)
    assert card.kept(tmp_path) == "" and "None" not in read(tmp_path)[1]


def test_a_run_that_keeps_watch_on_a_text_has_its_perplexity_in_the_card(tmp_path):
    from fitout import verbs
    from fitout.config import load
    from tests.equal.small import write_shell_recipe

    (tmp_path / "book.txt").write_text("The capital of Japan is Tokyo. " * 40, encoding="utf-8")
    changes = ["train.max_steps=2", f"evaluate.retention={tmp_path / 'book.txt'}", "evaluate.limit=4"]
    run = verbs.run(load(write_shell_recipe(tmp_path), changes), out=tmp_path / "run")
    _, body = read(run.merged)
    assert "perplexity of book.txt, lower is better" in body and str(tmp_path) not in body.split("## How")[0]
    measured = json.loads(run.evaluation_report.read_text())["retention"]["perplexity"]
    assert f"{measured['tuned']['value']:.1f} (" in body
