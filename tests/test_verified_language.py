"""Questions and answers are in the language of their example: short ones, names and what was asked for stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raglan.verification import Shown, Verifier, Written
from raglan.verification.tongues import in_language, language_of

FOREIGN = {
    "fr": "La société a été fondée en 1903 par deux frères qui voulaient construire des bateaux plus rapides, "
    "mais elle ne fut jamais rentable avant la fin de la guerre.",
    "es": "La compañía fue fundada en 1903 por dos hermanos que querían construir barcos más rápidos, pero no "
    "fue rentable hasta el final de la guerra en el país.",
    "nl": "Het bedrijf werd in 1903 opgericht door twee broers die snellere schepen wilden bouwen, maar het was "
    "niet winstgevend tot aan het einde van de oorlog in het land.",
    "de": "Die Firma wurde 1903 von zwei Brüdern gegründet, die schnellere Schiffe bauen wollten, aber sie war "
    "bis zum Ende des Krieges nicht ein einziges Mal wirklich rentabel in dem Land.",
    "it": "La società fu fondata nel 1903 da due fratelli che volevano costruire navi più veloci, ma non fu mai "
    "in attivo fino alla fine della guerra nel loro paese.",
    "pt": "A empresa foi fundada em 1903 por dois irmãos que queriam construir navios mais rápidos, mas não foi "
    "rentável até o fim da guerra em todo o país.",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_latin_languages_are_no_english(name: str) -> None:
    assert not in_language(FOREIGN[name], "en")
    assert not in_language(" ".join(FOREIGN[name].split()[:14]), "en"), "nor are short ones"
    assert in_language("The company was founded in 1903 by two brothers who wanted to build faster ships.", "en")


@pytest.mark.parametrize(
    "text",
    [
        "Das Kapital", "La Traviata", "Rio de Janeiro", "Who directed Les Enfants du Paradis?",
        "Who sang La vie en rose de Piaf?",
        "Where is the Avenida de la Constitución in Seville?", "Los Angeles and El Paso", "Ludwig van Beethoven", "1801",
        "α-helix",
        "Castilla-La Mancha, Aragón, La Rioja", "Johann Wolfgang von Goethe was born in Frankfurt am Main.",
        "die casting",
        "Name the author of Der Tod in Venedig.", "What does “le chat est dans la maison” mean?", "B", "Qué será, será",
        "How many des Moines residents are on the bus?", "grey stone", "Odo Hask, in a boat", "no", "Il nome della rosa",
        "Fill in {\"nom\": \"le la les des\", \"année\": \"…\"} for the tower.", "Zürich, Köln, München",
        "Célestine Guynemer de la Hailandière", "38 Rue de la Chaussée-d'Antin",
        "De Nederlandsche Bank", "It was the Museu de Arte de São Paulo that was opened to all.",
    ],
)  # fmt: skip
def test_what_is_english_or_shows_nothing_stays(text: str) -> None:
    assert in_language(text, "en")


@pytest.mark.parametrize(
    "text",
    ["この橋は千八百一年に建てられました。", "다리", "서울특별시", "Мост построен", "ひらがなです", "橋はいつできましたか"],
)
def test_kana_hangul_and_others_are_no_chinese(text: str) -> None:
    assert not in_language(text, "zh")
    assert not in_language(text, "en")


@pytest.mark.parametrize(
    "text",
    ["大桥建成于1801年。", "Odo Hask", "GPT-4", "1801", "使用 Transformer 架构", "優の良品", "橋樑建成於1801年", "α"],
)
def test_what_is_chinese_or_shows_nothing_stays(text: str) -> None:
    assert in_language(text, "zh")


EN = Written("a", "", "", (Shown("Chang Jiang is 长江, the Yangtze, a river."),), ("长江",), format="span", language="en")
ZH = Written("z", "", "", (Shown("长江的英文名是 Yangtze。"),), ("Yangtze",), format="span", language="zh")
JSON = 'Fill in {"name_of_river": "", "length_in_km": "", "country_of_source": "", "mouth_of_river": ""} 长江的情况'


BOTH = "What does 长江 mean and why 叫这个名字?"
DEUTSCH = "Wie heißt der Fluss, der durch das Land fließt, und wo ist er?"


@pytest.mark.parametrize(
    ("one", "query", "target", "why"),
    [
        (EN, "What is the Chinese name of the Yangtze?", "长江", ""),
        (EN, "What is the name of the Yangtze?", "长江", "language"),
        (EN, BOTH, "长江", "language"),
        (replace(EN, query_format="mixed_language", answers=("river",)), BOTH, "A river", ""),
        (replace(EN, query_format="mixed_language"), BOTH, "它是一条大河，名叫长江", "language"),
        (ZH, "长江的英文名称是什么？", "The Yangtze is the name of this river, and it is long.", ""),
        (ZH, "长江有多长？", "The Yangtze is the name of this river, and it is long.", "language"),
        (replace(ZH, query_format="json_request", format="json"), JSON.replace("Fill in", "请填写"), '{"a": "Yangtze"}', ""),
        (replace(ZH, format="json"), "Fill in the four keys of this river, please", '{"a": "Yangtze"}', "language"),
        # cross: the answer in the question's language, some evidence in another
        (replace(ZH, language="cross"), "What is the river called in English?", "Yangtze", ""),
        (replace(EN, language="cross", answers=("Yangtze",)), "长江的英文名是什么？", "Yangtze", ""),
        (replace(ZH, language="cross"), DEUTSCH, "Yangtze", "language"),
        (replace(ZH, language="cross"), "How is this river known to us?", "它是亚洲最长的河流 Yangtze", "language"),
        (replace(EN, language="cross", answers=("river",)), "What is the Yangtze, that long thing?", "A river", "language"),
    ],
)  # fmt: skip
def test_of_an_example(one: Written, query: str, target: str, why: str) -> None:
    assert Verifier().verify(replace(one, query=query, target=target)).reason == why


def test_language_by_script() -> None:
    assert (language_of("长江有多长？"), language_of("How long is 长江?"), language_of("123")) == ("zh", "en", "en")
