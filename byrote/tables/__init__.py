"""Rows and nothing else: where they live, how they are read, written and updated."""

from byrote.tables.ram import RamTable
from byrote.tables.rules import LazyAdam
from byrote.tables.table import Table

__all__ = ["LazyAdam", "RamTable", "Table"]
