"""Triton's code for GPUs that are not here: interpreted, one operation at a time, or compiled."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

TYPES = {
    **{torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"},
    **{torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"},
}
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on an L40S, the least of all GPUs with bf16


def interpreted(call: str) -> str:
    """What "module.function(arguments)" of a test module prints where Triton interprets its kernels, for which a
    process must ask beforehand."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", f"import {call.split('.')[0]}; {call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Launch(NamedTuple):
    """A kernel, and what Triton's compiler is told of its arguments."""

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]  # arguments that are multiples of 16, or point to such addresses
    options: dict[str, Any]

    def compile_for(self, capability: int) -> Any:
        """For GPUs of a compute capability, such as 90, which this does not take."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        place = {name: (i,) for i, name in enumerate(self.function.arg_names)}
        constants = {place[name]: value for name, value in self.constants.items()}
        attributes = {place[name]: [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.function, self.signature, constants, attributes)
        return compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def launches(call: Callable[[], object]) -> list[Launch]:
    """What is launched by `call`, on tensors without values (torch's meta device); nothing runs."""
    from triton.runtime.jit import JITFunction

    found = []

    def record(function: Any, *values: Any, grid: tuple, warmup: bool, **named: Any) -> None:
        assert min(grid) > 0
        given = dict(zip(function.arg_names, values, strict=False))
        given |= {name: value for name, value in named.items() if name in function.arg_names}
        options = {name: value for name, value in named.items() if name not in function.arg_names}
        signature, constants, aligned = {}, {}, []
        for parameter in function.params:
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.append(name)
        found.append(Launch(function, signature, constants, aligned, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def wide_loads(made: Any) -> bool:
    """Whether a compiled kernel loads 16 bytes at once, into registers or into shared memory."""
    return re.search(r"ld\.global\.v4\.[bu]32|cp\.async\.cg\.shared\.global .*, 0x10", made.asm["ptx"]) is not None
