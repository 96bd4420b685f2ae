"""The one exception that users see: what was wrong, where, the numbers, and what to do about it."""


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
