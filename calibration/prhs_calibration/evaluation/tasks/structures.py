"""Surface forms of the tasks other than single facts. Slots as in `forms`; {i} is the number of a value."""

from .types import Templates

# (line in front, row, line behind, questions)
PAIRS: dict[Templates, tuple[tuple[str, str, str, tuple[str, ...]], ...]] = {
    "seen": (
        ("{", '"{n}": "{v}",', "}", ('look up "{n}": "{v}"', "# {n} -> {v}", "The entry of {n} is {v}")),
        ("codes = dict(", "{n}={v},", ")", ("codes.{n} == {v}", "# {n} -> {v}", "Which number has {n}? {v}")),
        ("name,number", "{n},{v}", "", ("find {n},{v}", "The entry of {n} is {v}", "# {n} -> {v}")),
        ("| name | number |", "| {n} | {v} |", "", ("| find {n} | {v}", "The entry of {n} is {v}")),
        ("[numbers]", "{n} = {v}", "", ("get {n} = {v}", "# {n} -> {v}", "Which number has {n}? {v}")),
        ("# list of numbers", "# {n}: {v}", "# end of list", ("# again {n}: {v}", "The entry of {n} is {v}")),
        ("These are the numbers.", "{n} has {v}.", "", ("Which number has {n}? {v}", "# {n} -> {v}")),
    ),
    "unseen": (
        ("<dl>", "<dt>{n}<dd>{v}", "</dl>", ("dl[{n}] is {v}", "Give me the value next to {n}: {v}")),
        ("pairs:", "- {n} => {v}", "", ("select {n} => {v}", "Give me the value next to {n}: {v}")),
        ("The telephone book says:", "{n} ... {v}", "", ("Call {n} ... {v}", "dial({n}, {v}")),
    ),
}
ASSIGNMENTS: dict[Templates, tuple[str, ...]] = {
    "seen": (
        "{n} = {v}",
        "let {n} = {v};",
        "VAR {n} := {v}",
        "# {n} is {v}",
        "Let {n} be {v}.",
        "The variable {n} holds {v}.",
        '"{n}": {v},',
    ),
    "unseen": ("store {n} <- {v}", "We set {n} to {v}.", "{n} takes {v};"),
}
ALIASES: dict[Templates, tuple[str, ...]] = {
    "seen": (
        "{n} = {v}",
        "let {n} = {v};",
        "VAR {n} := {v}",
        "# {n} is {v}",
        "Let {n} be {v}.",
        "The variable {n} holds {v}.",
        "{n} refers to {v}",
    ),
    "unseen": ("store {n} <- {v}", "We set {n} to {v}.", "{n} is a name for {v}"),
}
TRACES: dict[Templates, tuple[str, ...]] = {
    "seen": ("trace {n} ->", "# follow {n} ->", "Question: what does {n} stand for? Answer: {n} ->"),
    "unseen": ("resolve({n}): {n} ->", "Please go from {n} ->"),
}
LISTED: dict[Templates, tuple[str, ...]] = {
    "seen": (
        "{n} {i} : {v}",
        "# {n} {i} : {v}",
        "The number of {n} {i} is {v}.",
        "| {n} {i} | {v} |",
        'value["{n} {i}"] = {v}',
        '{"{n} {i}": {v}}',
    ),
    "unseen": ("Page {n} {i} shows {v}.", "({n} {i}) => {v}", "item {n} {i}, worth {v}"),
}
LISTED_QUESTIONS: dict[Templates, tuple[str, ...]] = {
    "seen": ("All values of {n}:", "# every number of {n}:", "Question: which are the four of {n}? Answer:"),
    "unseen": ("List each one for {n}:", "collect({n}) ="),
}
# (in front of the words, question)
PASSAGES: dict[Templates, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("Passage {n}:", "Repeat {n}:"),
        ("# passage {n}:", "# copy of {n}:"),
        ("The song of {n} goes", "Sing the song of {n}:"),
        ("[{n}]", "again [{n}]"),
    ),
    "unseen": (("The spell of {n} is", "Say the spell of {n}:"), ("verse({n}) =", "verse of {n} =")),
}
WORD_LISTS: dict[Templates, tuple[tuple[str, str], ...]] = {
    "seen": (
        ("Words:", "Question: which word is the most common? Answer:"),
        ("# words:", "# the most common word is"),
        ("[words]", "most common [words]"),
        ("They shouted", "What they shouted most is"),
    ),
    "unseen": (("Shopping list:", "Bought most often:"), ("tags =", "the commonest of the tags =")),
}
