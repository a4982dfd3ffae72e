"""Tables of patterns of natural wordings (`wordings.txt`) and the signs that surround them."""

from importlib.resources import files


def _read() -> dict[str, tuple[str, ...]]:
    """Table -> lines."""
    text = files("prhs_calibration.reference_model").joinpath("wordings.txt").read_text(encoding="utf-8")
    parts = (part.split("\n") for part in text.split("\n@@ ")[1:])
    return {name: tuple(filter(None, lines)) for name, *lines in parts}


TABLES = _read()
KINDS = "number code key tag label pin id mark index count".split()
SEPARATORS = ", ; : / - | = ~ & + @ > < * # .. -- == \\ ^ ; , : -".split()
QUOTES = (("", ""),) * 8 + (('"', '"'), ("'", "'"), ("(", ")"), ("[", "]"), ("<", ">"), ("`", "`"))
PREFIXES = tuple(f"{sign} " for sign in "# // -- ; * - > >>> $ ! Q: NB: 1. ~ ## @ +".split())
WRAPPERS = (
    *((prefix, "") for prefix in PREFIXES),
    *(("/* ", " */"), ("<!-- ", " -->"), ('"""', '"""'), ("(", ")"), ("{# ", " #}"), ("<p>", "</p>")),
    *(("<li>", "</li>"), ("[", "]"), ("**", "**"), ("| ", " |"), ("print('", "')"), ("log: ", ";")),
)
BEFORE_VALUE = (
    *(" {v}", ": {v}", "={v}", " = {v}", ' "{v}"', ": '{v}'", " ({v})", ",{v}", "; {v}", " is {v}."),
    *(
        " - {v}",
        "/{v}",
        " > {v}",
        " [{v}]",
        ">{v}<",
        " #{v}",
        " has {v}",
        "; it is {v}!",
        "? {v}",
        " was {v}",
    ),
    *(" == {v}", "? It is {v}", ", namely {v}", ". Answer: {v}", ", {v}", " | {v}", " @ {v}", "({v})"),
    *(' -> "{v}"', "? Of course {v}", " :{v}"),
)

PAIR_HEADS = ("", "", "", *TABLES["pair heads"])
PAIR_TAILS = (
    *("", "", "", "", "}", "]", ")", "# end", "END", "---", "</data>", "};", "</table>", "```"),
    "That is all.",
)
ECHOES = "find get again see repeat also then now read check row copy pick ask".split()
FACTS = ("job", "city", "pet", "colour", "music")
