"""What a power loss may take: a new file is safe only when every folder above it that was new was synced as well."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest

from fitout.errors import FitoutError
from fitout.files import (
    atomic_path,
    errors_of_the_system,
    explain_full_disk,
    remove_leftovers,
    staged_folder,
    write_json,
    write_text,
)


@pytest.fixture
def synced(monkeypatch):
    """The folders synced so far, each with the entries that it had then."""
    seen: dict[str, set[str]] = {}
    real = os.fsync

    def fsync(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(path):
            seen.setdefault(path, set()).update(os.listdir(path))
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_every_new_folder_above_a_file_is_synced_into_its_parent(tmp_path, synced):
    write_text(tmp_path / "a" / "b" / "file", "x")
    assert "a" in synced[str(tmp_path)] and "b" in synced[str(tmp_path / "a")]
    assert "file" in synced[str(tmp_path / "a" / "b")]


def test_and_above_a_folder(tmp_path, synced):
    with staged_folder(tmp_path / "run" / "checkpoints" / "step-1") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert "run" in synced[str(tmp_path)] and "checkpoints" in synced[str(checkpoints.parent)]
    assert "step-1" in synced[str(checkpoints)]
    assert any("inner" in entries for path, entries in synced.items() if ".part" in path)


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as staging:
        staging.write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fails_is_told_also_where_a_library_names_the_file_in_bytes(tmp_path):
    with pytest.raises(FitoutError, match="cannot write: Input/output error") as error, explain_full_disk(tmp_path):
        raise OSError(errno.EIO, "Input/output error", b"/somewhere/events.out")
    assert error.value.where == "/somewhere/events.out"


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_a_disk_that_takes_no_more_as_a_library_says_it_in_words_is_an_error_of_the_system(tmp_path, library):
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    write = {
        "safetensors": lambda: save_file({"a": np.zeros(99)}, tmp_path / "file"),
        "tokenizers": lambda: Tokenizer(models.BPE()).save(str(tmp_path / "file")),
    }[library]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as error, errors_of_the_system(tmp_path):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path)


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), errors_of_the_system(tmp_path):
        _ = 1 / 0


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_between_the_two_renames_the_old_folder_is_not_lost(tmp_path, monkeypatch, how):
    path, real = tmp_path / "adapter", os.replace
    with staged_folder(path) as folder:
        (folder / "weights").write_text("old")

    def replace(source, target):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error") if how == "fails" else SystemExit
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if how == "is killed":  # nothing is tidied up any more
        monkeypatch.setattr("fitout.files._remove_or_put_back", lambda *_: None)
    with pytest.raises((FitoutError, SystemExit)), staged_folder(path) as folder:
        (folder / "weights").write_text("new")
    monkeypatch.undo()
    assert (how == "fails") == path.exists()
    assert len(remove_leftovers(tmp_path)) == (0 if how == "fails" else 1)
    assert (path / "weights").read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["adapter"]


def test_what_is_not_ours_is_no_leftover(tmp_path):
    for name in (".env.old", ".notes.part", ".a.12.parts", "x.12.old"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".run.json.12.part").write_text("half")
    assert remove_leftovers(tmp_path) == [".run.json.12.part"]
    assert len(list(tmp_path.iterdir())) == 4


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write_json(tmp_path / "x.json", {"loss": float("nan"), "rows": [1.5, float("inf"), {"a": (float("-inf"), 2)}]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": None, "rows": [1.5, None, {"a": [None, 2]}]}
