"""The closed vocabularies of the demo model: every word a request may hold, English and French.

No sentence is built here, only words and the small rules that bend them (article, elision,
agreement). The sets are closed on purpose: the model must combine words, never spell new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VOWELS = "aeiouyâàéèêîôûAEIOUYÂÀÉÈÊÎÔÛ"


@dataclass(frozen=True)
class Noun:
    one: str
    many: str
    french_one: str
    french_many: str
    feminine: bool


@dataclass(frozen=True)
class Colour:
    """French forms: masculine and feminine, singular and plural."""

    french: tuple[str, str, str, str]

    def agree(self, feminine: bool, plural: bool) -> str:
        return self.french[2 * feminine + plural]


def _nouns(lines: str) -> dict[str, Noun]:
    """`one many french_one french_many gender` per line; English singular is the key."""
    table = {}
    for line in lines.strip().splitlines():
        one, many, french_one, french_many, gender = line.split()
        table[one] = Noun(one, many, french_one, french_many, gender == "f")
    return table


FRUITS = _nouns(
    """
    apple apples pomme pommes f
    apricot apricots abricot abricots m
    avocado avocados avocat avocats m
    banana bananas banane bananes f
    cherry cherries cerise cerises f
    fig figs figue figues f
    kiwi kiwis kiwi kiwis m
    lemon lemons citron citrons m
    mango mangoes mangue mangues f
    melon melons melon melons m
    orange oranges orange oranges f
    papaya papayas papaye papayes f
    peach peaches pêche pêches f
    pear pears poire poires f
    pineapple pineapples ananas ananas m
    plum plums prune prunes f
    raspberry raspberries framboise framboises f
    strawberry strawberries fraise fraises f
    """
)

# No h is mute here: the French words in h (hérisson, hibou) take no elision.
ANIMALS = _nouns(
    """
    cat cats chat chats m
    dog dogs chien chiens m
    donkey donkeys âne ânes m
    duck ducks canard canards m
    elephant elephants éléphant éléphants m
    fox foxes renard renards m
    frog frogs grenouille grenouilles f
    goat goats chèvre chèvres f
    goose geese oie oies f
    hedgehog hedgehogs hérisson hérissons m
    hen hens poule poules f
    horse horses cheval chevaux m
    mouse mice souris souris f
    otter otters loutre loutres f
    owl owls hibou hiboux m
    rabbit rabbits lapin lapins m
    squirrel squirrels écureuil écureuils m
    turtle turtles tortue tortues f
    """
)

COLOURS = {
    "black": Colour(("noir", "noirs", "noire", "noires")),
    "brown": Colour(("brun", "bruns", "brune", "brunes")),
    "golden": Colour(("doré", "dorés", "dorée", "dorées")),
    "green": Colour(("vert", "verts", "verte", "vertes")),
    "grey": Colour(("gris", "gris", "grise", "grises")),
    "pink": Colour(("rose", "roses", "rose", "roses")),
    "purple": Colour(("violet", "violets", "violette", "violettes")),
    "red": Colour(("rouge", "rouges", "rouge", "rouges")),
    "white": Colour(("blanc", "blancs", "blanche", "blanches")),
    "yellow": Colour(("jaune", "jaunes", "jaune", "jaunes")),
}

# Cities whose French name takes no article, so that "à" is always right.
CITIES = {
    "Algiers": "Alger",
    "Amsterdam": "Amsterdam",
    "Antwerp": "Anvers",
    "Athens": "Athènes",
    "Barcelona": "Barcelone",
    "Berlin": "Berlin",
    "Boston": "Boston",
    "Brussels": "Bruxelles",
    "Chicago": "Chicago",
    "Copenhagen": "Copenhague",
    "Dakar": "Dakar",
    "Dublin": "Dublin",
    "Edinburgh": "Édimbourg",
    "Florence": "Florence",
    "Geneva": "Genève",
    "Hamburg": "Hambourg",
    "Krakow": "Cracovie",
    "Kyoto": "Kyoto",
    "Lima": "Lima",
    "Lisbon": "Lisbonne",
    "London": "Londres",
    "Lyon": "Lyon",
    "Madrid": "Madrid",
    "Montreal": "Montréal",
    "Nairobi": "Nairobi",
    "Osaka": "Osaka",
    "Oslo": "Oslo",
    "Paris": "Paris",
    "Porto": "Porto",
    "Prague": "Prague",
    "Quito": "Quito",
    "Rome": "Rome",
    "Seoul": "Séoul",
    "Sydney": "Sydney",
    "Toronto": "Toronto",
    "Turin": "Turin",
    "Utrecht": "Utrecht",
    "Venice": "Venise",
    "Vienna": "Vienne",
    "Warsaw": "Varsovie",
}

FESTIVALS = {
    "art": "art",
    "book": "littérature",
    "circus": "cirque",
    "dance": "danse",
    "film": "cinéma",
    "jazz": "jazz",
    "kite": "cerfs-volants",
    "music": "musique",
    "opera": "opéra",
    "poetry": "poésie",
    "puppet": "marionnettes",
    "theatre": "théâtre",
}

MONTHS = {
    "January": "janvier",
    "February": "février",
    "March": "mars",
    "April": "avril",
    "May": "mai",
    "June": "juin",
    "July": "juillet",
    "August": "août",
    "September": "septembre",
    "October": "octobre",
    "November": "novembre",
    "December": "décembre",
}

# fmt: off
NAMES = (
    "Basil", "Bella", "Bruno", "Charlie", "Cleo", "Coco", "Daisy", "Ella", "Felix", "Finn",
    "Ginger", "Hazel", "Hugo", "Iris", "Jasper", "Kiki", "Leo", "Lola", "Lucky", "Luna", "Max",
    "Maya", "Mia", "Milo", "Mocha", "Nala", "Nemo", "Noah", "Olga", "Oscar", "Otto", "Pablo",
    "Pepper", "Pickle", "Pixel", "Poppy", "Rex", "Rocky", "Rosie", "Ruby", "Salty", "Sam",
    "Simba", "Tango", "Teddy", "Toffee", "Ziggy", "Zoe",
)
# fmt: on


def with_article(noun: str) -> str:
    """a pear, an apple. No English noun here starts with a mute or a sounded-as-w vowel."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(words: Sequence[str], conjunction: str) -> str:
    """a / a and b / a, b and c."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def de(word: str) -> str:
    """de pommes, d'oranges; de Lyon, d'Oslo."""
    return f"d'{word}" if word[0] in VOWELS else f"de {word}"


def le(noun: Noun) -> str:
    """le chat, la tortue, l'oie."""
    if noun.french_one[0] in VOWELS:
        return f"l'{noun.french_one}"
    return f"{'la' if noun.feminine else 'le'} {noun.french_one}"


def un(noun: Noun) -> str:
    return f"{'une' if noun.feminine else 'un'} {noun.french_one}"


def capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
