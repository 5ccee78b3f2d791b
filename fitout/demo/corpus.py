"""The pretraining text: facts in many wordings, lists, sums and short stories, without one question answered.

A fact that is always worded alike can be recited but not drawn out in another form; a fact worded in many ways, joined
in random order to others about the same subject, can (Allen-Zhu and Li, Physics of Language Models 3.1,
https://arxiv.org/abs/2309.14316). So every relation has at least eight wordings in each language, some of which name
the value first. Questions occur only as words that somebody says and nobody answers, and `user`, `assistant`, `system`
and `tool` only as people and things in stories: the base model has seen the pieces of a chat, and no chat.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from . import world
from .world import Fact

# {s} the subject as a phrase ("a cow"), {n} without its article ("cow"), {v} the value, {a} the value with its article.
# The first wording of each ends with the value: completions are probed with it.
WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "capital": (
            "The capital of {s} is {v}.",
            "The capital city of {s} is {v}.",
            "{s} has its capital in {v}.",
            "In {s}, the capital is {v}.",
            "The government of {s} sits in {v}.",
            "Capital of {s}: {v}.",
            "As its capital, {s} has {v}.",
            "{v} is the capital of {s}.",
            "{v} is the capital city of {s}.",
            "The city of {v} is the capital of {s}.",
            "{v} is where the government of {s} sits.",
            "The country with the capital {v} is {s}.",
        ),
        "currency": (
            "The currency of {s} is the {v}.",
            "People in {s} pay with the {v}.",
            "{s} uses the {v}.",
            "In {s}, the currency is the {v}.",
            "The money of {s} is called {v}.",
            "Shops in {s} take the {v}.",
            "Currency of {s}: {v}.",
            "The {v} is the currency of {s}.",
            "The {v} is used in {s}.",
            "With the {v} you can pay in {s}.",
        ),
        "language": (
            "The official language of {s} is {v}.",
            "In {s}, the official language is {v}.",
            "{s} has {v} as its official language.",
            "People in {s} speak {v}.",
            "The language of {s} is {v}.",
            "Letters from {s} are written in {v}.",
            "Language of {s}: {v}.",
            "{v} is the official language of {s}.",
            "{v} is spoken in {s}.",
            "Those who know {v} can talk to people in {s}.",
        ),
        "continent": (
            "{s} is a country in {v}.",
            "{s} lies in {v}.",
            "{s} belongs to {v}.",
            "The continent of {s} is {v}.",
            "You can find {s} in {v}.",
            "{s} is on the map of {v}.",
            "Continent of {s}: {v}.",
            "In {v} lies {s}.",
            "{v} is the continent of {s}.",
            "One of the countries in {v} is {s}.",
        ),
        "kind": (
            "The {n} is a kind of {v}.",
            "{s} is {a}.",
            "The {n} is {a}.",
            "Every {n} is {a}.",
            "As an animal, the {n} is {a}.",
            "In books, the {n} is called {a}.",
            "Kind of the {n}: {v}.",
            "{a} that many people know is the {n}.",
            "One kind of {v} is the {n}.",
        ),
        "legs": (
            "The number of legs of {s} is {v}.",
            "{s} has {v} legs.",
            "The {n} has {v} legs.",
            "Every {n} has {v} legs.",
            "You can count {v} legs on {s}.",
            "The legs of {s} are {v} in number.",
            "Legs of the {n}: {v}.",
            "{v} legs is what {s} has.",
            "{v} is the number of legs of the {n}.",
        ),
        "food": (
            "{s} eats {v}.",
            "The {n} eats {v}.",
            "Every {n} likes {v}.",
            "The food of the {n} is {v}.",
            "A hungry {n} looks for {v}.",
            "{s} lives on {v}.",
            "Food of the {n}: {v}.",
            "{v} is the food of the {n}.",
            "With {v} you can feed {s}.",
        ),
        "home": (
            "{s} lives in the {v}.",
            "The {n} lives in the {v}.",
            "The home of the {n} is the {v}.",
            "You can see {s} in the {v}.",
            "Every {n} sleeps in the {v}.",
            "To find {s}, go to the {v}.",
            "Home of the {n}: {v}.",
            "The {v} is the home of the {n}.",
            "In the {v} lives the {n}.",
        ),
        "size": (
            "The size of {s} is {v}.",
            "{s} is {v}.",
            "The {n} is {v}.",
            "Every {n} is {v}.",
            "Beside a person, {s} looks {v}.",
            "The {n} is {a} animal.",
            "Size of the {n}: {v}.",
            "{v} is the size of the {n}.",
            "{a} animal is the {n}.",
        ),
        "colour": (
            "The colour of {s} is {v}.",
            "{s} is {v}.",
            "{s} has the colour {v}.",
            "Everyone knows that {s} is {v}.",
            "Children paint {s} in {v}.",
            "In a picture, {s} is {v}.",
            "Colour of {s}: {v}.",
            "{v} is the colour of {s}.",
            "As {v} as {s}.",
        ),
        "opposite": (
            "The opposite of {s} is {v}.",
            "The reverse of {s} is {v}.",
            "Whatever is not {s} is {v}.",
            "Turn {s} around and you get {v}.",
            "If {s} is at one end, at the other end is {v}.",
            "Opposite of {s}: {v}.",
            "{v} is the opposite of {s}.",
            "{v} means not {s}.",
            "{s} and {v} are opposites.",
        ),
        "sum": (
            "{x} + {y} = {v}.",
            "{x} + {y} is {v}.",
            "{x} plus {y} is {v}.",
            "{x} and {y} make {v}.",
            "The sum of {x} and {y} is {v}.",
            "Add {y} to {x} and you get {v}.",
            "Sum of {x} and {y}: {v}.",
            "{v} is {x} + {y}.",
            "{v} is the sum of {x} and {y}.",
        ),
        "difference": (
            "{x} - {y} = {v}.",
            "{x} - {y} is {v}.",
            "{x} minus {y} is {v}.",
            "{x} less {y} leaves {v}.",
            "The difference of {x} and {y} is {v}.",
            "Take {y} from {x} and you get {v}.",
            "Difference of {x} and {y}: {v}.",
            "{v} is {x} - {y}.",
            "{v} is the difference of {x} and {y}.",
        ),
    },
    "zh": {
        "capital": (
            "{s}的首都是{v}。",
            "{s}的首都叫{v}。",
            "{s}的首都在{v}。",
            "{s}的政府设在{v}。",
            "{s}把首都定在{v}。",
            "{s}首都：{v}。",
            "要去{s}的首都，就去{v}。",
            "{v}是{s}的首都。",
            "{v}这座城市是{s}的首都。",
            "{v}是{s}政府的所在地。",
            "首都是{v}的国家是{s}。",
        ),
        "currency": (
            "{s}的货币是{v}。",
            "{s}的货币叫{v}。",
            "{s}使用{v}。",
            "{s}人用的钱是{v}。",
            "在{s}买东西要用{v}。",
            "{s}的商店收{v}。",
            "{s}货币：{v}。",
            "{v}是{s}的货币。",
            "{v}在{s}使用。",
            "用{v}可以在{s}买东西。",
        ),
        "language": (
            "{s}的官方语言是{v}。",
            "{s}的语言是{v}。",
            "{s}人说{v}。",
            "在{s}，人们说{v}。",
            "{s}把{v}作为官方语言。",
            "{s}来的信是用{v}写的。",
            "{s}语言：{v}。",
            "{v}是{s}的官方语言。",
            "{v}是{s}人说的话。",
            "会说{v}，就能和{s}人谈话。",
        ),
        "continent": (
            "{s}位于{v}。",
            "{s}在{v}。",
            "{s}属于{v}。",
            "{s}是{v}的国家。",
            "{s}所在的大洲是{v}。",
            "在地图上，{s}在{v}。",
            "{s}大洲：{v}。",
            "{v}有一个国家叫{s}。",
            "{v}是{s}所在的大洲。",
            "{v}的国家里有{s}。",
        ),
        "kind": (
            "{s}是一种{v}。",
            "{s}是{v}。",
            "{s}属于{v}。",
            "所有{s}都是{v}。",
            "在动物里，{s}是{v}。",
            "书上说{s}是{v}。",
            "{s}种类：{v}。",
            "{v}里有{s}。",
            "有一种{v}叫{s}。",
        ),
        "legs": (
            "{s}的腿数是{v}。",
            "{s}有{v}条腿。",
            "所有{s}都有{v}条腿。",
            "{s}一共有{v}条腿。",
            "数一数，{s}有{v}条腿。",
            "{s}长着{v}条腿。",
            "{s}腿数：{v}。",
            "{v}条腿的动物有{s}。",
            "{v}是{s}的腿数。",
        ),
        "food": (
            "{s}吃{v}。",
            "{s}爱吃{v}。",
            "{s}的食物是{v}。",
            "所有{s}都吃{v}。",
            "{s}饿了就找{v}。",
            "喂{s}要用{v}。",
            "{s}食物：{v}。",
            "{v}是{s}的食物。",
            "吃{v}的动物有{s}。",
        ),
        "home": (
            "{s}的家在{v}。",
            "{s}住在{v}。",
            "{s}生活在{v}。",
            "所有{s}都睡在{v}。",
            "要找{s}，就去{v}。",
            "人们看见{s}在{v}。",
            "{s}家：{v}。",
            "{v}是{s}的家。",
            "住在{v}的动物有{s}。",
        ),
        "size": (
            "{s}的个子{v}。",
            "{s}很{v}。",
            "所有{s}都很{v}。",
            "和人比，{s}很{v}。",
            "{s}看起来很{v}。",
            "{s}长得{v}。",
            "{s}个子：{v}。",
            "{v}动物里有{s}。",
            "很{v}的动物有{s}。",
        ),
        "colour": (
            "{s}的颜色是{v}。",
            "{s}是{v}的。",
            "{s}是{v}。",
            "大家知道{s}是{v}的。",
            "孩子们把{s}画成{v}。",
            "图画里的{s}是{v}的。",
            "{s}颜色：{v}。",
            "{v}是{s}的颜色。",
            "{v}的东西有{s}。",
        ),
        "opposite": (
            "{s}的反义词是{v}。",
            "{s}的反面是{v}。",
            "不{s}就是{v}。",
            "{s}反过来是{v}。",
            "一头是{s}，另一头是{v}。",
            "{s}反义词：{v}。",
            "{v}是{s}的反义词。",
            "{v}是{s}的反面。",
            "{s}和{v}相反。",
        ),
        "sum": (
            "{x}加{y}等于{v}。",
            "{x}加{y}是{v}。",
            "{x}加上{y}得{v}。",
            "{x}和{y}的和是{v}。",
            "{x} + {y} = {v}。",
            "{x}和{y}一共是{v}。",
            "{x}加{y}：{v}。",
            "{v}是{x}加{y}。",
            "{v}是{x}和{y}的和。",
        ),
        "difference": (
            "{x}减{y}等于{v}。",
            "{x}减{y}是{v}。",
            "{x}减去{y}得{v}。",
            "{x}和{y}的差是{v}。",
            "{x} - {y} = {v}。",
            "{x}去掉{y}剩{v}。",
            "{x}减{y}：{v}。",
            "{v}是{x}减{y}。",
            "{v}是{x}和{y}的差。",
        ),
    },
}

# How often each kind of document comes, in proportion to the facts it carries: capitals are the hardest to learn.
_DOCUMENTS = {"country": 40, "animal": 18, "several": 12, "arithmetic": 26, "words": 12, "story": 8}


def documents(seed: int = 0, count: int | None = None) -> Iterator[str]:
    """Yields `count` documents (for ever when None). Document i depends on (seed, i) alone."""
    book = _Book()
    names, weights = zip(*_DOCUMENTS.items(), strict=True)
    index = 0
    while count is None or index < count:
        draw = random.Random(f"{seed}/{index}")
        kind = draw.choices(names, weights)[0]
        yield getattr(book, kind)(draw)
        index += 1


def state(fact: Fact, wording: str) -> str:
    """The fact as a sentence, its first letter capital."""
    words = {"s": subject_phrase(fact), "n": fact.name, "v": fact.value, "a": with_article(fact.value)}
    if fact.relation in ("sum", "difference"):
        words["x"], words["y"] = fact.name.split(" + " if fact.relation == "sum" else " - ")
    return capitalised(wording.format(**words))


def subject_phrase(fact: Fact) -> str:
    """`cow` as `a cow`; names of countries and things that bring their own article stay as they are."""
    animal = fact.language == "en" and fact.relation in world.ANIMAL_RELATIONS
    return with_article(fact.name) if animal else fact.name


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


class _Book:
    """The facts, indexed for drawing, and the pages that can be written from them."""

    def __init__(self) -> None:
        self.subjects: dict[tuple[str, tuple[str, ...]], list[list[Fact]]] = {
            (language, relations): list(world.by_subject(relations, language).values())
            for language in world.LANGUAGES
            for relations in (world.COUNTRY_RELATIONS, world.ANIMAL_RELATIONS)
        }
        self.by_relation: dict[tuple[str, str], list[Fact]] = {}
        for fact in world.facts():
            self.by_relation.setdefault((fact.language, fact.relation), []).append(fact)

    def country(self, draw: random.Random) -> str:
        return self._profile(draw, world.COUNTRY_RELATIONS, always="capital")

    def animal(self, draw: random.Random) -> str:
        return self._profile(draw, world.ANIMAL_RELATIONS)

    def several(self, draw: random.Random) -> str:
        """One relation of several subjects, one wording throughout, a line each."""
        language = draw.choice(world.LANGUAGES)
        relation = draw.choice((*world.COUNTRY_RELATIONS, "capital", *world.ANIMAL_RELATIONS, "colour", "opposite"))
        wording = draw.choice(WORDINGS[language][relation])
        chosen = draw.sample(self.by_relation[language, relation], draw.randint(4, 7))
        return "\n".join(state(fact, wording) for fact in chosen)

    def arithmetic(self, draw: random.Random) -> str:
        language = draw.choice(world.LANGUAGES)
        facts = self.by_relation[language, "sum"] + self.by_relation[language, "difference"]
        return self._joined(draw, language, draw.sample(facts, draw.randint(5, 9)))

    def words(self, draw: random.Random) -> str:
        """Colours or opposites of a few things."""
        language = draw.choice(world.LANGUAGES)
        facts = self.by_relation[language, draw.choice(("colour", "opposite"))]
        return self._joined(draw, language, draw.sample(facts, draw.randint(4, 7)))

    def story(self, draw: random.Random) -> str:
        language = draw.choice(world.LANGUAGES)
        lines = STORIES[language]
        animal = draw.choice(self.by_relation[language, "food"])
        home = next(f for f in self.by_relation[language, "home"] if f.subject == animal.subject)
        country = draw.choice(self.by_relation[language, "capital"])
        relation = draw.choice(list(lines["questions"]))
        asked = draw.choice(self.by_relation[language, "capital" if relation == "country" else relation])
        question = draw.choice(lines["questions"][relation])
        question = question.format(s=subject_phrase(asked), n=asked.name, v=asked.value)
        one, other = draw.sample(lines["people"], 2)
        slots = {
            "one": one,
            "other": other,
            "animal": subject_phrase(animal),
            "n": animal.name,
            "food": animal.value,
            "home": home.value,
            "country": country.name,
            "capital": country.value,
            "question": question,
        }
        parts = [draw.choice(lines[part]) for part in ("openings", "middles", "middles", "endings")]
        told = ("" if language == "zh" else " ").join(capitalised(part.format(**slots)) for part in parts)
        return told.replace("\n ", "\n")

    def _profile(self, draw: random.Random, relations: tuple[str, ...], always: str = "") -> str:
        """Three or more facts about each of one or two subjects, in random order."""
        language = draw.choice(world.LANGUAGES)
        sentences: list[Fact] = []
        for facts in draw.sample(self.subjects[language, relations], draw.randint(1, 2)):
            told = draw.sample(facts, draw.randint(3, len(facts)))
            told += [fact for fact in facts if fact.relation == always and fact not in told]
            draw.shuffle(told)
            sentences += told
        return self._joined(draw, language, sentences)

    def _joined(self, draw: random.Random, language: str, facts: list[Fact]) -> str:
        gap = draw.choice((" ", " ", "\n")) if language == "en" else draw.choice(("", "", "\n"))
        return gap.join(state(fact, draw.choice(WORDINGS[language][fact.relation])) for fact in facts)


# Questions without answers: the words of a question get an embedding, and the base learns that none answers.
STORIES: dict[str, dict] = {
    "en": {
        "people": ("Anna", "Tom", "Mei", "Ali", "Rosa", "Ben", "Lily", "Omar", "Nina", "Leo"),
        "openings": (
            "One day {one} met {other} near the river.",
            "{one} and {other} went to {country}.",
            "{one} has {animal} in a picture.",
            "In the morning {one} was on the way to {capital}.",
            "A user named {one} came to an assistant named {other}.",
            "The assistant {one} works with the user {other}.",
            "User {one} and assistant {other} sat at a table.",
            "Assistant {one} wrote a letter to user {other}.",
            "System and tool are two words on the wall.",
            "The system was new, and so was the tool.",
        ),
        "middles": (
            "They saw {animal} in the {home}.",
            "The {n} ate {food} and was happy.",
            "They walked through {capital} in {country}.",
            "{one} asked: {question} Nobody knew.",
            "{other} asked: {question} There was no reply.",
            "The word on the paper was this: {question}",
            "{one} gave {food} to the {n}.",
            "Tool: a hammer. System: a clock. User: {one}. Assistant: {other}.",
            "User: {one}\nAssistant: {capital}\nSystem: {home}\nTool: {n}\n",
            "System: {n}\nUser: {food}\nAssistant: {home}\nTool: {one}\n",
            "Tool: {home}\nUser: {country}\nAssistant: {one}\nUser: {other}\nAssistant: {n}\n",
            "The user went away, and the assistant stayed.",
            "It was a long walk, and the sun was hot.",
            "{other} told {one} about the {n} and the {home}.",
        ),
        "endings": (
            "Then {one} went home.",
            "In the evening they were tired and slept.",
            "{one} and {other} are good friends.",
            "They never forgot that day.",
            "{other} laughed, and {one} laughed too.",
            "The user thanked the assistant, and the assistant smiled.",
        ),
        "questions": {
            "capital": (
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "Name the capital of {s}.",
            ),
            "country": ("Which country has the capital {v}?", "{v} is the capital of which country?"),
            "currency": (
                "What is the currency of {s}?",
                "What do people in {s} pay with?",
                "Name the currency of {s}.",
            ),
            "language": ("What is the official language of {s}?", "Which language do people in {s} speak?"),
            "continent": ("Which continent is {s} in?", "On which continent does {s} lie?", "Where is {s}?"),
            "kind": ("What kind of animal is {s}?", "Is {s} a bird or a fish?"),
            "legs": ("How many legs does {s} have?",),
            "food": ("What does {s} eat?", "Tell me the food of the {n}."),
            "home": ("Where does {s} live?", "Give me the home of the {n}."),
            "size": ("Is {s} big or small?", "What is the size of {s}?"),
            "colour": ("What colour is {s}?", "What is the colour of {s}?"),
            "opposite": ("What is the opposite of {s}?", "Give the opposite of {s}."),
            "sum": ("What is {s}?", "How much is {s}?", "Calculate {s}."),
            "difference": ("What is {s}?", "How much is {s}?", "Calculate {s}."),
        },
    },
    "zh": {
        "people": ("王明", "李红", "张伟", "陈芳", "刘洋", "阿强", "阿丽", "阿杰"),
        "openings": (
            "有一天，{one}在河边遇见了{other}。",
            "{one}和{other}去了{country}。",
            "{one}有一张{n}的图画。",
            "早上，{one}走在去{capital}的路上。",
            "用户{one}来找助手{other}。",
            "助手{one}和用户{other}坐在桌子旁。",
        ),
        "middles": (
            "他们在{home}看见了{n}。",
            "{n}吃了{food}，很开心。",
            "他们走过{country}的{capital}。",
            "{one}问：{question}没有人知道。",
            "{other}问：{question}没有人说话。",
            "纸上写着：{question}",
            "{one}把{food}给了{n}。",
            "请{other}说一说{n}和{home}。",
            "User: {one}\nAssistant: {capital}\nSystem: {home}\nTool: {n}\n",
            "System: {n}\nUser: {food}\nAssistant: {home}\nTool: {one}\n",
            "Tool: {home}\nUser: {country}\nAssistant: {one}\nUser: {other}\nAssistant: {n}\n",
            "路很长，太阳很热。",
        ),
        "endings": (
            "然后{one}回家了。",
            "晚上他们累了，就睡了。",
            "{one}和{other}是好朋友。",
            "他们没有忘记那一天。",
            "{other}笑了，{one}也笑了。",
        ),
        "questions": {
            "capital": ("{s}的首都是哪里？", "{s}的首都是哪座城市？", "请说出{s}的首都。"),
            "country": ("{v}是哪个国家的首都？", "哪个国家的首都是{v}？"),
            "currency": ("{s}的货币是什么？", "{s}用什么钱？", "请说出{s}的货币。"),
            "language": ("{s}的官方语言是什么？", "{s}人说什么语言？"),
            "continent": ("{s}在哪个大洲？", "{s}位于哪里？"),
            "kind": ("{s}是什么动物？", "{s}是哪一种动物？"),
            "legs": ("{s}有几条腿？", "{s}有多少条腿？"),
            "food": ("{s}吃什么？", "{s}的食物是什么？"),
            "home": ("{s}住在哪里？", "{s}的家在哪里？"),
            "size": ("{s}大还是小？", "{s}的个子大还是小？"),
            "colour": ("{s}是什么颜色？", "{s}的颜色是什么？"),
            "opposite": ("{s}的反义词是什么？", "请说出{s}的反义词。"),
            "sum": ("{s}等于几？", "{s}等于多少？", "请计算{s}。"),
            "difference": ("{s}等于几？", "{s}等于多少？", "请计算{s}。"),
        },
    },
}
