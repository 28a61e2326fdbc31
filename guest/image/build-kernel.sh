#!/usr/bin/env bash
# build-kernel.sh OUT: a folder with what comes from Debian's kernel package (and busybox, for the kernel's own calls of modprobe):
#
#   vmlinux            uncompressed ELF, for QEMU's PVH entry
#   release            `uname -r` of it
#   modules/NAME.ko    what PID 1 loads at boot; modules/order names them in load order
#   modules.squashfs   the whole tree, which PID 1 mounts at /lib/modules
#   busybox            static
set -euo pipefail
# shellcheck source=guest/image/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PACKAGE=linux-image-cloud-amd64
# Loaded at every boot, with what they need: the machine's devices, and what mounting /lib/modules takes. The rest is loaded on demand.
BOOT_MODULES=(virtio_mmio virtio_blk virtio_console virtio_net virtio_rng virtio_balloon loop squashfs)

main() {
  begin "$@"
  update_private_apt
  local real release tree=$WORK/kernel made=$WORK/made
  # The package itself is empty and depends on the current kernel's.
  real=$(private_apt apt-cache depends "$PACKAGE" | awk '/^ *Depends: linux-image-[0-9]/ { print $2; exit }')
  [ -n "$real" ] || die "the machine's APT sources offer no $PACKAGE"
  unpack_package "$real" "$tree"
  unpack_package busybox-static "$WORK/busybox"
  # Trixie has /usr/lib/modules in the package.
  [ -d "$tree/lib/modules" ] || ln -s usr/lib "$tree/lib"
  release=$(ls "$tree/lib/modules")
  mkdir -p "$made/modules"
  echo "$release" >"$made/release"
  extract_vmlinux "$tree/boot/vmlinuz-$release" "$made/vmlinux"
  prepare_modules "$tree" "$release"
  boot_modules "$tree" "$release" "$made/modules"
  echo "packing the modules of $release"
  mksquashfs "$tree/lib/modules" "$made/modules.squashfs" -comp zstd -noappend -all-root -no-progress -quiet -mkfs-time 0 -all-time 0
  install -m 755 "$WORK/busybox/bin/busybox" "$made/busybox"
  chmod -R u=rwX,go=rX "$made"
  mv -T "$made" "$OUT"
}

# A bzImage is a boot stub around the compressed ELF; the header (boot protocol 2.08) says where it lies.
extract_vmlinux() {
  local image=$1 out=$2 method
  echo "extracting the kernel of $(basename "$image")"
  method=$(python3 - "$image" "$WORK/payload" <<'PY'
import struct, sys
image = open(sys.argv[1], "rb").read()
assert image[0x202:0x206] == b"HdrS", "not a bzImage"
setup_sectors = image[0x1F1] or 4
offset, length = struct.unpack("<II", image[0x248:0x250])
start = (setup_sectors + 1) * 512 + offset
payload = image[start:start + length]
methods = {b"\x02\x21\x4c\x18": "lz4", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}
method = next(name for magic, name in methods.items() if payload.startswith(magic))
# The kernel's build appends the size to all but gzip, where it is part of the format; the programs would call that trailing garbage.
open(sys.argv[2], "wb").write(payload if method == "gzip" else payload[:-4])
print(method)
PY
  ) || die "the kernel image $(basename "$image") has a layout that is not known here"
  "$method" -dc <"$WORK/payload" >"$out"
  [ "$(head -c 4 "$out" | tail -c 3)" = ELF ] || die "what lies in $(basename "$image") is no ELF"
}

# Decompressed (trixie ships .ko.xz): the squashfs compresses better than file by file, and PID 1 needs no decompressor.
prepare_modules() {
  local tree=$1 release=$2
  find "$tree/lib/modules/" -name '*.ko.xz' -exec xz -d {} +
  find "$tree/lib/modules/" -name '*.ko.zst' -exec zstd -q -d --rm {} +
  # Links into a source tree that is not there.
  rm -f "$tree/lib/modules/$release/build" "$tree/lib/modules/$release/source"
  PATH=$PATH:/sbin:/usr/sbin depmod -b "$tree" -F "$tree/boot/System.map-$release" "$release" 2>/dev/null \
    || PATH=$PATH:/sbin:/usr/sbin depmod -b "$tree" "$release"
}

boot_modules() {
  local tree=$1 release=$2 to=$3 module kind path name
  for module in "${BOOT_MODULES[@]}"; do
    while read -r kind path _; do
      # `builtin NAME` needs nothing.
      [ "$kind" = insmod ] || continue
      name=$(basename "$path" .ko)
      grep -qx "$name" "$to/order" 2>/dev/null || { cp "$path" "$to/$name.ko"; echo "$name" >>"$to/order"; }
    done < <(PATH=$PATH:/sbin:/usr/sbin modprobe -d "$tree" -S "$release" -C /dev/null --show-depends "$module")
  done
  for module in virtio_mmio virtio_blk virtio_console virtio_net; do
    grep -qx "$module" "$to/order" || grep -q "/$module.ko" "$tree/lib/modules/$release/modules.builtin" || die "the kernel $release has no $module"
  done
  echo "modules of the boot: $(tr '\n' ' ' <"$to/order")"
}

main "$@"
