"""`byrote table verify`: has a table file changed since its checksums were written?"""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import progress, terminal

SHOWN = 20  # damaged blocks, one a line


def verify(
    file: Annotated[Path, typer.Argument(help="A table file, of ours or released.")],
    write: Annotated[bool, typer.Option("--write", help="Write the checksums of the file as it is now.")] = False,
) -> None:
    """Compare a file with the checksums beside it (FILE.sums), block by block.

    Names the damaged blocks and the rows in them. Exit status 1 if there are any.
    With --write, what `byrote table info` refuses is refused.
    """
    from byrote.cli.table.info import tables_of
    from byrote.tables.files import checksums

    console = terminal()
    if write:
        tables_of(file)  # damage that is seen already gets no checksums
    with progress(console) as bar:
        task = bar.add_task(file.name, total=None)
        report = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        if write:
            target = checksums.write_sums(file, report)
        else:
            damaged = checksums.verify(file, report)
    if write:
        console.print(f"wrote {target}", soft_wrap=True)
        return
    for damage in damaged[:SHOWN]:
        rows = ", ".join(f"{name}: rows {first:,} to {last:,}" for name, (first, last) in damage.rows.items())
        where = f"block {damage.number:,}, bytes {damage.begin:,} to {damage.end - 1:,}"
        console.print(f"{where}: {rows or 'the header'}", soft_wrap=True)
    if len(damaged) > SHOWN:
        console.print(f"and {len(damaged) - SHOWN:,} more")
    if damaged:
        blocks = "1 damaged block" if len(damaged) == 1 else f"{len(damaged):,} damaged blocks"
        console.print(f"{file}: {blocks}; copy it again", style="bold red", soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"{file}: every block is as it was", soft_wrap=True)
