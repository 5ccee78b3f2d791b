"""The data report as one HTML page that stands alone, in English and Chinese: what the data are, and what to look at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from .charts import bar, columns, prompt_strip, say, stripe
from .split import PARTS

PART_NAMES = {"train": ("training", "训练"), "validation": ("validation", "验证"), "test": ("test", "测试")}
PLACE_NAMES = {"head": ("head", "开头"), "middle": ("middle", "中间"), "tail": ("tail", "结尾")}
RULE_NAMES = {
    "end_markers": ("literal end markers", "字面结束符"),
    "control_characters": ("control characters", "控制字符"),
    "mojibake": ("mojibake (decoded wrongly)", "乱码（解码错误）"),
    "unicode": ("accents stored apart (not NFC)", "未规范化的字符（非 NFC）"),
    "html": ("HTML remnants", "HTML 残留"),
    "personal": ("personal data", "个人信息"),
    "refusals": ("boilerplate refusals", "套话式拒答"),
    "copied": ("copied answers", "照抄问题的回答"),
    "language": ("answers in another language", "语言不符的回答"),
}
ACTIONS = {
    "off": ("off", "关闭"),
    "report": ("only reported", "仅报告"),
    "fix": ("fixed", "已修正"),
    "drop": ("dropped", "已移除"),
    "mask": ("masked", "已遮盖"),
}
STAGES = {
    "read": ("read", "读取"),
    "convert": ("convert", "转换"),
    "clean": ("clean", "清洗"),
    "duplicates": ("duplicates", "去重"),
    "benchmarks": ("benchmarks", "基准题"),
    "split": ("split", "划分"),
    "augment": ("augment", "扩充"),
    "render": ("render", "渲染"),
    "balance": ("balance", "均衡"),
}

STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5d6b7a;--line:#d9dfe5;--wash:#f4f6f8;--card:#fff;--one:#2f6f9f;
--two:#d98032;--three:#7b5ea7;--bad:#c0463c;--good:#2e8b57}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#94a3b3;--line:#33404d;--wash:#161c23;--card:#1d252e;
--one:#5fa3d3;--two:#e79a56;--three:#a78bd0;--bad:#e0736a;--good:#5dbb85}}
*{box-sizing:border-box}body{font:16px/1.55 system-ui,"Noto Sans","Noto Sans CJK SC",sans-serif;color:var(--ink);
background:var(--wash);margin:0}main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 4rem}
html:not(:lang(zh)) [lang=zh],html:lang(zh) [lang=en],html:not(:lang(zh)) svg .zh,html:lang(zh) svg .en{display:none}
header{display:flex;justify-content:space-between;align-items:baseline;gap:1rem}h1{font-size:1.7rem;margin:.2rem 0}
button{font:inherit;color:inherit;background:none;border:1px solid var(--line);border-radius:.4rem;padding:.15rem .7rem;
cursor:pointer}section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem 1.2rem;
margin:1rem 0}h2{font-size:1.15rem;margin:.1rem 0 .5rem}h3{font-size:.95rem;margin:1rem 0 .3rem}
p{margin:.4rem 0}.soft,.soft *{color:var(--soft)}small{color:var(--soft)}
.sum{font-size:1.25rem;margin:.6rem 0}.sum b{font-size:1.55rem}.key i{display:inline-block;width:.8rem;height:.8rem;
border-radius:2px;margin:0 .35rem 0 1rem}.key i:first-child{margin-left:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.7rem;margin:.6rem 0}
.tile{border:1px solid var(--line);border-radius:.5rem;padding:.55rem .8rem}.tile b{font-size:1.35rem;display:block;
line-height:1.25}.two{columns:2}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.4rem}
table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{padding:.28rem .6rem;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top;overflow-wrap:break-word}th{font-weight:600;color:var(--soft);font-size:.82rem}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tr.total td{font-weight:600}
.scroll{overflow-x:auto}ul.look{padding-left:1.1rem;margin:.3rem 0}ul.look li{margin:.25rem 0}li.warn::marker{color:
var(--bad);content:"▲ "}li.fine::marker{color:var(--good);content:"✓ "}li.note::marker{color:var(--one);content:"● "}
pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--wash);border-radius:.35rem;padding:.4rem .6rem;
margin:.2rem 0;font:.82rem/1.45 ui-monospace,"Noto Sans Mono CJK SC",monospace;max-height:11rem;overflow:auto}
details{margin:.3rem 0}summary{cursor:pointer}.chip{display:inline-block;border:1px solid var(--line);border-radius:1rem;
padding:.02rem .6rem;margin:.12rem .15rem;font-size:.85rem}table.fixed{table-layout:fixed}table.fixed td:first-child{width:18%;overflow-wrap:anywhere}table.pairs td:first-child{width:auto}table.pairs th:first-child{width:5.5rem}td.b{white-space:nowrap;width:1%}.bar{display:inline-block;width:5.5rem;height:.7rem;background:
var(--wash);border-radius:2px;vertical-align:middle}.bar i{display:block;height:100%;border-radius:2px}
i.one,.one{background:var(--one);fill:var(--one)}i.two,.two-c,rect.two{background:var(--two);fill:var(--two)}
i.three,rect.three{background:var(--three);fill:var(--three)}i.bad,rect.bad{background:var(--bad);fill:var(--bad)}
i.good,rect.good{background:var(--good);fill:var(--good)}svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:10.5px}svg text.count{fill:var(--ink);font-size:10px}svg text.big{font-size:17px;
font-weight:600;fill:var(--ink)}svg text.inverse{fill:var(--card)}svg text.plain{fill:var(--ink)}svg .axis{stroke:var(
--line)}svg .mark{stroke:var(--bad);stroke-dasharray:3 3}svg text.marked{fill:var(--bad)}svg .page{fill:var(--wash)}
svg.stripe{height:1.7rem;border-radius:.35rem}.turn{border-left:3px solid var(--line);padding:.1rem .7rem;margin:.35rem 0}
.turn.assistant{border-color:var(--one)}.turn.user{border-color:var(--two)}.turn b{font-size:.8rem;color:var(--soft)}
.verdict{border-left:4px solid var(--good);padding:.3rem .8rem;background:var(--wash);border-radius:0 .35rem .35rem 0}
.like{font-variant-numeric:tabular-nums;font-weight:600}nav{font-size:.9rem}nav a{color:var(--one);margin-right:.9rem}
"""
SCRIPT = """
const r=document.documentElement;if((navigator.language||'').startsWith('zh'))r.lang='zh';
document.getElementById('lang').onclick=()=>{r.lang=r.lang==='zh'?'en':'zh'};
"""


def write_page(path: Path, report: dict[str, Any], details: dict[str, Any], quarantine: list[dict[str, Any]]) -> None:
    write_text(path, render(report, details, quarantine))


def render(report: dict[str, Any], details: dict[str, Any], quarantine: list[dict[str, Any]]) -> str:
    """The page; every text from the data is escaped. `details` holds the texts, `report` the figures."""
    sections: list[tuple[str, tuple[str, str], str]] = [
        ("look", ("What to look at", "值得注意"), _findings(report)),
        ("flow", ("Where the samples went", "样本的去向"), _flow(report)),
        ("parts", ("Parts", "各部分"), _parts(report)),
        ("tasks", ("Tasks", "任务"), _tasks(report)),
        ("lengths", ("Lengths", "长度"), _lengths(report)),
        ("position", ("Where the key information stands", "关键信息的位置"), _positions(report)),
        ("diversity", ("Diversity of the instructions", "指令的多样性"), _diversity(report)),
        ("duplicates", ("Near-duplicates", "近似重复"), _duplicates(report, details)),
        ("leakage", ("Leakage certificate", "泄漏证明"), _leakage(report, details)),
        ("benchmarks", ("Benchmark questions", "基准测试题"), _benchmarks(report, details)),
        ("cleaning", ("Cleaning rules", "清洗规则"), _cleaning(report, details)),
        ("quarantine", ("Quarantine", "隔离区"), _quarantine(report, quarantine)),
        ("samples", ("Samples", "样本示例"), _samples(details)),
        ("sources", ("Sources and settings", "来源与设置"), _sources(report)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{say(*title)}</a>' for name, title, _ in shown)
    body = "".join(f'<section id="{name}"><h2>{say(*title)}</h2>{inside}</section>' for name, title, inside in shown)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Data report</title><style>{STYLE}</style><main><header><h1>{say('Data report', '数据报告')}</h1>"
        f'<button id="lang">{say("中文", "English")}</button></header>{_sum(report)}<nav>{links}</nav>{body}</main>'
        f"<script>{SCRIPT}</script></html>\n"
    )


# pieces


def _sum(report: dict[str, Any]) -> str:
    kept, quarantined, removed = (sum(report[key].values()) for key in ("kept", "quarantined", "removed"))
    drawn = stripe(
        [
            *((("one", "three", "good")[at], report["kept"][part], f"{part}: {report['kept'][part]:,}")
              for at, part in enumerate(PARTS)),
            ("bad", quarantined, f"quarantined: {quarantined:,}"),
            ("two", removed, f"removed: {removed:,}"),
        ],
        label="kept, quarantined, removed",
    )  # fmt: skip
    words = "".join(
        f'<i class="{kind}"></i>{say(*names)}'
        for kind, names in (
            ("one", PART_NAMES["train"]), ("three", PART_NAMES["validation"]), ("good", PART_NAMES["test"]),
            ("bad", ("quarantined", "隔离")), ("two", ("removed by a rule", "按规则移除")),
        )
    )  # fmt: skip
    return (
        f"<p class=sum><b>{report['samples']:,}</b> {say('samples', '个样本')} = <b>{kept:,}</b> {say('kept', '保留')} + "
        f"<b>{quarantined:,}</b> {say('quarantined', '隔离')} + <b>{removed:,}</b> {say('removed', '移除')}</p>{drawn}"
        f"<p class=key><small>{words}</small></p>"
    )


def _findings(report: dict[str, Any]) -> str:
    """What a reader should know first, the worst at the top."""
    found: list[tuple[str, str, str]] = []
    leakage = report.get("leakage")
    if leakage:
        nearest = max((part["nearest"] for part in leakage["parts"].values()), default=0.0)
        removed = leakage["removed"]
        english = f"No training prompt is {leakage['similarity']:g} or more alike to a validation or test prompt"
        chinese = f"没有训练提示与验证或测试提示的相似度达到 {leakage['similarity']:g}"
        if removed:
            english += f"; {removed:,} that were have been removed"
            chinese += f"；其中 {removed:,} 个过近的已被移除"
        found.append(
            ("fine", f"{english}. The nearest left is {nearest:.3f}.", f"{chinese}。剩余最近的为 {nearest:.3f}。")
        )
    for part in PARTS[1:]:
        if not report["kept"][part]:
            english, chinese = PART_NAMES[part]
            found.append(("warn", f"There is no {english} part.", f"没有{chinese}部分。"))
    train = report["parts"]["train"]
    if train["tokens"] and train["supervised"] / train["tokens"] < 0.1:
        share = 100 * train["supervised"] / train["tokens"]
        found.append(("note", f"Only {share:.0f} % of the training tokens are trained; the rest is context.",
                      f"训练 token 中只有 {share:.0f}% 参与训练，其余为上下文。"))  # fmt: skip
    if train.get("unknown"):
        found.append(("warn", f"{train['unknown']:,} training tokens are unknown to the tokenizer.",
                      f"{train['unknown']:,} 个训练 token 是分词器不认识的。"))  # fmt: skip
    if train["no_end"]:
        found.append(("warn", f"{train['no_end']:,} training samples end without a trained end of turn: they were cut.",
                      f"{train['no_end']:,} 个训练样本被截断，没有学到结束符。"))  # fmt: skip
    repairable = sum(report["quarantined"].values())
    if repairable:
        found.append(("warn", f"{repairable:,} rows are in quarantine; `fitout data repair` lists what can be repaired.",
                      f"有 {repairable:,} 行被隔离；`fitout data repair` 会列出可修复的行。"))  # fmt: skip
    for line in report.get("cleaning", ()):
        if line["samples"] and line["action"] == "report":
            english, chinese = RULE_NAMES[line["rule"]]
            found.append(("note", f"{line['samples']:,} samples: {english} (reported only; data.clean.{line['rule']}).",
                          f"{line['samples']:,} 个样本：{chinese}（仅报告；data.clean.{line['rule']}）。"))  # fmt: skip
    duplicates = report.get("duplicates", {})
    if duplicates.get("would_go") and duplicates["near"] == "report":
        found.append(("note", f"{duplicates['clusters']:,} clusters of near-duplicates; `data.deduplicate.near: drop` "
                      f"would take {duplicates['would_go']:,} samples out.",
                      f"{duplicates['clusters']:,} 组近似重复；设 `data.deduplicate.near: drop` 会移除 "
                      f"{duplicates['would_go']:,} 个样本。"))  # fmt: skip
    diversity = report.get("diversity")
    if diversity and diversity["phrasings"] and diversity["phrasings"][0]["share"] >= 0.2:
        top = diversity["phrasings"][0]
        found.append(("note", f"{top['share']:.0%} of the instructions begin with “{top['begins']}”.",
                      f"{top['share']:.0%} 的指令以“{top['begins']}”开头。"))  # fmt: skip
    places = {name: count for name, count in train.get("places", {}).items() if name in PLACE_NAMES}
    if sum(places.values()) >= 50:
        name, count = max(places.items(), key=lambda one: one[1])
        if count > 0.6 * sum(places.values()):
            share = count / sum(places.values())
            found.append(("note", f"The key information stands at the {PLACE_NAMES[name][0]} of the prompt in {share:.0%} "
                          "of the samples where it can be located.",
                          f"在可定位的样本中，{share:.0%} 的关键信息位于提示的{PLACE_NAMES[name][1]}。"))  # fmt: skip
    order = {"warn": 0, "note": 1, "fine": 2}
    lines = "".join(f"<li class={kind}>{say(*texts)}" for kind, *texts in sorted(found, key=lambda one: order[one[0]]))
    return f"<ul class=look>{lines}</ul>" if lines else ""


def _flow(report: dict[str, Any]) -> str:
    most = max((stage["came"] for stage in report.get("stages", ())), default=0) or 1
    lines = []
    for stage in report.get("stages", ()):
        out = [f"- {n:,} {rule}" for key in ("quarantined", "removed") for rule, n in stage[key].items() if n]
        made = [f"+ {n:,} {what}" for what, n in stage["made"].items() if n]
        changed = [f"~ {n:,} {what}" for what, n in stage["changed"].items() if n]
        lines.append(
            (
                _html(say(*STAGES.get(stage["name"], (stage["name"],) * 2))),
                stage["came"],
                _html("<br>".join(map(escape, (*made, *out, *changed)))),
                stage["left"],
                _html(bar(stage["left"] / most)),
            )
        )
    note = say(
        "Each stage adds up: what came and was made = what left + what was quarantined or removed. ~ were changed and kept.",
        "每一阶段都核对总数：进入 + 新增 = 离开 + 隔离 + 移除。~ 表示经修改后保留。",
    )
    return _table(
        [("stage", "阶段"), ("came", "进入"), ("what happened", "处理"), ("left", "离开"), ("", "")], lines
    ) + (f"<p class=soft>{note}</p>")


def _parts(report: dict[str, Any]) -> str:
    rows = [
        (
            _html(say(*PART_NAMES[name])),
            report["kept"][name],
            part["rows"],
            part["tokens"],
            part["supervised"],
            _html(f"{_share(part['supervised'], part['tokens'])} {bar(_ratio(part['supervised'], part['tokens']))}"),
        )
        for name, part in report["parts"].items()
    ]
    heads = [("part", "部分"), ("samples", "样本"), ("rows", "行"), ("tokens", "token"), ("trained", "参与训练"),
             ("share trained", "训练占比")]  # fmt: skip
    note = ""
    if report["weighted"]:
        changes = ", ".join(f"{file} {change:+,}" for file, change in report["weighted"].items())
        note = (
            f"<p class=soft>{say('By weights and shares, an epoch has', '按权重与占比，每轮')}: {escape(changes)}</p>"
        )
    return _table(heads, rows) + note


def _tasks(report: dict[str, Any]) -> str:
    tasks = report.get("tasks")
    if not tasks:
        return ""
    total = sum(line["train"]["tokens"] for line in tasks["grid"]) or 1
    by_task: dict[str, list[dict[str, Any]]] = {}
    for line in tasks["grid"]:
        by_task.setdefault(line["task"], []).append(line)
    largest = max((sum(one["train"]["tokens"] for one in lines) for lines in by_task.values()), default=1) or 1
    rows = []
    for task, lines in sorted(by_task.items(), key=lambda one: -sum(line["train"]["tokens"] for line in one[1])):
        rows.append(_task_row(task, lines[0]["subtask"] if len(lines) == 1 else "", lines, total, largest))
        if len(lines) > 1:
            rows += [_task_row("", line["subtask"] or "-", [line], total, largest) for line in lines]
    heads = [("task", "任务"), ("sub-task", "子任务"), ("train", "训练"), ("validation", "验证"), ("test", "测试"),
             ("tokens", "token"), ("trained", "参与训练"), ("median length", "长度中位数"), ("share of tokens", "token 占比")]  # fmt: skip
    came = ", ".join(f"{what} {count:,}" for what, count in tasks["came_from"].items())
    note = f"<p class=soft>{say('Labels came from', '标签来源')}: {escape(came)}"
    suggested = report.get("suggested")
    if suggested and suggested["accuracy"] is not None:
        note += ". " + say(
            f"The classifier was sure of {suggested['samples']:,} of {suggested['of']:,}; on labelled samples kept from "
            f"it, it was sure of {suggested['coverage']:.0%} and right in {suggested['accuracy']:.1%} of these.",
            f"分类器对 {suggested['of']:,} 个中的 {suggested['samples']:,} 个有把握；在留出的有标签样本上，它对 "
            f"{suggested['coverage']:.0%} 有把握，其中 {suggested['accuracy']:.1%} 正确。",
        )
    return _table(heads, rows) + note + "</p>"


def _task_row(task: str, below: str, lines: Sequence[dict[str, Any]], total: int, largest: int) -> tuple[Any, ...]:
    def summed(part: str, key: str) -> int:
        return sum(line[part][key] for line in lines)

    tokens = summed("train", "tokens")
    medians = sorted((line["train"]["median"], line["train"]["rows"]) for line in lines)
    middle = medians[len(medians) // 2][0] if medians else 0
    name = _html(f"<b>{escape(task)}</b>" if task else "")
    return (
        name, below, summed("train", "samples"), summed("validation", "samples"), summed("test", "samples"), tokens,
        summed("train", "supervised"), middle,
        _html(f"{_share(tokens, total)} {bar(tokens / largest, 'one' if task else 'three')}"),
    )  # fmt: skip


def _lengths(report: dict[str, Any]) -> str:
    train = report["parts"]["train"]
    if "prompts" not in train or not train["rows"]:
        return ""
    halves = []
    for key, title in (
        ("prompts", ("Prompts, tokens", "提示长度（token）")),
        ("answers", ("Answers, tokens", "回答长度（token）")),
    ):
        one = train[key]
        bars = [(f"{low}-{high}" if high < 1024 else f"{low // 1024}k+" if low >= 1024 else f"{low}+", count)
                for low, high, count in one["histogram"]]  # fmt: skip
        spread = say(
            f"median {one['median']:,}, 95 % up to {one['high']:,}, longest {one['longest']:,}",
            f"中位数 {one['median']:,}，95% 不超过 {one['high']:,}，最长 {one['longest']:,}",
        )
        halves.append(f"<div><h3>{say(*title)}</h3>{columns(bars, label=title[0])}<p class=soft>{spread}</p></div>")
    limit = report["max_length"]
    whole = columns(
        [(str(high), count) for _, high, count in train["lengths"]], label="lengths of samples", width=1080, height=120
    )
    cut = report["removed"].get("too long", 0)
    note = say(
        f"Whole samples, up to data.max_length = {limit:,}; {cut:,} were longer and left out ({report['too_long']}).",
        f"整个样本的长度，上限 data.max_length = {limit:,}；更长的有 {cut:,} 个未使用（{report['too_long']}）。",
    )
    return f"<div class=pair>{''.join(halves)}</div><h3>{note}</h3>{whole}{_balance(report)}"


def _balance(report: dict[str, Any]) -> str:
    drawn = []
    for one in report.get("balance", ()):
        rows = [(line["class"], line["before"], line["after"]) for line in one["classes"]]
        title = say(f"Balanced by {one['by']} ({one['how']})", f"按 {one['by']} 均衡（{one['how']}）")
        heads = [("class", "类别"), ("before", "之前"), ("after", "之后")]
        drawn.append(f"<h3>{title}</h3>{_table(heads, rows)}")
    return "".join(drawn)


def _positions(report: dict[str, Any]) -> str:
    drawn = []
    for name in ("train", "test"):
        places = report["parts"][name].get("places", {})
        if not sum(places.get(place, 0) for place in PLACE_NAMES):
            continue
        thirds = [(*PLACE_NAMES[place], places.get(place, 0)) for place in PLACE_NAMES]
        rest = {place: count for place, count in places.items() if place not in PLACE_NAMES}
        told = say(
            f"Not located: {rest.get('none', 0):,} have nothing in common with their answer, {rest.get('spread', 0):,} "
            f"have it everywhere, {rest.get('short', 0):,} are too short to tell.",
            f"未定位：{rest.get('none', 0):,} 个与回答无重合，{rest.get('spread', 0):,} 个分散各处，"
            f"{rest.get('short', 0):,} 个太短。",
        )
        drawn.append(
            f"<div><h3>{say(*PART_NAMES[name])}</h3>{prompt_strip(thirds, label='places')}<p class=soft>{told}</p></div>"
        )
    if not drawn:
        return ""
    note = say(
        "A third of the prompt each; the darker, the more samples have what their answer needs there. Scores are told by "
        "these places too.",
        "每格为提示的三分之一；颜色越深，答案所需信息位于此处的样本越多。评测分数也按位置给出。",
    )
    return f"<p class=soft>{note}</p><div class=pair>{''.join(drawn)}</div>"


def _diversity(report: dict[str, Any]) -> str:
    found = report.get("diversity")
    if not found:
        return ""
    tiles = [
        (f"{found['distinct']['2']:.0%}", ("of word pairs are different (distinct-2)", "的二元组互不相同（distinct-2）")),
        ("-" if found["self_bleu"] is None else f"{found['self_bleu']:.2f}",
         ("self-BLEU: 0 all different, 1 all the same", "self-BLEU：0 完全不同，1 完全相同")),
        ("-" if found["entropy"] is None else f"{found['entropy']:.2f}",
         ("evenness of topics: 1 where all are equally large", "主题均匀度：1 表示各主题同样大")),
        (f"{found['verb_pairs']['different']:,}",
         (f"verb-object pairs in {found['verb_pairs']['found']:,} instructions",
          f"种动宾组合，见于 {found['verb_pairs']['found']:,} 条指令")),
    ]  # fmt: skip
    stats = "".join(f"<div class=tile><b>{escape(value)}</b><small>{say(*text)}</small></div>" for value, text in tiles)
    top = found["phrasings"][0]["share"] if found["phrasings"] else 1
    openings = _table(
        [("instructions begin with", "指令开头"), ("", ""), ("prompts", "条数")],
        [
            (
                _html(f"“{escape(one['begins'])}”"),
                _html(f"{bar(one['share'] / top)} {one['share']:.0%}"),
                one["prompts"],
            )
            for one in found["phrasings"]
        ],
    )
    verbs = ""
    if found["verbs"]:
        rows = [
            (
                _html(f"<b>{escape(one['verb'])}</b>"),
                one["prompts"],
                _html("".join(f"<span class=chip>{escape(noun)} {n}</span>" for noun, n in one["objects"])),
            )
            for one in found["verbs"][:8]
        ]
        verbs = _table([("verb", "动词"), ("prompts", "条数"), ("objects", "宾语")], rows)
    topics = "".join(
        f"<span class=chip title='{one['size']}'><b>{one['size']:,}</b> {escape(' · '.join(one['words'][:4]))}</span>"
        for one in found["clusters"]
    )
    topics = f"<h3>{say('Topics (clusters by TF-IDF)', '主题（TF-IDF 聚类）')}</h3>{topics}" if topics else ""
    return f"<div class=tiles>{stats}</div><div class=pair><div>{openings}</div><div>{verbs}</div></div>{topics}"


def _duplicates(report: dict[str, Any], details: dict[str, Any]) -> str:
    found = report.get("duplicates", {})
    if not found.get("clusters"):
        return ""
    english = f"{found['clusters']:,} clusters with {found['in_clusters']:,} samples that are {found['similarity']:g} or more alike"
    chinese = f"{found['clusters']:,} 组共 {found['in_clusters']:,} 个样本，相似度达到 {found['similarity']:g}"
    english += {"drop": f"; {found['would_go']:,} were removed.", "report": "; all are kept (near: report)."}[
        found["near"]
    ]
    chinese += {"drop": f"；已移除 {found['would_go']:,} 个。", "report": "；全部保留（near: report）。"}[found["near"]]
    drawn = [f"<p>{say(english, chinese)}</p>"]
    for one in details.get("clusters", ())[:12]:
        members = "".join(
            f"<p>{_where(member['where'])}<small>"
            + (f" · <span class=like>{member['likeness']:.2f}</span>" if member["likeness"] is not None else
               f" · {say('stays', '保留')}")
            + f"</small></p><div class=text>{escape(member['text'])}</div>"
            for member in one["members"]
        )  # fmt: skip
        head = say(f"{one['size']} samples, {one['stay']} would stay", f"{one['size']} 个样本，保留 {one['stay']} 个")
        first = escape(one["members"][0]["text"][:90])
        drawn.append(f"<details><summary>{head} <small>{first}</small></summary>{members}</details>")
    return "".join(drawn)


def _leakage(report: dict[str, Any], details: dict[str, Any]) -> str:
    found = report.get("leakage")
    if not found:
        return ""
    compared = sum(part["compared"] for part in found["parts"].values())
    held_out = sum(part["samples"] for part in found["parts"].values())
    training = report["parts"]["train"]["samples"]
    english = (
        f"Each of {compared:,} of {held_out:,} held-out prompts was compared with every training prompt. Every pair that "
        f"is alike by {found['least']:g} was found; {found['removed']:,} training samples at {found['similarity']:g} or "
        f"more were removed, {training:,} are left."
    )
    chinese = (
        f"将 {held_out:,} 个留出提示中的 {compared:,} 个与每个训练提示逐一比较。相似度达到 {found['least']:g} 的样本对全部找出；"
        f"{found['removed']:,} 个达到 {found['similarity']:g} 的训练样本已移除，剩余 {training:,} 个。"
    )
    drawn = [f"<p class=verdict>{say(english, chinese)}</p><div class=pair>"]
    for name, part in found["parts"].items():
        bars = [(f"<{high:g}" if not low else f"{low:g}", count) for low, high, count in part["histogram"]
                if low < found["similarity"] or count]  # fmt: skip
        title = say(f"{PART_NAMES[name][0]}: likeness to the nearest training prompt",
                    f"{PART_NAMES[name][1]}：与最近训练提示的相似度")  # fmt: skip
        drawn.append(f"<div><h3>{title}</h3>{columns(bars, label=name)}</div>")
    drawn.append("</div>")
    pairs = details.get("nearest", ())
    if pairs:
        rows = "".join(
            f"<tr><td class='n like'>{one['likeness']:.2f}{' ✕' if one['removed'] else ''}"
            f"<td><small>{say(*PART_NAMES[one['part']])}</small> {_where(one['where'])}<div class=text>{escape(one['text'])}"
            f"</div><td>{_where(one['training'])}<div class=text>{escape(one['training_text'])}</div></tr>"
            for one in pairs
        )
        head = (
            f"<tr><th class=n>{say('likeness', '相似度')}<th>{say('held out', '留出')}"
            f"<th>{say('nearest in training', '训练集中最近的')}</tr>"
        )
        title = say(f"The {len(pairs)} nearest pairs (✕: the training sample was removed)",
                    f"最近的 {len(pairs)} 对（✕：训练样本已移除）")  # fmt: skip
        drawn.append(f"<details><summary>{title}</summary><table class='fixed pairs'>{head}{rows}</table></details>")
    return "".join(drawn)


def _benchmarks(report: dict[str, Any], details: dict[str, Any]) -> str:
    found = report.get("benchmarks")
    if not found:
        return ""
    names = ", ".join(f"{name} ({count:,})" for name, count in found["files"].items())
    english = f"{found['samples']:,} samples hold {found['overlap']:.0%} or more of a question of {names}"
    chinese = f"{found['samples']:,} 个样本含有 {names} 中某题的 {found['overlap']:.0%} 以上"
    english += "; they were removed." if found["action"] == "drop" else "; they are kept."
    chinese += "；已移除。" if found["action"] == "drop" else "；已保留。"
    rows = [
        (f"{one['share']:.0%}", f"{one['where']}: {one['text']}", f"{one['benchmark']}: {one['item']}")
        for one in details.get("benchmarks", ())[:12]
    ]
    table = _table([("share", "占比"), ("sample", "样本"), ("question", "题目")], rows) if rows else ""
    return f"<p>{say(english, chinese)}</p>{table}"


def _cleaning(report: dict[str, Any], details: dict[str, Any]) -> str:
    lines = report.get("cleaning")
    if not lines:
        return ""
    drawn: list[tuple[Any, ...]] = []
    looks: list[str] = []
    for line in lines:
        examples = details.get("cleaning", {}).get(line["rule"], ())
        shown = "".join(
            f"<tr><td>{_where(one['where'])}<td><div class=text>{escape(one['before'])}</div>"
            f"<td><div class=text>{escape(one['after'])}</div></tr>"
            for one in examples
        )
        if shown:
            title = say(*RULE_NAMES[line["rule"]])
            looks.append(f"<details><summary>{title}</summary><table class=fixed>{shown}</table></details>")
        kinds = "".join(f"<span class=chip>{kind} {count:,}</span>" for kind, count in line.get("kinds", {}).items())
        drawn.append(
            (
                _html(say(*RULE_NAMES[line["rule"]])),
                line["samples"],
                _html(say(*ACTIONS[line["action"]])),
                _html(kinds),
            )
        )
    heads = [("rule", "规则"), ("samples", "样本"), ("action", "处理"), ("", "")]
    shown_all = f"<h3>{say('Before and after', '处理前后')}</h3>{''.join(looks)}" if looks else ""
    return _table(heads, drawn) + shown_all


def _quarantine(report: dict[str, Any], quarantine: list[dict[str, Any]]) -> str:
    if not report["quarantined"]:
        return ""
    drawn = []
    for rule, count in report["quarantined"].items():
        rows = [row for row in quarantine if row["rule"] == rule]
        shown = "".join(_quarantined(row) for row in rows)
        drawn.append(
            f"<details><summary><b>{escape(rule)}</b>: {count:,} <small>{escape('; '.join(list(report['reasons'].get(rule, ()))[:3]))}"
            f"</small></summary><table class=fixed><tr><th>{say('where', '位置')}<th>{say('why', '原因')}<th>{say('row', '行')}"
            f"<th>{say('suggested repair', '建议的修复')}</tr>{shown}</table></details>"
        )
    note = say("All are in quarantine.jsonl, each with its suggested repair; `fitout data repair` lets accepted ones in again.",
               "全部见 quarantine.jsonl，附建议的修复；`fitout data repair` 让接受的修复重新进入数据。")  # fmt: skip
    return f"<p class=soft>{note}</p>{''.join(drawn)}"


def _quarantined(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return escape(said[:600])

    repair = (
        f"<small>{escape(row['repair']['how'])}</small><pre>{text(row['repair']['row'])}</pre>"
        if row.get("repair")
        else "-"
    )
    return (
        f"<tr><td>{_where(row['file'] + ':' + str(row['line']))}<td>{escape(row['reason'][:200])}"
        f"<td><pre>{text(row['row'])}</pre><td>{repair}</tr>"
    )


def _samples(details: dict[str, Any]) -> str:
    drawn = []
    for one in details.get("samples", ()):
        turns = "".join(
            f"<div class='turn {escape(role)}'><b>{escape(role)}</b><div>{escape(text)}</div></div>"
            for role, text in one["turns"]
        )
        task = f" · {escape(one['task'])}" if one.get("task") else ""
        drawn.append(f"<details><summary><small>{escape(one['where'])}{task}</small> {escape(one['turns'][0][1][:80])}"
                     f"</summary>{turns}</details>")  # fmt: skip
    return "".join(drawn)


def _sources(report: dict[str, Any]) -> str:
    rows = [
        (s["path"], s["format"], s["samples"], s["bad_rows"], len(s["skipped_files"])) for s in report["sources"]
    ]  # fmt: skip
    heads = [
        ("source", "来源"),
        ("format", "格式"),
        ("samples", "样本"),
        ("bad rows", "坏行"),
        ("files skipped", "跳过的文件"),
    ]
    notes = "".join(f"<p class=soft>{escape(note)}</p>" for note in report["notes"])
    template = f"<p class=soft>{say('Template', '模板')}: {escape(report['template'])}</p>"
    return _table(heads, rows) + template + notes


def _where(place: str) -> str:
    """A place in a file, with the last two names of its path; the whole path shows under the pointer."""
    return f'<small title="{escape(place)}">{escape("/".join(place.split("/")[-2:]))}</small>'


# tables


class _html(str):
    """Text that is HTML already."""


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]) -> str:
    body = [list(row) for row in rows]
    numeric = [bool(body) and isinstance(value, int) for value in (body[0] if body else heads)]
    head = "".join(
        f"<th{' class=n' if n else ''}>{say(*h) if any(h) else ''}" for h, n in zip(heads, numeric, strict=True)
    )

    def cell(value: Any) -> str:
        if isinstance(value, int):
            return f"<td class=n>{value:,}"
        if isinstance(value, _html):
            return f"<td{' class=b' if value.endswith('</i></span>') else ''}>{value}"
        return f"<td>{escape(str(value))}"

    lines = ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in body]
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
