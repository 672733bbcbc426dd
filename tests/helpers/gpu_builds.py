"""Compiles Triton kernels for GPUs that need not be present: registers, spills, memory.

Triton must not be in interpreter mode, so the work is done in a process of its own, which runs this
file: builds come in as JSON and facts go out as JSON.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

# Bytes of shared memory that one thread block can have.
SHARED_LIMITS = {80: 166_912, 90: 232_448}
_TENSOR_CORE_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async")


class Build(NamedTuple):
    """A kernel as it is launched.

    `types` gives Triton's type of each argument that is no constexpr ("*bf16", "i32", "fp32"), and
    `constexprs` the value of each one that is; pointers count as aligned to 16 bytes.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    architectures: tuple[int, ...] = tuple(SHARED_LIMITS)


class Facts(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: bool


@functools.cache
def compile_builds(*builds: Build) -> list[dict[int, Facts]]:
    """Compiles each build for its architectures; one entry per build.

    Give all builds of a test module in one call: a process takes seconds to start.
    """
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache, because the compiler's report is only written when it runs.
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(builds),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return [
        {int(arch): Facts(*facts) for arch, facts in by_arch.items()}
        for by_arch in json.loads(done.stdout)
    ]


def _compile(build: Build, arch: int) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    types, constexprs = dict(build.types), dict(build.constexprs)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*")
    }
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs=aligned,
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Facts(
        registers=_figures(r"Used (\d+) registers", log.getvalue()),
        spill_bytes=_figures(r"(\d+) bytes spill (?:stores|loads)", log.getvalue()),
        shared_bytes=compiled.metadata.shared,
        tensor_cores=any(name in compiled.asm["ptx"] for name in _TENSOR_CORE_INSTRUCTIONS),
    )


def _figures(pattern: str, log: str) -> int:
    figures = re.findall(pattern, log)
    if not figures:
        raise ValueError(f"no {pattern!r} in the report of ptxas: {log}")
    return sum(map(int, figures))


if __name__ == "__main__":
    facts = []
    for build in [Build(*fields) for fields in json.load(sys.stdin)]:
        facts.append({arch: _compile(build, arch) for arch in build.architectures})
    json.dump(facts, sys.stdout)
