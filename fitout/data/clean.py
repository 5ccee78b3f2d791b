"""Rules over single samples: what each looks for, what it does, how often, with examples of before and after.

Rules over texts come first (they may change what stands there), then rules over answers (they may take a sample out).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ..chat.types import Conversation, Message, Pair, Sample, Text
from ..errors import RequestError
from . import CleanSettings
from .content import normalised, texts
from .personal import find, masked, veiled

#: Markers that mean "the text ends here" in some tokenizer and nothing else anywhere.
END_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|end|>")

#: The same, but also ordinary text (HTML); stripped only when the tokenizer at hand has them.
END_MARKERS_IF_CONTROL = ("</s>", "<eos>", "<end_of_turn>")

# C0 controls but for tab, line feed, carriage return and form feed; byte order marks; non-characters.
CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ufdd0-\ufdef\ufffe\uffff\U0001fffe\U0001ffff\U0010fffe\U0010ffff]"
)
UNSEEN = re.compile(CONTROLS.pattern + "|[\x80-\x9f]")  # what an example spells out
ESCAPE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")  # what colours a terminal; without its first character it would be text
TAG = re.compile(
    r"</?(?:br|p|div|span|b|i|u|em|strong|font|a|sup|sub|li|ul|ol|table|tr|td|h[1-6])\b[^<>]{0,200}>", re.I
)
ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|ldquo|rdquo|lsquo|rsquo|mdash|ndash|hellip|#\d{2,6}|#x[0-9a-f]{2,5});", re.I
)
BREAK = re.compile(r"<\s*(?:br\s*/?|/p|/div|/li|/tr|/h[1-6])\s*>", re.I)
CODE = re.compile(r"```|[{}]|=>|;\n|\bimport |\bdef |\bclass[ =]|\bfunction\b|\bselect .{1,80} from ", re.I)
MARKUP = re.compile(r"html|xml|<script|<style|css\b|\btags?\b|markup|href|标签|网页|" + CODE.pattern, re.I)
REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence)(?: language)?(?: model| assistant)?\b|\bi(?:'m| am) (?:just |only )?an? "
    r"(?:ai language|artificial intelligence|large language|language) model\b"
    r"|\bi do(?:n't| not) have personal (?:opinions|feelings|experiences|preferences)\b"
    r"|作为(?:一个|一名|一款)?\s*(?:AI|人工智能|大型?语言|语言)\s*(?:语言)?(?:模型|助手|程序)",
    re.I,
)
REFUSAL_WORDS = ("an ai", "an artificial", "language model", "personal ", "作为")  # one of them is in all of it
TRANSLATION = re.compile(
    r"translat|翻译|译成|译为|(?:in|into|to) (?:english|chinese|french|german|spanish|italian|japanese|korean|russian|"
    r"arabic|portuguese|latin|hindi|dutch|greek|turkish)|用.{0,4}(?:英语|英文|中文|法语|德语|日语|韩语|俄语|西班牙语)",
    re.I,
)
ALIKE = (
    {"hr", "bs", "sr"},
    {"no", "nn", "nb", "da"},
    {"id", "ms"},
    {"gl", "pt", "es"},
    {"cs", "sk"},
    {"hi", "mr", "ne"},
)
PROSE = 80  # bytes of a text, from which its language is judged; a Chinese character has three
EXAMPLES = 5  # of each rule
AROUND = 60  # characters shown before and after a change

NAMES = {  # settings key: what was changed or found, in the words of the report
    "end_markers": "end marker stripped",
    "control_characters": "control characters removed",
    "mojibake": "mojibake undone",
    "unicode": "accents composed (NFC)",
    "html": "HTML removed",
    "personal": "personal data masked",
}
FAULTS = {
    "refusals": "boilerplate refusal",
    "copied": "copied answer",
    "language": "wrong language",
    "personal": "personal data",
}


class Cleaner:
    """The rules of a recipe, and what they found so far. `found` counts samples by settings key whatever the action."""

    def __init__(self, settings: CleanSettings, control: Sequence[str]):
        self.settings = settings
        self.control = control
        languages = _detected(settings.languages)
        self.found: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()  # of personal data, samples
        self.examples: dict[str, list[dict[str, str]]] = defaultdict(list)
        rules: dict[str, Callable[[str], str]] = {
            "control_characters": without_controls,
            "mojibake": without_mojibake,
            "unicode": composed,
            "html": without_html,
        }
        self.actions: dict[str, str] = {
            "end_markers": settings.end_markers,
            "control_characters": settings.control_characters,
            "mojibake": settings.mojibake,
            "unicode": settings.unicode,
            "html": settings.html,
            "personal": settings.personal.action,
            "refusals": settings.refusals,
            "copied": settings.copied,
            "language": settings.language,
        }
        self._texts = [
            (key, rule, self.actions[key] == "fix") for key, rule in rules.items() if self.actions[key] != "off"
        ]
        answers: dict[str, Callable[[Sample], str | None]] = {
            "refusals": refusal,
            "copied": copied,
            "language": lambda sample: wrong_language(sample, languages),
        }
        self._answers = [(key, rule) for key, rule in answers.items() if self.actions[key] != "off"]

    def clean(self, sample: Sample) -> tuple[Sample, list[str], tuple[str, str] | None]:
        """(the sample with what is to be fixed fixed, keys of the rules that changed it, (key, reason) of the rule that
        takes it out or None)."""
        changed = []
        for key, rule, fixes in self._texts:
            after = _mapped(sample, rule)
            if after is not sample and not (key == "html" and any(map(MARKUP.search, texts(sample)))):
                self._note(key, sample, after)
                if fixes:
                    sample = after
                    changed.append(key)
        if self.settings.end_markers != "off":
            after, stripped = strip_end_markers(sample, self.control)
            if stripped:
                self._note("end_markers", sample, after)
                if self.settings.end_markers == "fix":
                    sample = after
                    changed.append("end_markers")
        for key, rule_of_answers in self._answers:
            fault = rule_of_answers(sample)
            if fault is not None:
                self._note_fault(key, sample, fault)
                if self.actions[key] == "drop":
                    return sample, changed, (key, fault)
        return self._personal(sample, changed)

    def _personal(self, sample: Sample, changed: list[str]) -> tuple[Sample, list[str], tuple[str, str] | None]:
        settings = self.settings.personal
        if settings.action == "off":
            return sample, changed, None
        kinds: set[str] = set()
        for text in texts(sample):
            spans = find(text, settings)
            if spans and not kinds and len(self.examples["personal"]) < EXAMPLES:
                start, end = max(0, spans[0][0] - AROUND), spans[-1][1] + AROUND
                shown = veiled(text, spans)[start:end], masked(text, spans)[start:end]
                where = str(sample.origin)
                self.examples["personal"].append({"where": where, "before": shown[0], "after": shown[1]})
            kinds |= {kind for _, _, kind in spans}
        if not kinds:
            return sample, changed, None
        self.found["personal"] += 1
        self.kinds.update(kinds)
        if settings.action == "drop":
            return sample, changed, ("personal", f"holds {', '.join(sorted(kinds))}")
        if settings.action == "mask":
            return _mapped(sample, lambda text: masked(text, find(text, settings))), [*changed, "personal"], None
        return sample, changed, None

    def _note(self, key: str, before: Sample, after: Sample) -> None:
        self.found[key] += 1
        if len(self.examples[key]) < EXAMPLES:
            for one, other in zip(texts(before), texts(after), strict=False):
                if one != other:
                    shown = _difference(one, other)
                    self.examples[key].append({"where": str(before.origin), "before": shown[0], "after": shown[1]})
                    break

    def _note_fault(self, key: str, sample: Sample, fault: str) -> None:
        self.found[key] += 1
        if len(self.examples[key]) < EXAMPLES:
            self.examples[key].append({"where": str(sample.origin), "before": fault, "after": ""})

    def report(self) -> list[dict[str, Any]]:
        """A line for each rule: its key, what it does, and in how many samples it found something."""
        lines = []
        for key, action in self.actions.items():
            line: dict[str, Any] = {"rule": key, "action": action, "samples": self.found[key]}
            if key == "personal":
                line["kinds"] = dict(self.kinds)
            lines.append(line)
        return lines


# rules over texts: each gives the text itself where there is nothing to do


def without_controls(text: str) -> str:
    """Without control characters and terminal escapes; NUL has no place in a text that is to be learned."""
    return CONTROLS.sub("", ESCAPE.sub("", text)) if CONTROLS.search(text) else text


def without_mojibake(text: str) -> str:
    """Decoded as it was meant, where ftfy is certain that it was decoded wrongly; what Latin-1 has as controls
    (U+0080 to U+009F) is what Windows has there: dashes and quotes."""
    if text.isascii() or not _suspects().search(text):
        return text
    import ftfy

    return ftfy.fixes.fix_c1_controls(ftfy.fix_encoding(text))


def composed(text: str) -> str:
    """In Normalization Form C (Unicode Standard Annex 15): an accent and its letter as one character."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def without_html(text: str) -> str:
    """Tags of formatting taken out, breaks and paragraphs as line breaks, entities as what they stand for."""
    if "<" not in text and "&" not in text or not (TAG.search(text) or ENTITY.search(text)):
        return text
    return TAG.sub("", BREAK.sub("\n", html.unescape(text))).replace("\xa0", " ")


@lru_cache(maxsize=1)
def _suspects() -> re.Pattern[str]:
    """What the first byte of a UTF-8 character becomes in the encodings that ftfy undoes; no mojibake lacks them."""
    leads = bytes(range(0xC2, 0xF5))
    codecs = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "cp1254", "cp1257", "iso8859-2", "mac-roman", "cp437")
    found = {char for codec in codecs for char in leads.decode(codec, "ignore") if ord(char) > 127}
    found |= set(map(chr, range(0x80, 0xA0)))
    return re.compile("[" + "".join(map(re.escape, sorted(found))) + "]")


# rules over answers: each gives what it found, None for nothing


def refusal(sample: Sample) -> str | None:
    """Boilerplate in which a model speaks of being one."""
    for _, answer in _answers(sample):
        opening = answer.content[:300].lower()
        if not any(word in opening for word in REFUSAL_WORDS):
            continue
        found = REFUSAL.search(answer.content[:300])
        if found and not re.search('["=({]', answer.content[max(0, found.start() - 30) : found.start()]):
            return answer.content[max(0, found.start() - AROUND) : found.end() + AROUND].strip()
    return None


def copied(sample: Sample) -> str | None:
    """An answer that is its question, or one paragraph of it and nothing else, longer than a word or two."""
    for question, answer in _answers(sample):
        said = normalised(answer.content).casefold()
        if said and said == normalised(question).casefold():
            return answer.content[: 2 * AROUND]
    return None


def wrong_language(sample: Sample, languages: Sequence[str] = ()) -> str | None:
    """An answer that is certainly in another language than its question (which asks for no translation), or in none of
    `languages` (two letters each) where these are given."""
    for question, answer in _answers(sample):
        said = language(answer.content)
        if said is None:
            continue
        if languages:
            if said not in languages and prose(answer.content):
                return f"{said}: {answer.content[: 2 * AROUND]}"
            continue
        asked = language(question)
        if asked is None or asked == said or any({asked, said} <= group for group in ALIKE):
            continue
        if not TRANSLATION.search(question) and prose(answer.content):
            return f"{asked} -> {said}: {answer.content[: 2 * AROUND]}"
    return None


def language(text: str) -> str | None:
    """The language (two letters) that a text is certainly in (Compact Language Detector 2); None for short texts and
    for several languages."""
    coded = text[:600].encode("utf-8", "ignore")
    if len(coded) < PROSE:
        return None
    import pycld2

    try:
        reliable, _, found = pycld2.detect(coded)
    except pycld2.error:
        return None
    name, code, percent, _ = found[0]
    return code.partition("-")[0] if reliable and percent >= 80 and name != "Unknown" else None


def _detected(codes: Sequence[str]) -> list[str]:
    """The codes as `language` gives them. Raises RequestError for one that it never gives."""
    import pycld2

    known = {code for name, code in pycld2.LANGUAGES if name in pycld2.DETECTED_LANGUAGES}
    wrong = [code for code in codes if code not in known]
    if wrong:
        raise RequestError(
            f"{', '.join(wrong)}: no language that is told apart here",
            where="data.clean.languages",
            harm="Every answer would be in another language.",
            hint="Give codes of Compact Language Detector 2: en, de, zh, iw (Hebrew), ...",
        )
    return [code.partition("-")[0] for code in codes]


def prose(text: str) -> bool:
    """Whether a text is neither code nor mostly figures: only then does a detector know its language."""
    text = text[:600]
    return CODE.search(text) is None and sum(map(str.isalpha, text)) + text.count(" ") >= 0.85 * len(text)


def _answers(sample: Sample) -> list[tuple[str, Message]]:
    """(the turn before, the answer) of every trained answer; system turns aside."""
    if isinstance(sample, Conversation):
        pairs = zip(sample.messages, sample.messages[1:], strict=False)
        return [(a.content, b) for a, b in pairs if b.role == "assistant" and b.train and a.role == "user"]
    if isinstance(sample, Pair) and sample.prompt:
        return [(sample.prompt[-1].content, sample.chosen)]
    return []


def _mapped(sample: Sample, change: Callable[[str], str]) -> Sample:
    """The sample with every content changed; the sample itself where that changes nothing."""
    if isinstance(sample, Text):
        text = change(sample.text)
        return sample if text == sample.text else replace(sample, text=text)

    def of(message: Message) -> Message:
        content = change(message.content)
        return message if content == message.content else replace(message, content=content)

    if isinstance(sample, Conversation):
        messages = tuple(map(of, sample.messages))
        same = all(one is other for one, other in zip(messages, sample.messages, strict=True))
        return sample if same else replace(sample, messages=messages)
    pair = replace(sample, prompt=tuple(map(of, sample.prompt)), chosen=of(sample.chosen), rejected=of(sample.rejected))
    return sample if pair == sample else pair


def _difference(before: str, after: str) -> tuple[str, str]:
    """The stretch in which two texts differ, with what stands around it; characters that cannot be seen are spelled."""
    start = next(
        (at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    ends = zip(reversed(before[start:]), reversed(after[start:]), strict=False)
    end = next((at for at, (a, b) in enumerate(ends) if a != b), min(len(before), len(after)) - start)
    low = max(0, start - AROUND)

    def shown(text: str) -> str:
        piece = text[low : min(len(text) - end, start + 3 * AROUND) + min(end, AROUND)]
        return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", piece)

    return shown(before), shown(after)


# control tokens


def control_tokens(sample: Sample, control: Sequence[str]) -> str | None:
    """Why a sample cannot be trained on with a tokenizer that has the `control` tokens: its text spells one.

    Encoded, such text would become the token itself and could end or begin a turn. None when it spells none.
    """
    pattern = _pattern(tuple(control))
    if pattern is None:
        return None
    for text in texts(sample):
        found = pattern.search(text)
        if found:
            return f"the text spells the control token {found[0]}"
    return None


def strip_end_markers(sample: Sample, control: Sequence[str] = ()) -> tuple[Sample, bool]:
    """The sample without literal end markers at the very end of its answers or text, and whether there were any.

    An answer that is nothing but markers keeps them: stripping would leave it empty.
    """
    markers = (*END_MARKERS, *(marker for marker in END_MARKERS_IF_CONTROL if marker in control))

    def of(message: Message) -> Message:
        if message.role != "assistant":
            return message
        stripped = _stripped(message.content, markers)
        return message if stripped == message.content else replace(message, content=stripped)

    cleaned: Sample
    if isinstance(sample, Conversation):
        messages = tuple(of(message) for message in sample.messages)
        if all(one is other for one, other in zip(messages, sample.messages, strict=True)):
            return sample, False
        cleaned = replace(sample, messages=messages)
    elif isinstance(sample, Pair):
        cleaned = replace(
            sample,
            prompt=tuple(of(message) for message in sample.prompt),
            chosen=of(sample.chosen),
            rejected=of(sample.rejected),
        )
    else:
        cleaned = replace(sample, text=_stripped(sample.text, markers))
    return (cleaned, True) if cleaned != sample else (sample, False)


def only_markers(sample: Sample) -> str | None:
    """Why a sample is bad whose answer is nothing, or nothing but an end marker; None for all others."""
    if isinstance(sample, Conversation):
        answers = [m.content for m in sample.messages if m.role == "assistant" and not m.extra.get("tool_calls")]
    elif isinstance(sample, Pair):
        answers = [m.content for m in (sample.chosen, sample.rejected) if not m.extra.get("tool_calls")]
    else:
        answers = [sample.text]
    if any(answer.strip() in END_MARKERS for answer in answers):
        return "the answer is only an end marker"
    return "the answer is empty once it is cleaned" if any(not answer.strip() for answer in answers) else None


def _stripped(text: str, markers: Sequence[str]) -> str:
    left = text
    while True:
        bare = left.rstrip()
        marker = next((marker for marker in markers if bare.endswith(marker)), None)
        if marker is None:
            return left if left.strip() else text
        left = bare[: -len(marker)]


@lru_cache(maxsize=8)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all tokens, the longest first; None when there are none."""
    spelled = sorted({token for token in control if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None
