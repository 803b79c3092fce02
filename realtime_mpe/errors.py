"""The one exception that reaches people, and how it and every other remark are put before them."""

import sys
from collections.abc import Callable

drawn_in_place: list[Callable[[], None]] = []
"""Clear what is drawn over itself on a terminal, and have it drawn anew below whatever is written next."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the offending value and the way out."""


def tell(message: object, kind: str = "error") -> None:
    """One line on standard error, whatever a name in the message holds; standard output is kept for results."""
    for clear in drawn_in_place:
        clear()
    try:
        print(f"rt-mpe: {kind}: {' '.join(str(message).splitlines())}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # nobody listens there any more, and the work goes on
