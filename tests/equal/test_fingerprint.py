"""Prepared twice = the same fingerprint and the same files; anything that decides the tokens changes it."""

from __future__ import annotations

import json

import pytest

from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.data import DataSettings
from fitout.data.prepare import prepare
from fitout.model.load import SHELL
from fitout.rundir import RunDir


@pytest.fixture(scope="module")
def chats():
    return {name: open_chat(SHELL, ChatSettings(template=name)) for name in ("auto", "plain")}


def write_rows(folder, rows=40):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "rows.jsonl"
    lines = [json.dumps({"instruction": f"Say {i}.", "output": f"{i}, as you asked."}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(path, chat, out, *, seed=0, **settings):
    made, _ = prepare(
        DataSettings(sources=[{"path": str(path)}], **settings), chat, "conversation", RunDir(out), seed=seed
    )
    return made


def test_twice_the_same(tmp_path, chats):
    """In another folder, from another path, by another tokenizer object: same fingerprint, same ids, same parts."""
    first = prepared(write_rows(tmp_path / "a"), chats["auto"], tmp_path / "one")
    second = prepared(write_rows(tmp_path / "b"), open_chat(SHELL), tmp_path / "two")
    assert first.fingerprint == second.fingerprint
    for name in ("train", "validation", "test"):
        one, two = first.part(name), second.part(name)
        assert len(one) == len(two) > 0
        for row in range(len(one)):
            assert one.ids(row).tolist() == two.ids(row).tolist()
            assert one.train_on(row).tolist() == two.train_on(row).tolist()


def test_nothing_is_done_twice(tmp_path, chats):
    path = write_rows(tmp_path / "a")
    first = prepared(path, chats["auto"], tmp_path / "one")
    stamp = (first.folder / "train.arrow").stat()
    again = prepared(path, chats["auto"], tmp_path / "one")
    assert again.fingerprint == first.fingerprint
    now = (again.folder / "train.arrow").stat()
    assert (now.st_mtime_ns, now.st_ino) == (stamp.st_mtime_ns, stamp.st_ino)


def test_packing_is_not_part_of_it(tmp_path, chats):
    path = write_rows(tmp_path / "a")
    assert (
        prepared(path, chats["auto"], tmp_path / "one", packing=True).fingerprint
        == prepared(path, chats["auto"], tmp_path / "two", packing=False).fingerprint
    )


@pytest.mark.parametrize(
    "what", ["byte", "template", "max_length", "too_long", "split", "deduplicate", "seed", "limit"]
)
def test_another_one(tmp_path, chats, what):
    path = write_rows(tmp_path / "a")
    before = prepared(path, chats["auto"], tmp_path / "run")
    ids = [before.part("train").ids(row).tolist() for row in range(len(before.part("train")))]
    settings, seed, chat = {}, 0, chats["auto"]
    if what == "byte":
        content = bytearray(path.read_bytes())
        at = content.index(b"7, as you asked.")
        content[at] = ord("8")
        path.write_bytes(content)
    elif what == "template":
        chat = chats["plain"]
    elif what == "seed":
        seed = 1
    elif what == "limit":
        settings = {"sources": [{"path": str(path), "limit": 39}]}
    else:
        settings = {
            "max_length": {"max_length": 512},
            "too_long": {"too_long": "truncate"},
            "split": {"split": {"train": 0.7, "validation": 0.1, "test": 0.2}},
            "deduplicate": {"deduplicate": False},
        }[what]
    merged = {"sources": [{"path": str(path)}], **settings}
    after, _ = prepare(DataSettings(**merged), chat, "conversation", RunDir(tmp_path / "run"), seed=seed)
    assert after.fingerprint != before.fingerprint
    if what in ("byte", "template", "split", "seed", "limit"):
        part = after.part("train")
        assert [part.ids(row).tolist() for row in range(len(part))] != ids  # prepared anew, not taken from before
