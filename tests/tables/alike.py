"""Tables that are to be alike: the same updates, the same files."""

import torch


def update_alike(tables, rule, steps):
    """Steps of some rows each, with the same gradients for all tables."""
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        rows = torch.randperm(tables[0].num_rows, generator=generator)[: 60 + number]
        gradient = torch.randn(len(rows), tables[0].width, generator=generator)
        for table in tables:
            table.update(rule, rows, gradient, 0.1)
            table.commit()


def assert_same_files(tables, folder):
    """Rows and state, byte by byte."""
    for i, table in enumerate(tables):
        table.save(folder / f"rows-{i}")
        table.save_state(folder / f"state-{i}")
    for kind in ("rows", "state"):
        assert len({(folder / f"{kind}-{i}").read_bytes() for i in range(len(tables))}) == 1
