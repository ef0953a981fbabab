"""Numbers in one spelling, for comparisons that must not miss: 一九九八 and 1998, 三千 and 3,000 and 3000 are the same.

Runs of two or more Chinese numerals are read: digits one after another as such, with 十, 百, 千, 万 or 亿 by value. A lone
numeral stays, since 一 and 万 are parts of many words. EM and F1 do not fold numbers, so that figures stay comparable.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["fold_numbers"]

DIGITS = {letter: value for value, letter in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000}
MYRIADS = {"万": 10**4, "亿": 10**8}
_NUMERAL = re.compile(f"[{''.join((*DIGITS, *UNITS, *MYRIADS))}]{{2,}}")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")


def fold_numbers(text: str) -> str:
    """一九九八年 → 1998年, 三千 → 3000, 3,000 → 3000, １２ → 12; all else but full-width letters stays."""
    text = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), unicodedata.normalize("NFKC", text))
    return _NUMERAL.sub(lambda found: _value(found.group()), text)


def _value(numeral: str) -> str:
    if all(letter in DIGITS for letter in numeral):
        return "".join(str(DIGITS[letter]) for letter in numeral)
    if not any(letter in DIGITS or letter == "十" for letter in numeral):
        return numeral  # 千万, 百万: "by all means" as often as a number
    whole = part = digit = 0
    for letter in numeral:
        if letter in DIGITS:
            digit = DIGITS[letter]
        elif letter in UNITS:
            part, digit = part + (digit or 1) * UNITS[letter], 0
        else:
            whole, part, digit = (whole + part + digit) * MYRIADS[letter], 0, 0
    return str(whole + part + digit)
