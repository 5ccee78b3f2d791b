"""The report: files that stand alone, numbers that come from the result, text that cannot act."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fitout.chat.types import Message
from fitout.evaluate import EvaluateSettings, drawing, page
from fitout.evaluate.report import summary_table, write_report
from fitout.evaluate.scores import Score
from fitout.evaluate.suite import evaluate
from fitout.files import read_json, read_jsonl
from fitout.rundir import RunDir

from .fakes import FakeEngine, Said, asked

EVIL = '</title><script>alert("x")</script><img src=x onerror=alert(1)>\x00\x1b[31m\u202e\'"&'
LOG = [
    *({"step": step, "loss": 2.0 / step} for step in range(1, 11)),
    {"event": "evaluated", "step": 5, "validation_loss": 0.75},
    {"event": "evaluated", "step": 10, "validation_loss": 0.625},
    {"event": "saved", "step": 10},
    {"event": "resumed", "step": 7, "loss": 99.0},
]


class Balanced(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(run):
    parser = Balanced()
    parser.feed(run.evaluation_page.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture
def written(tmp_path):
    def write(base, tuned, rows, settings=None, probes=None, **more):
        run = RunDir(tmp_path / "run")
        result = evaluate(base, tuned, rows, settings or EvaluateSettings(samples=200), probes=probes)
        defaults = {"title": "my run", "recipe_summary": {"train": {"epochs": 3}}, "training_log": LOG}
        write_report(result, run, **{**defaults, **more})
        return run, result

    return write


def test_three_files_that_agree(written):
    rows = [asked("Japan?", "Tokyo", line=1), asked("France?", "Paris", line=2), asked("Peru?", "Lima", line=3)]
    base, tuned = FakeEngine({"France?": "Paris"}), FakeEngine({"Japan?": "Tokyo", "France?": "Lyon"})
    run, result = written(
        base, tuned, rows, data_counts={"kept": 30, "removed": {"duplicate": 2}}, command="fitout evaluate here"
    )
    assert read_jsonl(run.predictions) == result.rows
    report = read_json(run.evaluation_report)
    assert report["scores"][0]["tuned"]["value"] == pytest.approx(100 / 3)
    assert report["scores"][0]["verdict"] == "no difference shown"
    assert (
        report["data_counts"] == {"kept": 30, "removed": {"duplicate": 2}}
        and report["command"] == "fitout evaluate here"
    )
    text = " ".join(read(run).text)
    for expected in [
        "Fixed: 1",
        "Broken: 1",
        "Still wrong: 1",
        "removed.duplicate",
        "train.epochs",
        "fitout evaluate here",
    ]:
        assert expected in text
    assert (
        "lowest validation loss 0.6250 at step 10" in text and "nrefs:1|case:mixed" in text and "rouge-score:" in text
    )
    assert re.search(r"33\.3", text)


def test_the_page_stands_alone_and_text_cannot_act(written):
    evil = asked(EVIL, EVIL, before=(Message("system", EVIL),), task=EVIL)
    engine = FakeEngine({EVIL: Said(EVIL, "length")}, plain={EVIL: EVIL})
    probes = [{"prompt": EVIL, "answer": "x", "group": EVIL}, {"prompt": EVIL, "answer": EVIL, "group": "b"}]
    run, result = written(
        FakeEngine(),
        engine,
        [evil],
        probes=probes,
        title=EVIL,
        command=EVIL,
        recipe_summary={EVIL: {EVIL: [EVIL]}},
        data_counts={EVIL: EVIL},
        training_log=[*LOG, {"step": EVIL, "loss": EVIL}],
    )
    page_text = run.evaluation_page.read_text(encoding="utf-8")
    parser = read(run)
    assert not set(parser.tags) & {
        "script",
        "img",
        "iframe",
        "link",
        "object",
        "embed",
        "a",
        "form",
        "base",
        "foreignobject",
    }
    names = {name for name, _ in parser.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style", "xlink:href")]
    assert not re.search(r"https?:|//|@import|url\(|<script", page_text)
    assert "default-src 'none'" in page_text and "\x00" not in page_text and "\x1b" not in page_text
    assert 'alert("x")' in "".join(parser.text)
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(result))


def test_odd_text_is_shown_and_written(written):
    rows = [asked("half \ud83d", "pair \ud83d"), asked("long", "y" * 5000), asked("blank", "something")]
    run, result = written(FakeEngine({"long": "y" * 5000}), FakeEngine({"half \ud83d": "pair ?"}), rows)
    assert len(read_jsonl(run.predictions)) == 3
    text = " ".join(read(run).text)
    assert "4,300 more characters" in text and "(empty)" in text


def test_no_rows_no_log_no_retention_is_still_a_page(written):
    run, _ = written(FakeEngine(), FakeEngine(), [], training_log=[])
    text = " ".join(read(run).text)
    assert "no row to evaluate" in text and "Loss" not in text


def test_examples_are_sorted_by_what_tuning_did():
    rows = [
        {"base_scores": {"f1": b}, "tuned_scores": {"f1": t}, "id": at}
        for at, (b, t) in enumerate([(0, 50), (0, 100), (80, 20), (30, 30), (100, 100)])
    ]
    kinds = {kind: [row["id"] for row in found] for kind, found in page.sort_examples(rows, "f1").items()}
    assert kinds == {"fixed": [1, 0], "broken": [2], "still wrong": [3], "right in both": [4]}


def test_curves_take_the_last_run_of_a_step_and_count_what_is_not_a_number():
    log = [
        *LOG,
        {"step": 10, "loss": 0.5},
        {"step": 11, "loss": math.nan},
        {"step": 12, "loss": None},
        {"step": 13, "loss": "x"},
    ]
    training, validation, broken = drawing.curves(log)
    assert (
        training[-1] == (10.0, 0.5)
        and len(training) == 10
        and validation == [(5.0, 0.75), (10.0, 0.625)]
        and broken == 2
    )
    assert dict(training)[7.0] == 2 / 7  # events are not steps
    points, width = drawing.thin([(float(at), 1.0) for at in range(1000)])
    assert len(points) <= 300 and width == 4 and points[0] == (1.5, 1.0)


def test_an_objectives_figures_have_curves_of_their_own(written):
    log = [
        {"event": "evaluated", "step": 0, "validation_loss": 1.0, "figures": {"reward_accuracy": 0.5}},
        {"step": 1, "loss": 1.0, "figures": {"reward_accuracy": 0.25}},
        {"step": 1, "loss": 1.0, "figures": {"reward_accuracy": 0.75}},
    ]
    assert drawing.figure_curves(log, "reward_accuracy") == ([(1.0, 0.75)], [(0.0, 0.5)])
    for told, there in ((log, True), (LOG, False)):
        run, _ = written(FakeEngine(), FakeEngine(), [], training_log=told)
        text = " ".join(read(run).text)
        assert ("Reward accuracy" in text) == there and "Reward margin" not in text


def test_a_chart_stays_inside_its_frame():
    for training, validation in (
        ([(1.0, 5.0)], []),
        ([], [(3.0, 1e-9)]),
        ([(1.0, 1e9), (100000.0, -1e9)], [(50.0, 0.0)]),
    ):
        chart = drawing.chart(training, validation, "loss")
        assert "nan" not in chart and "inf" not in chart
        for x in re.findall(r'c?x\d?="([-\d.]+)"', chart):
            assert -1 <= float(x) <= 761


def test_ticks_are_round_and_inside():
    assert drawing.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert drawing.ticks(0.0, 420.0, 6) == [0, 100, 200, 300, 400]
    assert drawing.ticks(-0.5, 0.5) == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4])


def test_the_summary_fits_a_terminal(written):
    rows = [asked("Japan?", "Tokyo")]
    engine = FakeEngine({"Japan?": "Tokyo"}, plain={"a": "[red]x"})
    _, result = written(
        FakeEngine(),
        engine,
        rows,
        probes=[{"prompt": "a", "answer": "[red]x", "group": "[bold]facts"}, {"prompt": "b", "answer": "y"}],
    )
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(result))
    text = out.getvalue()
    assert "…" not in text and "Exact match" in text and "kept: [bold]facts" in text and "+100.0" in text
    assert json.dumps(result.as_dict())


def test_a_saved_report_draws_the_same_table(written):
    """`fitout run` a second time shows what report.json holds."""
    import io
    import json

    from rich.console import Console

    from fitout.evaluate.suite import from_report

    probes = [{"prompt": "The sky is", "answer": "blue", "group": "colours"}]
    _, result = written(FakeEngine({"a": "1"}), FakeEngine({"a": "2"}), [asked("a", "2")], probes=probes)
    saved = from_report(json.loads(json.dumps(result.as_dict())))
    drawn = []
    for one in (result, saved):
        out = io.StringIO()
        Console(file=out, width=100).print(summary_table(one))
        drawn.append(out.getvalue())
    assert drawn[0] == drawn[1]
    assert "kept" in drawn[0]


@pytest.mark.parametrize(
    ("value", "low", "high", "written"),
    [
        (92.14, 87.1, 96.43, ("+92.1", "+87.1", "+96.4")),
        (-0.0136, -0.0678, -0.0016, ("-0.014", "-0.068", "-0.002")),
        (0.6, 0.04, 1.2, ("+0.60", "+0.04", "+1.20")),
        (-0.01, -0.02, 0.0, ("+0.0", "+0.0", "+0.0")),  # holds zero: nothing was shown
        (-3e-6, -5e-6, -1e-6, ("+0.0000", "+0.0000", "+0.0000")),
    ],
)
def test_a_bound_that_is_not_zero_does_not_read_as_zero(value, low, high, written):
    assert page.signed(Score(value, 20, low, high)) == written
