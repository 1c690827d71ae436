r"""Where the answer of a completion stands, and its characters made plain. Strings only, no mathematics.

A completion that goes on with a question of its own (a few-shot prompt taught it to) is read up to there. The boxed
answer is that of the *last* box, also when that one isn't complete: then there is none. Boxes side by side, as in
`\boxed{1}, \boxed{2} and \boxed{3}`, are one answer.
"""

import re

NEXT_QUESTION = re.compile(
    r"(?:\n|(?<=[.!?])\s)\s{0,8}(?:\*\*|\#+\s*)?(?:Question|Problem|Exercise|Example|Instruction|Input|User|Human|Q)\b"
    r"[ ]?\d*\s*(?:\*\*)?\s*[:\uff1a]|<\|",
    re.IGNORECASE,
)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
BARE_CONTENT = re.compile(r"[^\s${},;]+")
_SPACE = r"(?:[\s$]|\\q?quad|\\[,;: ]|\\[\[\]()])*"
BESIDE = re.compile(
    rf"{_SPACE}(?:[,;]|(?:[,;]{_SPACE})?(?:\\text\s*\{{\s*)?\b(?:and|or)\b(?:\s*\}})?){_SPACE}(?:\\?[A-Za-z](?:_\{{?\w+\}}?)?\s*=\s*)?"
)
"""What stands between two boxes of one answer."""

FARTHEST_BESIDE = 60
"""Characters between two boxes of one answer, at most."""

_FULL_WIDTH: dict[int, str] = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_MINUSES: dict[int, str] = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63"), "-")
_SPACES: dict[int, str] = dict.fromkeys(
    map(ord, "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"), " "
)
_NOTHING: dict[int, str] = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), "")
_FRACTIONS = {
    ord("\u00bd"): " 1/2",
    ord("\u00bc"): " 1/4",
    ord("\u00be"): " 3/4",
    ord("\u2153"): " 1/3",
    ord("\u2154"): " 2/3",
    ord("\u2044"): "/",
}
PLAIN: dict[int, str] = _FULL_WIDTH | _MINUSES | _SPACES | _NOTHING | _FRACTIONS
"""Typography without a meaning of its own: full-width characters, minus signs and dashes, kinds of spaces."""

_RAISED, _LOWERED = (
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079",
    "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089",
)
_SCRIPTS = re.compile(rf"[{_RAISED}\u207b]*[{_RAISED}]|[{_LOWERED}]+")
_SCRIPT_DIGITS = str.maketrans(_RAISED + _LOWERED + "\u207b", "0123456789" * 2 + "-")
_THIN = r"(?:\\[,;: !]|~)"
THOUSANDS_GROUP = re.compile(rf"(?<=\d)\s*(?:\{{\s*,\s*\}}|,?{_THIN}+,?)\s*(?=\d{{3}}(?!\d))")
"""What LaTeX writes between groups of three digits, and nobody writes elsewhere: 8{,}000, 11,\\! 111, 10\\,080."""


REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar)\s*(?:\{\s*(\d{1,20})\s*\}|(\d))")
r"""0.1\overline{6}"""


def made_plain(text: str) -> str:
    """The text with one minus sign, one space, ASCII digits, no LaTeX between the groups of a long number, and a
    fraction for a repeating decimal."""
    text = _SCRIPTS.sub(_script, text.translate(PLAIN))
    # A group ends where the next one begins, so one pass reads 11,\! 111,\! 100 too.
    return REPEATING.sub(_repeating_as_fraction, THOUSANDS_GROUP.sub("", text))


def _repeating_as_fraction(found: re.Match[str]) -> str:
    whole, places, period = found[1], found[2], found[3] or found[4]
    before = int(whole + places)
    top, bottom = int(whole + places + period) - before, 10 ** len(places) * (10 ** len(period) - 1)
    return rf"\frac{{{top}}}{{{bottom}}}"


def _script(found: re.Match[str]) -> str:
    """Raised digits as an exponent, lowered ones as an index."""
    sign = "_" if found.group()[0] in _LOWERED else "^"
    return f"{sign}{{{found.group().translate(_SCRIPT_DIGITS)}}}"


def before_next_question(completion: str) -> str:
    """The completion up to the first question after the beginning that it asks itself; all of it without one."""
    found = NEXT_QUESTION.search(completion)
    return completion[: found.start()] if found else completion


def boxed_answer(completion: str) -> str | None:
    """The content of the last box (of the last boxes side by side, separated by commas); None without one.

    A last box that is never closed is no answer: an earlier one was given up.
    """
    answered = before_next_question(completion)
    return _boxed_answer(completion if not BOX.search(answered) else answered)


def _boxed_answer(text: str) -> str | None:
    boxes = list(BOX.finditer(text))
    content, _ = _content(text, boxes[-1].end()) if boxes else (None, 0)
    if content is None:
        return None
    contents = [content]
    for box, next_box in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        content, end = _content(text[: next_box.start()], box.end())
        between = text[end : next_box.start()]
        if content is None or len(between) > FARTHEST_BESIDE or not BESIDE.fullmatch(between):
            break
        contents.insert(0, content)
    return ", ".join(dict.fromkeys(contents))


def _content(text: str, at: int) -> tuple[str | None, int]:
    """What a box that opens before `at` holds (None if it isn't closed), and where it ends."""
    if not text.startswith("{", at):
        found = BARE_CONTENT.match(text, at)
        return (found.group().rstrip("."), found.end()) if found else (None, at)
    end = closing_brace(text, at)
    return (text[at + 1 : end].strip(), end + 1) if end is not None else (None, len(text))


def closing_brace(text: str, at: int) -> int | None:
    r"""Where the brace that opens at `at` is closed; `\{` and `\}` are characters, not braces."""
    depth = 0
    position = at
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return position
        position += 1
    return None
