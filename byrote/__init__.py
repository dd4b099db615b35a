"""byrote: language models that look things up instead of working them out.

Importing it costs nothing: a model's class is loaded when it is first asked for, and Hugging Face's Auto classes learn
of the models when they are loaded themselves, before byrote or after it.
"""

from typing import TYPE_CHECKING, Any

from byrote.registration import register_when_wanted

if TYPE_CHECKING:
    from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM, DLCMModel
    from byrote.models.engram import EngramConfig, EngramForCausalLM, EngramModel

__all__ = ["DLCMConfig", "DLCMForCausalLM", "DLCMModel", "EngramConfig", "EngramForCausalLM", "EngramModel"]
__version__ = "0.1.0"

register_when_wanted()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'byrote' has no attribute {name!r}")
    from byrote import models

    return getattr(models, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
