"""Triton's code for GPUs that are not here."""

from typing import Any


def compile_for(capability: int, function: Any, types: dict[str, str], values: dict[str, int], warps: int) -> Any:
    """A kernel compiled for GPUs of a compute capability, as it is called: pointers are aligned, `numbers` is a
    multiple of 16. Arguments in capitals have `values`; the others are bf16 unless in `types`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = function.arg_names
    signature = {name: "constexpr" if name.isupper() else types.get(name, "*bf16") for name in names}
    constants = {(i,): values[name] for i, name in enumerate(names) if name.isupper()}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name == "numbers"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
