"""Triton's code for GPUs that are not here: interpreted, one operation at a time, or compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def interpreted(call: str) -> str:
    """What "module.function(arguments)" of a test module prints where Triton interprets its kernels, for which a
    process must ask beforehand."""
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", f"import {call.split('.')[0]}; {call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_for(capability: int, function: Any, types: dict[str, str], values: dict[str, int], warps: int) -> Any:
    """A kernel compiled for GPUs of a compute capability, as it is called: pointers are aligned, `size` is a
    multiple of 16. Arguments in capitals have `values`; the others are bf16 unless in `types`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = function.arg_names
    signature = {name: "constexpr" if name.isupper() else types.get(name, "*bf16") for name in names}
    constants = {(i,): values[name] for i, name in enumerate(names) if name.isupper()}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name == "size"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
