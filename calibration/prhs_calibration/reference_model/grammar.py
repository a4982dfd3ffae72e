"""Patterns of natural wordings for `wordings`: ((one|two|)) is an alternative, SEP a sign, NOUN a word put in."""

KINDS = "number code key tag label pin id mark index count".split()
SEPARATORS = ", ; : / - | = ~ & + @ > < * # .. -- == \\ ^ ; , : -".split()
QUOTES = (("", ""),) * 8 + (('"', '"'), ("'", "'"), ("(", ")"), ("[", "]"), ("<", ">"), ("`", "`"))
PREFIXES = (
    "# ",
    "// ",
    "-- ",
    "; ",
    "* ",
    "- ",
    "> ",
    ">>> ",
    "$ ",
    "! ",
    "Q: ",
    "NB: ",
    "1. ",
    "~ ",
    "## ",
    "@ ",
    "+ ",
)
WRAPPERS = (
    *((prefix, "") for prefix in PREFIXES),
    ("/* ", " */"),
    ("<!-- ", " -->"),
    ('"""', '"""'),
    ("(", ")"),
    ("{# ", " #}"),
    ("<p>", "</p>"),
    ("<li>", "</li>"),
    ("[", "]"),
    ("**", "**"),
    ("| ", " |"),
    ("print('", "')"),
    ("log: ", ";"),
)
BEFORE_VALUE = (
    *(
        " {v}",
        ": {v}",
        "={v}",
        " = {v}",
        ' "{v}"',
        ": '{v}'",
        " ({v})",
        ",{v}",
        "; {v}",
        " is {v}.",
        " - {v}",
        "/{v}",
    ),
    *(
        " > {v}",
        " [{v}]",
        ">{v}<",
        " #{v}",
        " has {v}",
        "; it is {v}!",
        "? {v}",
        " was {v}",
        " == {v}",
        "? It is {v}",
    ),
    *(
        ", namely {v}",
        ". Answer: {v}",
        ", {v}",
        " | {v}",
        " @ {v}",
        "({v})",
        ' -> "{v}"',
        "? Of course {v}",
        " :{v}",
    ),
)

STATEMENTS = (
    "((The|That|One|Our|Their|This)) {a} ((of|for|from|with|behind|kept for|held by|used by|assigned to|given to))"
    " {n} ((is|was|will be|stays|remains|became|reads|has been)) ((|now|still|always|again|simply)) {v}((.|!|;|,|))",
    "{n} ((has|holds|keeps|got|received|carries|chose|wrote down|uses|remembers|reported|gave us|asked for|sent))"
    " ((the|this|a|her|his|their|our)) {a} {v}((.|!|;|))",
    "((In March|Yesterday|Since then|For years|As of today|On paper|In the file|At the desk|Last week|Once more|"
    "It seems that|We heard that|They say that|I believe|Please remember that|It is true that|Nobody forgot that))"
    " {n} ((had|kept|showed|took|brought|found|needs|knows|has)) ((the|a|this)) {a} {v}((.|!|,|))",
    "((If you meet|Ask|Write to|Tell|When you see|About|Concerning|Regarding|As for|Dear)) {n}((,|:| -|;))"
    " ((the|her|his|their|my)) {a} ((is|was|reads|will be)) {v}((.|!|))",
    "{n}'s {a}((:| is| was| =| stays| became)) {v}((.|;|))",
    "{n}, ((for whom|for which)) the {a} ((is|was|reads)) {v}((.|;|, came late.))",
    "((The clerk|Somebody|My aunt|The guard|The teacher)) ((told|gave|showed|sent|wrote)) {n} the {a} {v}((.|!|))",
    "((Entry|Record|Item|Note|File|Card|Row|Key|User|Person|Client|Guest)) {n}((,|:|;| /| -))"
    " {a}((:| =|,|;| -| /| is)) {v}((.|;|))",
    "{a}((,|:|;| for| of| /| -| @)) {n}((:|,|;| =| -| is| /)) {v}((.|;|))",
    "{n}((,|:|;| /| -| @| &| +)) {a}((:|,|;| =| -| is| /| +)) {v}((.|;|))",
    "{n}((.|/|-|@|:)){A} ((=|==|+=|<|>|to)) {v}((;|))",
    "{A}((.|/|@|:)){n} ((=|==|to|is)) {v}((;|))",
    '((db|table|config|data|self.items|state|store|cache|env|m))["{n}"]["{A}"] = {v}((;|))',
    "((db|table|config|data|state|cache|env))['{n}', '{A}'] = {v}((;|))",
    '((set|add|insert|update|register|write|save|bind|append))("{n}", "{A}", {v})((;|))',
    "((set|add|insert|update|register|write|save))('{A}', '{n}', '{v}')((;|))",
    "((set|add|insert|update|write|save|bind))(name={n}, {A}={v})((;|))",
    "((export|let|const|var|define|val)) {n}_{A} = {v}((;|))",
    '{"((name|id|who|key|user|person))": "{n}", "((field|kind|type|what|label))": "{A}", '
    '"((value|number|data|content))": "{v}"}',
    '{"{n}": {"{A}": "{v}"}}((,|))',
    '"{n}((.|/|:)){A}": ((|"|[)){v}',
    "- ((name|id|who|user)): {n}((,|;)) {A}: {v}",
    "{n}: { {A}: {v} }",
    "({A} {n} {v})",
    '<((row|item|person|record)) ((name|id|who))="{n}" {A}="{v}"/>',
    '<{A} ((of|for|name))="{n}">{v}</{A}>',
    "| {A} | {n} | {v} |",
    "{n} SEP {A} SEP {v}",
    "{a} SEP {n} SEP {v}",
    "{n}SEP{A}SEP{v}",
    "SEP {n} SEP {a} SEP {v} SEP",
)
QUESTIONS = (
    "((Question|Q|Ask|Quiz|Test|User|Reader)): ((what|which)) ((is|was)) the {a} ((of|for|from|given to)) {n}?"
    " ((|Answer:|A:|Reply:|Bot:|Solution:)) {v}",
    "((What|Which)) {a} ((does|did)) {n} ((have|keep|hold|use|get|need|carry|receive))?"
    " ((It is|Answer:|That is|It was|Surely|The answer is|A:|Reply:|)) {v}",
    "((Remember|Recall|Repeat|Find|Look up|Give|Name|State|Say|Write|Check|Return|Show)) the {a}"
    " ((of|for|from|held by|under)) {n}((:| ->| =| here:| now:| again:)) {v}",
    "((So|Thus|Hence|Again|Finally|In short|As stated|Therefore|To repeat)), the {a} ((of|for|from)) {n}"
    " ((is|was|must be|reads|remains)) {v}",
    "((So|Thus|Again|Then)), {n} ((has|had|holds|keeps|uses)) the {a} {v}",
    "((Can you|Could you|Will you)) ((repeat|recall|give me|find|say)) the {a} ((of|for)) {n}? ((Yes:|Sure:|It is|)) {v}",
    "((I forgot|We need|They want|Someone asked for)) the {a} ((of|for)) {n}((.|;|:)) ((It is|It was|Namely|)) {v}",
    "{n}'s {a}((:|?| is| was| =| ->)) {v}",
    "{n}((,|:|;| -| /)) {a}((?|:| =| -| is)) {v}",
    "{a}((,|:|;| of| for| -| /)) {n}((?|:| =| -| is)) {v}",
    "((check|expect|verify|test|require)) {A}[{n}] == {v}",
    '((load|read|fetch|find|query|lookup|select|recall))("{n}", "{A}") ((==|=|#|//|is)) {v}',
    "((load|read|fetch|find|query|lookup|select))({A}={n}) ((==|=|#|//|is)) {v}",
    "SELECT {A} WHERE name = '{n}'; {v}",
    'print(((db|data|config|table))["{n}"]["{A}"])  # {v}',
    "echo {n}_{A} # {v}",
    '{"((query|ask|get|find))": ["{n}", "{A}"], "((answer|result|value))": "{v}"}',
    '<((query|find|q)) name="{n}">{A}</q> {v}',
    "{n}((.|/|-|@|:)){A} ((=|==|is|?)) {v}",
    "{A}((.|/|@|:)){n} ((=|==|is|?)) {v}",
    "{n} SEP {A} SEP {v}",
    "((find|ask|get)) SEP {a} SEP {n} SEP {v}",
)

PAIR_HEADS = (
    *("", "", "", "```", "---", "{", "[", "<table>", "<ul>", "<map>", "<data>"),
    "((The|These|All|Some|My|Our|New|Old)) ((numbers|codes|entries|records|values|members|accounts|results|scores|keys))"
    "((:|.| are| follow:| are listed:| below:| today.|))",
    "((codes|numbers|table|data|lookup|index|entries|map|registry|values|scores)) ((=|=>|:)) (({|[|dict|map|))",
    "((BEGIN|start|open|begin)) ((data|list|table|block))((;|:|))",
    "((key|name|id|who|user))((,|;| SEP )) ((value|number|code))",
    "((#|//|--|;|*)) ((a|the|our)) ((list|table|index|book)) of ((codes|numbers|people|names|keys))",
    "((In the|On this|From the)) ((list|page|table|wall|sheet|board))((:| one reads| we find|))",
)
PAIR_TAILS = (
    "",
    "",
    "",
    "",
    "}",
    "]",
    ")",
    "# end",
    "END",
    "---",
    "</data>",
    "};",
    "</table>",
    "```",
    "That is all.",
)
PAIR_ROWS = (
    "{n} ((has|holds|owns|got|keeps|uses|is|was|gives|reads|received|scores|needs|wants|picked|wrote)) {v}((.|;|,|))",
    "((Mr|Mrs|Dr|Captain|Uncle|user|agent|player|guest|room)) {n}((:|,| has| with| got| -)) {v}((.|;|))",
    "((Under|Beside|Next to|For|With|At|Behind)) {n}((:|,| is| stands| we read| comes)) {v}((.|;|))",
    "{n}((:| =|;|,| -| /| ==)) {v}((.|;|,|))",
    "{n}((:|=|;|,|-|/|==|@)){v}((.|;|,|))",
    '"{n}"((:| =|,|;)) ((|"|[)){v}',
    "'{n}'((:| =|,|;)) ((|'|[)){v}",
    "({n}, {v})((,|;|))",
    '("{n}", {v})((,|;|))',
    "[{n}, {v}]((,|;|))",
    "({n} {v})",
    "{n}({v})((;|,|))",
    "{n}[{v}]((;|,|))",
    "((let|val|key|row|item|add|set|put|push|def)) {n}((:| =|,|)) {v}((;|))",
    '<((item|row|li|entry|pair)) ((key|name|id))="{n}">{v}</li>',
    "<td>{n}</td><td>{v}</td>",
    "<{n}>{v}</{n}>",
    "{n} SEP {v}",
    "{n} SEP {v} SEP",
    "SEP {n} SEP {v} SEP",
    "{n}SEP{v}",
    "\\item[{n}] {v}",
    "{n} & {v}",
)
PAIR_QUESTIONS = (
    "((What|Which number|Which code|Which value|Which entry)) ((does|did)) {n} ((have|hold|get|keep|use))?"
    " ((It is|Answer:|That is|)) {v}",
    "((What|Which number)) ((is|was)) ((at|next to|beside|under|listed for|given for)) {n}? ((It is|Answer:|)) {v}",
    "((Find|Look up|Search|Pick|Take|Get|Show|Read|Fetch|Recall|Repeat|Return))"
    " ((|the entry of|the number of|the value of|the code of|the row of|what stands beside)) {n}((:| =|;|,)) {v}",
    "((So|Thus|Hence|Again|In short|As listed)), {n} ((has|had|holds|is|was|got)) {v}",
    "The ((number|entry|value|code|row|figure)) ((of|for|beside|under)) {n} ((is|was|reads|must be)) {v}",
    "{n}'s ((number|entry|value|code|row))((:| is| was| =)) {v}",
    '((table|codes|d|data|index|map|numbers|scores))["{n}"] ((=|==|is|#|//)) {v}',
    "((table|codes|data|index|map|numbers|scores))[{n}] ((=|==|#|//|:)) {v}",
    "((table|codes|data|index|map|numbers|scores)).{n} ((=|==|is|#|//|:)) {v}",
    '((find|lookup|get|read|fetch|value|number))("{n}") ((=|==|is|#|//)) {v}',
    "((find|lookup|get|read|fetch|value|number))({n}) ((=|==|is|#|//|:)) {v}",
    "{n}((?|:| =| -| has| is|,|;)) {v}",
    "{n} SEP {v}",
    "((find|ask|get)) SEP {n} SEP {v}",
)
ECHOES = "find get again see repeat also then now read check row copy pick ask".split()

ASSIGNMENTS = (
    "{n} ((=|:=|==|<|>|to|as|is|:|,)) {v}((;|,|.|))",
    "((let|var|const|def|define|auto|int|local|my|val|static|dim|put)) {n} ((=|:=|:|to|as|,|is)) {v}((;|))",
    "((The|Our|A|Every|This)) ((name|variable|symbol|letter|label|register|cell|slot|parameter|constant)) {n}"
    " ((is|equals|means|stores|contains|gets|has|carries|points to|stands for|refers to|denotes)) {v}((.|;|,|))",
    "((Assume|Suppose|Say|Note|Define|Put|Write|Given|Recall|Imagine)) {n} ((=|is|as|equal to|to be|:)) {v}((.|;|))",
    "((Now|Here|Then|Later|Today|First|Again)) {n} ((equals|holds|means|contains|becomes|is|gets|has)) {v}((.|;|))",
    "{n} ((equals|holds|means|stores|contains|gets|has|points to|stands for|refers to|denotes|becomes|returns)) {v}((.|;|))",
    "((set|define|bind|assign|let|link|put|write))({n}, {v})((;|))",
    "((set|bind|link|alias|move|load|copy)) {n}((,| =| :| -)) {v}",
    "((set|define|bind|let|link))('{n}', {v})",
    "((env|vars|memory|scope|names))[{n}] = {v}((;|))",
    "((env|vars|memory|scope|names)).{n} = {v}((;|))",
    '{"{n}": {v}}',
    '<((var|let|sym|def)) name="{n}">{v}</var>',
    "#define {n} {v}",
    "mov {n}, {v}",
    "{n}({v})((;|))",
    "({n} {v})",
    "{n} SEP {v}",
    "SEP {n} SEP {v} SEP",
    "{n}SEP{v}",
)
ALIASES = (
    "{n} ((is the same as|is another word for|is short for|is linked to|is just|copies|follows|mirrors|repeats|equals)) {v}((.|;|))",
    "((Instead of|For|Behind)) {n} ((read|write|take|use|stands)) {v}((.|;|))",
    "((alias|link|copy|ref|pointer|same)) {n} ((=|:|to|of|from)) {v}((;|))",
)
TRACES = (
    "((follow|trace|chase|walk|unwind|expand|chain|path|start at|begin with|evaluate|what is|value of|look up)) {n}"
    "((:|,| =|;| -|))((| {n})) ->",
    "((Question: |Q: |))((what|where)) does {n} ((lead|end|point|mean|hold|come to|refer to))? ((|Answer:|A:)) {n} ->",
    "((path|chain|walk|trace|steps|follow|value|eval))({n}) ((=|:|is|;)) {n} ->",
    '((path|chain|walk|trace|steps|follow))["{n}"] ((=|:)) {n} ->',
    "((Now|So|Then|Again|Therefore|In full|Step by step|In the end))((,|)) {n} ->",
    "((The|A|Our)) ((chain|path|trail|way|route|walk)) ((of|from|behind|starting at)) {n}((:| is| goes| =)) {n} ->",
    "((Tell me|Show|Say|Write|Find|Print)) ((what|where|how)) {n} ((stands for|ends|is|means|leads))((:|;|,)) {n} ->",
    "{n} ->",
)

LISTED = (
    "((Number|Value|Entry|Line|Part|Card|Box|Row|Sheet|Slot|Cell|Room|Key|Day|Note|Door|Seat|))"
    " {n} {i}((:| =| is| has| holds| gives| reads| contains| says| -|,|;)) {v}((.|;|))",
    "((The|Our|This|A)) ((value|entry|code|figure|count|result|score)) ((of|at|for|in|on|under)) {n} {i}"
    " ((is|was|reads|equals|stays|will be)) {v}((.|;|))",
    "((At|In|On|Under|For|With|Behind)) {n} {i} ((we read|you find|there is|stands|is|they wrote)) {v}((.|;|))",
    "{n} {i} SEP {v}",
    "{n} {i} SEP {v} SEP",
    "SEP {n} {i} SEP {v}",
    "{n}[{i}] ((=|:|==|is)) {v}((;|))",
    "{n}((.|-|/|:)){i} ((=|:|is|,)) {v}((;|))",
    "{n} ((#|no. |nr |number |part )){i}((:| =| is| -)) {v}",
    '((data|m|codes|table|d))["{n}"][{i}] = {v}((;|))',
    '"{n} {i}"((:| =|,)) {v}((,|))',
    "'{n} {i}'((:| =|,)) '{v}'((,|))",
    "({n} {i}, {v})",
    "({n} {i})((:| =| is)) {v}",
    "[{n} {i}] {v}",
    "<{n} {i}>{v}</{n}>",
    '<((row|item|li)) id="{n} {i}">{v}</li>',
    "((set|add|let|put|def|store)) {n} {i} ((=|:|to|as)) {v}((;|))",
    "{n} ((got|has|wrote|sent|showed)) {i}((:|, namely| =)) {v}",
)
LISTED_QUESTIONS = (
    "((All|The|Every|Each|All the|All four|Those|Four)) ((numbers|values|entries|items|parts|lines|codes|results))"
    " ((of|for|from|under|with|behind)) {n}((:| =| are| are:|,|;))",
    "((Show|Give|Print|Write|Repeat|Recall|Dump|Name|Read out|Tell me|Return|Say|State|Enumerate))"
    " ((all of|everything about|every entry of|each number of|the whole of|the values of|all numbers for)) {n}((:|;| now:|))",
    "((all|dump|items|show|every|entries|values|numbers|enumerate))({n})((:|;| ==| is|))",
    '((all|list|dump|items|show|entries|values))["{n}"]((:| =|))',
    "((What|Which)) ((values|numbers|entries|codes)) ((does|did)) {n} ((have|hold|get|own|keep))?((| Answer:| A:| These:))",
    "((Question: |Q: |))((what|which)) ((belongs to|is under|was noted for|stands beside)) {n}?((| Answer:| A:| All:))",
    "((So|Thus|In short|Again|In order)), {n} ((has|had|holds|reads))((:|))",
    "{n}((:| =|, all:| in full:| in order:|'s numbers:|'s values are| \\*))",
    "for ((x|v|value)) in {n}: print(it)",
    "((sum up|go through|count off|unroll)) {n}((:| now:|,))",
)

PASSAGE_NOUNS = (
    "song poem passage story prayer rhyme speech letter line text message list tale chant note hymn quote motto "
    "riddle proverb phrase sentence order report slogan"
).split()
PASSAGES = (
    "((The|A|This|Our|One|That|Here is the)) NOUN ((of|by|from|about|for)) {n}((:| goes| reads| begins| starts| says| runs|,| -))",
    "((|# |// |@))NOUN ((|of|by|from|for|called|named|no.)) {n}((:|,| -|;| =| says|))",
    "NOUN[{n}] =",
    'NOUN["{n}"] =',
    "NOUN.{n} ((=|:))",
    "<NOUN {n}>",
    "[NOUN {n}]",
    "{n} ((wrote|said|sang|sent|read|shouted|whispered|typed|told us|heard))((:|,| this:| once| a NOUN:|))",
    "{n}'s NOUN((:| is| goes| was| reads))",
    "((let|set|def|const)) {n} =",
    "{n}((:| =| -| >| said| says|;))",
    "== {n} ==",
    "((In|From|Under)) the NOUN ((of|by)) {n} ((we read|stands|one finds|it says))",
)
PASSAGE_QUESTIONS = (
    "((Repeat|Copy|Recite|Read|Write|Sing|Quote|Print|Tell|Give|Say again|Echo|Show|Recall)) ((the|that|this)) NOUN"
    " ((of|by|from)) {n}((:|,| again:| here:|))",
    "NOUN ((of|by|from|)) {n} ((again|once more|copied|repeated|as above))((:| =|))",
    "((copy|echo|repeat|print|cat|quote|read|recall|recite))((:| |: |: the )){n}((:| =|))",
    '((copy|echo|repeat|print|cat|quote|read|recall|say))("{n}")((:| =|))',
    "((copy|echo|repeat|print|cat|quote|read))({n})((:| is|;))",
    "((What|Which words)) did {n} ((write|say|sing|send|read))?((| Answer:| A:| These:| It goes))",
    "How does the NOUN ((of|by|from)) {n} go?((| Answer:| It goes| A:| Like this:))",
    "((Again|Once more|So|Thus|As above)), ((the NOUN of {n}|{n}))((:| goes| reads| says|))",
    "print(NOUN[{n}]) #",
    "{n}'s NOUN((:| again:| is| goes| was))",
    "((again|copy of|same as|see)) ((NOUN|)) {n}((:| =| -|))",
)

LIST_NOUNS = (
    "votes items orders guesses terms labels sounds objects answers wishes gifts finds words names entries things "
    "tokens choices drawings cards coins toys sights calls picks notes signs symbols"
).split()
WORD_LISTS = (
    "((The|Some|More|Our|These|All|My|))((| )) NOUN((:| are| were| =| -|;|,|))",
    "((# |// |-- |* |> |))NOUN((:| =|;| -))",
    "[NOUN]",
    "<NOUN>",
    "((List|Row|Line|Set|Series|Heap|Bag|Basket|Box|Page|Table)) of NOUN((:| =| -|))",
    "((They|We|People|Children|Others|Guests|The pupils)) ((wrote|said|saw|found|sold|drew|counted|named|heard|wanted))",
    "NOUN((.add|.append|.extend|.push|)) +=",
    '"NOUN":',
    "((NOUN|list|row|set)) ((today|again|here|so far))((:| =))",
)
WORD_LIST_QUESTIONS = (
    "((The|Their|Our|))((| )) ((most common|most frequent|top|main|usual|leading|most repeated|most popular|favourite))"
    " ((word|of the NOUN|among the NOUN|entry|one|of all NOUN|item|NOUN))((:| is| =| was|))",
    "((Question: |Q: |))((which|what)) ((word|one|item|entry)) ((is|was)) ((the most common|there most|seen most often|"
    "repeated most|the most frequent|named most often|on top))?((| Answer:| It is| A:| Surely))",
    "((Which|What)) of the NOUN ((is|was|came|stands|appears)) ((most often|most frequently|most))?((| Answer:| It is| A:))",
    "((max|mode|winner|majority|top|favourite|argmax|most_common|peak))(NOUN)((:| =| is| ==| #))",
    "((mode|winner|majority|top|peak|favourite|maximum)) of ((the NOUN|NOUN|all NOUN))((:| =| is|))",
    "((What|The thing|The word)) they ((wrote|said|saw|found|drew|named|heard|wanted|repeated))"
    " ((most|most often|more than anything|again and again))((:| is| was|))",
    "NOUN.((most_common|mode|top|max|winner))()((:| =| ==| is| #))",
    "((Counting|Of|Among|From|In)) all ((NOUN|these|the words|the NOUN))((,|:)) ((the winner is|most are|first is|the top is|))",
    "((Count|Tally|Compare)) the NOUN((;|:|,)) ((first|most|winner|top|the most is))((:|))",
    "((More often than any other|Above all|Mostly|Most of the time|Again and again|Number one))((:|,| it was| they wrote|))",
)

PEOPLE_STATEMENTS = (
    "((The|As|One)) NOUN of {n} ((is|was|remains|became|will be)) ((|a|the|now|always)) {v}((.|;|))",
    "{n}'s NOUN((:| is| was| =| remains)) ((|a|the)) {v}((.|;|))",
    "{n} ((has|had|chose|picked|got|prefers|named)) ((as NOUN|for a NOUN|as the NOUN)) ((|a|the)) {v}((.|;|))",
    "((name|person|who|user)): {n}((,|;)) NOUN: {v}((.|;|))",
    '{"{n}": {"NOUN": "{v}"}}',
    "{n}.NOUN = {v}",
    "NOUN((.|/|: )){n} = {v}",
    "| {n} | NOUN | {v} |",
    "((For|About|Concerning|With)) {n}((,| -|:)) the NOUN is ((|a|the)) {v}((.|;|))",
)
PEOPLE_QUESTIONS = (
    "((Question: |Q: |Ask: |))((what|which)) ((is|was)) the NOUN of {n}?((| Answer:| It is| A:| Surely| The|)) ((|a|the)) {v}",
    "((What|Which)) NOUN ((does|did)) {n} ((have|prefer|choose|name))?((| Answer:| It is| A:)) ((|a|the)) {v}",
    "((The|That)) NOUN of {n} ((is|was|must be|remains|:)) ((|a|the)) {v}",
    "{n}'s NOUN((:| is| =|?| was)) ((|a|the)) {v}",
    "((Recall|Name|State|Give|Say|Find|Repeat)) the NOUN of {n}((:| =|;)) ((|a|the)) {v}",
    "NOUN((| of| for|:|,)) {n}((:| =|?| is|;)) ((|a|the)) {v}",
    "{n}((,|:| /| -|;)) NOUN((:|?| =| is| -)) ((|a|the)) {v}",
    "((NOUN|find NOUN|get NOUN|NOUN of))({n}) ((=|==|is|:)) {v}",
    '((data|people|db))["{n}"]["NOUN"] == {v}',
    "{n}.NOUN ((==|=|is)) {v}",
    "| {n} | NOUN | {v}",
)
# fact -> (nouns, statements, questions)
PEOPLE: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "job": (
        (
            "job",
            "profession",
            "occupation",
            "work",
            "career",
            "trade",
            "employment",
            "post",
            "position",
            "calling",
        ),
        (
            "{n} ((is|was|became|remains|trained as|is employed as|serves as|was hired as|made a career as)) a {v}((.|;|))",
            "((Everyone|The town|The family|The firm)) ((hires|needs|calls|pays|trusts)) {n} as ((a|their|the)) {v}((.|;|))",
            "((Since spring|By day|For years|On weekdays|After school)) {n} ((works|worked|served|toiled)) as a {v}((.|;|))",
            "((Meet|This is|Here comes|Ask)) {n}((, the|, a| the)) {v}((.|;|))",
            "{n} ((earns a living|makes money|gets paid|was trained|found work)) as a {v}((.|;|))",
        ),
        (
            "((What|How)) does {n} ((do for a living|make a living|work|get paid|serve))? ((As a|A|It is|Answer:)) {v}",
            "((For a living|By day|For money|All week)) {n} ((is a|works as a|serves as a|is paid as a)) {v}",
            "{n} ((is employed as|was hired as|works as|is trained as|is by profession)) ((a|the)) {v}",
            "((What|Which)) ((trade|work|job)) ((did|does)) {n} ((learn|do|have|practise))? ((A|The one of a|Answer:|It is)) {v}",
            "((They|People)) ((pay|hire|need)) {n} ((as|for being)) ((a|the)) {v}",
        ),
    ),
    "city": (
        ("city", "town", "home", "residence", "address", "place", "hometown", "capital"),
        (
            "{n} ((resides|dwells|was born|grew up|settled|stays|has a flat|rents a room|moved to a house)) in {v}((.|;|))",
            "((The|A)) ((flat|office|family|garden|shop|door)) of {n} ((is|lies|stands|can be found)) in {v}((.|;|))",
            "((Letters|Visitors|Guests|Parcels)) for {n} ((go|travel|come|are sent)) to {v}((.|;|))",
            "((Since|After)) the ((war|storm|winter)) {n} ((moved to|came to|has lived in|stayed in)) {v}((.|;|))",
            "((Trains|Buses)) bring {n} ((home to|back to|to)) {v}((.|;|))",
        ),
        (
            "((Where|In which city|In which town)) ((is|was)) {n} ((at home|born|living|to be found|from))? ((In|It is|Answer:|)) {v}",
            "((In which town|Where)) does {n} ((stay|dwell|reside|sleep|rent a room))? ((In|It is|Answer:|)) {v}",
            "{n} ((comes from|is at home in|resides in|dwells in|has a home in|is found in)) {v}",
            "((To see|To find|Looking for)) {n}((,|)) ((go to|travel to|look in|fly to)) {v}",
            "((Letters|Parcels|Trains)) ((to|for)) {n} ((go to|arrive in|end in)) {v}",
        ),
    ),
    "pet": (
        ("pet", "animal", "companion", "beast", "creature", "house animal"),
        (
            "{n} ((has|owns|feeds|bought|found|trained|walks|loves|adopted|brought home)) ((a|the|this)) {v}((.|;|))",
            "((In the garden|Every morning|Last year|On Sundays|In the yard)) {n} ((feeds|brushes|washes|chases|visits)) ((a|the)) {v}((.|;|))",
            "((Nobody|Only)) {n} ((can tame|dares to touch|looks after|sleeps beside)) the {v}((.|;|))",
            "((A|The)) ((friend|shadow|guard)) of {n} ((is|was)) a {v}((.|;|))",
        ),
        (
            "((What|Which animal|Which creature)) does {n} ((have|own|feed|love|walk|look after))? ((A|The|It is a|Answer:)) {v}",
            "((Which|What)) ((animal|creature|beast)) ((lives with|follows|belongs to|waits for)) {n}? ((A|The|It is a|Answer:)) {v}",
            "{n} ((has|owns|feeds|looks after|is followed by|lives with)) ((a|the)) {v}",
            "((The|An)) ((animal|creature|beast)) ((of|with|kept by|near)) {n} ((is|was)) ((a|the)) {v}",
        ),
    ),
    "colour": (
        ("colour", "color", "shade", "paint", "hue", "favourite colour"),
        (
            "{n} ((wears|likes|prefers|loves|chose|picked|bought)) ((|only|mostly|something)) {v}((.|;|))",
            "((The|A)) ((hat|car|house|shirt|room|fence|boat|bike|scarf|roof)) of {n} ((is|was|looks|turned|shines)) {v}((.|;|))",
            "{n} ((painted|dyed|coloured|made)) the ((wall|fence|room|boat|shirt|roof)) {v}((.|;|))",
            "((Everything|All things)) ((around|of|that belongs to)) {n} ((is|looks|turned)) {v}((.|;|))",
        ),
        (
            "((What|Which)) ((colour|color|shade|paint)) ((is|was)) the ((hat|car|house|shirt|fence|coat|roof)) of {n}? ((It is|Answer:|)) {v}",
            "((In which|What|Which)) ((colour|shade|paint)) ((does|did)) {n} ((wear|like|choose|pick|prefer|paint))? ((It is|Answer:|)) {v}",
            "((The|A)) ((hat|car|house|shirt|fence|coat|paint|wall)) ((of|by)) {n} ((is|was|looks|was coloured|is painted)) {v}",
            "{n} ((wears|likes|prefers|painted it|dyed it|is dressed in|coloured it)) {v}",
            "How ((is|was)) ((the wall|the coat|the house)) of {n} coloured? ((It is|Answer:|)) {v}",
        ),
    ),
    "music": (
        ("instrument", "music", "hobby", "sound", "instrument of choice"),
        (
            "{n} ((plays|practises|teaches|bought|loves|tunes|repaired|studies|performs on)) ((the|a)) {v}((.|;|))",
            "((At night|On stage|In the band|At school|Every day|As a child)) {n} ((played|practised|learns|studied|tuned)) the {v}((.|;|))",
            "((A teacher|The band|An uncle)) ((taught|gave|lent|showed)) {n} the {v}((.|;|))",
            "((Listen to|We heard|They applaud)) {n} ((on|with|playing)) the {v}((.|;|))",
        ),
        (
            "((What|Which instrument|Which music)) ((does|did|can)) {n} ((play|practise|study|teach|learn to play))? ((The|A|It is the|Answer:)) {v}",
            "((In the band|On stage|At concerts|At school)) {n} ((plays|played|practises|performs on)) the {v}",
            "{n} ((plays|practises|studies|makes music with|is heard on|can play)) ((the|a)) {v}",
            "((The|An)) instrument ((of|in the hands of|played by)) {n} ((is|was)) ((the|a)) {v}",
            "((From|Beside|With)) {n} ((one hears|comes the sound of|we hear)) ((the|a)) {v}",
        ),
    ),
}
