#!/usr/bin/env bash
# Installs what building, testing and `make run` need from the distribution. Idempotent: a second run installs nothing.
#
#   scripts/setup.sh [build|run|predict|callgrind]
#     build: compilers and headers only; run (default): also QEMU, libvirt, nbdkit, NBD clients, guest tools, a C++ compiler; predict: Python that can
#     make virtual environments, unless there is one; callgrind: compilers and valgrind
#
# Debian 12: libvirt and QEMU come from bookworm-backports, because virtio-mem and vhost-user reconnect need
# libvirt >= 11 and because the suite's own packages conflict with backported qemu-utils where those are installed.
set -euo pipefail

what=${1:-run}
build_packages=(gcc libc6-dev pkg-config make git ca-certificates libvirt-dev)
run_packages=(
  qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu
  nbdkit libnbd-bin python3-libnbd fio openssl
  mmdebstrap e2fsprogs zstd cpio sqlite3 procps
  g++ # libFuzzer
)
packages=("${build_packages[@]}")
case $what in
  build) ;;
  run) packages+=("${run_packages[@]}") ;;
  # any Python does, also one that the distribution did not install
  predict) packages=(); python3 -c 'import ensurepip, venv' 2>/dev/null || packages=(python3 python3-venv) ;;
  callgrind) packages=(gcc); command -v valgrind >/dev/null || packages+=(valgrind) ;;
  *) echo "setup: $what: build, run, predict or callgrind" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  # is only a header package: dpkg's own word is the one sign that works for all of them
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

command -v apt-get >/dev/null || {
  echo "setup: this host has no apt-get. Install by hand: ${missing[*]}" >&2
  exit 1
}
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "setup: not root and no sudo. As root: apt-get install ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi

release=()
. /etc/os-release
if [ "${VERSION_CODENAME:-}" = bookworm ]; then
  if ! grep -rqs 'bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d; then
    # the same mirror that the host already trusts, so that a site's own mirror keeps being used
    mirror=$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null |
      grep -v -e security -e snapshot | head -n 1 | tr -d ' ' || true)
    echo "deb ${mirror:?setup: no Debian mirror found in /etc/apt} bookworm-backports main" |
      "${sudo[@]}" tee /etc/apt/sources.list.d/prestage-backports.list >/dev/null
  fi
  release=(-t bookworm-backports)
fi
echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
# No services are started by the install where no init system runs; `make run` starts what it needs and says so.
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${release[@]}" "${missing[@]}" >/dev/null
