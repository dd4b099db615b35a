"""`byrote generate`: continue a prompt."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Draft(StrEnum):
    """Who drafts tokens ahead: nobody, or the prediction modules."""

    none = "none"
    mtp = "mtp"


class Placement(StrEnum):
    """Where the rows of the tables live."""

    host = "host"
    device = "device"
    file = "file"


def generate(
    folder: Annotated[Path, typer.Argument(help="A run folder or any Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="How many new tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="Lower is surer.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest; 0: from all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest of this sum.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    placement: Annotated[Placement, typer.Option(help="Where tables are read.")] = Placement.host,
    cache: Annotated[str | None, typer.Option(help="With --placement file: RAM for hot rows, as 64MB.")] = None,
    draft: Annotated[Draft, typer.Option(help="mtp: let the model's prediction modules draft.")] = Draft.none,
) -> None:
    """Continue a prompt with a trained model."""
    if max_tokens < 1:
        raise ValueError(f"--max-tokens is {max_tokens}; it must be at least 1")
    if temperature <= 0:
        raise ValueError(f"--temperature is {temperature}; it must be above 0 (for the likeliest token: --greedy)")
    if top_k is not None and top_k < 0:
        raise ValueError(f"--top-k is {top_k}; it must be at least 1, or 0 for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if greedy and (top_k is not None or top_p is not None):
        raise ValueError("--top-k and --top-p choose what is drawn from, and --greedy draws nothing: leave one out")
    import torch
    from transformers import TextStreamer

    from byrote.cli.load import load
    from byrote.data.tokenizer import encode_prompt
    from byrote.models.configuration import MemoryConfig
    from byrote.models.engram import EngramForCausalLM
    from byrote.train.run import open_device

    place = open_device(device, "--device")
    model, tokenizer = load(folder, placement, cache)
    model.to(place)
    drafting = draft == Draft.mtp
    if drafting and not (isinstance(model, EngramForCausalLM) and model.model.mtp):
        raise ValueError(
            f"--draft mtp: {folder} has no modules that predict further tokens; train a model with "
            "model.num_nextn_predict_layers=1, as recipes/tiny-mtp.toml does, or leave --draft out"
        )
    ids = encode_prompt(tokenizer, prompt, document=isinstance(model.config, MemoryConfig))
    if not ids:
        raise ValueError("the prompt has no tokens: give some text to continue")
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=place)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampling = {name: value for name, value in sampling.items() if value is not None}
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
        counts, new = model.drafts, output.shape[1] - len(ids)
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
