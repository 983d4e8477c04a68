"""The demo model's grammar: small tables, questions, and the one right answer in each voice.

A request is a table and a question. Its canonical form is its kind and what it names: the phrasing
and the rows are left out. A fixed share of the canonical forms is held out, and no training text of
any sort is made from those, so that a held-out request never equals a training one in other words.
A form always combines two words (one key alone is joined by the table's name): combinations are
held out, words are not.
Standard library only; `demo_train.py` draws from here, tests judge it (SQLite runs the SQL).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from demo_lexicon import (
    ANIMALS,
    CITIES,
    COLOURS,
    FESTIVALS,
    FRUITS,
    MONTHS,
    NAMES,
    capital,
    de,
    le,
    listed,
    un,
    with_article,
)

Value = str | int
Row = Mapping[str, Value]  # role -> value
Form = tuple[Value, ...]  # a canonical form within its kind

VOICES = ("base", "sql", "json", "french")
HELD_OUT_SHARE = 8  # one canonical form in so many, at least one per kind


@dataclass(frozen=True)
class Theme:
    """A sort of table: its roles in column order, the words a role is printed as, its values."""

    tables: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Sequence[Value]]
    unique: tuple[str, ...]  # no two rows agree on all of these roles


@dataclass(frozen=True)
class Table:
    theme: str
    name: str
    columns: Mapping[str, str]  # role -> printed name, in column order
    rows: tuple[Row, ...]

    def text(self) -> str:
        """A heading and a list. Every word follows a space, so that it is the same token in the
        table, in a question and inside an answer: rows are found by equal tokens."""
        rows = [", ".join(str(row[role]) for role in self.columns) for row in self.rows]
        return "\n".join(
            [f"{self.name}: {', '.join(self.columns.values())}", *map("- {}".format, rows)]
        )


@dataclass(frozen=True)
class Kind:
    """One sort of question.

    `shape` says how rows become an answer: "one" row, "all" rows, the "best" row by `order`, or
    their "count". `picks` are the roles answered. The two sentences take (keys, rows that answer).
    """

    theme: str
    keys: tuple[str, ...]
    shape: str
    picks: tuple[str, ...]
    phrasings: tuple[str, ...]
    english: Callable[[Row, Sequence[Row]], str]
    french: Callable[[Row, Sequence[Row]], str]
    order: tuple[str, bool] = ("", False)  # role, largest first

    @property
    def weight(self) -> int:
        """How often it is drawn for training: what takes longer to learn comes more often."""
        return {"one": len(self.picks), "count": 1, "all": 2, "best": 3}[self.shape]


@dataclass(frozen=True)
class Request:
    """One question about one table. `canonical` is what training and held-out must not share."""

    kind: str
    keys: tuple[Value, ...]
    phrasing: int
    table: Table

    @property
    def canonical(self) -> tuple[str, Form]:
        return self.kind, form_of(self.kind, self.table.name, self.keys)

    @property
    def question(self) -> str:
        kind = KINDS[self.kind]
        words = _surface(dict(zip(kind.keys, self.keys, strict=True)))
        return kind.phrasings[self.phrasing].format(**words)

    @property
    def text(self) -> str:
        return f"{self.table.text()}\n{self.question}"


# ---- themes ----

THEMES = {
    "market": Theme(
        tables=("market", "shop", "stall"),
        columns={
            "city": ("city", "town"),
            "fruit": ("fruit",),
            "colour": ("colour",),
            "stock": ("stock", "units"),
            "price": ("price", "cost"),
        },
        values={
            "city": tuple(CITIES),
            "fruit": tuple(FRUITS),
            "colour": ("brown", "golden", "green", "pink", "purple", "red", "yellow"),
            "stock": tuple(range(0, 31)),
            "price": tuple(range(1, 16)),
        },
        unique=("city", "fruit"),
    ),
    "pets": Theme(
        tables=("pets", "friends", "animals"),
        columns={
            "name": ("name",),
            "animal": ("animal", "species"),
            "colour": ("colour",),
            "age": ("age", "years"),
        },
        values={
            "name": NAMES,
            "animal": tuple(ANIMALS),
            "colour": ("black", "brown", "golden", "grey", "red", "white"),
            "age": tuple(range(1, 21)),
        },
        unique=("name",),
    ),
    "festivals": Theme(
        tables=("festivals", "events", "calendar"),
        columns={
            "city": ("city", "town"),
            "festival": ("festival", "topic"),
            "month": ("month",),
            "days": ("days", "length"),
        },
        values={
            "city": tuple(CITIES),
            "festival": tuple(FESTIVALS),
            "month": tuple(MONTHS),
            "days": tuple(range(1, 16)),
        },
        unique=("city", "festival"),
    ),
}


def _surface(keys: Row) -> dict[str, str]:
    """The words a phrasing may use for these keys."""
    words = {role: str(value) for role, value in keys.items()}
    for role in ("fruit", "animal", "festival"):
        if role in words:
            words[f"a_{role}"] = with_article(words[role])
    for role, nouns in (("fruit", FRUITS), ("animal", ANIMALS)):
        if role in words:
            words[f"{role}s"] = nouns[words[role]].many
    return words


# ---- sentences ----


def _fruit(keys: Row) -> tuple[str, bool]:
    noun = FRUITS[str(keys["fruit"])]
    return noun.french_many, noun.feminine


def _there_are(n: int, one: str, many: str) -> str:
    if n == 0:
        return f"There are no {many}"
    return f"There is 1 {one}" if n == 1 else f"There are {n} {many}"


def _il_y_a(n: int, one: str, many: str) -> str:
    if n == 0:
        return f"Il n'y a pas {de(many)}"
    return f"Il y a 1 {one}" if n == 1 else f"Il y a {n} {many}"


def _stock_english(k: Row, rows: Sequence[Row]) -> str:
    noun = FRUITS[str(k["fruit"])]
    return f"{_there_are(int(rows[0]['stock']), noun.one, noun.many)} in {k['city']}."


def _stock_french(k: Row, rows: Sequence[Row]) -> str:
    noun = FRUITS[str(k["fruit"])]
    there = _il_y_a(int(rows[0]["stock"]), noun.french_one, noun.french_many)
    return f"{there} à {CITIES[str(k['city'])]}."


def _units(n: Value, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


def _price_english(k: Row, rows: Sequence[Row]) -> str:
    noun = capital(with_article(str(k["fruit"])))
    return f"{noun} costs {_units(rows[0]['price'], 'euro')} in {k['city']}."


def _price_french(k: Row, rows: Sequence[Row]) -> str:
    noun = capital(un(FRUITS[str(k["fruit"])]))
    return f"{noun} coûte {_units(rows[0]['price'], 'euro')} à {CITIES[str(k['city'])]}."


def _colour_english(k: Row, rows: Sequence[Row]) -> str:
    return f"The {FRUITS[str(k['fruit'])].many} in {k['city']} are {rows[0]['colour']}."


def _colour_french(k: Row, rows: Sequence[Row]) -> str:
    fruits, feminine = _fruit(k)
    colour = COLOURS[str(rows[0]["colour"])].agree(feminine, plural=True)
    return f"Les {fruits} {de(CITIES[str(k['city'])])} sont {colour}."


def _sold_english(k: Row, rows: Sequence[Row]) -> str:
    return f"{k['city']} sells {listed([FRUITS[str(r['fruit'])].many for r in rows], 'and')}."


def _sold_french(k: Row, rows: Sequence[Row]) -> str:
    fruits = listed([f"des {_fruit(r)[0]}" for r in rows], "et")
    return f"{CITIES[str(k['city'])]} vend {fruits}."


def _cheapest_english(k: Row, rows: Sequence[Row]) -> str:
    return f"The cheapest {FRUITS[str(k['fruit'])].many} are in {rows[0]['city']}."


def _cheapest_french(k: Row, rows: Sequence[Row]) -> str:
    fruits, feminine = _fruit(k)
    dear = "chères" if feminine else "chers"
    return f"Les {fruits} sont les moins {dear} à {CITIES[str(rows[0]['city'])]}."


def _age_english(k: Row, rows: Sequence[Row]) -> str:
    return f"{k['name']} is {_units(rows[0]['age'], 'year')} old."


def _age_french(k: Row, rows: Sequence[Row]) -> str:
    return f"{k['name']} a {_units(rows[0]['age'], 'an')}."


def _are_english(animal: Value, colour: Value, rows: Sequence[Row]) -> str:
    names = listed([str(r["name"]) for r in rows], "and")
    if len(rows) == 1:
        return f"{names} is {with_article(f'{colour} {animal}')}."
    return f"{names} are {colour} {ANIMALS[str(animal)].many}."


def _are_french(animal: Value, colour: Value, rows: Sequence[Row]) -> str:
    names = listed([str(r["name"]) for r in rows], "et")
    noun = ANIMALS[str(animal)]
    shade = COLOURS[str(colour)].agree(noun.feminine, plural=len(rows) > 1)
    if len(rows) == 1:
        return f"{names} est {un(noun)} {shade}."
    return f"{names} sont des {noun.french_many} {shade}."


def _oldest_english(k: Row, rows: Sequence[Row]) -> str:
    return f"{rows[0]['name']} is the oldest {k['animal']}."


def _oldest_french(k: Row, rows: Sequence[Row]) -> str:
    noun = ANIMALS[str(k["animal"])]
    most = "la plus âgée" if noun.feminine else "le plus âgé"
    return f"{rows[0]['name']} est {le(noun)} {most}."


def _youngest_english(k: Row, rows: Sequence[Row]) -> str:
    return f"{rows[0]['name']} is the youngest {k['animal']}."


def _youngest_french(k: Row, rows: Sequence[Row]) -> str:
    noun = ANIMALS[str(k["animal"])]
    return f"{rows[0]['name']} est {le(noun)} {'la' if noun.feminine else 'le'} plus jeune."


def _count_english(k: Row, rows: Sequence[Row]) -> str:
    return f"{_there_are(len(rows), str(k['animal']), ANIMALS[str(k['animal'])].many)}."


def _count_french(k: Row, rows: Sequence[Row]) -> str:
    noun = ANIMALS[str(k["animal"])]
    return f"{_il_y_a(len(rows), noun.french_one, noun.french_many)}."


def _festival_french(row: Row) -> str:
    return f"festival {de(FESTIVALS[str(row['festival'])])}"


def _when_english(k: Row, rows: Sequence[Row]) -> str:
    return f"The {k['festival']} festival in {k['city']} is in {rows[0]['month']}."


def _when_french(k: Row, rows: Sequence[Row]) -> str:
    where = de(CITIES[str(k["city"])])
    return f"Le {_festival_french(k)} {where} est en {MONTHS[str(rows[0]['month'])]}."


def _length_english(k: Row, rows: Sequence[Row]) -> str:
    lasts = _units(rows[0]["days"], "day")
    return f"The {k['festival']} festival in {k['city']} lasts {lasts}."


def _length_french(k: Row, rows: Sequence[Row]) -> str:
    where = de(CITIES[str(k["city"])])
    return f"Le {_festival_french(k)} {where} dure {_units(rows[0]['days'], 'jour')}."


def _where_english(k: Row, rows: Sequence[Row]) -> str:
    cities = listed([str(r["city"]) for r in rows], "and")
    have = "has" if len(rows) == 1 else "have"
    return f"{cities} {have} {with_article(str(k['festival']))} festival in {k['month']}."


def _where_french(k: Row, rows: Sequence[Row]) -> str:
    cities = listed([CITIES[str(r["city"])] for r in rows], "et")
    have = "a" if len(rows) == 1 else "ont"
    return f"{cities} {have} un {_festival_french(k)} en {MONTHS[str(k['month'])]}."


def _longest_english(k: Row, rows: Sequence[Row]) -> str:
    return f"The {rows[0]['festival']} festival is the longest in {k['city']}."


def _longest_french(k: Row, rows: Sequence[Row]) -> str:
    return f"À {CITIES[str(k['city'])]}, le {_festival_french(rows[0])} est le plus long."


# ---- kinds ----

KINDS = {
    "stock": Kind(
        "market", ("city", "fruit"), "one", ("stock",),
        ("How many {fruits} are there in {city}?", "How many {fruits} does {city} have?",
         "Count the {fruits} in {city}."),
        _stock_english, _stock_french,
    ),
    "price": Kind(
        "market", ("city", "fruit"), "one", ("price",),
        ("How much is {a_fruit} in {city}?", "What does {a_fruit} cost in {city}?",
         "Tell me the price of {a_fruit} in {city}."),
        _price_english, _price_french,
    ),
    "colour": Kind(
        "market", ("city", "fruit"), "one", ("colour",),
        ("What colour are the {fruits} in {city}?", "Which colour do the {fruits} in {city} have?"),
        _colour_english, _colour_french,
    ),
    "sold": Kind(
        "market", ("city",), "all", ("fruit",),
        ("Which fruits are sold in {city}?", "What fruit can I buy in {city}?",
         "List the fruits in {city}."),
        _sold_english, _sold_french,
    ),
    "cheapest": Kind(
        "market", ("fruit",), "best", ("city",),
        ("Where are {fruits} cheapest?", "Which city has the cheapest {fruits}?"),
        _cheapest_english, _cheapest_french, ("price", False),
    ),
    "age": Kind(
        "pets", ("name",), "one", ("age",),
        ("How old is {name}?", "Tell me the age of {name}.", "What age is {name}?"),
        _age_english, _age_french,
    ),
    "who": Kind(
        "pets", ("name",), "one", ("animal", "colour"),
        ("Who is {name}?", "What is {name}?", "Describe {name}."),
        lambda k, rows: _are_english(rows[0]["animal"], rows[0]["colour"], rows),
        lambda k, rows: _are_french(rows[0]["animal"], rows[0]["colour"], rows),
    ),
    "which": Kind(
        "pets", ("animal", "colour"), "all", ("name",),
        ("Which {animals} are {colour}?", "Name the {colour} {animals}.",
         "Who are the {colour} {animals}?"),
        lambda k, rows: _are_english(k["animal"], k["colour"], rows),
        lambda k, rows: _are_french(k["animal"], k["colour"], rows),
    ),
    "oldest": Kind(
        "pets", ("animal",), "best", ("name",),
        ("Which {animal} is the oldest?", "Who is the oldest {animal}?"),
        _oldest_english, _oldest_french, ("age", True),
    ),
    "youngest": Kind(
        "pets", ("animal",), "best", ("name",),
        ("Which {animal} is the youngest?", "Who is the youngest {animal}?"),
        _youngest_english, _youngest_french, ("age", False),
    ),
    "count": Kind(
        "pets", ("animal",), "count", (),
        ("How many {animals} are there?", "Count the {animals}."),
        _count_english, _count_french,
    ),
    "when": Kind(
        "festivals", ("city", "festival"), "one", ("month",),
        ("When is the {festival} festival in {city}?",
         "In which month is the {festival} festival in {city}?"),
        _when_english, _when_french,
    ),
    "length": Kind(
        "festivals", ("city", "festival"), "one", ("days",),
        ("How long is the {festival} festival in {city}?",
         "How many days does the {festival} festival in {city} last?"),
        _length_english, _length_french,
    ),
    "where": Kind(
        "festivals", ("festival", "month"), "all", ("city",),
        ("Which cities have {a_festival} festival in {month}?",
         "Where is there {a_festival} festival in {month}?"),
        _where_english, _where_french,
    ),
    "longest": Kind(
        "festivals", ("city",), "best", ("festival",),
        ("Which festival is the longest in {city}?", "What is the longest festival in {city}?"),
        _longest_english, _longest_french, ("days", True),
    ),
}  # fmt: skip


# ---- canonical forms ----


def form_of(kind: str, table_name: str, keys: tuple[Value, ...]) -> Form:
    return keys if len(keys) > 1 else (table_name, *keys)


def all_keys(kind: str) -> list[tuple[Value, ...]]:
    values = THEMES[KINDS[kind].theme].values
    return list(itertools.product(*(values[role] for role in KINDS[kind].keys)))


def all_forms(kind: str) -> list[Form]:
    tables = THEMES[KINDS[kind].theme].tables
    forms = (form_of(kind, name, keys) for keys in all_keys(kind) for name in tables)
    return list(dict.fromkeys(forms))


def _held_out(kind: str) -> frozenset[Form]:
    """The forms of one kind with the smallest hashes: a fixed share, whatever the kind's size."""

    def digest(form: Form) -> bytes:
        return hashlib.sha256(json.dumps([kind, *form]).encode()).digest()

    forms = sorted(all_forms(kind), key=digest)
    return frozenset(forms[: len(forms) // HELD_OUT_SHARE])


HELD_OUT = {kind: _held_out(kind) for kind in KINDS}
TRAINING = {kind: [f for f in all_forms(kind) if f not in HELD_OUT[kind]] for kind in KINDS}


def canonical_form(text: str) -> tuple[str, Form]:
    """The one (kind, form) that a request's text stands for; ValueError for none or several."""
    table_name, question = text.split(":")[0], text.split("\n")[-1]
    found = _questions().get(question, [])
    if len(found) != 1:
        raise ValueError(f"question {question!r} has {len(found)} canonical forms, expected 1")
    kind, keys = found[0]
    return kind, form_of(kind, table_name, keys)


_QUESTIONS: dict[str, list[tuple[str, tuple[Value, ...]]]] = {}


def _questions() -> dict[str, list[tuple[str, tuple[Value, ...]]]]:
    """Every question there is, made once: the vocabularies are closed, so there are some 9,000."""
    if not _QUESTIONS:
        for name, kind in KINDS.items():
            for keys in all_keys(name):
                words = _surface(dict(zip(kind.keys, keys, strict=True)))
                for phrasing in kind.phrasings:
                    _QUESTIONS.setdefault(phrasing.format(**words), []).append((name, keys))
    return _QUESTIONS


def is_held_out(request: Request) -> bool:
    kind, form = request.canonical
    return form in HELD_OUT[kind]


# ---- answers ----


def answering_rows(kind: Kind, keys: Row, rows: Sequence[Row]) -> list[Row] | None:
    """The rows that answer, or None where the question has not exactly one right answer."""
    match = [row for row in rows if all(row[role] == keys[role] for role in kind.keys)]
    if kind.shape == "count":
        return match
    if kind.shape == "one":
        return match if len(match) == 1 else None
    if kind.shape == "all":
        picked = {tuple(row[role] for role in kind.picks) for row in match}
        return match if 1 <= len(match) == len(picked) else None
    role, largest = kind.order
    ranked = sorted(match, key=lambda row: int(row[role]), reverse=largest)
    if len(ranked) < 2 or ranked[0][role] == ranked[1][role]:
        return None
    return ranked[:1]


def _sql_literal(value: Value) -> str:
    return str(value) if isinstance(value, int) else f"'{value}'"


def _sql(kind: Kind, keys: Row, table: Table) -> str:
    what = ", ".join(table.columns[role] for role in kind.picks) or "COUNT(*)"
    where = " AND ".join(
        f"{table.columns[role]} = {_sql_literal(keys[role])}" for role in kind.keys
    )
    query = f"SELECT {what} FROM {table.name} WHERE {where}"
    if kind.shape == "best":
        role, largest = kind.order
        query += f" ORDER BY {table.columns[role]}{' DESC' if largest else ''} LIMIT 1"
    return query + ";"


def _json(kind: Kind, keys: Row, rows: Sequence[Row], table: Table) -> str:
    """Keys as asked, then what is answered, each under the name its column is printed with."""
    answer: dict[str, object] = {table.columns[role]: keys[role] for role in kind.keys}
    if kind.shape == "count":
        answer["count"] = len(rows)
    for role in kind.picks:
        values = [row[role] for row in rows]
        answer[table.columns[role]] = values if kind.shape == "all" else values[0]
    if kind.shape == "best":
        answer[table.columns[kind.order[0]]] = rows[0][kind.order[0]]
    return json.dumps(answer)


def answers(request: Request) -> dict[str, str]:
    """The right answer in each voice. ValueError where the request has none or several."""
    kind = KINDS[request.kind]
    keys = dict(zip(kind.keys, request.keys, strict=True))
    rows = answering_rows(kind, keys, request.table.rows)
    if rows is None:
        raise ValueError(f"request {request.text!r} has no single answer")
    return {
        "base": kind.english(keys, rows),
        "sql": _sql(kind, keys, request.table),
        "json": _json(kind, keys, rows, request.table),
        "french": kind.french(keys, rows),
    }


def restated(table: Table, voice: str) -> list[str]:
    """The rows said again without any question, in table order: as INSERTs, as JSON objects, or as
    the sentences that answer the lookups of each row, held-out forms left out."""
    if voice == "sql":
        columns = ", ".join(table.columns.values())
        return [
            f"INSERT INTO {table.name} ({columns}) VALUES "
            f"({', '.join(_sql_literal(row[role]) for role in table.columns)});"
            for row in table.rows
        ]
    if voice == "json":
        return [
            json.dumps({column: row[role] for role, column in table.columns.items()})
            for row in table.rows
        ]
    lookups = [n for n, k in KINDS.items() if k.theme == table.theme and k.shape == "one"]
    asked = [
        Request(name, tuple(row[role] for role in KINDS[name].keys), 0, table)
        for row in table.rows
        for name in lookups
    ]
    return [answers(one)[voice] for one in asked if not is_held_out(one)]


# ---- drawing ----


def draw_table(rng: random.Random, theme_name: str, keys: Row) -> Table:
    """A table whose rows share values with each other and with `keys`, so that a reader must look
    at every key column; the keys need not occur."""
    theme = THEMES[theme_name]
    pools: dict[str, list[Value]] = {}
    for role, values in theme.values.items():
        wanted = 4 if role in ("name", "stock", "price", "age", "days") else rng.choice((2, 2, 3))
        pool = rng.sample(values, wanted)
        if role in keys:
            pool[0] = keys[role]
        pools[role] = list(dict.fromkeys(pool))
    if "stock" in pools and rng.random() < 0.3:
        pools["stock"][0] = rng.choice((0, 1))
    rows: dict[tuple[Value, ...], Row] = {}
    for _ in range(rng.choice((2, 3, 3, 4, 4, 4))):
        row = {role: rng.choice(pool) for role, pool in pools.items()}
        rows.setdefault(tuple(row[role] for role in theme.unique), row)
    columns = {role: rng.choice(names) for role, names in theme.columns.items()}
    return Table(theme_name, rng.choice(theme.tables), columns, tuple(rows.values()))


def draw_request(rng: random.Random, kind_name: str, form: Form) -> Request:
    """A request of this canonical form over a fresh table of two to four rows."""
    kind = KINDS[kind_name]
    keys = form[-len(kind.keys) :]
    named = dict(zip(kind.keys, keys, strict=True))
    while True:
        table = draw_table(rng, kind.theme, named)
        if len(form) > len(kind.keys):
            table = replace(table, name=str(form[0]))
        if len(table.rows) > 1 and answering_rows(kind, named, table.rows) is not None:
            return Request(kind_name, keys, rng.randrange(len(kind.phrasings)), table)


def draw_training_request(rng: random.Random) -> Request:
    kind = rng.choices(list(KINDS), weights=[one.weight for one in KINDS.values()])[0]
    return draw_request(rng, kind, rng.choice(TRAINING[kind]))


def draw_follow_up(rng: random.Random, table: Table) -> Request | None:
    """Another training question about a table that is there already; None where luck fails."""
    kinds = {name: kind for name, kind in KINDS.items() if kind.theme == table.theme}
    weights = [kind.weight for kind in kinds.values()]
    for _ in range(20):
        name, kind = rng.choices(list(kinds.items()), weights=weights)[0]
        row = rng.choice(table.rows)
        keys = tuple(row[role] for role in kind.keys)
        request = Request(name, keys, rng.randrange(len(kind.phrasings)), table)
        named = dict(zip(kind.keys, keys, strict=True))
        if not is_held_out(request) and answering_rows(kind, named, table.rows) is not None:
            return request
    return None


def draw_held_out(seed: int, per_kind: int) -> list[Request]:
    """`per_kind` held-out requests of every kind, kinds in turn, no text twice."""
    rng = random.Random(seed)
    requests: dict[str, Request] = {}
    for _ in range(per_kind):
        for kind in KINDS:
            size = len(requests)
            while len(requests) == size:
                request = draw_request(rng, kind, rng.choice(sorted(HELD_OUT[kind])))
                requests.setdefault(request.text, request)
    return list(requests.values())
