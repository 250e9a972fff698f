#!/usr/bin/env bash
# Builds a small real Debian guest and keeps it: kernel, initramfs and raw ext4 disk for direct kernel boot, and the
# checksums of the files the guest is asked to verify. Prints the folder's path as its last line.
#
#   scripts/guest-image.sh
#
#   <cache>/guest-<hash>/vmlinuz     Debian's cloud kernel
#                        initrd      busybox and the modules of a virtio disk, see guest/init
#                        initrd-demand  busybox, balloon, memory device, guest agent; needs no disk, see guest/demand
#                        disk.raw    the root file system
#                        sums        `SHA256 PATH` a line, what the guest must find on the disk
#                        about       release and kernel version
#
# <hash> covers this script and guest/*: a change builds anew, an unchanged tree never does. Built in a temporary folder
# and renamed, under a lock, so that neither an interrupt nor a second build leaves half an image.
#   PRESTAGE_CACHE         folder of the cache, default ~/.cache/prestage
#   PRESTAGE_GUEST_SUITE   Debian suite of the guest, default bookworm
#   PRESTAGE_MIRROR        Debian mirror, default the host's own
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
guest=$here/guest
cache=${PRESTAGE_CACHE:-$HOME/.cache/prestage}
suite=${PRESTAGE_GUEST_SUITE:-bookworm}
disk_mib=1024
need_mib=2600 # tree, packages, the temporary disk and the finished one

say() { echo "guest image: $*" >&2; }
die() {
  say "$*"
  exit 1
}

hash=$({
  echo "$suite"
  cd "$here"
  sha256sum guest-image.sh guest/*
} | sha256sum | cut -c 1-16)
image=$cache/guest-$hash
if [ -e "$image/about" ]; then
  echo "$image"
  exit 0
fi

[ "$(id -u)" -eq 0 ] || die "needs root, for the owners of the guest's files: sudo --preserve-env=HOME,PRESTAGE_CACHE $0"
[ "$(uname -m)" = x86_64 ] || die "only x86-64 hosts are supported, this is $(uname -m)"
for tool in mmdebstrap mke2fs debugfs cpio zstd sqlite3 perl; do
  command -v "$tool" >/dev/null || die "no $tool here: run scripts/setup.sh first"
done
mkdir -p "$cache"
exec 9>"$cache/guest.lock"
flock --nonblock 9 || {
  say "waiting for another build to finish"
  flock 9
}
if [ -e "$image/about" ]; then
  echo "$image"
  exit 0
fi

free_mib=$(df --output=avail -m "$cache" | tail -n 1 | tr -d ' ')
[ "$free_mib" -ge "$need_mib" ] ||
  die "$cache has $free_mib MiB free and $need_mib are needed: free some, or set PRESTAGE_CACHE to another folder"
mirror=${PRESTAGE_MIRROR:-$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null |
  grep -v -e security -e snapshot | head -n 1 | tr -d ' ' || true)}
[ -n "$mirror" ] || die "no Debian mirror found in /etc/apt: name one with PRESTAGE_MIRROR=http://HOST/debian"

# leftovers of a build that was killed; the lock says that none runs
rm -rf "$cache"/.guest-build.*
work=$(mktemp -d "$cache/.guest-build.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
chmod 755 "$work"
tree=$work/tree
out=$work/image
mkdir "$out"
started=$SECONDS

say "1/5 Debian $suite from $mirror (a minute or two)"
mmdebstrap --quiet --mode=root --variant=minbase \
  --include=systemd-sysv,udev,kmod,dbus,cron,busybox-static,sqlite3,iproute2,netbase,logrotate,openssh-server,python3 \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='APT::Install-Recommends "false"' \
  --customize-hook='chroot "$1" sh -ec "
    mkdir /kernel
    cd /kernel
    kernel=\$(apt-cache depends --no-suggests linux-image-cloud-amd64 | sed -n \"s/.*Depends: \\(linux-image-[0-9].*\\)/\\1/p\" | head -n 1)
    apt-get -qq download \$kernel
    mkdir /agent
    cd /agent
    apt-get -qq download \$(apt-get --simulate install qemu-guest-agent | sed -n \"s/^Inst \([^ ]*\).*/\1/p\")"' \
  --customize-hook='for package in "$1"/agent/*.deb; do dpkg-deb --extract "$package" "$1/agent"; done' \
  --customize-hook='dpkg-deb --extract "$1"/kernel/linux-image-*.deb "$1/kernel"' \
  "$suite" "$tree" "$mirror" >"$work/log" 2>&1 || {
  tail -n 15 "$work/log" >&2
  die "mmdebstrap failed (above). Is $mirror reachable from here? PRESTAGE_MIRROR names another one"
}

say "2/5 kernel and initramfs"
version=$(ls "$tree/kernel/lib/modules")
cp "$tree/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
mkdir -p "$tree/usr/lib/modules"
mv "$tree/kernel/lib/modules/$version" "$tree/usr/lib/modules/$version"
rm -rf "$tree/kernel"
chroot "$tree" depmod "$version"
initramfs=$work/initramfs
mkdir -p "$initramfs"/{bin,dev,proc,sys,root,lower,upper,modules}
cp "$tree/bin/busybox" "$initramfs/bin/busybox"
for applet in sh mount mkdir insmod usleep poweroff switch_root; do ln -s busybox "$initramfs/bin/$applet"; done
install -m 755 "$guest/init" "$initramfs/init"
# Modules with what they depend on, in the order they load in: modules FOLDER NAME...
modules() {
  local folder=$1
  shift
  for module in "$@"; do
    chroot "$tree" modprobe --show-depends --set-version "$version" "$module"
  done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' | while read -r path; do
    cp "$tree$path" "$folder/"
    basename "$path" >>"$folder/order"
  done
  [ -s "$folder/order" ] || die "no modules found for kernel $version"
}
modules "$initramfs/modules" virtio_pci virtio_blk ext4 crc32c_generic overlay
# not compressed: reading a megabyte more takes the emulator less time than unpacking it
(cd "$initramfs" && find . | cpio --quiet --create --format=newc) >"$out/initrd"

demand=$work/demand
mkdir -p "$demand"/{bin,dev,proc,sys,run,lib,lib64,modules}
cp "$tree/bin/busybox" "$demand/bin/busybox"
for applet in sh mount mkdir insmod usleep poweroff stty mkfifo dd killall sleep; do ln -s busybox "$demand/bin/$applet"; done
install -m 755 "$guest/demand" "$demand/init"
modules "$demand/modules" virtio_pci virtio_balloon virtio_console virtio_mem
cp "$(find "$tree/agent" -path '*/sbin/qemu-ga' -type f)" "$demand/bin/"
agent_libs=$(cd "$tree" && find agent -name '*.so.*' -printf '/%h\n' | sort -u | paste -s -d :)
chroot "$tree" env LD_LIBRARY_PATH="$agent_libs" ldd "/$(cd "$tree" && find agent -path '*/sbin/qemu-ga')" >"$work/ldd"
! grep 'not found' "$work/ldd" >&2 || die "the guest agent lacks libraries (above)"
grep -o '/[^ ]*' "$work/ldd" | while read -r library; do
  case $library in */ld-linux*) cp -L "$tree$library" "$demand/lib64/" ;; *) cp -L "$tree$library" "$demand/lib/" ;; esac
done
(cd "$demand" && find . | cpio --quiet --create --format=newc) >"$out/initrd-demand"
rm -rf "$tree/agent"

say "3/5 services and data"
lib=$tree/usr/local/lib/prestage
mkdir -p "$lib" "$tree/srv/www" "$tree/srv/data" "$tree/var/lib/prestage"
install -m 755 "$guest/probe" "$guest/program" "$guest/shop.py" "$lib/"
install -m 644 "$guest/queries.sql" "$lib/"
install -m 644 "$guest/prestage-probe.service" "$guest/prestage.target" "$guest/shop.service" "$tree/etc/systemd/system/"
# a fixed identity: an empty one makes systemd go through its first-boot steps in every boot
echo 7072657374616765677565737400f00d >"$tree/etc/machine-id"
echo prestage-guest >"$tree/etc/hostname"
echo '127.0.0.1 localhost prestage-guest' >"$tree/etc/hosts"
: >"$tree/etc/fstab"
mkdir -p "$tree/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\n' >"$tree/etc/systemd/journald.conf.d/prestage.conf"
# what waits for hardware or for a clock that the guest does not have
chroot "$tree" systemctl --quiet mask getty@tty1.service serial-getty@ttyS0.service console-getty.service \
  systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
  e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-random-seed.service systemd-pcrphase.service \
  systemd-pcrphase-sysinit.service
chroot "$tree" systemctl --quiet enable prestage-probe.service shop.service
chroot "$tree" systemctl --quiet set-default prestage.target
perl "$guest/content.pl" "$tree/srv/www" "$lib/requests"
sqlite3 "$tree/srv/data/shop.db" <"$guest/schema.sql" >/dev/null
rm -rf "$tree/var/cache/apt"/*.bin "$tree/var/lib/apt/lists"/* "$tree/var/log"/*.log
# what the guest verifies when asked: the file set, the database, and programs and libraries of the system
{
  (cd "$tree" && find srv -type f && find usr/bin usr/sbin -type f -size +150k && find usr/lib/x86_64-linux-gnu -name 'lib[a-l]*.so*' -type f) |
    sed 's|^|/|' | sort
} >"$lib/files"
# systemd takes files older than this stamp for updated ones and rebuilds its caches in every boot
touch "$tree/etc/.updated" "$tree/var/.updated"
(cd "$tree" && sed 's|^/||' "$lib/files" | xargs sha256sum) | sed 's|  | /|' >"$out/sums"

say "4/5 file system"
truncate --size="${disk_mib}M" "$out/disk.raw"
mke2fs -q -F -t ext4 -L prestage-guest -m 0 -J size=16 -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
  -d "$tree" "$out/disk.raw" || die "mke2fs failed; the guest's tree is $(du -sm "$tree" | cut -f 1) MiB, the disk $disk_mib MiB"

say "5/5 in place"
printf 'suite %s\nkernel %s\nfiles %s\n' "$suite" "$version" "$(wc -l <"$lib/files")" >"$out/about"
chmod 755 "$out"
sync --file-system "$out/disk.raw"
mv "$out" "$image"
say "built in $((SECONDS - started)) s: $image ($(du -sm "$image" | cut -f 1) MiB on disk)"
echo "$image"
