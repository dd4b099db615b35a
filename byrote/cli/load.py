"""What several verbs do: find the model of a run folder, or of any Hugging Face folder, and load it."""

from pathlib import Path
from typing import Any


def model_folder(folder: Path) -> Path:
    """A Hugging Face folder itself; of a run folder, its newest checkpoint."""
    from byrote.train.checkpoint import latest

    if (folder / "config.json").exists():
        return folder
    if (folder / "checkpoints").is_dir():
        return latest(folder)
    raise ValueError(f"{folder} is neither a run folder nor a Hugging Face model folder (it has no config.json)")


def load(folder: Path, placement: str = "host", cache: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import byrote  # noqa: F401  registers the models with the Auto classes

    logging.disable_progress_bar()
    found = model_folder(folder)
    places: dict[str, Any] = {}
    if placement != "host" or cache is not None:
        if not getattr(AutoConfig.from_pretrained(found), "memory_layers", []):
            raise ValueError(f"--placement and --cache are for tables, and {folder} is a model without any")
        places = {"placement": placement, "cache": cache}
    return AutoModelForCausalLM.from_pretrained(found, **places).eval(), AutoTokenizer.from_pretrained(found)
