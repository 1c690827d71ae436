r"""Numbers written out: integers, decimals, fractions, percentages. Read exactly (as fractions) and compared exactly.

The one tolerance: a decimal with at least six significant digits equals what rounds to it, and only if the number
expected isn't an integer. 0.333333 answers 1/3 and 4.12311 answers 4.123106, because nobody can write 1/3 as a decimal;
0.33 doesn't, it is another number. Integers have no such excuse: 7006653 isn't 7006652.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

SIGNIFICANT = 6
"""Digits from which on a decimal may stand for what it is the rounded value of."""
FLOAT_NOISE = Fraction(1, 10**14)
"""Relative error of binary floating point: 0.30000000000000004 is 0.3 to who computes so."""
FLOAT_DIGITS = 15
LARGEST_EXPONENT = 9999
LONGEST_NUMBER = 10_000
"""Characters of a number; nobody's answer is longer."""

GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+|\d{1,3}(?:['\u2019]\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}"
UNSIGNED = rf"(?:(?:(?:{GROUPED})(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
TIMES = r"\s*(?:\\times|\\cdot|\u00d7|\u00b7|\*|x)\s*"
EXPONENT = rf"[eE][-+]?\d{{1,4}}(?!\d)|{TIMES}10\s*(?:\^|\*\*)\s*(?:\{{\s*-?\d{{1,4}}\s*\}}|-?\d{{1,4}})"
FRACTION = (
    r"\\[dtc]?frac\s*(?:\{\s*(?P<tex_sign>-?)\s*(?P<tex_top>\d+)\s*\}\s*\{\s*(?P<tex_bottom>\d+)\s*\}"
    r"|(?P<digit_top>\d)\s*(?P<digit_bottom>\d)(?!\d))"
)
PERCENT = r"\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:percent(?:age)?|per\s+cent|pct)\b\s*\}?)"
SCALE = r"\s(?P<scale>thousand|million|billion|trillion)\b"
NUMBER = (
    rf"(?:(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)(?![\d/]|\.\d)"
    rf"|(?:(?P<tex_whole>\d+)\s*)?{FRACTION}"
    rf"|(?P<base>\d+)\s*(?:\^|\*\*)\s*(?:\{{\s*(?P<braced_power>-?\d{{1,4}})\s*\}}|(?P<power>-?\d{{1,4}}))(?!\d)"
    rf"|(?P<decimal>{UNSIGNED})(?P<exponent>{EXPONENT})?(?!\.?\d|[eE][-+]?\d)(?:{SCALE})?)"
    rf"(?P<percent>{PERCENT})?"
)
"""A number without its sign. Named groups: what `_value` makes a fraction of."""
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_WHOLE_TEXT = re.compile(
    rf"\s*(?P<sign>[-+]?)\s*(?:{NUMBER})\s*\.?\s*",
)


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number and how it was written."""

    value: Fraction
    percent: bool = False
    half_unit: Fraction | None = None
    """Half a unit of the last digit, for decimals of at least six significant digits; None for other numbers."""

    @property
    def readings(self) -> tuple[Fraction, ...]:
        """28 % is 0.28, and answers a question "how many per cent" as 28."""
        return (self.value, self.value / 100) if self.percent else (self.value,)

    @property
    def tolerance(self) -> Fraction:
        """How far away a number may be that this one is the rounded value of; 0 unless this is a long decimal."""
        if self.half_unit is None:
            return Fraction(0)
        noisy = self.half_unit * 2 * 10 ** (FLOAT_DIGITS - 1) <= abs(self.value)
        return max(self.half_unit, abs(self.value) * FLOAT_NOISE) if noisy else self.half_unit


def plain_number(text: str) -> PlainNumber | None:
    """The number that the whole text is; None if it is anything else. `made_plain` comes first."""
    found = _WHOLE_TEXT.fullmatch(text)
    return None if found is None else number_of(found, negative=found["sign"] == "-")


def number_of(found: re.Match[str], negative: bool) -> PlainNumber | None:
    """The number that a match of `NUMBER` wrote; None for one that is none (1/0, 4 10/3, 10^9999999)."""
    if found.end() - found.start() > LONGEST_NUMBER:
        return None
    value = _value(found)
    if value is None:
        return None
    signed = -value if negative else value
    return PlainNumber(signed, percent=found["percent"] is not None, half_unit=_half_unit(found))


def same_number(expected: PlainNumber, given: PlainNumber) -> bool:
    """Whether `given` is the number that was expected, see the head of this file."""
    if expected.percent and given.percent:
        return _close(expected.value, given.value, max(expected.tolerance, given.tolerance))
    tolerance = max(expected.tolerance, given.tolerance)
    return any(_close(a, b, tolerance) for a in expected.readings for b in given.readings)


def _close(expected: Fraction, given: Fraction, tolerance: Fraction) -> bool:
    if expected == given:
        return True
    return expected.denominator != 1 and abs(expected - given) <= tolerance


def _value(found: re.Match[str]) -> Fraction | None:
    if found["decimal"] is not None:
        return _scaled(found)
    if found["base"] is not None:
        return _power(found["base"], int(found["braced_power"] or found["power"]))
    if found["top"] is not None:
        return _mixed(found["whole"], found["top"], found["bottom"])
    if found["digit_top"] is not None:
        return _mixed(found["tex_whole"], found["digit_top"], found["digit_bottom"])
    value = _mixed(found["tex_whole"], found["tex_top"], found["tex_bottom"])
    return -value if value is not None and found["tex_sign"] else value


def _mixed(whole: str | None, top: str, bottom: str) -> Fraction | None:
    numerator, denominator = (int(Decimal(text)) for text in (top, bottom))
    if denominator == 0 or (whole is not None and numerator >= denominator):
        return None
    # Decimal first: int() refuses strings of more than 4300 digits.
    return (int(Decimal(whole)) if whole else 0) + Fraction(numerator, denominator)


def _power(written: str, power: int) -> Fraction | None:
    base = int(Decimal(written))  # int() refuses strings of more than 4300 digits.
    if base == 0 and power < 0:
        return None
    # More digits than anybody writes out are no plain number.
    return None if abs(power) * len(written) > LARGEST_EXPONENT else Fraction(base) ** power


def _scaled(found: re.Match[str]) -> Fraction:
    value = Fraction(Decimal(_digits(found["decimal"])))
    return value * _power_of_ten(_exponent(found)) * SCALES.get(found["scale"] or "", 1)


def _power_of_ten(exponent: int) -> Fraction:
    return Fraction(10**exponent) if exponent >= 0 else Fraction(1, 10**-exponent)


def _exponent(found: re.Match[str]) -> int:
    written = found["exponent"]
    if written is None:
        return 0
    return int(re.search(r"-?\d+\s*\}?$", written.replace("+", ""))[0].rstrip("} "))  # type: ignore[index]


def _half_unit(found: re.Match[str]) -> Fraction | None:
    written = found["decimal"]
    if written is None or "." not in written:
        return None
    digits = _digits(written)
    if len(digits.replace(".", "").lstrip("0")) < SIGNIFICANT:
        return None
    places = len(digits.partition(".")[2])
    return _power_of_ten(_exponent(found) - places) * SCALES.get(found["scale"] or "", 1) / 2


def _digits(written: str) -> str:
    return re.sub(r"[ ,'\u2019]", "", written)
