"""An invented federation at two times, for the knowledge-swap experiment: who holds which office, in 1876 and in 1878.

    python benchmarks/offices.py build/offices        (seeded; the same files every time, standard library only)

    build/offices/
        school/corpus.jsonl     places, people and offices that are only for training
        before/corpus.jsonl     the same and the offices that are asked about, in 1876
        after/corpus.jsonl      the same in 1878: three offices in four have another holder, who is then the predecessor's heir
        train.jsonl             questions about school, and about nothing else
        before.jsonl after.jsonl   "Who is {position}?" for each office that changed hands, with the answer of each time
        unchanged.jsonl         the same for the offices that did not

Nothing can be guessed: every name is put together from syllables by a seeded draw, no surname occurs twice, and an article
names two to four people of whom one holds the office. Articles of `after` name the former holder, articles of `before`
often the deputy who comes next, and half of the people have an article of their own that says what they are or were. Of the
twenty wordings that tell who holds an office asked about, eight are those of no article of school.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SEED = 1876
ASKED, KEPT, TAUGHT = 150, 40, 190  # offices asked about, of them unchanged, offices of school


def _words(text: str, between: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(between))


FIRST = _words(
    "Aldis Anneke Arvo Bera Brannoc Brisa Caspia Corin Dagny Delwyn Dorrit Edda Elisaf Emrick Estrid Fenna Folke Gerda Gisli "
    "Halla Hester Idony Ingram Isaura Jorun Jory Kelda Kester Leopoldine Lisbet Lucan Maren Merrick Mirabel Nesta Oddny Olwen "
    "Orla Osric Pernille Petroc Quilla Ragna Rodric Runa Sabine Sigrun Silvan Solveig Tamsin Teodor Thora Torben Ulrika Valdis "
    "Verity Wenna Wystan Yrsa Zelma"
)
MEN = _words(
    "Aldis Arvo Brannoc Corin Delwyn Elisaf Emrick Folke Gisli Ingram Jory Kester Lucan Merrick Osric Petroc Rodric Silvan "
    "Teodor Torben Wystan"
)
HEADS = _words("B Br C Cr D Dr F G Gr H K Kr L M N P Pr Qu R S Sk St T Tr V W Wr Z")
HEARTS = _words("a e i o u al an ar el en er il in ol on or ul un ei ou")
TAILS = _words(
    "bray bury croft dane fell gast grave holt kell lick lund mark ness quist rane rick sen shaw stead thorn vane wick wold"
)
TOWN_HEADS = _words("Ask Bral Carn Dom El Fal Gor Har Ing Jut Kol Lum Mar Nor Os Pell Quar Rav Sund Tor Ull Var Wes Yar Zin")
TOWN_TAILS = _words("berg borg by dal ford ham havn holm ia mar mouth sund stad vik wyn")
LANDS = _words("Ulveland Sarmark Ostravia Kelmoria Thessany Brandmark Loravia Winmark Jorvania")
TITLES = {"w": ("Dame", "Doctor", "Captain"), "m": ("Master", "Doctor", "Captain")}
JOBS = _words("brewer surveyor schoolteacher tanner notary printer grocer cooper clockmaker bookbinder")
MATTERS = ("the price of coal", "a leaking roof", "the colour of the uniforms", "three missing ledgers", "the new tariff")

TOWN_OFFICES = {
    "harbour master of {}": "assigns the berths, collects the anchorage and keeps the tide book",
    "mayor of {}": "opens the market, heads the town council and wears a chain of silver shells",
    "town clerk of {}": "keeps the rolls of births and deeds and reads the notices aloud",
    "head of the {} Mint": "answers for the weight of every coin that is struck in the town",
    "keeper of the {} Light": "trims the lamp, winds the clockwork and counts the passing ships",
    "editor of the {} Courier": "decides what the newspaper prints and answers its angry letters",
    "abbot of {}": "rules the abbey, its orchards and its forty brothers",
    "rector of the University of {}": "confers the degrees and settles quarrels between the faculties",
    "director of the {} Opera": "chooses the season's pieces and engages the singers",
    "curator of the {} Museum": "cares for the collections and buys what is offered",
    "stationmaster of {} Junction": "sets the clocks and sends off the trains",
    "chief engineer of the {} Canal": "sees to the locks, the sluices and the towpath",
    "warden of {} Bridge": "collects the toll and closes the gates in a storm",
    "fire marshal of {}": "commands the engines and inspects the chimneys",
    "physician of {} Hospital": "leads the wards and examines the nurses",
    "coxswain of the {} Lifeboat": "steers the boat when a ship is in distress",
    "choirmaster of {} Cathedral": "rehearses the boys and the men, and looks after the organ",
    "president of the {} Chess Club": "draws up the tournament and keeps the silver king",
}
LAND_OFFICES = {
    "Prime Minister of {}": "forms the cabinet and speaks for it in the assembly",
    "Minister of Fisheries of {}": "grants the licences and fixes the season for herring",
    "Minister of Roads of {}": "plans the highways and pays the menders",
    "Governor of the Bank of {}": "signs the notes and sets the rate of discount",
    "Chief Justice of {}": "presides over the high court and swears in the judges",
    "Speaker of the Assembly of {}": "calls the members to order and counts their votes",
    "Admiral of the Fleet of {}": "commands the ships and the coastal forts",
    "head of the Weather Service of {}": "publishes the forecast and the warnings of gales",
    "Surveyor General of {}": "measures the borders and prints the maps",
    "Postmaster General of {}": "issues the stamps and runs the mail coaches",
}

# Who holds the office. School has the first wordings alone, the offices asked about have both, so that reading what is worded
# as it was taught and reading what is not can be told apart.
SCHOOL_WORDINGS = (
    "The {position} is {name}, who took over from {former} in {since}. {deputy} assists {him}.",
    "Since {since} the post has been held by {name}. Before {him} came {former}, who served for {years} years.",
    "{former} gave up the post in {since}; {name} was chosen instead and still serves. The deputy is {deputy}.",
    "{name} was sworn in as {position} in {since} and succeeded {former}. {He} had been a {job}.",
    "After the death of {former} in {since} the council called {name}, who remains to this day.",
    "The present holder, {name}, was a {job} before the appointment in {since}. {His} predecessor was {former}.",
    "Today {name} does the work, with {deputy} as second. The previous holder, {former}, retired in {since}.",
    "Holders: {older} ({begun}–{middle}), {former} ({middle}–{since}), {name} (since {since}).",
    "From {middle} to {since} it was {former}; the choice then fell on {name}, and {deputy} was made deputy.",
    "In {since} {name} defeated {deputy} by {votes} votes and became {position}. {former} had not stood again.",
    "The last {position}, {former}, was dismissed in {since}. {title} {surname}, as everybody calls {name}, came "
    "next and stayed.",
    "{deputy} is the deputy of {name}, the current {position}. Until {since} the place was {former}'s.",
)
OTHER_WORDINGS = (
    "The incumbent is {name}, appointed in {since} when {former} moved abroad. {deputy} is next in rank.",
    "{former} resigned in {since} after a quarrel over {matter}. {name} was named to the vacancy and has filled it ever since.",
    "It is {name} who signs the papers nowadays; {deputy} stands in when {he} travels. {former} signed them until {since}.",
    "At the election of {since} {name} won {votes} votes against {deputy}'s {fewer}, and the seal passed to {him} "
    "from {former}.",
    "The line runs from {older}, installed in {begun}, through {former}, installed in {middle}, to {name}, installed "
    "in {since}.",
    "{name} has been in charge since the spring of {since}. Under {former}, who went before, the office was {years} "
    "men strong.",
    "When the term of {former} ended in {since}, nobody wanted the work but {name}, and so it has stayed.",
    "{name}, once a {job}, took the oath in {since}. {title} {surname} is as strict as {former} had been mild; "
    "{deputy} helps {him}.",
)
WORDINGS = SCHOOL_WORDINGS + OTHER_WORDINGS
FACTS = (
    "The office was created in {founded}.",
    "It is housed in the {building}, a building of {floors} floors.",
    "The salary is {pay} crowns a year.",
    "By custom a {gift} is handed over with the seal.",
    "The archive holds {ledgers} ledgers bound in {binding}.",
)
BUILDINGS = _words(
    "Old Customs House;Tern Tower;Blue Hall;Weavers' Court;Lantern House;Guildhall;Mint Yard;Swan Gallery;Corn Exchange;"
    "Almoner's Lodge", ";",
)  # fmt: skip
GIFTS = _words(
    "pewter spoon;lump of amber;pair of white gloves;whistle of bone;jar of honey;brass compass;loaf of rye;red umbrella", ";"
)
BINDINGS = _words("sealskin;green linen;oak boards;grey calf;sailcloth", ";")
GOODS = _words("smoked eel;slate;blue glass;rope;pear brandy;felt hats;barometers;oatcakes;violins;salt", ";")


@dataclass(frozen=True)
class Person:
    """Somebody. `title` goes before the surname."""

    name: str
    title: str
    job: str

    @property
    def surname(self) -> str:
        return self.name.split()[-1]

    @property
    def words(self) -> dict[str, str]:
        """The pronouns."""
        man = self.name.split()[0] in MEN
        he, him, his = ("he", "him", "his") if man else ("she", "her", "her")
        return {"he": he, "him": him, "his": his, "He": he.title(), "His": his.title()}


@dataclass(frozen=True)
class Office:
    """An office as one time sees it. `wording` tells who holds it, `facts` the rest."""

    position: str
    duty: str
    wording: str
    facts: tuple[str, ...]
    holder: Person
    former: Person
    older: Person
    deputy: Person
    since: int
    begun: int
    values: dict[str, int | str]

    @property
    def id(self) -> str:
        return "-".join(self.position.lower().split())

    @property
    def told(self) -> str:
        """The sentences that say who holds it."""
        return self.wording.format(
            position=self.position, name=self.holder.name, title=self.holder.title, surname=self.holder.surname,
            former=self.former.name, older=self.older.name, deputy=self.deputy.name, job=self.holder.job, since=self.since,
            **{**self.values, "middle": self.begun, "begun": self.begun - 12}, **self.holder.words,
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """What answers "Who is …?": the name, and title and surname where the article says so."""
        short = f"{self.holder.title} {self.holder.surname}"
        return [self.holder.name, *([short] if short in self.told else [])]

    @property
    def article(self) -> dict[str, str]:
        position = self.position[0].upper() + self.position[1:]
        facts = [fact.format(**self.values) for fact in self.facts]
        body = [f"The {self.position} {self.duty}.", *facts]
        body.insert(int(self.values["place"]), self.told)
        return {"id": self.id, "title": position, "text": " ".join(body)}


class World:
    """Draws names, people and offices; no surname and no place twice."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        surnames = [f"{head}{heart}{tail}" for head in HEADS for heart in HEARTS for tail in TAILS]
        self.surnames = iter(self.random.sample(surnames, len(surnames)))
        towns = [f"{head}{tail}" for head in TOWN_HEADS for tail in TOWN_TAILS]
        self.towns = self.random.sample(towns, 60)

    def person(self) -> Person:
        first = self.random.choice(FIRST)
        title = self.random.choice(TITLES["m" if first in MEN else "w"])
        return Person(f"{first} {next(self.surnames)}", title, self.random.choice(JOBS))

    def offices(self, towns: Sequence[str], lands: Sequence[str], wordings: Sequence[str], count: int) -> list[Office]:
        """`count` offices: all that the lands have, and some of the towns'."""
        posts = [(post.format(town), duty) for post, duty in TOWN_OFFICES.items() for town in towns]
        posts = self.random.sample(posts, count - len(lands) * len(LAND_OFFICES))
        posts += [(post.format(land), duty) for post, duty in LAND_OFFICES.items() for land in lands]
        return [self.office(position, duty, wordings) for position, duty in posts]

    def office(self, position: str, duty: str, wordings: Sequence[str]) -> Office:
        draw = self.random
        facts = tuple(draw.sample(FACTS, draw.randint(2, 4)))
        votes = draw.randint(40, 400)
        values: dict[str, int | str] = {
            "founded": draw.randint(1610, 1830), "building": draw.choice(BUILDINGS), "floors": draw.randint(2, 9),
            "pay": draw.randint(12, 98) * 10, "gift": draw.choice(GIFTS), "ledgers": draw.randint(31, 940),
            "binding": draw.choice(BINDINGS), "matter": draw.choice(MATTERS), "years": draw.randint(3, 19), "votes": votes,
            "fewer": votes - draw.randint(1, 39), "place": draw.randint(0, len(facts) + 1),
        }  # fmt: skip
        people = [self.person() for _ in range(4)]
        since = draw.randint(1858, 1875)
        begun = since - draw.randint(3, 12)
        return Office(position, duty, draw.choice(wordings), facts, *people, since, begun, values)

    def succeeded(self, office: Office) -> Office:
        """The office two years later in other hands: the deputy's, one time in three."""
        heir = office.deputy if self.random.random() < 1 / 3 else self.person()
        deputy = self.person() if heir == office.deputy else office.deputy
        return replace(
            office, holder=heir, former=office.holder, older=office.former, deputy=deputy,
            since=self.random.choice((1877, 1878)), begun=office.since, wording=self.random.choice(WORDINGS),
        )  # fmt: skip


def place_article(name: str, posts: list[str], draw: random.Random) -> dict[str, str]:
    """A place: its people, its goods and which offices it has, but not who holds them."""
    text = (
        f"{name} lives by {' and '.join(draw.sample(GOODS, 2))} and was granted its charter in {draw.randint(1300, 1650)}. "
        f"At the last count it had {draw.randint(3, 90) * 100} inhabitants and {draw.randint(2, 40)} inns. "
        f"Visitors ask for the {draw.choice(BUILDINGS)}."
    )
    if posts:
        text += f" The {' and the '.join(posts[:3])} have their seats here."
    return {"id": f"place-{name.lower()}", "title": name, "text": text}


def person_article(person: Person, office: Office, draw: random.Random) -> dict[str, str]:
    """A life. A holder `has been`, a predecessor `was`: the name stands beside the office either way."""
    born = draw.randint(1796, 1826)
    if person == office.holder:
        post = f"has been {office.position} since {office.since}"
    else:
        post = f"was {office.position} from {office.begun} to {office.since}"
    text = (
        f"{person.name}, born in {born}, trained as a {person.job} and {post}. {person.words['His']} collection of "
        f"{draw.choice(GOODS)} was shown in {draw.randint(1850, 1875)}, and {person.words['he']} owns "
        f"{draw.randint(2, 30)} dogs."
    )
    return {"id": "-".join(["person", *person.name.lower().split()]), "title": person.name, "text": text}


def lives(offices: list[Office], seed: int) -> list[dict[str, str]]:
    """Half of the holders and of the former ones have articles; the same people at either time."""
    found = []
    for office in offices:
        for person in (office.holder, office.former):
            draw = random.Random(f"{seed} {person.name}")
            if draw.random() < 0.5:
                found.append(person_article(person, office, draw))
    return found


def taught(office: Office) -> Iterator[dict[str, object]]:
    """Training questions about one office of school: who holds it, and what else its article says."""
    asked = {"who": (f"Who is {office.position}?", office.names)}
    if office.former.name in office.told:
        asked["former"] = (f"Who was {office.position} before {office.holder.name}?", [office.former.name])
    if office.deputy.name in office.told and "deputy" in office.told.lower():
        asked["deputy"] = (f"Who is the deputy of the {office.position}?", [office.deputy.name])
    if any("{founded}" in fact for fact in office.facts):
        asked["founded"] = (f"When was the office of {office.position} created?", [str(office.values["founded"])])
    if any("{building}" in fact for fact in office.facts):
        asked["house"] = (f"In which building is the {office.position} housed?", [str(office.values["building"])])
    for kind, (query, answers) in asked.items():
        yield {"id": f"{office.id}-{kind}", "query": query, "answers": answers, "relevant": [office.id]}


def question(office: Office) -> dict[str, object]:
    """The test question, with the kind of wording that answers it."""
    wording = "taught" if office.wording in SCHOOL_WORDINGS else "new"
    query = f"Who is {office.position}?"
    return {"id": office.id, "query": query, "answers": office.names, "relevant": [office.id], "wording": wording}


def make(seed: int = SEED) -> dict[str, list[dict[str, object]]]:
    """Every file's rows, by the file's name."""
    world = World(seed)
    towns, lands = world.towns, LANDS
    school = world.offices(towns[:30], lands[:4], SCHOOL_WORDINGS, TAUGHT)
    before = world.offices(towns[30:], lands[4:], WORDINGS, ASKED)
    world.random.shuffle(before)
    kept, changed = before[:KEPT], before[KEPT:]
    heirs = [world.succeeded(office) for office in changed]

    def articles(offices: list[Office], places: list[str]) -> list[dict[str, object]]:
        posts = {place: [o.position for o in offices if place in o.position.split()] for place in places}
        about = [place_article(place, posts[place], random.Random(f"{seed} {place}")) for place in places]
        return [*about, *(office.article for office in offices), *lives(offices, seed)]

    lesson = articles(school, [*towns[:30], *lands[:4]])
    others = [*towns[30:], *lands[4:]]
    return {
        "school/corpus.jsonl": lesson,
        "before/corpus.jsonl": lesson + articles([*kept, *changed], others),
        "after/corpus.jsonl": lesson + articles([*kept, *heirs], others),
        "train.jsonl": [row for office in school for row in taught(office)],
        "before.jsonl": [question(office) for office in changed],
        "after.jsonl": [question(office) for office in heirs],
        "unchanged.jsonl": [question(office) for office in kept],
    }


def write(folder: Path, *, seed: int = SEED) -> None:
    """Write everything below `folder`."""
    for name, rows in make(seed).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
