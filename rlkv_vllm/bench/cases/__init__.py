"""One case per file."""

from __future__ import annotations

from rlkv_vllm.bench.case import Case
from rlkv_vllm.bench.cases.capacity import Capacity
from rlkv_vllm.bench.cases.decode import Decode
from rlkv_vllm.bench.cases.monitoring import Monitoring
from rlkv_vllm.bench.cases.overhead import Overhead
from rlkv_vllm.bench.cases.prefill import Prefill
from rlkv_vllm.bench.cases.prefix import Prefix
from rlkv_vllm.bench.cases.serve import Serve
from rlkv_vllm.bench.cases.short import Short
from rlkv_vllm.bench.cases.solve import Solve
from rlkv_vllm.bench.cases.startup import Startup

#: In the order in which they are measured: neighbours share engines.
CASES: dict[str, type[Case]] = {
    case.name: case
    for case in (
        *(Solve, Capacity, Decode, Short, Prefill, Prefix, Overhead),
        *(Serve, Monitoring),
        Startup,
    )
}
