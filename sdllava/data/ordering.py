"""The order of names with numbers in them."""

import re


def natural_key(text: str) -> list[int | str]:
    """Sort key that compares runs of digits as numbers, so that `val_2` comes before `val_10`.

    Returns:
        `list[int | str]`: Text and numbers in turn. The first element is always text, possibly empty.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
