"""A thread that packs batches ahead of the training loop.

What is resumed is the number of batches that the loop has taken. Batches that lie ready but were not
taken are packed again: a batch is a function of its number (packing.py), so the resumed run sees exactly
what the uninterrupted one would have.
"""

import threading
from collections.abc import Callable, Iterator
from queue import Full, Queue

from byrote.data.packing import Batch, Packer


class Loader:
    """Iterates over batches forever. `ahead`: how many lie ready at most; 0 packs in the caller's thread.

    `prepare(batch)` is called on the thread with each batch before it lies ready, to fetch what its step will need; it
    must change nothing.
    """

    def __init__(self, packer: Packer, ahead: int = 4, prepare: Callable[[Batch], None] | None = None):
        self.packer, self.ahead, self.prepare = packer, ahead, prepare
        self.taken = 0
        self._queue: Queue[Batch | Exception] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self.ahead:
            batch = self.packer.batch(self.taken)
        else:
            if self._thread is None:
                self._start()
            assert self._queue is not None
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            batch = item
        self.taken += 1
        return batch

    def state_dict(self) -> dict[str, int | str | list[int]]:
        return {"taken": self.taken, "stream": self._stream(), "corpus": self.packer.data.fingerprint}

    def load_state_dict(self, state: dict[str, int | str | list[int]]) -> None:
        if state["stream"] != self._stream():
            raise ValueError(
                f"the checkpoint read another stream: (seed, rows, length, tokens) were {state['stream']} "
                f"and are {self._stream()}. Resume with the recipe and the data that the run began with."
            )
        corpus = self.packer.data.fingerprint
        if state.get("corpus", corpus) != corpus:
            raise ValueError(
                f"the checkpoint read another text or tokenizer: the corpus had the fingerprint {state['corpus']} and "
                f"has {corpus}. Resume with the text that the run began with, or start a new run."
            )
        self.close()
        assert isinstance(state["taken"], int)
        self.taken = state["taken"]

    def close(self) -> None:
        """Stop the thread; batches that lie ready are dropped."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _stream(self) -> list[int]:
        packer = self.packer
        return [packer.seed, packer.batch_size, packer.length, len(packer.data)]

    def _start(self) -> None:
        self._queue, self._stop = Queue(maxsize=self.ahead), threading.Event()
        arguments = (self._queue, self._stop, self.taken)
        self._thread = threading.Thread(target=self._pack, args=arguments, daemon=True)
        self._thread.start()

    def _pack(self, queue: "Queue[Batch | Exception]", stop: threading.Event, number: int) -> None:
        while not stop.is_set():
            try:
                batch = self.packer.batch(number)
                if self.prepare is not None:
                    self.prepare(batch)
                item: Batch | Exception = batch
            except Exception as error:
                item = error
            while not stop.is_set():
                try:
                    queue.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            number += 1
