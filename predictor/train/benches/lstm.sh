#!/usr/bin/env bash
# The LSTM beside Burn's backends, onnxruntime and the multiply-add floor: examples/lstm_bench with a Python that has
# onnxruntime, made once in the cache. Arguments are passed on, e.g. --json.
set -euo pipefail

cache=${PRESTAGE_CACHE:-$HOME/.cache/prestage}
python=$cache/onnx/bin/python
if ! "$python" -c 'import onnx, onnxruntime' 2>/dev/null; then
  echo "lstm: installing onnxruntime once into $cache/onnx" >&2
  python3 -m venv "$cache/onnx"
  "$cache/onnx/bin/pip" install --quiet onnx onnxruntime numpy
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec cargo run --quiet --locked --release --features flex --example lstm_bench -- --python "$python" "$@"
