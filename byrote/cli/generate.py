"""`byrote generate`: continue a prompt."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    folder: Annotated[Path, typer.Argument(help="A run folder or any Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="How many new tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="Lower is surer.")] = 0.8,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens is {max_tokens}; it must be at least 1")
    if temperature <= 0:
        raise ValueError(f"--temperature is {temperature}; it must be above 0 (for the likeliest token: --greedy)")
    import torch
    from transformers import TextStreamer

    from byrote.cli.models import load

    model, tokenizer = load(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    sampling = {} if greedy else {"temperature": temperature}
    shown = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=not greedy, streamer=shown, **sampling)
    if not stream:
        typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))
