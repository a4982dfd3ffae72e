"""Made-up names and values: thousands of them, composed of syllables, a fifth kept for evaluation.

Which names are kept out of training is decided by a hash of the name, so it never depends on a seed.
"""

import zlib
from functools import lru_cache
from random import Random

from ...reference_model.recall import NAMES as PROMPT_NAMES
from .types import Templates

_STARTS = (
    "Al An Ar Bal Bel Bor Cal Cor Dal Dar Dor El Fal Fen Gal Gar Hal Hol Il Jor Kal Kel Kor Lan Lor Mal Mar "
    "Mor Nal Nor Ol Pel Por Quar Ral Ros Sal Sel Tal Tor Ul Val Ven Wil Zan"
).split()
_MIDDLES = "a e i o u ama eri ino olo una ebi aki ado eno isa ova".split()
_ENDS = "dor lin mont ra sk ton vale wick by mere den gar rin sa tus vik".split()
_SYLLABLES = (
    "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu bra cle dri flo gru pla ste tri".split()
)
ATTRIBUTES = (
    "secret number;access code;room key;ticket number;serial number;locker code;phone number;pass code;"
    "order number;flight number;badge number;door code;account number;parcel number;licence number"
).split(";")
UNSEEN_ATTRIBUTES = "vault code;customs number;membership number;shelf mark;garage code".split(";")
WORDS = (
    "apple anchor arrow autumn badge basket bell berry bird blanket bottle branch bread bridge brush "
    "bucket butter button cabin candle canvas carpet castle chain chair cheese cherry circle clock "
    "cloud coat coffee copper corner cotton cradle crown curtain desk diamond dinner dragon drum "
    "eagle engine feather fence field finger flame flower forest fountain garden ghost glass glove "
    "grape guitar hammer harbor hat hill honey horse island jacket jewel kettle kitchen ladder lake "
    "lamp leaf lemon letter lion lock maple market marble meadow melon mirror monkey moon mountain "
    "music needle night ocean olive onion orange orchard oven owl paint palace panda paper peach "
    "pearl pencil pepper piano pillow pirate planet plum pocket pond potato prince pumpkin puzzle "
    "queen rabbit rain ribbon ring river robin rocket roof rope rose saddle sail salt sand school "
    "shadow sheep shell shirt silver smoke snow soap spider spoon spring square star stone storm "
    "street sugar summer sun table teapot temple thread thunder tiger tomato tower train tree "
    "trumpet tunnel turtle umbrella valley velvet village violin wagon walnut water whale wheat "
    "wheel willow window winter wolf wood yard zebra "
).split()


def is_unseen(name: str) -> bool:
    """True for the fifth of all names that no task drawn for training contains."""
    return zlib.crc32(f"prhs-entity/{name}".encode()) % 5 == 0


@lru_cache(maxsize=2)
def names(templates: Templates) -> tuple[str, ...]:
    """Capitalised names such as "Kelamaton", about 9,000 to train with and 1,800 held out.

    The names of this project's prompts (`recall`) are trained with too, so none of them counts as held out.
    """
    wanted = templates == "unseen"
    every = (start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS)
    trained = set(PROMPT_NAMES) if wanted else set()
    return tuple(name for name in every if is_unseen(name) == wanted and name not in trained)


@lru_cache(maxsize=2)
def identifiers(templates: Templates) -> tuple[str, ...]:
    """Names of variables such as "gu_clelo", about 17,000 to train with and 4,300 held out."""
    wanted = templates == "unseen"
    every = (f"{a}_{b}{c}" for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES)
    return tuple(name for name in every if is_unseen(name) == wanted)


def attributes(templates: Templates) -> tuple[str, ...]:
    """Kinds of numbers a name can have."""
    return tuple(UNSEEN_ATTRIBUTES if templates == "unseen" else ATTRIBUTES)


def number(rng: Random, digits: int = 5) -> str:
    """Decimal digits, leading zeros included, all equally likely."""
    return f"{rng.randrange(10**digits):0{digits}d}"
