"""Files that are there whole or not at all."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Written beside the file and renamed: whoever reads it, or kills this, meets the old text or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, "utf-8")
    aside.replace(path)
