"""Rows and nothing else: where they live, how they are stored, read, written and updated."""

from byrote.tables.codecs import CODECS, Codec
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.ram import RamTable
from byrote.tables.rules import LazyAdam, RowAdagrad, RowRule, SinkhornMomentum
from byrote.tables.table import Table

__all__ = ["CODECS", "Codec", "FileTable", "LazyAdam", "RamTable", "RowAdagrad", "RowRule", "SinkhornMomentum", "Table"]
