"""Run by an interpreter that has llama-cpp-python, not by pytest: loads or quantises one GGUF after another, and tells what llama.cpp logs.

A line in, JSON: {"path", "context": fields of llama_context_params, "model": fields of llama_model_params}, or {"path", "file_type": llama_ftype,
"importance": whether there is an importance matrix}; a line out, JSON: {"log": [line, …], "model_bytes": the sum of the model's tensors}, or {"error"}.
"""

import ctypes
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import llama_cpp  # noqa: E402  what it prints goes to standard error

lines: list[str] = []


@llama_cpp.llama_log_callback
def keep(level: int, text: bytes, data: object) -> None:
    lines.append(text.decode(errors="replace"))


def load(path: str, context: dict, model: dict) -> dict:
    model_params = llama_cpp.llama_model_default_params()
    for name, value in model.items():
        setattr(model_params, name, value)
    loaded = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not loaded:
        return {"error": "".join(lines)}
    try:
        context_params = llama_cpp.llama_context_default_params()
        for name, value in context.items():
            setattr(context_params, name, value)
        made = llama_cpp.llama_init_from_model(loaded, context_params)
        if not made:
            return {"error": "".join(lines)}
        llama_cpp.llama_free(made)
        return {"log": "".join(lines).splitlines(), "model_bytes": llama_cpp.llama_model_size(loaded)}
    finally:
        llama_cpp.llama_model_free(loaded)


def quantise(path: str, file_type: int, importance: bool) -> dict:
    """Told only, nothing is written; with an importance matrix, one of a single number."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.dry_run = file_type, 1, True
    if importance:
        number = (ctypes.c_float * 1)(1.0)
        matrix = (llama_cpp.llama_model_imatrix_data * 2)()
        matrix[0].name, matrix[0].data, matrix[0].size = b"none", ctypes.cast(number, ctypes.POINTER(ctypes.c_float)), 1
        params.imatrix = ctypes.cast(matrix, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    failed = llama_cpp.llama_model_quantize(path.encode(), b"unwritten.gguf", ctypes.byref(params))
    return {"error": "".join(lines)} if failed else {"log": "".join(lines).splitlines()}


def main() -> None:
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    for line in sys.stdin:
        asked = json.loads(line)
        lines.clear()
        answer = quantise(**asked) if "file_type" in asked else load(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
