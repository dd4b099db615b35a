"""What both Engram classes share: what must stay in float32."""

from __future__ import annotations

from byrote.models.engram.configuration import EngramConfig
from byrote.models.pretrained import MemoryPreTrainedModel


class EngramPreTrainedModel(MemoryPreTrainedModel):
    config_class = EngramConfig
    config: EngramConfig
    _no_split_modules = ["EngramBlock"]  # noqa: RUF012
