"""The cases, those of one kind in one file."""

from __future__ import annotations

from rlkv_vllm.bench.case import Case
from rlkv_vllm.bench.cases.capacity import Capacity
from rlkv_vllm.bench.cases.decode import Decode, Prefill
from rlkv_vllm.bench.cases.prefix import Prefix
from rlkv_vllm.bench.cases.rollouts import RolloutsCase
from rlkv_vllm.bench.cases.serve import Monitoring, Serve
from rlkv_vllm.bench.cases.short import Overhead, Short, Startup
from rlkv_vllm.bench.cases.solve import Solve

#: In the order in which they are measured: neighbours share engines.
CASES: dict[str, type[Case]] = {
    case.name: case
    for case in (
        *(Solve, Capacity, Decode, Short, Prefill, Prefix, Overhead),
        *(Serve, Monitoring, Startup, RolloutsCase),
    )
}
