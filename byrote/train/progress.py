"""Live progress of a run: one moving line on a terminal, a line now and then elsewhere (a log, CI)."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10  # of a run, where there is no terminal
SECONDS = 10  # between two lines of an evaluation there


class Shown:
    """What is seen of `bar` while the block runs."""

    bar: Progress
    console: Console

    def say(self, text: str) -> None:
        """A line as it is: names of runs and corpora are the user's, and no markup."""
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class Live(Shown):
    """`with Live(console, name, steps) as live:` and hand `live.report` and `live.evaluating` to the Trainer."""

    def __init__(self, console: Console, name: str, steps: int = 0):
        self.console, self.name, self.steps = console, name, steps
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(name, total=steps, facts="", visible=steps > 0)
        self.evaluation = self.bar.add_task(f"{name}, evaluation", facts="", visible=False)
        self.said = time.monotonic()

    def report(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if "val_loss" in record:
            bits = f", {record['bits_per_byte']:.4f} bits per byte" if record["bits_per_byte"] else ", on a part"
            self.say(f"{self.name} step {step}: validation loss {record['val_loss']:.4f}{bits}")
            return
        facts = f"loss {record['loss']:.3f} lr {record['lr']:.1e} {record['tokens_per_second']:,.0f} tok/s"
        if record.get("tokens_per_concept"):
            facts += f" {record['tokens_per_concept']:.2f} tok/concept"
        if record.get("rows_touched"):
            facts += f" {record['rows_touched']:,} rows"
        self.bar.update(self.task, completed=step, facts=facts)
        if not self.console.is_terminal and (step == 1 or step % max(1, self.steps // LINES) == 0):
            left = record["seconds"] / step * (self.steps - step)
            self.say(f"{self.name} {step}/{self.steps} {facts}, about {left:.0f} s left")

    def evaluating(self, done: int, total: int) -> None:
        self.bar.update(self.evaluation, completed=done, total=total, visible=done < total)
        if done in (0, total):
            self.said = time.monotonic()
        elif not self.console.is_terminal and time.monotonic() - self.said > SECONDS:
            self.say(f"{self.name}, evaluation: {done} of {total} batches")
            self.said = time.monotonic()


class DataLive(Shown):
    """The same for the preparation of a corpus; its `report` is that of `byrote.data.prepare`."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=12), MofNCompleteColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def report(self, what: str, done: int, total: int) -> None:
        if not total:
            self.say(f"{self.name}: {what}")
            return
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(f"{self.name}: {what}", total=total)
            if not self.console.is_terminal:
                self.say(f"{self.name}: {what}")
        self.bar.update(self.tasks[what], completed=done)
