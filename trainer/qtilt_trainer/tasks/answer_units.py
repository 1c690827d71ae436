"""Units, currencies and degrees beside a number: told from it, each with one name."""

import re

from qtilt_trainer.tasks.latex_text import DEGREES
from qtilt_trainer.tasks.plain_numbers import plain_number

CURRENCY = re.compile(r"(?:\\?\$|\u20ac|\u00a3|\\pounds(?![A-Za-z]))")
PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:percent(?:age)?|per cent|pct)\s*\}?)$")
TEXT_UNIT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$")
WORD_UNIT = re.compile(r"(?<=[\d}])\s+([A-Za-z]{2,}(?:[ /][A-Za-z]+)*)\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$")
DEGREE_UNIT = re.compile(rf"{DEGREES.pattern}\s*(?:\\text\s*\{{\s*)?([CF]?)\s*\}}?$")
SHORT_UNITS = {
    "cm",
    "mm",
    "km",
    "kg",
    "mg",
    "lb",
    "lbs",
    "oz",
    "ft",
    "in",
    "hr",
    "hrs",
    "ml",
    "mph",
    "kph",
    "min",
    "sec",
    "pm",
    "am",
    "deg",
}
UNIT_NAMES = {
    "dollar": "$",
    "usd": "$",
    "euro": "\u20ac",
    "eur": "\u20ac",
    "pound": "lb",
    "hr": "hour",
    "min": "minute",
    "centimeter": "cm",
    "centimetre": "cm",
    "millimeter": "mm",
    "millimetre": "mm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "kilogram": "kg",
    "gram": "g",
    "sec": "second",
    "deg": "degree",
    "inche": "inch",
    "in": "inch",
    "foot": "feet",
    "ft": "feet",
    "unit": "",
    "sq unit": "",
    "square unit": "",
    "cubic unit": "",
}


def without_unit(text: str) -> tuple[str, str | None]:
    """What is left without the unit, and the unit's one name; None without a unit."""
    currency = CURRENCY.search(text)
    if currency:
        text = CURRENCY.sub("", text).strip()
        name = {"\\$": "$", "\\pounds": "\u00a3"}.get(currency.group(), currency.group())
        return without_unit(text)[0], name
    degree = DEGREE_UNIT.search(text)
    if degree and degree.start() > 0:
        return text[: degree.start()].strip(), "degree" + degree[1].casefold()
    found = TEXT_UNIT.search(text)
    if found and found.start() > 0 and not PERCENT.search(text):
        return text[: found.start()].strip(), _unit_name(found[1], found[2])
    found = WORD_UNIT.search(text)
    if found and _is_unit(found[1]) and plain_number(text[: found.start()].strip()) is not None:
        return text[: found.start()].strip(), _unit_name(found[1], found[2])
    return text, None


def _is_unit(word: str) -> bool:
    if PERCENT.fullmatch(word):
        return False
    first = word.split()[0].casefold()
    return first in SHORT_UNITS or len(first) > 3


def _unit_name(written: str, power: str | None) -> str | None:
    name = written.strip().strip(".").casefold()
    singular = name if name.endswith("ss") or "/" in name or len(name) < 3 else name.removesuffix("s")
    name = UNIT_NAMES.get(name, UNIT_NAMES.get(singular, singular))
    return (name + (f"^{power}" if power else "")) or None
