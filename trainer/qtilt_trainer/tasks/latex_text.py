r"""A mathematical answer as people and models type it -> LaTeX that math-verify's parser reads. Strings only.

Nothing here drops a part of an answer: what only looks different is written in one way (\dfrac, \le, pi/2, \text{13}),
and units are returned beside the rest. math-verify's own normalisation isn't used, because it strips "units" such as
the t of 2t and the c of x^2+3c.
"""

import re
from collections.abc import Sequence

from qtilt_trainer.tasks.answer_text import closing_brace, made_plain

LONGEST_ANSWER = 2000
"""Characters of an answer that is read as mathematics; nobody's is longer."""

_CHARACTERS = str.maketrans(
    {
        "\u03c0": r"\pi ",
        "\u221a": r"\sqrt",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u00f7": r"\div ",
        "\u221e": r"\infty ",
        "\u00b0": r"^\circ ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "\u2208": r"\in ",
        "\u00b1": r"\pm ",
        "\u2026": r"\ldots ",
        "\u2264": r"\leq ",
        "\u2265": r"\geq ",
        "\u2260": r"\neq ",
        "\u2248": r"\approx ",
        "\u2205": r"\emptyset ",
        "\u211d": r"\mathbb{R}",
        "\u03b8": r"\theta ",
        "\u03b1": r"\alpha ",
        "\u03b2": r"\beta ",
    }
)
_REWRITES: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|mleft|mright|bigg?[lrm]?|Bigg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|hfill)(?![A-Za-z])", ""),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\mathbf\s*(?:\{\s*R\s*\}|R(?![A-Za-z]))", r"\\mathbb{R}"),
        (r"\\(?:text(?:rm|bf|it|normal|sf)|mbox|hbox|math(?:rm|bf|it|sf)|operatorname)\s*(?=\{)", r"\\text"),
        (r"\\!", ""),
        (r"(?<!\\)(?:\\[,;: ]|~|\\q?quad)", " "),
        (r"\{\s*,\s*\}", ","),
        (r"\\(?:le|leqslant)(?![A-Za-z])|<=|=<", r"\\leq "),
        (r"\\(?:ge|geqslant)(?![A-Za-z])|>=", r"\\geq "),
        (r"\\ne(?![A-Za-z])|!=|/=", r"\\neq "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:dots[cbmio]?|cdots|ldots)(?![A-Za-z])|\.\.\.", r"\\ldots "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:Bbb|mathbb)\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\\Bbb(?![A-Za-z])", r"\\mathbb"),
        (r"\\backslash(?![A-Za-z])|\\smallsetminus(?![A-Za-z])", r"\\setminus "),
        (r"\*\*(?=\S)", "^"),
        (r"\*", r"\\cdot "),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(theta|alpha|beta|gamma|lambda)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![A-Za-z\\])(?:union|U)(?=\s*[\[(])", r"\\cup "),
        (r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|ln|log|arcsin|arccos|arctan)(?![A-Za-z])", r"\\\1 "),
        (r"\\text\s*\{\s*(sin|cos|tan|cot|sec|csc|ln|log|arcsin|arccos|arctan)\s*\}", r"\\\1 "),
        (r"\\text\s*\{\s*([-+]?[\d.,/]+|[A-Za-z])\s*\}(?![\^_])", r"\1"),
        (r"\\exp\s*|(?<![A-Za-z\\])exp\s*(?=\()", r"e^"),
        (r"\\sqrt\s+(?=[\d A-Za-z{(])", r"\\sqrt"),
        (r"(?<![A-Za-z\\])sqrt\s*(?=[({\d])", r"\\sqrt"),
    )
]
DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?){DEGREES.pattern}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_STRAY_DOLLAR = re.compile(r"(?<!\\)\$(?!\s*[\d.])(?<![\d]\$)")
_FRAC_DIGITS = re.compile(
    r"\\frac\s*(?:(\d)\s*(\d)|(\d|[A-Za-z])\s*(?=\{)|(\{[^{}]*\})\s*(\d|[A-Za-z])|(\d)\s*([A-Za-z]))"
)
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?![\d.])|(?<![\d.])(\d+)\.(?![\d.])")
_OUTER = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\[(.*)\\\]|\\\((.*)\\\)|\*\*(.*)\*\*|`(.*)`", re.DOTALL)
_OPENERS, _CLOSERS = "([{", ")]}"


def tidy(text: str) -> str:
    """One way to write what means the same: no math delimiters, no \\left, plain spaces, ASCII."""
    text = _without_delimiters(made_plain(text).translate(_CHARACTERS).replace("\n", " ").replace("\t", " "))
    text = re.sub(r"^([A-J])\)", r"(\1)", text)
    if r"\begin" not in text:  # There a double backslash ends a row; elsewhere somebody escaped it twice.
        text = re.sub(r"\\\\(?=[A-Za-z{}])", r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    return re.sub(r" {2,}", " ", _STRAY_DOLLAR.sub("", text)).strip()


def exact(text: str) -> str:
    r"""For the parser: decimals as fractions, which it doesn't round; braces where it needs them (\frac12, ^(…))."""
    text = _DECIMAL.sub(_decimal_as_fraction, text)
    text = _FRAC_DIGITS.sub(_braced_fraction, text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*([A-Za-z])(?![A-Za-z])", r"\\sqrt{\1}", text)
    for command in (r"\sqrt", "^"):
        text = _braced_argument(text, command)
    return text


def split_outside_brackets(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    r"""(parts, separators between them), at the outermost level of (), [], {}, \{\} and \begin…\end."""
    parts, found = [], []
    depth = start = at = 0
    while at < len(text):
        if depth == 0 and (match := separator.match(text, at)) and match.end() > at:
            parts.append(text[start:at])
            found.append(match.group())
            start = at = match.end()
            continue
        step, change = _bracket(text, at)
        depth = max(0, depth + change)
        at += step
    parts.append(text[start:])
    return [part.strip() for part in parts], found


def balanced(text: str) -> bool:
    """Whether every bracket that opens is closed, whatever closes it: [0, 1) is balanced."""
    depth = at = 0
    while at < len(text):
        step, change = _bracket(text, at)
        depth += change
        if depth < 0:
            return False
        at += step
    return depth == 0


def enclosed(text: str) -> tuple[str, str, str] | None:
    r"""(opening, inside, closing) if one pair of brackets is around the whole text; \{ and \} count as brackets."""
    opening = next((sign for sign in (r"\{", r"\langle", "(", "[", "{") if text.startswith(sign)), None)
    closing = next((sign for sign in (r"\}", r"\rangle", ")", "]", "}") if text.endswith(sign)), None)
    if opening is None or closing is None or len(text) < len(opening) + len(closing):
        return None
    depth = at = 0
    while at < len(text):
        step, change = _bracket(text, at)
        depth += change
        at += step
        if depth == 0 and at < len(text):
            return None
    return (opening, text[len(opening) : -len(closing)].strip(), closing) if depth == 0 else None


def _bracket(text: str, at: int) -> tuple[int, int]:
    """(characters, change of depth) of what stands at a position."""
    for sign, change in ((r"\begin", 1), (r"\end", -1), (r"\{", 1), (r"\}", -1), (r"\langle", 1), (r"\rangle", -1)):
        if text.startswith(sign, at):
            return len(sign), change
    if text[at] == "\\":
        return 2, 0
    return 1, (text[at] in _OPENERS) - (text[at] in _CLOSERS)


def _without_delimiters(text: str) -> str:
    text = text.strip()
    while True:
        before = text
        text = re.sub(r"(?:\\\\|[.,;:])+\s*$", "", text) if not text.endswith("...") else text
        found = _OUTER.fullmatch(text.strip())
        inside = next((group for group in found.groups() if group is not None), "") if found else ""
        if found and "$" not in inside.replace(r"\$", ""):
            text = inside
        text = text.strip()
        if text == before:
            return text


def _decimal_as_fraction(found: re.Match[str]) -> str:
    whole, places, alone = found.groups()
    if places is None:
        return str(alone)
    return rf"{{\frac{{{(whole + places).lstrip('0') or '0'}}}{{{'1' + '0' * len(places)}}}}}"


def _braced_fraction(found: re.Match[str]) -> str:
    top, bottom, top_only, braced_top, single_bottom, digit, letter = found.groups()
    if top is not None:
        return rf"\frac{{{top}}}{{{bottom}}}"
    if top_only is not None:
        return rf"\frac{{{top_only}}}"
    if digit is not None:
        return rf"\frac{{{digit}}}{{{letter}}}"
    return rf"\frac{braced_top}{{{single_bottom}}}"


def _braced_argument(text: str, command: str) -> str:
    """`sqrt(2)` -> `sqrt{2}`, `2^(x+1)` -> `2^{x+1}`, the parentheses' whole content."""
    at = text.find(command)
    while at >= 0:
        start = at + len(command)
        while start < len(text) and text[start] == " ":
            start += 1
        if start < len(text) and text[start] == "(":
            end = _closing_parenthesis(text, start)
            if end is not None:
                text = f"{text[:start]}{{{text[start + 1 : end]}}}{text[end + 1 :]}"
        at = text.find(command, at + len(command))
    return text


def _closing_parenthesis(text: str, at: int) -> int | None:
    depth = 0
    for position in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return None


def text_content(text: str) -> str | None:
    r"""What \text{…} holds if it is around everything; None otherwise."""
    found = re.match(r"\\text\s*\{", text)
    if found is None or closing_brace(text, found.end() - 1) != len(text) - 1:
        return None
    return text[found.end() : -1].strip()
