# SPDX-License-Identifier: Apache-2.0
"""SnapKV's decision by the operator beside the same in torch: what each costs for one layer, in
alternating runs, and how many of the kept tokens are the same."""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # llama3_8b


def snapkv(queries, keys, kept, window, pool):
    """Positions [kv_head, kept]: the last `window`, and the best of the others."""
    kv_heads, tokens, dim = keys.shape[1:]
    rows = queries.reshape(1, kv_heads, -1, dim)  # the query heads of a KV head share one product
    logits = (rows @ keys.transpose(-1, -2)).float().view(1, kv_heads, -1, window, tokens)
    logits *= dim**-0.5
    hidden = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:].masked_fill_(hidden, float("-inf"))
    scores = logits.softmax(-1)[..., :-window].sum((2, 3))
    scores = F.avg_pool1d(scores, pool, stride=1, padding=pool // 2)
    best = scores.topk(kept - window, dim=-1).indices[0]
    recent = torch.arange(tokens - window, tokens).expand(kv_heads, -1)
    return torch.cat([best, recent], dim=-1)


def measure(works, runs):
    """Median milliseconds of each, in alternating runs."""
    times = [[] for _ in works]
    for _ in range(runs + 1):
        for work, into in zip(works, times):
            start = time.perf_counter()
            work()
            into.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(each[1:]) for each in times]  # the first run warms up


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--library", required=True)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    options.add_argument("--window", type=int, default=32)
    options.add_argument("--pool", type=int, default=5)
    options.add_argument("--runs", type=int, default=9)
    given = options.parse_args()
    torch.ops.load_library(given.library)
    torch.manual_seed(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("type     tokens  torch ms  refreekv ms  ratio  same tokens")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in given.tokens:
            queries = torch.randn(1, Q_HEADS, given.window, HEAD_DIM).to(dtype)
            keys = torch.randn(1, KV_HEADS, tokens, HEAD_DIM).to(dtype)
            kept = tokens // 2

            def ours():
                return torch.ops.refreekv.select_snapkv(
                    queries,
                    keys,
                    layer=2,
                    budget=kept,
                    window=given.window,
                    pool="average",
                    pool_width=given.pool,
                )

            def theirs():
                return snapkv(queries, keys, kept, given.window, given.pool)

            positions = ours()[0][0, :, :kept]
            common = [
                len(set(a.tolist()) & set(b.tolist())) for a, b in zip(positions, theirs())
            ]
            torch_ms, our_ms = measure((theirs, ours), given.runs)
            print(
                f"{str(dtype)[6:]:8} {tokens:6} {torch_ms:9.2f} {our_ms:12.2f}"
                f" {torch_ms / our_ms:6.1f} {sum(common) / (KV_HEADS * kept):11.2%}",
                flush=True,
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
