"""What strangers wrote into files, read with bounds and shown without harm."""

import json
import math
from typing import Any

from ldm.errors import ModelError

DIGITS = 20  # of the longest whole number that is read: seeds of other tools have 64 bits


def json_object(text: str, what: str, *, largest: int = 4_000_000, lenient: bool = False) -> dict[str, Any]:
    """The JSON object of a text that may be hostile. lenient: numbers that are not finite become None.

    ModelError, naming `what`: over `largest` characters, no JSON object, nested too deeply, a whole number of over 20
    digits, or a number that is not finite.
    """

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise ValueError("it has a whole number of over 20 digits")
        return int(digits)

    def real(digits: str) -> float | None:
        number = float(digits)
        if math.isfinite(number):
            return number
        if lenient:
            return None
        raise ValueError("it has a number that is not finite")

    if len(text) > largest:
        raise ModelError(f"{what} has {len(text):,} characters; at most {largest:,} are read")
    try:
        value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=real)
    except RecursionError:
        raise ModelError(f"{what} is nested too deeply to be read") from None
    except ValueError as error:
        raise ModelError(f"{what} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def brief(value: Any) -> str:
    """A stranger's value for a sentence: quoted, short, and with nothing in it that a terminal would obey."""
    text = f"a JSON {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
