"""The LSTM as an ONNX graph, run by onnxruntime on one thread: the coprocess of examples/lstm_bench.rs.

usage: lstm_onnx.py PARTS.f32 SHAPES.json

PARTS.f32 are the model's weights, SHAPES.json their names and shapes in order. Then one request a line on standard
input, one line of JSON each in answer:
  check TOKEN…      logits of all leads after these tokens (14-bit integers)
  time BATCH STEPS  nanoseconds a call of STEPS calls, each a step and all leads' logits for BATCH streams
The time includes onnxruntime's Python API, with inputs and outputs bound beforehand.
"""

import json
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 64


def graph(parts):
    """Model: symbol, op, size, gap [B], h, c [1, B, 64] -> logits [B, 192], h, c. ONNX has the gates in the order
    input, output, forget, cell and one weight row a gate unit."""
    order = [0, 3, 1, 2]

    def gates(matrix):
        columns = np.split(matrix, 4, axis=1)
        return np.concatenate([columns[gate] for gate in order], axis=1).T[np.newaxis]

    bias = gates(parts["bias"])[..., 0]
    tensors = {name: parts[name] for name in ("symbol", "op", "size", "gap", "head")}
    tensors["head_bias"] = parts["head_bias"][0]
    tensors["W"] = gates(parts["input"])
    tensors["R"] = gates(parts["recurrent"])
    tensors["B"] = np.concatenate([bias, np.zeros_like(bias)], axis=1)
    tensors["axis"] = np.array([0], dtype=np.int64)
    names = ("symbol", "op", "size", "gap")
    nodes = [helper.make_node("Gather", [name, name + "_at"], [name + "_row"]) for name in names]
    nodes += [
        helper.make_node("Sum", ["op_row", "size_row", "gap_row"], ["context"]),
        helper.make_node("Concat", ["symbol_row", "context"], ["row"], axis=1),
        helper.make_node("Unsqueeze", ["row", "axis"], ["x"]),
        helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c"], ["", "h_out", "c_out"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["h_out", "axis"], ["h_rows"]),
        helper.make_node("Gemm", ["h_rows", "head", "head_bias"], ["logits"]),
    ]
    state = [1, "B", HIDDEN]
    inputs = [helper.make_tensor_value_info(name + "_at", TensorProto.INT64, ["B"]) for name in names]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in ("h", "c")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 192])]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in ("h_out", "c_out")]
    weights = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "lstm", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.checker.check_model(model)
    return model


def fields(tokens):
    tokens = np.asarray(tokens, dtype=np.int64)
    return {
        "symbol_at": tokens & 63,
        "op_at": tokens >> 6 & 3,
        "size_at": tokens >> 8 & 7,
        "gap_at": tokens >> 11 & 7,
    }


def check(session, tokens):
    h = c = np.zeros((1, 1, HIDDEN), dtype=np.float32)
    logits = None
    for token in tokens:
        logits, h, c = session.run(None, {**fields([token]), "h": h, "c": c})
    return logits[0].tolist()


def clock(session, batch, steps):
    binding = session.io_binding()
    h = c = np.zeros((1, batch, HIDDEN), dtype=np.float32)
    inputs = {**fields(np.arange(batch) * 37 % (1 << 14)), "h": h, "c": c}
    for name, value in inputs.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value))
    for name in ("logits", "h_out", "c_out"):
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    start = time.perf_counter_ns()
    for _ in range(steps):
        session.run_with_iobinding(binding)
    return (time.perf_counter_ns() - start) / steps


def main():
    flat = np.fromfile(sys.argv[1], dtype="<f4")
    parts = {}
    for name, rows, columns in json.load(open(sys.argv[2], encoding="utf-8")):
        parts[name], flat = flat[: rows * columns].reshape(rows, columns), flat[rows * columns :]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    model = graph(parts).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for line in sys.stdin:
        request, *numbers = line.split()
        numbers = [int(number) for number in numbers]
        if request == "check":
            answer = {"logits": check(session, numbers), "version": onnxruntime.__version__}
        else:
            answer = {"ns": clock(session, *numbers)}
        print(json.dumps(answer), flush=True)


main()
