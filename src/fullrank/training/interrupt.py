"""Ctrl-C that waits for the step to finish."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupt:
    """Notes the first Ctrl-C instead of raising; the second one raises as usual.

    Parameters
    ----------
    waits
        False leaves Ctrl-C alone: there is nothing worth waiting for. So does a thread other
        than the main one, where Python delivers no signals.

    Attributes
    ----------
    wanted
        Whether Ctrl-C was pressed.
    """

    def __init__(self, waits: bool = True) -> None:
        self.wanted = False
        self._waits = waits and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._waits:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waits:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            signal.signal(signal.SIGINT, self._before)
            raise KeyboardInterrupt
        self.wanted = True
