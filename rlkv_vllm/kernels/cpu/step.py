"""What both implementations of streaming heads on the CPU plan from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StreamingStep:
    """One step as one block table of streaming heads sees it."""

    block_table: Tensor  # int32 [requests, max blocks]; those out of the window may be stale
    seq_lens: Tensor  # [requests], tokens after the step, new ones included
    query_start_loc: Tensor  # [requests + 1], first row of each request
    # [N], slot of each new token. A token that is out of the window when the chunk ends has none:
    # its slot lies in block 0, which nobody owns.
    slot_mapping: Tensor
    block_size: int  # tokens per block
    sink: int  # first tokens kept
    window: int  # last tokens kept, the query's own included
