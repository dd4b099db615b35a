"""A net with two widths in a few lines, for muP: tokens -> pairs of tokens pooled -> concepts -> back to tokens."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, BASE, STD = 32, 16, 0.1


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(self.norm(x))))


class TwoWidths(nn.Module):
    """`mup` False: s = 1 everywhere, the standard parametrization."""

    def __init__(self, token: int, concept: int, mup: bool, seed: int = 0) -> None:
        super().__init__()
        self.scales = {"token": token / BASE, "concept": concept / BASE} if mup else {"token": 1.0, "concept": 1.0}
        self.embedding = nn.Embedding(VOCABULARY, token)
        self.encoder, self.pool = SwiGLU(token), nn.Linear(token, concept, bias=False)
        self.trunk = SwiGLU(concept)
        self.norm, self.read = nn.RMSNorm(concept), nn.Linear(concept, token, bias=False)
        self.decoder, self.exit = SwiGLU(token), nn.RMSNorm(token)
        self.head = nn.Linear(token, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=STD / self.mup_groups()[name][1] ** 0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def mup_groups(self):
        groups = {}
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                groups[name] = ("others", 1.0)
            elif name.startswith(("embedding", "head")):
                groups[name] = ("embedding", 1.0)
            else:
                group = "concept" if name.startswith(("trunk", "read")) else "token"
                groups[name] = (group, self.scales[group])
        return groups

    def forward(self, ids, labels):
        x = self.embedding(ids)
        x = x + self.encoder(x)
        z = self.pool(x.unflatten(1, (-1, 2)).mean(dim=2))
        z = z + self.trunk(z)
        x = x + self.read(self.norm(z)).repeat_interleave(2, dim=1)
        x = x + self.decoder(x)
        logits = self.head(self.exit(x) / self.scales["token"])
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def make(width, *, varied, mup, seed=0):
    """The widths are `width` and BASE: `varied` says which is which, or both."""
    token, concept = (width if varied in (name, "both") else BASE for name in ("token", "concept"))
    ids = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed))
    return TwoWidths(token, concept, mup, seed), lambda step: {"ids": ids, "labels": ids.roll(1, 1)}
