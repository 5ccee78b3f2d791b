"""Through preparing as a whole: planted leaks are all found, whatever hid them; duplicates by meaning; the page."""

from __future__ import annotations

import random
import string
from html.parser import HTMLParser

import pytest

from fitout.data import DataSettings
from fitout.data.page import render
from fitout.data.prepare import kept_samples, prepare
from fitout.data.shingles import Weights, likeness
from fitout.errors import DataError
from fitout.files import read_json
from fitout.rundir import RunDir

from .conftest import write


def made(tmp_path, chat, sources, **more):
    data = DataSettings.model_validate({"sources": sources, "max_length": 512, **more})
    run = RunDir(tmp_path / "run")
    return run, prepare(data, chat, "conversation", run)[1]


def words(draw, count):
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 9))) for _ in range(count))


def reworded(draw, text):
    """The text with one word in ten replaced and its letters in another case: no longer the same to the byte."""
    parts = text.split()
    for at in draw.sample(range(len(parts)), max(1, len(parts) // 20)):
        parts[at] = words(draw, 1)
    return "  ".join(parts).title()


def asked(run, part):
    return [sample.messages[0].content for sample in kept_samples(run, part)]


def nearest(weights, prompt, others):
    mine = weights.weighed(prompt)
    return max(likeness(mine, weights.weighed(other)) for other in others)


@pytest.mark.parametrize("seed", range(2))
def test_no_reworded_twin_is_parted_by_the_split(tmp_path, chat, seed):
    """A fifth of the rows is planted as reworded twins of others; compared all with all, none stands on both sides."""
    draw = random.Random(seed)
    rows = [{"instruction": words(draw, 24), "output": words(draw, 3)} for _ in range(200)]
    rows += [{**row, "instruction": reworded(draw, row["instruction"])} for row in draw.sample(rows, 50)]
    run, report = made(tmp_path, chat, [{"path": write(tmp_path / "rows.jsonl", rows)}])
    parts = {part: asked(run, part) for part in ("train", "validation", "test")}
    weights = Weights([prompt for prompts in parts.values() for prompt in prompts])
    for part in ("validation", "test"):
        assert len(parts[part]) == 25
        assert max(nearest(weights, prompt, parts["train"]) for prompt in parts[part]) < 0.8
    assert report["leakage"]["removed"] == 0  # the groups had done it already
    assert report["duplicates"]["clusters"] >= 40


def test_reworded_test_questions_in_a_training_file_are_removed(tmp_path, chat):
    """Files whose parts are fixed: the split cannot keep twins together, so the certificate takes training ones out."""
    draw = random.Random(7)
    test = [{"instruction": words(draw, 24), "output": "a"} for _ in range(40)]
    train = [{"instruction": words(draw, 24), "output": "b"} for _ in range(100)]
    leaked = [{"instruction": reworded(draw, row["instruction"]), "output": "leak"} for row in test[:15]]
    sources = [
        {"path": write(tmp_path / "train.jsonl", train + leaked), "split": "train"},
        {"path": write(tmp_path / "test.jsonl", test), "split": "test"},
    ]
    run, report = made(tmp_path, chat, sources)
    assert report["removed"] == {"too near to a held-out sample": 15} and report["leakage"]["removed"] == 15
    assert report["kept"] == {"train": 100, "validation": 0, "test": 40}
    pairs = read_json(run.data_details)["nearest"]
    assert sum(pair["removed"] for pair in pairs) == 15
    assert all("train.jsonl" in pair["training"] for pair in pairs)
    _, report = made(tmp_path, chat, sources, deduplicate=False)  # nothing near is looked for
    assert report["kept"]["train"] == 115 and "leakage" not in report


def test_benchmark_questions_are_dropped_or_told(tmp_path, chat):
    draw = random.Random(9)
    items = [{"question": words(draw, 16), "answer": "42"} for _ in range(30)]
    rows = [{"instruction": words(draw, 20), "output": words(draw, 4)} for _ in range(100)]
    for at in range(0, 30, 3):
        rows.append({"instruction": f"{words(draw, 6)} {items[at]['question']}", "output": "x"})
    sources = [{"path": write(tmp_path / "rows.jsonl", rows)}]
    benchmark = write(tmp_path / "bench.jsonl", items)
    _, report = made(tmp_path, chat, sources, benchmarks={"files": [benchmark]})
    assert report["removed"] == {"benchmark question": 10} and report["benchmarks"]["samples"] == 10
    _, report = made(tmp_path, chat, sources, benchmarks={"files": [benchmark], "action": "report"})
    assert not report["removed"] and report["benchmarks"]["samples"] == 10
    empty = write(tmp_path / "empty.jsonl", [{"question": "short", "answer": "a"}])
    with pytest.raises(DataError, match="no question of at least"):
        made(tmp_path, chat, sources, benchmarks={"files": [empty]})


def test_one_author_is_never_parted(tmp_path, chat):
    draw = random.Random(3)
    rows = [{"instruction": words(draw, 12), "output": "a", "author": f"author {n % 40}"} for n in range(400)]
    path = write(tmp_path / "rows.jsonl", rows)
    run, report = made(tmp_path, chat, [{"path": path}], split={"group": "author"})
    seen = {part: {s.meta["author"] for s in kept_samples(run, part)} for part in ("train", "validation", "test")}
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    assert report["kept"] == {"train": 320, "validation": 40, "test": 40}
    with pytest.raises(DataError, match="no sample has the column 'writer'"):
        made(tmp_path, chat, [{"path": path}], split={"group": "writer"})


def test_near_duplicates_go_and_the_best_stays(tmp_path, chat):
    draw = random.Random(5)
    rows = [{"instruction": words(draw, 20), "output": words(draw, 20), "rating": 1} for _ in range(60)]
    twins = [{**row, "instruction": row["instruction"] + " please", "output": row["output"] + " more", "rating": 5}
             for row in rows[:20]]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows + twins)
    whole = {"train": 1, "validation": 0, "test": 0}
    for keep, wanted in (("longest", 20), ("first", 0), ("rating", 20)):
        run, report = made(tmp_path, chat, [{"path": path}], split=whole, deduplicate={"near": "drop", "keep": keep})
        assert report["removed"] == {"near-duplicate": 20}
        assert sum(s.messages[1].content.endswith("more") for s in kept_samples(run, "train")) == wanted


def test_duplicates_by_meaning(tmp_path, chat):
    """With a random encoder nothing is known of meaning, but equal words in another case are equal vectors to none, and
    the same prompt with another answer is: what is found comes from the encoder's vectors alone."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from fitout.data.meaning import encode

    folder = tmp_path / "encoder"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *string.ascii_lowercase,
        *(f"##{c}" for c in string.ascii_lowercase),
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32)).save_pretrained(folder)  # fmt: skip
    draw = random.Random(1)
    texts = [words(draw, 6) for _ in range(70)]
    vectors = encode(texts, str(folder))
    assert vectors.shape == (70, 32) and abs((vectors**2).sum(1) - 1).max() < 1e-5
    alone = encode([texts[5]], str(folder))
    assert abs(alone[0] - vectors[5]).max() < 1e-5  # padding changes nothing
    rows = [{"instruction": text, "output": words(draw, 12)} for text in texts]
    rows.append({"instruction": texts[3].upper(), "output": words(draw, 12)})  # the same to an uncased encoder
    path = write(tmp_path / "rows.jsonl", rows)
    meaning = {"model": str(folder), "similarity": 0.9999}
    _, report = made(tmp_path, chat, [{"path": path}], deduplicate={"meaning": meaning})
    assert report["duplicates"]["by_meaning"] == 1 and report["duplicates"]["clusters"] == 1
    with pytest.raises(DataError, match="encoder cannot be loaded"):
        made(tmp_path, chat, [{"path": path}], deduplicate={"meaning": {"model": str(tmp_path / "nowhere")}})


class Balanced(HTMLParser):
    """Reads a page; notes scripts, and which languages its texts have."""

    def __init__(self):
        super().__init__()
        self.scripts, self.languages, self.text = 0, [], []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "span" and dict(attributes).get("lang"):
            self.languages.append(dict(attributes)["lang"])

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_escapes_and_speaks_two_languages(tmp_path, chat):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    draw = random.Random(2)
    rows = [{"instruction": f"{evil} {words(draw, 30)}", "output": evil, "task": f"{evil} / x"} for _ in range(60)]
    rows += [{"instruction": evil, "output": ""}, {"instruction": evil, "output": 5}]
    run, report = made(tmp_path, chat, [{"path": write(tmp_path / "rows.jsonl", rows)}], tasks={"field": "task"})
    page = run.data_page.read_text(encoding="utf-8")
    reader = Balanced()
    reader.feed(page)
    assert reader.scripts == 1 and "<img" not in page
    assert reader.languages.count("en") == reader.languages.count("zh") > 50
    assert "http" not in page.replace("http-equiv", "")  # it stands alone
    assert "".join(reader.text).count("alert(1)") > 5
    empty = render({**report, "tasks": None, "diversity": None, "leakage": None, "cleaning": []}, {}, [])
    assert "Data report" in empty
