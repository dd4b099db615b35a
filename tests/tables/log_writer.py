"""What the crash tests run in a process: deterministic writes in a loop, to be killed at any moment.

It goes on from the last commit; the content after step s depends on s alone.
"""

from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from byrote.tables.log.log import RowLog

ROWS, BYTES = 400, 24
EVERY, SMALL = 3, {"budget": 2000, "segment_bytes": 3000}


def change(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    ids = rng.choice(ROWS // 2 if step % 5 else ROWS, 40, replace=False)
    return ids.astype(np.int64), rng.integers(0, 256, (40, BYTES), np.uint8)


def start(folder: Path) -> RowLog:
    if (folder / "log.json").exists() and list(folder.glob("manifest-*.json")):
        return RowLog.open(folder, **SMALL)
    (folder / "log.json").unlink(missing_ok=True)  # killed while it was being made
    return RowLog.create(folder, num_rows=ROWS, record_bytes=BYTES, digest="d", **SMALL)


def run(log: RowLog, steps: int) -> None:
    """Step s reads some of what is there, so that a wrong resumption shows in all that follows."""
    for step in range(log.generation, steps):
        ids, records = change(step)
        log.write(ids, records + log.read(ids)[1])
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            log.commit(step + 1)
            log.collect({step + 1, step + 1 - EVERY})


def content(log: RowLog) -> bytes:
    found, records = log.read(np.arange(ROWS))
    return found.tobytes() + records.tobytes()


def write_on(folder: Path, steps: int, tell: Connection) -> None:
    log = start(folder)
    tell.send("ready")
    run(log, steps)
