"""SIGINT and SIGTERM, noted and acted on between two steps; a second SIGINT ends the program at once."""

import signal
from types import FrameType, TracebackType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """`with Signals() as signals:`, then `signals.noted` is the name of the signal that came, or ""."""

    def __init__(self) -> None:
        self.noted = ""
        self._before: list[Any] = []

    def __enter__(self) -> "Signals":
        self.noted = ""
        try:
            self._before = [signal.signal(number, self._note) for number in NUMBERS]
        except ValueError:  # only the main thread may listen
            self._before = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in zip(NUMBERS, self._before, strict=False):
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = signal.Signals(number).name
