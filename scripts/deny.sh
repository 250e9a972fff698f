#!/usr/bin/env bash
# Checks licences, duplicate crates and sources of the dependency tree against deny.toml; `advisories` also checks known
# vulnerabilities, which needs the network. Uses cargo-deny from PATH, else builds it once into the cache.
#
#   scripts/deny.sh [advisories]
set -euo pipefail

cache=${PRESTAGE_CACHE:-$HOME/.cache/prestage}
tools=$cache/tools
# one version for everybody: a newer one may judge differently
version=0.20.2

if ! command -v cargo-deny >/dev/null; then
  if [ ! -x "$tools/bin/cargo-deny" ]; then
    echo "deny: building cargo-deny $version once into $tools (some minutes)" >&2
    # without optimisation: it runs for a second, and building is what takes time
    CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=$tools/build RUSTFLAGS='' \
      cargo install --quiet --locked --debug --root "$tools" --version "$version" cargo-deny
    rm -rf "$tools/build"
  fi
  PATH=$tools/bin:$PATH
fi
if [ "${1:-}" = advisories ]; then
  exec cargo deny --log-level error check advisories
fi
# A build fetches what this host needs alone, and the check reads every crate of the lock file.
cargo fetch --quiet --locked
cargo fetch --quiet --locked --manifest-path tests/fuzz/Cargo.toml
cargo deny --log-level error --offline check bans licenses sources
# The fuzz targets are a workspace of their own.
exec cargo deny --log-level error --offline --manifest-path tests/fuzz/Cargo.toml --config "$PWD/deny.toml" check bans licenses sources
