"""`byrote generate`: continue a prompt."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Draft(StrEnum):
    none = "none"
    mtp = "mtp"


class Placement(StrEnum):
    host = "host"
    device = "device"
    file = "file"


def generate(
    folder: Annotated[Path, typer.Argument(help="A run folder or any Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="How many new tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="Lower is surer.")] = 0.8,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    placement: Annotated[Placement, typer.Option(help="Where tables are read.")] = Placement.host,
    cache: Annotated[str | None, typer.Option(help="With --placement file: RAM for hot rows, as 64MB.")] = None,
    draft: Annotated[Draft, typer.Option(help="mtp: let the model's prediction modules draft.")] = Draft.none,
) -> None:
    """Continue a prompt with a trained model."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens is {max_tokens}; it must be at least 1")
    if temperature <= 0:
        raise ValueError(f"--temperature is {temperature}; it must be above 0 (for the likeliest token: --greedy)")
    import torch
    from transformers import TextStreamer

    from byrote.cli.load import load
    from byrote.models.engram import EngramForCausalLM

    model, tokenizer = load(folder, placement, cache)
    drafting = draft == Draft.mtp
    if drafting and not (isinstance(model, EngramForCausalLM) and model.model.mtp):
        raise ValueError(
            f"--draft mtp: {folder} has no modules that predict further tokens; train a model with "
            "model.num_nextn_predict_layers=1, as recipes/tiny-mtp.toml does, or leave --draft out"
        )
    inputs = tokenizer(
        prompt, return_tensors="pt", return_token_type_ids=False, split_special_tokens=True
    )  # as in training: text that spells a special token is text
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {} if greedy else {"temperature": temperature}
    shown = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    if drafting:
        sampling["use_mtp"] = True
    began = time.perf_counter()
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=not greedy, streamer=shown, **sampling)
    seconds = time.perf_counter() - began
    if placement is Placement.file:
        typer.echo(_reads(model.memory_stack), err=True)
    if not stream:
        typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))
    if drafting:
        counts, new = model.drafts, output.shape[1] - inputs["input_ids"].shape[1]
        share = counts.accepted / max(1, counts.drafted)
        typer.echo(
            f"drafts: {counts.accepted} of {counts.drafted} accepted ({share:.0%}), "
            f"{new / counts.forwards:.2f} tokens a forward, {new / seconds:.1f} tokens/s"
        )


def _reads(stack: Any) -> str:
    """What was read of tables in files, how long it took and how much of that was waited for."""
    memories = [] if stack is None else [memory for _, memory in stack.items()]
    if not memories:
        return "tables: none"
    read, waited = stack.read_times()
    text = f"tables: reads took {read:.3f} s, {1 - waited / read if read else 0:.0%} of it hidden"
    if all("hits" in memory.table.stats() for memory in memories):
        found = [memory.table.stats() for memory in memories]
        hits = sum(stats["hits"] for stats in found) / len(found)  # each is asked for as many rows
        fetched = sum(stats["bytes_fetched"] for stats in found)
        text += f"; {hits:.0%} of the rows were in the cache, {fetched:,} bytes came from files"
    return text
