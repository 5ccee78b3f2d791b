"""A miniature world in English and Chinese: real countries, animals, colours, opposites and small sums.

Everything the demo's base model knows, and everything its instruction data ask, comes from the tables below. The facts
are real, one right answer each. A *subject* is what a fact is about, named once for both languages ("Japan", "cow",
"7 + 5"), so that the instruction data can train on one half of the subjects and ask about the other half.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Fact:
    """`relation` of `subject` is `value`; `subject` names it for both languages, `name` as this language says it."""

    relation: str
    subject: str
    name: str
    value: str
    language: str


CONTINENTS = {
    "Asia": "亚洲",
    "Europe": "欧洲",
    "Africa": "非洲",
    "North America": "北美洲",
    "South America": "南美洲",
    "Oceania": "大洋洲",
}

# country, capital, currency, official language; then the same in Chinese. Only countries with one capital that nobody
# disputes, one continent and a name that takes no article.
_COUNTRIES = {
    "Asia": """
        Japan, Tokyo, yen, Japanese | 日本, 东京, 日元, 日语
        China, Beijing, yuan, Chinese | 中国, 北京, 人民币, 汉语
        South Korea, Seoul, won, Korean | 韩国, 首尔, 韩元, 韩语
        India, New Delhi, rupee, Hindi | 印度, 新德里, 卢比, 印地语
        Thailand, Bangkok, baht, Thai | 泰国, 曼谷, 泰铢, 泰语
        Vietnam, Hanoi, dong, Vietnamese | 越南, 河内, 越南盾, 越南语
        Malaysia, Kuala Lumpur, ringgit, Malay | 马来西亚, 吉隆坡, 林吉特, 马来语
        Cambodia, Phnom Penh, riel, Khmer | 柬埔寨, 金边, 瑞尔, 高棉语
        Laos, Vientiane, kip, Lao | 老挝, 万象, 基普, 老挝语
        Mongolia, Ulaanbaatar, tugrik, Mongolian | 蒙古, 乌兰巴托, 图格里克, 蒙古语
        Nepal, Kathmandu, rupee, Nepali | 尼泊尔, 加德满都, 卢比, 尼泊尔语
        Bangladesh, Dhaka, taka, Bengali | 孟加拉国, 达卡, 塔卡, 孟加拉语
        Pakistan, Islamabad, rupee, Urdu | 巴基斯坦, 伊斯兰堡, 卢比, 乌尔都语
        Iran, Tehran, rial, Persian | 伊朗, 德黑兰, 里亚尔, 波斯语
        Iraq, Baghdad, dinar, Arabic | 伊拉克, 巴格达, 第纳尔, 阿拉伯语
        Jordan, Amman, dinar, Arabic | 约旦, 安曼, 第纳尔, 阿拉伯语
        Qatar, Doha, riyal, Arabic | 卡塔尔, 多哈, 里亚尔, 阿拉伯语
        Uzbekistan, Tashkent, som, Uzbek | 乌兹别克斯坦, 塔什干, 苏姆, 乌兹别克语
    """,
    "Europe": """
        France, Paris, euro, French | 法国, 巴黎, 欧元, 法语
        Germany, Berlin, euro, German | 德国, 柏林, 欧元, 德语
        Italy, Rome, euro, Italian | 意大利, 罗马, 欧元, 意大利语
        Spain, Madrid, euro, Spanish | 西班牙, 马德里, 欧元, 西班牙语
        Portugal, Lisbon, euro, Portuguese | 葡萄牙, 里斯本, 欧元, 葡萄牙语
        Greece, Athens, euro, Greek | 希腊, 雅典, 欧元, 希腊语
        Britain, London, pound, English | 英国, 伦敦, 英镑, 英语
        Poland, Warsaw, zloty, Polish | 波兰, 华沙, 兹罗提, 波兰语
        Hungary, Budapest, forint, Hungarian | 匈牙利, 布达佩斯, 福林, 匈牙利语
        Romania, Bucharest, leu, Romanian | 罗马尼亚, 布加勒斯特, 列伊, 罗马尼亚语
        Sweden, Stockholm, krona, Swedish | 瑞典, 斯德哥尔摩, 克朗, 瑞典语
        Norway, Oslo, krone, Norwegian | 挪威, 奥斯陆, 克朗, 挪威语
        Denmark, Copenhagen, krone, Danish | 丹麦, 哥本哈根, 克朗, 丹麦语
        Finland, Helsinki, euro, Finnish | 芬兰, 赫尔辛基, 欧元, 芬兰语
        Iceland, Reykjavik, krona, Icelandic | 冰岛, 雷克雅未克, 克朗, 冰岛语
        Austria, Vienna, euro, German | 奥地利, 维也纳, 欧元, 德语
        Albania, Tirana, lek, Albanian | 阿尔巴尼亚, 地拉那, 列克, 阿尔巴尼亚语
        Ukraine, Kyiv, hryvnia, Ukrainian | 乌克兰, 基辅, 格里夫纳, 乌克兰语
    """,
    "Africa": """
        Egypt, Cairo, pound, Arabic | 埃及, 开罗, 埃及镑, 阿拉伯语
        Kenya, Nairobi, shilling, Swahili | 肯尼亚, 内罗毕, 先令, 斯瓦希里语
        Ethiopia, Addis Ababa, birr, Amharic | 埃塞俄比亚, 亚的斯亚贝巴, 比尔, 阿姆哈拉语
        Nigeria, Abuja, naira, English | 尼日利亚, 阿布贾, 奈拉, 英语
        Ghana, Accra, cedi, English | 加纳, 阿克拉, 塞地, 英语
        Senegal, Dakar, franc, French | 塞内加尔, 达喀尔, 法郎, 法语
        Morocco, Rabat, dirham, Arabic | 摩洛哥, 拉巴特, 迪拉姆, 阿拉伯语
        Algeria, Algiers, dinar, Arabic | 阿尔及利亚, 阿尔及尔, 第纳尔, 阿拉伯语
        Libya, Tripoli, dinar, Arabic | 利比亚, 的黎波里, 第纳尔, 阿拉伯语
        Angola, Luanda, kwanza, Portuguese | 安哥拉, 罗安达, 宽扎, 葡萄牙语
        Mozambique, Maputo, metical, Portuguese | 莫桑比克, 马普托, 梅蒂卡尔, 葡萄牙语
        Zambia, Lusaka, kwacha, English | 赞比亚, 卢萨卡, 克瓦查, 英语
        Somalia, Mogadishu, shilling, Somali | 索马里, 摩加迪沙, 先令, 索马里语
        Uganda, Kampala, shilling, English | 乌干达, 坎帕拉, 先令, 英语
    """,
    "North America": """
        Canada, Ottawa, dollar, English | 加拿大, 渥太华, 加元, 英语
        Cuba, Havana, peso, Spanish | 古巴, 哈瓦那, 比索, 西班牙语
        Jamaica, Kingston, dollar, English | 牙买加, 金斯敦, 牙买加元, 英语
        Nicaragua, Managua, cordoba, Spanish | 尼加拉瓜, 马那瓜, 科多巴, 西班牙语
    """,
    "South America": """
        Brazil, Brasilia, real, Portuguese | 巴西, 巴西利亚, 雷亚尔, 葡萄牙语
        Argentina, Buenos Aires, peso, Spanish | 阿根廷, 布宜诺斯艾利斯, 比索, 西班牙语
        Chile, Santiago, peso, Spanish | 智利, 圣地亚哥, 比索, 西班牙语
        Peru, Lima, sol, Spanish | 秘鲁, 利马, 索尔, 西班牙语
        Colombia, Bogota, peso, Spanish | 哥伦比亚, 波哥大, 比索, 西班牙语
        Venezuela, Caracas, bolivar, Spanish | 委内瑞拉, 加拉加斯, 玻利瓦尔, 西班牙语
        Uruguay, Montevideo, peso, Spanish | 乌拉圭, 蒙得维的亚, 比索, 西班牙语
    """,
    "Oceania": """
        Australia, Canberra, dollar, English | 澳大利亚, 堪培拉, 澳元, 英语
        New Zealand, Wellington, dollar, English | 新西兰, 惠灵顿, 新西兰元, 英语
        Fiji, Suva, dollar, English | 斐济, 苏瓦, 斐济元, 英语
    """,
}

KINDS = {
    "mammal": "哺乳动物",
    "bird": "鸟类",
    "fish": "鱼类",
    "insect": "昆虫",
    "reptile": "爬行动物",
    "amphibian": "两栖动物",
}

# animal, food, home; then the same in Chinese. A home fits "lives in the ...".
_ANIMALS = {
    ("mammal", 4): """
        cow, grass, farmyard | 牛, 草, 农场
        horse, hay, farmyard | 马, 干草, 农场
        pig, corn, farmyard | 猪, 玉米, 农场
        dog, bones, house | 狗, 骨头, 屋子
        cat, mice, house | 猫, 老鼠, 屋子
        rabbit, carrots, field | 兔子, 胡萝卜, 田野
        tiger, meat, jungle | 老虎, 肉, 丛林
        lion, meat, grassland | 狮子, 肉, 草原
        zebra, grass, grassland | 斑马, 草, 草原
        giraffe, leaves, grassland | 长颈鹿, 树叶, 草原
        elephant, leaves, jungle | 大象, 树叶, 丛林
        panda, bamboo, mountains | 熊猫, 竹子, 高山
        bear, honey, forest | 熊, 蜂蜜, 森林
        wolf, meat, forest | 狼, 肉, 森林
        deer, leaves, forest | 鹿, 树叶, 森林
        squirrel, nuts, forest | 松鼠, 坚果, 森林
        camel, hay, desert | 骆驼, 干草, 沙漠
        hedgehog, insects, garden | 刺猬, 虫子, 花园
    """,
    ("mammal", 0): """
        dolphin, fish, sea | 海豚, 鱼, 大海
        whale, shrimp, sea | 鲸, 虾, 大海
    """,
    ("bird", 2): """
        chicken, grain, farmyard | 鸡, 谷子, 农场
        eagle, meat, mountains | 鹰, 肉, 高山
        owl, mice, forest | 猫头鹰, 老鼠, 森林
        parrot, nuts, jungle | 鹦鹉, 坚果, 丛林
        sparrow, grain, field | 麻雀, 谷子, 田野
        swan, grass, pond | 天鹅, 草, 池塘
        seagull, fish, sea | 海鸥, 鱼, 大海
    """,
    ("fish", 0): """
        shark, fish, sea | 鲨鱼, 鱼, 大海
        salmon, shrimp, river | 三文鱼, 虾, 河
        carp, insects, pond | 鲤鱼, 虫子, 池塘
    """,
    ("insect", 6): """
        bee, nectar, garden | 蜜蜂, 花蜜, 花园
        butterfly, nectar, garden | 蝴蝶, 花蜜, 花园
        grasshopper, grass, field | 蚱蜢, 草, 田野
        dragonfly, insects, pond | 蜻蜓, 虫子, 池塘
    """,
    ("reptile", 4): """
        crocodile, meat, river | 鳄鱼, 肉, 河
        lizard, insects, desert | 蜥蜴, 虫子, 沙漠
    """,
    ("reptile", 0): """
        cobra, mice, jungle | 眼镜蛇, 老鼠, 丛林
        rattlesnake, mice, desert | 响尾蛇, 老鼠, 沙漠
    """,
    ("amphibian", 4): """
        frog, insects, pond | 青蛙, 虫子, 池塘
        toad, insects, garden | 蟾蜍, 虫子, 花园
    """,
}

# Beside a person; clear cases only.
_SIZES = {
    "big": ("大", "cow horse tiger lion zebra giraffe elephant bear camel dolphin whale shark crocodile panda"),
    "small": (
        "小",
        "cat rabbit squirrel hedgehog chicken owl parrot sparrow seagull bee butterfly grasshopper dragonfly lizard "
        "frog toad",
    ),
}

_COLOURS = {
    "green": ("绿色", "grass 草, a leaf 树叶, a cucumber 黄瓜, spinach 菠菜, a cactus 仙人掌"),
    "white": ("白色", "snow 雪, milk 牛奶, salt 盐, rice 米饭, cotton 棉花, paper 纸"),
    "red": ("红色", "blood 血, a tomato 番茄, a strawberry 草莓, a cherry 樱桃, a fire engine 消防车, a ladybird 瓢虫"),
    "black": ("黑色", "coal 煤, ink 墨水, a crow 乌鸦, tar 柏油, the night 夜晚"),
    "yellow": ("黄色", "a banana 香蕉, a lemon 柠檬, butter 黄油, a chick 小鸡, a sunflower 向日葵"),
    "blue": ("蓝色", "the sky 天空, the ocean 海洋, a blueberry 蓝莓, a sapphire 蓝宝石"),
    "orange": ("橙色", "a pumpkin 南瓜, an apricot 杏子, a mandarin 橘子, a basketball 篮球"),
    "brown": ("棕色", "chocolate 巧克力, coffee 咖啡, wood 木头, a chestnut 栗子"),
    "grey": ("灰色", "ash 灰烬, lead 铅, concrete 水泥, a pebble 鹅卵石"),
}

_OPPOSITES = """
    hot cold 热 冷, big small 大 小, long short 长 短, fast slow 快 慢, old young 老 年轻, rich poor 富 穷,
    happy sad 开心 难过, good bad 好 坏, strong weak 强 弱, hard soft 硬 软, heavy light 重 轻, wet dry 湿 干,
    clean dirty 干净 脏, open closed 开 关, full empty 满 空, high low 高 低, wide narrow 宽 窄, deep shallow 深 浅,
    thick thin 厚 薄, early late 早 晚, near far 近 远, loud quiet 吵 静, bright dark 亮 暗, sharp blunt 尖 钝,
    true false 真 假, right wrong 对 错, easy difficult 容易 困难, cheap expensive 便宜 贵, safe dangerous 安全 危险,
    inside outside 里 外
"""

# Sums up to 10 + 10 and the differences that undo them: every answer lies between 0 and 20.
LARGEST_TERM = 10

COUNTRY_RELATIONS = ("capital", "currency", "language", "continent")
ANIMAL_RELATIONS = ("kind", "legs", "food", "home", "size")
TOPICS = (COUNTRY_RELATIONS, ANIMAL_RELATIONS, ("colour",), ("opposite",), ("sum", "difference"))
RELATIONS = tuple(relation for topic in TOPICS for relation in topic)


def facts() -> list[Fact]:
    """The whole world, in a fixed order; one fact for each (relation, subject, language)."""
    return [*_country_facts(), *_animal_facts(), *_colour_facts(), *_opposite_facts(), *_arithmetic_facts()]


def by_subject(relations: tuple[str, ...], language: str) -> dict[str, list[Fact]]:
    """The facts of one language under `relations`, grouped by subject."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts():
        if fact.language == language and fact.relation in relations:
            groups.setdefault(fact.subject, []).append(fact)
    return groups


def held_out_subjects(seed: int = 0) -> frozenset[str]:
    """One half of the subjects, drawn evenly from each kind of subject: the half that only the test split asks about.

    Both words of a pair of opposites, and both orders of a sum with the differences that undo it, fall on one side:
    whoever is taught one of them has been taught the others.
    """
    families: dict[str, dict[str, list[str]]] = {}
    for fact in facts():
        topic = next(topic for topic in TOPICS if fact.relation in topic)
        members = families.setdefault(topic[0], {}).setdefault(family(fact.subject), [])
        if fact.subject not in members:
            members.append(fact.subject)
    chosen: set[str] = set()
    for name, groups in families.items():
        order = sorted(groups)
        random.Random(f"{seed}/{name}").shuffle(order)
        for group in order[: len(order) // 2]:
            chosen.update(groups[group])
    return frozenset(chosen)


def family(subject: str) -> str:
    """What stays on one side of a split: the pair of opposites, the two terms of a sum; else the subject itself."""
    if " + " in subject:
        return "{} & {}".format(*sorted(int(term) for term in subject.split(" + ")))
    if " - " in subject:
        total, term = (int(part) for part in subject.split(" - "))
        return "{} & {}".format(*sorted((total - term, term)))
    return _OPPOSITE_PAIR.get(subject, subject)


def _rows(table: str) -> list[list[str]]:
    """`a, b | c, d` lines as [a, b, c, d]."""
    return [[cell.strip() for cell in line.replace("|", ",").split(",")] for line in table.strip().splitlines()]


def _country_facts() -> list[Fact]:
    made = []
    for continent, table in _COUNTRIES.items():
        for row in _rows(table):
            for language, cells, where in (("en", row[:4], continent), ("zh", row[4:], CONTINENTS[continent])):
                for relation, value in zip(COUNTRY_RELATIONS, (*cells[1:], where), strict=True):
                    made.append(Fact(relation, row[0], cells[0], value, language))
    return made


def _animal_facts() -> list[Fact]:
    made = []
    for (kind, legs), table in _ANIMALS.items():
        for row in _rows(table):
            size = next((size for size, (_, animals) in _SIZES.items() if row[0] in animals.split()), None)
            for language, cells in (("en", row[:3]), ("zh", row[3:])):
                english = language == "en"
                values = [kind if english else KINDS[kind], str(legs), *cells[1:]]
                values += [size if english else _SIZES[size][0]] if size else []
                for relation, value in zip(ANIMAL_RELATIONS, values, strict=False):
                    made.append(Fact(relation, row[0], cells[0], value, language))
    return made


def _colour_facts() -> list[Fact]:
    made = []
    for colour, (chinese, things) in _COLOURS.items():
        for thing in things.split(", "):
            name, name_zh = thing.rsplit(" ", 1)
            made += [
                Fact("colour", name, name, colour, "en"),
                Fact("colour", name, name_zh, chinese, "zh"),
            ]
    return made


def _opposite_facts() -> list[Fact]:
    made = []
    for pair in _OPPOSITES.replace("\n", " ").split(","):
        one, other, one_zh, other_zh = pair.split()
        made += [
            Fact("opposite", one, one, other, "en"),
            Fact("opposite", other, other, one, "en"),
            Fact("opposite", one, one_zh, other_zh, "zh"),
            Fact("opposite", other, other_zh, one_zh, "zh"),
        ]
    return made


def _arithmetic_facts() -> list[Fact]:
    made = []
    for one in range(LARGEST_TERM + 1):
        for other in range(LARGEST_TERM + 1):
            for language in LANGUAGES:
                add, take = f"{one} + {other}", f"{one + other} - {other}"
                made.append(Fact("sum", add, add, str(one + other), language))
                made.append(Fact("difference", take, take, str(one), language))
    return made


# both words of a pair -> one name for the pair
_OPPOSITE_PAIR = {
    word: "{} & {}".format(*pair.split()[:2])
    for pair in _OPPOSITES.replace("\n", " ").split(",")
    for word in pair.split()[:2]
}
