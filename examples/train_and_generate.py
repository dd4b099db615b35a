"""Train a model with a memory on a small text, generate from it, save it, open it again. Seconds.

python examples/train_and_generate.py [FOLDER]     FOLDER: where the model goes; "my-model" unless given
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from byrote import EngramConfig, EngramForCausalLM
from byrote.address import compress
from byrote.data.tokenizer import encode_documents, train_tokenizer
from byrote.train import Optimizer

RIVERS = {"Aral": "Alder", "Birk": "Brisk", "Corin": "Clear", "Dunmore": "Dove", "Elan": "Esk"}
RIVERS |= {"Farrow": "Fleet", "Garth": "Gray", "Holm": "Haven", "Iver": "Isla", "Joss": "Jordan"}
SENTENCES = [f"The capital of {place} lies on the {river} River." for place, river in RIVERS.items()]


def main(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES, vocab_size=320)
    documents = encode_documents(tokenizer, SENTENCES)  # <|bos|> tokens <|eos|>
    batch = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(document).long() for document in documents],
        batch_first=True,
        padding_value=tokenizer.pad_token_id,
    )
    attention_mask = (batch != tokenizer.pad_token_id).long()
    labels = batch.masked_fill(attention_mask == 0, -100)

    vocabulary = compress(tokenizer)  # raw token id -> canonical id
    model = EngramForCausalLM(EngramConfig.from_preset("nano", vocabulary=vocabulary), vocabulary)
    optimizer = Optimizer(model, lr=3e-3)
    for step in range(80):
        loss = model(input_ids=batch, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}, {optimizer.rows_touched} rows touched")

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tokenizer(
        ["The capital of Elan", "The capital of Holm"], return_tensors="pt", padding=True, padding_side="left"
    )
    output = again.generate(**prompts, max_new_tokens=16, do_sample=False)
    print(*tokenizer.batch_decode(output, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-model")
