"""The end of an error about an unknown name."""

from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """A question that names the known name nearest to an unknown one, or nothing.

    It begins with a space, so that it can be put behind any sentence.

    >>> suggest("TNET", ["source", "tent"])
    " Did you mean 'tent'?"
    >>> suggest("bench", ["source", "tent"])
    ''
    """
    import difflib  # here, because only an error needs it

    # Case counts for nothing: 'TENT' is as near to 'tent' as a name can be.
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" Did you mean '{folded[near[0]]}'?" if near else ""
