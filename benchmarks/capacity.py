"""Cache bytes of a request and requests at once, split against full: exact counts, no timing.

    python benchmarks/capacity.py --layers 28 --kv-heads 8 --head-dim 128 --memory 16

The same accounting that the engine logs; `tests/integration/test_capacity.py` holds it against
vLLM's own block managers.
"""

from __future__ import annotations

import argparse
import random

from rlkv_vllm.allocation.forecast import (
    CacheGeometry,
    block_sizes_for,
    forecast_with_block_size,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="length of a request")
    parser.add_argument("--sink", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--memory", type=float, default=16, help="GiB of cache")
    args = parser.parse_args()
    rng = random.Random(0)
    gates = [[rng.random() for _ in range(args.kv_heads)] for _ in range(args.layers)]
    memory = int(args.memory * 2**30)
    print("| sparsity | block | bytes per request / full | over bare tokens | requests at once |")
    print("|---|---|---|---|---|")
    for sparsity in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8):
        forecast = forecast_with_block_size(
            gates,
            sparsity,
            CacheGeometry(args.layers, args.kv_heads, args.head_dim, 2, 16, args.sink, args.window),
            block_sizes_for(args.head_dim),
            max_model_len=args.tokens,
        )
        allocation = forecast.groups.allocation
        used = forecast.bytes_per_request(args.tokens, 0)
        tokens = allocation.num_full * args.tokens
        tokens += allocation.num_streaming * min(args.tokens, args.sink + args.window)
        share = used / forecast.stock_bytes_per_request(args.tokens)
        over = used / (tokens * forecast.geometry.head_token_bytes) - 1
        at_once = forecast.requests_at_once(args.tokens, memory)
        stock = forecast.stock_requests_at_once(args.tokens, memory)
        print(
            f"| {sparsity:g} | {forecast.geometry.block_size} | {share:.3f} | {over:+.1%} | "
            f"{at_once} ({stock}) |"
        )


if __name__ == "__main__":
    main()
