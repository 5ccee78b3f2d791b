"""Every method through the real command line, to the end; what cannot be merged says so and is served unmerged."""

from __future__ import annotations

import json

import pytest

from fitout.rundir import RunDir
from tests.cli.command import fitout, recipe, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    rows(folder / "rows.jsonl", 40)
    recipe(folder)
    return folder


def run(folder, name, *changes):
    sets = [word for change in changes for word in ("--set", change)]
    done = fitout("run", folder / "recipe.yaml", "--out", name, *sets, cwd=folder)
    return done, RunDir(folder / name)


@pytest.mark.parametrize(
    "method",
    ["{kind: sparse, density: 0.005}", "{kind: full, last_layers: 2}", "{kind: full, freeze: ['*norm*']}"],
)
def test_a_run_ends_with_a_plain_model(folder, method):
    done, directory = run(folder, f"run-{len(method)}", f"method={method}")
    assert done.code == 0, done.err
    assert directory.read_status()["status"] == "done"
    assert (directory.merged if "sparse" in method else directory.model).joinpath("config.json").exists()
    if "sparse" in method:
        assert directory.read_status()["merge_difference"] == 0.0


def test_an_unmergeable_adapter_is_kept_told_and_served(folder):
    done, directory = run(folder, "bottleneck", "method={kind: adapter, style: houlsby}")
    assert done.code == 0, done.err
    assert "not merged: a bottleneck adapter is nonlinear" in done.out and str(directory.adapter.name) in done.out
    status = directory.read_status()
    assert status["status"] == "done" and "nonlinear" in status["not_merged"]
    assert directory.evaluation_report.exists() and not directory.merged.exists()
    refused = fitout("merge", "bottleneck", cwd=folder)
    assert refused.code == 2 and "nonlinear" in refused.err and "fitout chat" in refused.err
    assert directory.read_status()["status"] == "done"  # asking in vain does not make a good run a failed one
    from fitout.engine import Engine

    engine = Engine.open(directory.path)
    assert [n for n, _ in engine.model.named_modules() if n.endswith(".adapter")]
    assert fitout("evaluate", "bottleneck", "--json", cwd=folder).code == 0
    again, _ = run(folder, "bottleneck", "method={kind: adapter, style: houlsby}")
    assert again.code == 0 and "not merged" in again.out


def test_mistakes_in_a_method_are_told_before_anything_runs(folder):
    for change, said in (
        ("method={kind: full, freeze: [model.layer.0]}", "names no parameter"),
        ("method={kind: sparse, density: 0.5}", "density"),
        ("method={kind: adapter, style: houlsby, scale: 2}", "scale belongs to style: parallel"),
        ("method={kind: sparse, targets: [q_prj]}", "q_prj"),
    ):
        done, directory = run(folder, "wrong", change)
        assert done.code == 2 and said in done.err, (change, done.err)
        assert not directory.log.exists() or not json.loads(directory.status.read_text()).get("trained_steps")
