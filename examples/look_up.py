"""What the memory of a trained model looks up: canonical ids, windows, row ids, rows.

python examples/look_up.py FOLDER TEXT     FOLDER: such as examples/train_and_generate.py writes
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import byrote  # noqa: F401  registers the model with the Auto classes
from byrote.address import DEAD, canonical_ids, hash_windows, windows


def main(folder: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    memories = AutoModelForCausalLM.from_pretrained(folder).model.memories
    spec = memories.spec
    print(f"contract {spec.contract}, orders {list(spec.orders)}, {spec.heads} heads, digest {spec.digest}")
    print(f"{spec.vocab_size} token ids in {spec.compressed_vocab_size} classes\n")

    raw = tokenizer(text, return_tensors="pt").input_ids
    ids = canonical_ids(memories.vocabulary, raw)
    starts = torch.zeros_like(raw, dtype=torch.bool)
    starts[:, 0] = True  # one document, and nothing before it
    window = windows(ids, starts, None, spec.max_order)
    for layer_id, memory in memories.items():
        layer = spec.layer(layer_id)
        row_ids = hash_windows(window, layer, spec.pad_id)
        rows = memory.table.read(row_ids)
        print(f"layer {layer_id}: {layer.rows} rows of {memory.table.width}, primes {layer.primes}")
        print(f"{'token':>10} {'raw':>4} {'id':>4} {'window':>15} {'row ids':>22}   norm of each row")
        for t, token in enumerate(tokenizer.convert_ids_to_tokens(raw[0])):
            places = " ".join("-" if place == DEAD else str(place) for place in window[0, t].tolist())
            numbers = " ".join(map(str, row_ids[0, t].tolist()))
            norms = " ".join(f"{norm:.2f}" for norm in rows[0, t].norm(dim=-1))
            print(f"{token:>10} {int(raw[0, t]):4} {int(ids[0, t]):4} {places:>15} {numbers:>22}   {norms}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
