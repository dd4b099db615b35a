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
    from byrote.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model_folder(folder))  # which takes less time to find damaged
    return load_model(folder, placement, cache), tokenizer


def load_model(folder: Path, placement: str = "host", cache: str | None = None) -> Any:
    """The model alone; ValueError that names the file where one is damaged or of another model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    import byrote  # noqa: F401  registers the models with the Auto classes
    from byrote.tables.files.headers import check_weights, parse_object

    logging.disable_progress_bar()
    found = model_folder(folder)
    for path in (found / "config.json", found / "generation_config.json"):  # transformers passes over a damaged one
        if path.exists():
            parse_object(path.read_bytes(), str(path))
    check_weights(found)
    try:
        config = AutoConfig.from_pretrained(found)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # Whatever is built from them, the fields of a config are the user's.
        raise ValueError(f"{found / 'config.json'} describes no model ({error!r})") from error
    places: dict[str, Any] = {}
    if placement != "host" or cache is not None:
        if not getattr(config, "memory_layers", []):
            raise ValueError(f"--placement and --cache are for tables, and {folder} is a model without any")
        places = {"placement": placement, "cache": cache}
    try:
        return AutoModelForCausalLM.from_pretrained(found, config=config, **places).eval()
    except (RuntimeError, TypeError, ValueError) as error:  # shapes of weights and config differ, or a field is no size
        if str(found) in str(error):
            raise
        raise ValueError(f"{found}: config.json and weights make no model ({error})") from error
