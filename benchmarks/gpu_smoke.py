"""What a GPU must show first, in at most six minutes on one card: is everything right there, and about how fast is it?

    python benchmarks/gpu_smoke.py --out runs/gpu-smoke [--device cuda] [--quick]        or: make gpu-smoke

Each part runs in a process of its own with a limit of its own, so that one that fails or hangs hides no other. What
they find is in OUT/report.json and in one table; what they print, in OUT/PART.log.

    exact      addresses and cached logits against the CPU's and the full forward's, in float32 and in bfloat16
    step       a training step of Engram (one and four streams) and of DLCM with a memory: losses, dense parameters
               and rows against the CPU's
    placement  pinned and device tables against tables in RAM; the Triton gather against its twin; varlen attention
    training, decode    ratios at the preset small in bfloat16 (benchmarks/training.py, benchmarks/decode.py)
    pinned     an 8-bit table of 8 B parameters in pinned memory beside a dense model of 4 B, against none
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from byrote import DLCMConfig, DLCMForCausalLM, EngramConfig, EngramForCausalLM
from byrote.train import Optimizer

ROOT = Path(__file__).parents[1]
LIMITS = {"exact": 90, "step": 45, "placement": 60, "training": 60, "decode": 45, "pinned": 60}  # seconds: 6 minutes
# In bfloat16 a router may send a token to another expert for a difference in the last bit, so nine logits in ten count.
BFLOAT16, COUNTED = 0.06, 0.9
MEMORY = {"memory_layers": [1], "memory_table_sizes": [1009, 1013]}


@dataclass(frozen=True)
class Check:
    """One number and its bound; `ok` if it is no greater."""

    what: str
    found: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.found <= self.bound


def models() -> dict[str, Any]:
    """Small models of every kind, with weights that let every part of them speak."""
    made = {
        "Engram": EngramForCausalLM(EngramConfig(**MEMORY)),
        "Engram, four streams": EngramForCausalLM(EngramConfig(num_streams=4, num_nextn_predict_layers=1, **MEMORY)),
        "DLCM with a memory": DLCMForCausalLM(DLCMConfig(**MEMORY | {"memory_layers": [0]})),
    }
    for model in made.values():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 or "conv" in name:
                    parameter.normal_(0, 0.05, generator=generator)
    return made


def tokens(model: Any, rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def apart(a: torch.Tensor, b: torch.Tensor, counted: float = 1.0) -> float:
    """The greatest of the `counted` share of least differences, as a share of the spread of `b`."""
    differences = (a.float().cpu() - b.float().cpu()).abs().flatten()
    return float(differences.quantile(counted) / b.float().std().cpu())


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
    """Of one forward; or of forwards over `sizes` tokens each, with one cache."""
    if sizes is None:
        return model(input_ids=ids).logits
    cache = DynamicCache(config=model.config)
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)


def exact(device: str) -> Iterator[Check]:
    for name, model in models().items():
        model, ids = model.eval(), tokens(model)
        expected, there = logits(model, ids), copy.deepcopy(model).to(device)
        yield Check(f"{name}, float32: logits against the CPU's", apart(logits(there, ids.to(device)), expected), 1e-4)
        for dtype, bound, counted in ((torch.float32, 1e-4, 1.0), (torch.bfloat16, BFLOAT16, COUNTED)):
            there = copy.deepcopy(model).to(device, dtype)
            whole = logits(there, ids.to(device))
            for what, sizes in {"token by token": [1] * ids.shape[1], "in chunks": [17, 1, 5, 25]}.items():
                found = apart(logits(there, ids.to(device), sizes), whole, counted)
                yield Check(f"{name}, {str(dtype).removeprefix('torch.')}: {what} against whole", found, bound)


def step(device: str) -> Iterator[Check]:
    for name, model in models().items():
        ids, copies = tokens(model), [model, copy.deepcopy(model).to(device)]
        losses, rows = [], []
        for each in copies:
            place = next(each.parameters()).device
            optimizer = Optimizer(each.train(), lr=1e-3)
            torch.manual_seed(0)
            loss = each(input_ids=ids.to(place), labels=ids.to(place)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            table = each.memory_stack.items()[0][1].table
            rows.append(table.read(torch.arange(table.num_rows)))
        yield Check(f"{name}: loss", abs(float(losses[0]) - float(losses[1])), 1e-4)
        dense = zip(copies[0].named_parameters(), copies[1].parameters(), strict=True)
        worst = max(float((a.detach().cpu() - b.detach().cpu()).abs().max()) for (_, a), b in dense)
        yield Check(f"{name}: dense parameters after a step", worst, 2e-3)  # two steps of Adam apart at most
        same = float(((rows[0] - rows[1]).abs() > 1e-3).float().mean())
        yield Check(f"{name}: share of rows' values that moved otherwise", same, 1e-3)


def placement(device: str) -> Iterator[Check]:
    model = models()["Engram"].eval()
    ids = tokens(model)
    expected = logits(copy.deepcopy(model).to(device), ids.to(device))
    for word in ("device", "pinned") if device == "cuda" else ("device",):
        moved = copy.deepcopy(model)
        for (_, memory), (_, own) in zip(moved.memory_stack.items(), model.memory_stack.items(), strict=True):
            memory.table = own.table  # a table in RAM, which can be moved
        moved.memory_stack.move(word, device)
        yield Check(f"{word} against host", apart(logits(moved.to(device), ids.to(device)), expected), 0.0)
    files = ["tests/tables/test_pinned.py", "tests/tables/test_device.py", "tests/nn/test_concept_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    found = subprocess.run(command, cwd=ROOT)
    yield Check("tests of kernels, placements and varlen (exit status; 5: none collected)", found.returncode, 0)


def parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Each part's command line."""
    here, python = str(Path(__file__).resolve()), sys.executable
    shape = "tiny" if options.quick else "small"
    measure = ["--device", options.device, "--dtype", "bfloat16", *(["--quick"] if options.quick else [])]
    made = {name: [python, here, "--part", name, "--device", options.device] for name in CHECKS}
    for name, extra in {
        "training": ["--shape", shape, "--batch", "16", "--turns", "5"],
        "decode": ["--shape", shape, "--turns", "5"],
        "pinned": ["--billions", "8", "--turns", "3"],
    }.items():
        result = str(options.out / f"{name}.json")
        made[name] = [python, str(ROOT / f"benchmarks/{name}.py"), *measure, *extra, "--json", result]
    return made


CHECKS: dict[str, Callable[[str], Iterator[Check]]] = {"exact": exact, "step": step, "placement": placement}


def check(name: str, device: str, result: Path) -> None:
    """Run the checks of one part and write what they find, also when one of them fails."""
    found: list[Check] = []
    try:
        for one in CHECKS[name](device):
            found.append(one)
            print(f"{'ok ' if one.ok else 'NOT'} {one.what}: {one.found:.3g}, at most {one.bound:g}", flush=True)
    finally:
        lines = [asdict(one) | {"ok": one.ok} for one in found]
        result.write_text(json.dumps({"lines": lines}) + "\n")


def run(name: str, command: list[str], out: Path, limit: float) -> dict[str, Any]:
    """What became of one part: ok, seconds, an error in words, and the lines it measured."""
    result, began = out / f"{name}.json", time.perf_counter()
    result.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    error = ""
    with open(out / f"{name}.log", "w") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=environment, timeout=limit)
            error = "" if done.returncode == 0 else f"exit status {done.returncode}, see {name}.log"
        except subprocess.TimeoutExpired:
            error = f"not done after {limit:.0f} s"
    lines = json.loads(result.read_text())["lines"] if result.exists() else []
    ok = not error and bool(lines) and all(line.get("ok", True) for line in lines)
    return {"ok": ok, "seconds": round(time.perf_counter() - began, 1), "error": error, "lines": lines}


def show(card: str, found: dict[str, dict[str, Any]]) -> None:
    table = Table("part", "", "seconds", "what", title=f"{card}, torch {torch.__version__}")
    for name, part in found.items():
        failed = [line["what"] for line in part["lines"] if not line.get("ok", True)]
        said = [
            f"{line['what']}: {line['ratio']['median']:.2f}x {line['verdict']}"
            for line in part["lines"]
            if line.get("ratio")
        ]
        told = failed or said or ([f"{len(part['lines'])} checks"] if part["ok"] else [])
        table.add_row(name, "ok" if part["ok"] else "FAILED", str(part["seconds"]), "\n".join([*told, part["error"]]))
    Console(width=140).print(table, markup=False)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    made.add_argument("--out", type=Path, default=Path("runs/gpu-smoke"), help="folder of the report and the logs")
    made.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    made.add_argument("--part", choices=sorted(CHECKS), help=argparse.SUPPRESS)
    options = made.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return check(options.part, options.device, options.out / f"{options.part}.json")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this is what a GPU must show first; --device cpu --quick is a dry run")
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    commands, found = parts(options), {}
    for name, command in commands.items():
        command = command if "--json" in command else [*command, "--out", str(options.out)]
        found[name] = run(name, command, options.out, LIMITS[name])
        content = {"card": card, "torch": torch.__version__, "quick": options.quick, "parts": found}
        (options.out / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    show(card, found)
    raise SystemExit(not all(part["ok"] for part in found.values()))


if __name__ == "__main__":
    main()
