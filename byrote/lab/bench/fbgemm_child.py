"""FBGEMM's row-wise Adagrad as a process of its own: `PYTHON fbgemm_child.py ROWS WIDTH COUNT RATE`.

It runs in whatever environment has fbgemm-gpu-cpu, which may want another torch than ours, and imports nothing of
byrote. It answers each line that it reads: `step` -> seconds of a lookup, backward and update of COUNT random rows,
`row R` -> the values of row R, which began as zeros. Ids and gradients are drawn as `update_bench.py` draws them.
"""

from __future__ import annotations

import json
import sys
import time

import torch


def main() -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    num_rows, width, count = (int(text) for text in sys.argv[1:4])
    torch.set_num_threads(1)
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=float(sys.argv[4]),
        eps=1e-8,
    )
    table.init_embedding_weights_uniform(0.0, 0.0)  # written, so that every page is there
    generator = torch.Generator().manual_seed(0)
    weight, offsets = torch.randn(count, width, generator=torch.Generator().manual_seed(1)), torch.arange(count + 1)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("row"):
            values = table.split_embedding_weights()[0][int(line.split()[1])]
            print(json.dumps(values.tolist()), flush=True)
            continue
        ids = torch.randint(0, num_rows, (count,), generator=generator)
        began = time.perf_counter()
        table(ids, offsets).backward(weight)  # bags of one row; the update is part of the backward
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
