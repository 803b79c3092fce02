"""All sinks of a performance as one."""

from collections.abc import Callable, Sequence

from ..errors import UserError
from .base import NoteSink


class SinkGroup:
    """Tells every sink. One that fails is dropped with one line, by ``warn``; the others play on."""

    def __init__(self, sinks: Sequence[NoteSink], warn: Callable[[str], None]):
        self._sinks = list(sinks)
        self._warn = warn

    @property
    def abandoned(self) -> bool:
        """Whether nobody reads any of them any more: closed pipes, and nothing else."""
        return bool(self._sinks) and all(getattr(sink, "closed", False) for sink in self._sinks)

    def tell(self, method: str, *values: object) -> None:
        """Call a method of every sink by its name. UserError if no sink is left."""
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*values)
            except Exception as error:  # a sink may be anybody's code, and must not silence the others
                self._drop(sink, error)

    def _drop(self, sink: NoteSink, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(sink).__name__} failed ({error!r})"
        self._sinks.remove(sink)
        try:
            sink.close()
        except Exception as late:  # it may hold what was played so far: say where that is, or that it is lost
            reason = f"{reason}; {late}"
        if not self._sinks:
            raise UserError(f"{reason}; nothing is left to play to") from error
        self._warn(reason)
