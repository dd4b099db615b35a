"""The runtime that every model with a memory shares: tickets, pending row gradients, decode state."""

from byrote.memory.lookup import Ticket
from byrote.memory.memory import Memory
from byrote.memory.row_step import TableWarning
from byrote.memory.stack import MemoryStack
from byrote.memory.state import MemoryState, Sequence

__all__ = ["Memory", "MemoryStack", "MemoryState", "Sequence", "TableWarning", "Ticket"]
