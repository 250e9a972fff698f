#!/usr/bin/env bash
# Fuzz targets of tests/fuzz, as cargo-fuzz builds them, with the stable compiler and without cargo-fuzz.
#
#   scripts/fuzz.sh SECONDS [TARGET…]   each target (default: all) for so long, beginning with its corpus
#
#   SANITIZER=address   with AddressSanitizer; asks the stable compiler for an unstable option
#   FUZZ_JOBS=N         processes a target (1)
#   FUZZ_MERGE=1        afterwards adds to the corpus in the repository what reaches code that it did not reach
#
# Inputs found on the way stay in target/fuzz/TARGET for the next time. One that breaks a promise is written to
# tests/fuzz/artifacts, shown, and ends the run with an error: put it into tests/fuzz/corpus/TARGET once it is mended.
set -euo pipefail
cd "$(dirname "$0")/.."

[[ ${1:-} =~ ^[0-9]+$ ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
seconds=$1
shift

triple=x86_64-unknown-linux-gnu
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares -Cforce-frame-pointers"
out=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
if [[ -n ${SANITIZER:-} ]]; then
  export RUSTC_BOOTSTRAP=1
  flags+=" -Zsanitizer=$SANITIZER"
  out+=-$SANITIZER
fi

mapfile -t known < <(sed -n 's/^name = "\(.*\)"$/\1/p' tests/fuzz/Cargo.toml | tail -n +2)
targets=("${@:-${known[@]}}")
for target in "${targets[@]}"; do
  [[ " ${known[*]} " == *" $target "* ]] || { echo "fuzz: no target $target; there are: ${known[*]}" >&2; exit 2; }
done

# cargo-fuzz's own folder, so that both build the same once.
RUSTFLAGS="$flags" cargo build --locked --release --manifest-path tests/fuzz/Cargo.toml --target "$triple" \
  --target-dir "$out" "${targets[@]/#/--bin=}"

# In memory where there is a place for it: a slab is written anew for every input.
scratch=$(mktemp -d -p "$([[ -d /dev/shm ]] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" prestage-fuzz.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch

for target in "${targets[@]}"; do
  corpus=tests/fuzz/corpus/$target
  found=$out/corpus/$target
  mkdir -p "$found" tests/fuzz/artifacts
  program=$out/$triple/release/$target
  options=(-max_len=8192 -rss_limit_mb=2048 -timeout=20 "-artifact_prefix=tests/fuzz/artifacts/$target-")
  echo "fuzz: $target for $seconds s"
  log=$out/$target.log
  run=("-max_total_time=$seconds" -print_final_stats=1)
  [[ ${FUZZ_JOBS:-1} == 1 ]] || run+=("-fork=$FUZZ_JOBS" -ignore_crashes=0)
  if ! "$program" "${options[@]}" "${run[@]}" "$found" "$corpus" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "fuzz: $target FAILED; the input is below tests/fuzz/artifacts" >&2
    exit 1
  fi
  grep -E 'stat::number_of_executed_units|stat::average_exec' "$log" || true
  grep -E ' cov: ' "$log" | tail -n 1
  if [[ -n ${FUZZ_MERGE:-} ]]; then
    "$program" "${options[@]}" -merge=1 "$corpus" "$found" >>"$log" 2>&1
    echo "fuzz: $target: corpus has $(find "$corpus" -type f | wc -l) inputs"
  fi
done
