"""The one exception that users see: what was wrong, where, the numbers, and what to do about it."""

#: why what a model computes may be no numbers, and what to do about it
NO_NUMBERS = (
    "weights of the model are no numbers, or what it computes overflows its number format. Mend its weights, or save it in "
    "bfloat16 or float32."
)


class UserError(Exception):
    """Bad input or a request that cannot be met; the command line prints it without a traceback and exits with 2."""


class LossError(UserError):
    """A training whose loss is no number."""


class UntriedError(UserError):
    """What an axis loses cannot be measured here, so sizes cannot be chosen by it."""


def nearest(name: str, known: list[str]) -> str:
    """Return the hint that follows an unknown name: the nearest valid one, then all of them."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known))}."
