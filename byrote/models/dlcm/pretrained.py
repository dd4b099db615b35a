"""What both DLCM classes share: initialization, and the groups of decoupled muP.

muP (2512.24617 section 6.1, equations 18 to 21): with s = width / d_base, of tokens or of concepts, a hidden matrix
starts at sigma / sqrt(s) and learns at rate / s; embeddings, gains and other vectors neither; logits are multiplied by
1 / s_token. The paper does not say which matrix belongs to which width. Here it is that of what the matrix reads: W_up
and the boundary's matrices are of the tokens, keys and values that tokens read of the concepts; rows of a memory are as
wide in every model, and what reads them neither starts nor learns in another way.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.stage import ConceptStage
from byrote.models.pretrained import MemoryPreTrainedModel
from byrote.nn.boundary import BoundaryHead

CONCEPT_SIDE = ("concepts.layers.", "concepts.read.k_proj.", "concepts.read.v_proj.")
EMBEDDINGS = ("embed_tokens.", "lm_head.")
# What reads neither width: a memory's matrices read rows, which are as wide in every model.
OTHERS = (".memory.", "_connection.", ".exit.")


class DLCMPreTrainedModel(MemoryPreTrainedModel):
    """What both DLCM classes share: how weights start, and the widths that muP scales them by."""

    config_class = DLCMConfig
    config: DLCMConfig
    _no_split_modules = ["TokenBlock", "ConceptBlock"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in every model (byrote.models.initialization), and

        the boundary's two matrices          the same orthonormal one (byrote.nn.boundary)
        what a document begins with          N(0, std^2), if anything
        """
        super()._init_weights(module)
        if isinstance(module, BoundaryHead) and module.query is not None and module.key is not None:
            start = module.start()
            init.copy_(module.query.weight, start)
            init.copy_(module.key.weight, start)
        elif isinstance(module, ConceptStage) and module.beginning is not None:
            init.normal_(module.beginning, mean=0.0, std=self._std(module))

    def mup_groups(self) -> dict[str, tuple[str, float]]:
        """Of each parameter: "embedding", "token", "concept" or "others", and its s (1 for embedding and others)."""
        groups = {}
        for name, parameter in self.named_parameters():
            if any(part in name for part in EMBEDDINGS):
                groups[name] = ("embedding", 1.0)
            elif parameter.dim() < 2 or any(part in name for part in OTHERS):
                groups[name] = ("others", 1.0)
            elif any(part in name for part in CONCEPT_SIDE):
                groups[name] = ("concept", self.config.concept_scale)
            else:
                groups[name] = ("token", self.config.token_scale)
        return groups

    def _mark_scales(self) -> None:
        """Tell each module the s that its matrices start with."""
        scales = {name.rpartition(".")[0]: scale for name, (_, scale) in self.mup_groups().items()}
        for name, module in self.named_modules():
            if scales.get(name, 1.0) != 1.0:
                module.mup_scale = scales[name]
