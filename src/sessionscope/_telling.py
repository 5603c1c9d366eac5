"""Telling observers what happened, without letting them hurt a unit of work."""

import logging
from collections.abc import Iterable

from sessionscope.events import Event, Observer
from sessionscope.exc import ConfigurationError

_log = logging.getLogger("sessionscope")


class Telling:
    """The observers of one Database."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = tuple(observers)
        for observer in self.observers:
            if not callable(observer):
                raise ConfigurationError(
                    f"observers has {observer!r}, which is not callable: write functions that "
                    "take an event of sessionscope.events"
                )
        self._failed: set[Observer] = set()

    def tell(self, event: Event) -> None:
        """Call every observer with *event*; log once for each one that raises."""
        for observer in self.observers:
            try:
                observer(event)
            except Exception:
                if observer not in self._failed:
                    self._failed.add(observer)
                    _log.exception("The observer %r failed; this is logged once", observer)
