"""Facts to plant in text and to ask for later: a random number under a name, in plain English sentences.

Names and sentence forms are shared by training and evaluation; numbers are drawn afresh, and evaluation
plants them in text that training has not seen.
"""

from dataclasses import dataclass
from random import Random

DIGITS = 5
ATTRIBUTES = (
    "secret number",
    "access code",
    "room key",
    "ticket number",
    "serial number",
    "locker code",
    "phone number",
    "pass code",
)
# {a} attribute, {n} name; the number follows the space at the end, "." follows the number.
STATEMENTS = (
    "The {a} of {n} is ",
    "Note that the {a} for {n} is ",
    "Remember: {n} has the {a} ",
    "# {n}: the {a} is ",
)
QUESTIONS = (
    "Question: what is the {a} of {n}? Answer:",
    "Q: {n}, {a}? A:",
    "As noted above, the {a} of {n} is",
)
DEMO_STATEMENT, DEMO_QUESTION = STATEMENTS[0], QUESTIONS[0]

_PLACES = (
    "Oslo Lima Cairo Paris Tokyo Delhi Quito Accra Berlin Madrid Vienna Prague Dublin Lisbon Athens "
    "Warsaw Geneva Boston Denver Austin Dallas Seattle Chicago Toronto Montreal Havana Bogota Santiago "
    "Nairobi Lagos Dakar Tunis Algiers Tripoli Amman Beirut Ankara Tehran Baghdad Kabul Karachi Mumbai "
    "Chennai Dhaka Colombo Bangkok Hanoi Manila Jakarta Perth Sydney Auckland Suva Seoul Osaka Kyoto "
    "Beijing Shanghai Taipei Moscow Kiev Minsk Riga Tallinn Vilnius Helsinki Stockholm Bergen Malmo "
    "Aarhus Hamburg Munich Cologne Zurich Basel Milan Turin Naples Venice Verona Seville Valencia Porto "
    "Lyon Nantes Lille Ghent Bruges Utrecht Leiden Cardiff Belfast Glasgow Leeds York Oxford Dover "
    "Bristol Zagreb Split Skopje Sofia Varna Bucharest Budapest Belgrade Sarajevo"
).split()
_PEOPLE = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Louis Maria Nancy Oscar Peter Quinn "
    "Rachel Simon Teresa Victor Walter Yvonne Aaron Bella Chloe Daniel Elena Felix George Hannah Isaac "
    "Julia Kevin Laura Martin Nora Olivia Paul Rosa Samuel Thomas Ursula Vera William Adam Brenda Cedric "
    "Diana Edgar Fiona Gavin Helga Ivan Joan Klaus Linda Marcus Nina Otto Paula Ralph Sonia Tobias Vivian "
    "Amir Bianca Carlos Daphne Ernest Farah Gilbert Hilda Ingrid Jonas Kirsten Leonard Miriam Norman "
    "Ophelia Patrick Ramona Stefan Tamara Ulrich"
).split()
_STARTS = "Bal Cor Dar Fen Gar Hol Jor Kel Lor Mar Nor Pel Quar Ros Sel Tor Ul Ven Wil Zan".split()
_MIDDLES = "a e i o u ama eri ino olo una ebi aki".split()
_ENDS = "dor lin mont ra sk ton vale wick by mere".split()
NAMES: tuple[str, ...] = tuple(
    _PLACES + _PEOPLE + [s + m + e for s in _STARTS for m in _MIDDLES for e in _ENDS]
)


@dataclass(frozen=True)
class Fact:
    """One planted fact. `statement + number + "."` states it, `question + " " + number` asks and answers."""

    name: str
    statement: str
    question: str
    number: str

    @property
    def sentence(self) -> str:
        """The sentence that plants the fact."""
        return f"{self.statement}{self.number}."

    @property
    def answer(self) -> str:
        """What follows the question, with the space before it."""
        return f" {self.number}"


def draw_facts(rng: Random, count: int, *, demo: bool = False) -> list[Fact]:
    """Draw `count` facts about different names; `demo` fixes the plainest sentence and question forms."""
    facts = []
    for name in rng.sample(NAMES, count):
        attribute = ATTRIBUTES[0] if demo else rng.choice(ATTRIBUTES)
        statement = DEMO_STATEMENT if demo else rng.choice(STATEMENTS)
        question = DEMO_QUESTION if demo else rng.choice(QUESTIONS)
        number = "".join(rng.choice("0123456789") for _ in range(DIGITS))
        facts.append(
            Fact(name, statement.format(a=attribute, n=name), question.format(a=attribute, n=name), number)
        )
    return facts
