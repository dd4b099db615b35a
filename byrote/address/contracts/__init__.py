"""The rules by which families of models compute addresses, one file a contract: a builder, and what it promises."""

from byrote.address.contracts.deepseek_v41 import deepseek_v41
from byrote.address.contracts.engram import check, engram
from byrote.address.spec import CONTRACTS, Contract

CONTRACTS |= {"engram": Contract(engram, check), "deepseek_v41": Contract(deepseek_v41, check)}

__all__ = ["CONTRACTS", "deepseek_v41", "engram"]
