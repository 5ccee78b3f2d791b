"""How much memory there still is: the machine's, or less where a control group of this process says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitout.model import memory

MB = 1 << 20


def group(folder: Path, limit: str, used: int, files: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used * MB}\n")
    (folder / "memory.stat").write_text(f"anon {(used - files) * MB}\ninactive_file {files * MB}\nactive_file 0\n")
    return folder


def machine() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@pytest.mark.parametrize(
    ("inner", "outer", "want"),
    [
        (("100", 30, 10), ("max", 0, 0), 80),  # what files take would be given back
        (("100", 30, 10), ("60", 30, 0), 30),  # the narrowest of those around it holds
        (("max", 30, 0), ("60", 20, 0), 40),
    ],
)
def test_the_narrowest_control_group_holds(tmp_path, monkeypatch, inner, outer, want):
    groups = [
        group(tmp_path / name, limit if limit == "max" else str(int(limit) * MB), *more)
        for name, (limit, *more) in (("a/b", inner), ("a", outer))
    ]
    monkeypatch.setattr(memory, "_control_groups", lambda: groups)
    assert memory.available_memory() == want * MB


def test_without_limits_it_is_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_control_groups", lambda: [group(tmp_path, "max", 10, 0), tmp_path / "none"])
    assert memory.available_memory() == pytest.approx(machine(), rel=0.05)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("0::/slurm/job_7/step_0\n", ["slurm/job_7/step_0", "slurm/job_7", "slurm", "."]),
        ("12:memory:/old\n0::/\n", ["."]),  # inside a container
        ("12:memory:/old\n", ["."]),  # version 1
    ],
)
def test_the_control_groups_around_a_process(tmp_path, line, want):
    (tmp_path / "own").write_text(line)
    assert memory._control_groups(tmp_path / "fs", tmp_path / "own") == [tmp_path / "fs" / name for name in want]
