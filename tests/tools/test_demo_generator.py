"""The demo grammar promises one right answer per request and held-out forms never trained on.

The oracles are SQLite (runs the SQL voice over the request's own table) and `json`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sqlite3

import demo_grammar as grammar
import demo_lexicon as lexicon
import pytest


def training_requests(n: int) -> list[grammar.Request]:
    rng = random.Random(7)
    return [grammar.draw_training_request(rng) for _ in range(n)]


def run_sql(table: grammar.Table, query: str) -> list[tuple[object, ...]]:
    base = sqlite3.connect(":memory:")
    base.execute(f"CREATE TABLE {table.name} ({', '.join(table.columns.values())})")
    marks = ", ".join("?" * len(table.columns))
    rows = [tuple(row[role] for role in table.columns) for row in table.rows]
    base.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
    return base.execute(query).fetchall()


def table(theme: str, *rows: tuple[grammar.Value, ...]) -> grammar.Table:
    columns = {role: names[0] for role, names in grammar.THEMES[theme].columns.items()}
    named = tuple(dict(zip(columns, row, strict=True)) for row in rows)
    return grammar.Table(theme, grammar.THEMES[theme].tables[0], columns, named)


MARKET = table(
    "market",
    ("Oslo", "orange", "red", 0, 3),
    ("Lyon", "apple", "green", 12, 1),
    ("Oslo", "apple", "golden", 1, 4),
)
PETS = table(
    "pets",
    ("Mia", "goose", "grey", 3),
    ("Leo", "cat", "white", 9),
    ("Luna", "goose", "grey", 1),
)
FESTIVALS = table(
    "festivals",
    ("Oslo", "opera", "April", 1),
    ("Lyon", "jazz", "April", 4),
    ("Lyon", "opera", "May", 5),
    ("Rome", "opera", "April", 2),
)

# kind, keys, table, English, SQL, JSON, French: the agreements and elisions, written by hand.
WRITTEN = [
    ("stock", ("Oslo", "orange"), MARKET, "There are no oranges in Oslo.",
     "SELECT stock FROM market WHERE city = 'Oslo' AND fruit = 'orange';",
     '{"city": "Oslo", "fruit": "orange", "stock": 0}', "Il n'y a pas d'oranges à Oslo."),
    ("stock", ("Oslo", "apple"), MARKET, "There is 1 apple in Oslo.",
     "SELECT stock FROM market WHERE city = 'Oslo' AND fruit = 'apple';",
     '{"city": "Oslo", "fruit": "apple", "stock": 1}', "Il y a 1 pomme à Oslo."),
    ("price", ("Lyon", "apple"), MARKET, "An apple costs 1 euro in Lyon.",
     "SELECT price FROM market WHERE city = 'Lyon' AND fruit = 'apple';",
     '{"city": "Lyon", "fruit": "apple", "price": 1}', "Une pomme coûte 1 euro à Lyon."),
    ("colour", ("Lyon", "apple"), MARKET, "The apples in Lyon are green.",
     "SELECT colour FROM market WHERE city = 'Lyon' AND fruit = 'apple';",
     '{"city": "Lyon", "fruit": "apple", "colour": "green"}', "Les pommes de Lyon sont vertes."),
    ("sold", ("Oslo",), MARKET, "Oslo sells oranges and apples.",
     "SELECT fruit FROM market WHERE city = 'Oslo';",
     '{"city": "Oslo", "fruit": ["orange", "apple"]}', "Oslo vend des oranges et des pommes."),
    ("cheapest", ("apple",), MARKET, "The cheapest apples are in Lyon.",
     "SELECT city FROM market WHERE fruit = 'apple' ORDER BY price LIMIT 1;",
     '{"fruit": "apple", "city": "Lyon", "price": 1}', "Les pommes sont les moins chères à Lyon."),
    ("age", ("Luna",), PETS, "Luna is 1 year old.", "SELECT age FROM pets WHERE name = 'Luna';",
     '{"name": "Luna", "age": 1}', "Luna a 1 an."),
    ("who", ("Leo",), PETS, "Leo is a white cat.",
     "SELECT animal, colour FROM pets WHERE name = 'Leo';",
     '{"name": "Leo", "animal": "cat", "colour": "white"}', "Leo est un chat blanc."),
    ("which", ("goose", "grey"), PETS, "Mia and Luna are grey geese.",
     "SELECT name FROM pets WHERE animal = 'goose' AND colour = 'grey';",
     '{"animal": "goose", "colour": "grey", "name": ["Mia", "Luna"]}',
     "Mia et Luna sont des oies grises."),
    ("oldest", ("goose",), PETS, "Mia is the oldest goose.",
     "SELECT name FROM pets WHERE animal = 'goose' ORDER BY age DESC LIMIT 1;",
     '{"animal": "goose", "name": "Mia", "age": 3}', "Mia est l'oie la plus âgée."),
    ("youngest", ("goose",), PETS, "Luna is the youngest goose.",
     "SELECT name FROM pets WHERE animal = 'goose' ORDER BY age LIMIT 1;",
     '{"animal": "goose", "name": "Luna", "age": 1}', "Luna est l'oie la plus jeune."),
    ("count", ("owl",), PETS, "There are no owls.",
     "SELECT COUNT(*) FROM pets WHERE animal = 'owl';", '{"animal": "owl", "count": 0}',
     "Il n'y a pas de hiboux."),
    ("when", ("Oslo", "opera"), FESTIVALS, "The opera festival in Oslo is in April.",
     "SELECT month FROM festivals WHERE city = 'Oslo' AND festival = 'opera';",
     '{"city": "Oslo", "festival": "opera", "month": "April"}',
     "Le festival d'opéra d'Oslo est en avril."),
    ("length", ("Oslo", "opera"), FESTIVALS, "The opera festival in Oslo lasts 1 day.",
     "SELECT days FROM festivals WHERE city = 'Oslo' AND festival = 'opera';",
     '{"city": "Oslo", "festival": "opera", "days": 1}', "Le festival d'opéra d'Oslo dure 1 jour."),
    ("where", ("opera", "April"), FESTIVALS, "Oslo and Rome have an opera festival in April.",
     "SELECT city FROM festivals WHERE festival = 'opera' AND month = 'April';",
     '{"festival": "opera", "month": "April", "city": ["Oslo", "Rome"]}',
     "Oslo et Rome ont un festival d'opéra en avril."),
    ("longest", ("Lyon",), FESTIVALS, "The opera festival is the longest in Lyon.",
     "SELECT festival FROM festivals WHERE city = 'Lyon' ORDER BY days DESC LIMIT 1;",
     '{"city": "Lyon", "festival": "opera", "days": 5}',
     "À Lyon, le festival d'opéra est le plus long."),
]  # fmt: skip


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: f"{row[0]}-{row[1][-1]}")
def test_answers_are_the_ones_a_person_wrote(row):
    kind, keys, asked, english, sql, as_json, french = row
    got = grammar.answers(grammar.Request(kind, keys, 0, asked))
    assert got == {"base": english, "sql": sql, "json": as_json, "french": french}


def test_every_kind_has_a_written_answer():
    assert {row[0] for row in WRITTEN} == set(grammar.KINDS)


def test_sql_run_on_the_table_gives_what_json_says():
    for request in training_requests(2000):
        kind = grammar.KINDS[request.kind]
        got = grammar.answers(request)
        said = json.loads(got["json"])
        rows = run_sql(request.table, got["sql"])
        if kind.shape == "count":
            assert rows == [(said["count"],)]
            continue
        picked = [said[request.table.columns[role]] for role in kind.picks]
        if kind.shape == "all":
            picked = picked[0]
            assert rows == [(value,) for value in picked]
        else:
            assert rows == [tuple(picked)], "a second row would be a second right answer"


def test_a_text_has_one_canonical_form():
    for request in training_requests(500) + grammar.draw_held_out(1, 20):
        assert grammar.canonical_form(request.text) == request.canonical


def test_no_two_canonical_forms_share_words():
    seen: dict[str, tuple[str, grammar.Form]] = {}
    for name, kind in grammar.KINDS.items():
        for keys in grammar.all_keys(name):
            for phrasing in range(len(kind.phrasings)):
                request = grammar.Request(name, keys, phrasing, table(kind.theme))
                assert seen.setdefault(request.question, request.canonical) == request.canonical


def test_unknown_question_is_refused():
    with pytest.raises(ValueError, match="0 canonical forms, expected 1"):
        grammar.canonical_form("shop: city\nHow many whales are there in Oslo?")


def test_held_out_forms_are_a_share_of_every_kind_and_never_trained():
    for kind in grammar.KINDS:
        held, trained = grammar.HELD_OUT[kind], set(grammar.TRAINING[kind])
        assert held and not held & trained
        assert held | trained == set(grammar.all_forms(kind))
        assert len(held) == len(trained | held) // grammar.HELD_OUT_SHARE


def test_training_draws_and_follow_ups_never_hold_a_held_out_form():
    rng = random.Random(3)
    for _ in range(3000):
        request = grammar.draw_training_request(rng)
        follow_up = grammar.draw_follow_up(rng, request.table)
        for drawn in [request, follow_up] if follow_up else [request]:
            kind, form = grammar.canonical_form(drawn.text)
            assert form not in grammar.HELD_OUT[kind]


def test_held_out_requests_are_held_out_distinct_and_repeatable():
    requests = grammar.draw_held_out(5, 10)
    assert len({r.text for r in requests}) == 10 * len(grammar.KINDS)
    assert [r.text for r in requests] == [r.text for r in grammar.draw_held_out(5, 10)]
    for request in requests:
        kind, form = grammar.canonical_form(request.text)
        assert form in grammar.HELD_OUT[kind]


def test_held_out_answers_hold_no_word_that_training_answers_lack():
    """A word is taken with what stands before it, since that decides its token."""

    def words(requests: list[grammar.Request], voice: str) -> set[str]:
        texts = (grammar.answers(request)[voice] for request in requests)
        return {word for text in texts for word in re.findall(r"^\w+|\W\w+", text)}

    trained, held = training_requests(12_000), grammar.draw_held_out(2, 40)
    for voice in grammar.VOICES:
        assert not words(held, voice) - words(trained, voice)


def test_restated_rows_fill_the_same_table_in_sqlite_and_json():
    for request in training_requests(200):
        asked = request.table
        base = sqlite3.connect(":memory:")
        base.execute(f"CREATE TABLE {asked.name} ({', '.join(asked.columns.values())})")
        for statement in grammar.restated(asked, "sql"):
            base.execute(statement)
        rows = [tuple(row.values()) for row in asked.rows]
        assert base.execute(f"SELECT * FROM {asked.name}").fetchall() == rows
        said = [json.loads(line) for line in grammar.restated(asked, "json")]
        assert [tuple(one.values()) for one in said] == rows


def test_restated_sentences_leave_held_out_forms_out():
    kind, (city, fruit) = "colour", sorted(grammar.HELD_OUT["colour"])[0]
    asked = table("market", (city, fruit, "red", 3, 4), (city, fruit, "green", 3, 4))
    one_row = dataclasses.replace(asked, rows=asked.rows[:1])
    answer = grammar.answers(grammar.Request(kind, (city, fruit), 0, one_row))["french"]
    assert answer not in grammar.restated(one_row, "french")


def test_answers_depend_on_the_rows():
    changed = 0
    for request in training_requests(300):
        rows = tuple(
            {r: grammar.THEMES[request.table.theme].values[r][0] if r not in
             grammar.KINDS[request.kind].keys else v for r, v in row.items()}
            for row in request.table.rows
        )  # fmt: skip
        other = dataclasses.replace(request, table=dataclasses.replace(request.table, rows=rows))
        try:
            changed += grammar.answers(other)["base"] != grammar.answers(request)["base"]
        except ValueError:
            changed += 1
    assert changed > 200


def test_ambiguous_request_has_no_answer():
    tie = table("pets", ("Mia", "cat", "grey", 3), ("Leo", "cat", "grey", 3))
    with pytest.raises(ValueError, match="no single answer"):
        grammar.answers(grammar.Request("oldest", ("cat",), 0, tie))


@pytest.mark.parametrize(
    ("made", "right"),
    [
        (lexicon.de("oranges"), "d'oranges"),
        (lexicon.de("hiboux"), "de hiboux"),
        (lexicon.de("Édimbourg"), "d'Édimbourg"),
        (lexicon.le(lexicon.ANIMALS["squirrel"]), "l'écureuil"),
        (lexicon.le(lexicon.ANIMALS["turtle"]), "la tortue"),
        (lexicon.un(lexicon.ANIMALS["donkey"]), "un âne"),
        (lexicon.with_article("owl"), "an owl"),
        (lexicon.listed(["a", "b", "c"], "et"), "a, b et c"),
        (lexicon.COLOURS["white"].agree(feminine=True, plural=True), "blanches"),
        (lexicon.COLOURS["grey"].agree(feminine=False, plural=True), "gris"),
    ],
)
def test_words_bend(made, right):
    assert made == right
