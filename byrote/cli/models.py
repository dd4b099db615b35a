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


def load(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import byrote  # noqa: F401  registers the model with the Auto classes

    logging.disable_progress_bar()
    found = model_folder(folder)
    return AutoModelForCausalLM.from_pretrained(found).eval(), AutoTokenizer.from_pretrained(found)
