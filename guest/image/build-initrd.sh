#!/usr/bin/env bash
# build-initrd.sh OUT: the initramfs. GUEST_BINARY is the static guest binary, KERNEL the folder that build-kernel.sh made. In it:
#
#   /init                        the guest binary, PID 1
#   /modules/order, /modules/*.ko, /modules.squashfs    see build-kernel.sh
#   /sbin/modprobe → /bin/busybox   what the kernel itself calls to load a module on demand (from /lib/modules)
set -euo pipefail
# shellcheck source=guest/image/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# QEMU's microvm puts the initrd at the very top of low memory, where the firmware then puts the ACPI tables: a tail of a page that is too full
# overwrites FACP, and the kernel hangs at "ACPI: Core revision". A multiple of the page size leaves the last page alone.
PAGE_BYTES=4096

main() {
  begin "$@"
  local kernel=${KERNEL:?the folder made by build-kernel.sh} root=$WORK/root size
  [ -x "${GUEST_BINARY:?the static guest binary}" ] || die "$GUEST_BINARY is no program"
  ! readelf -l "$GUEST_BINARY" | grep -q INTERP || die "$GUEST_BINARY is not static, and the initramfs has no libraries"
  echo "laying out the initramfs"
  mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,mnt,etc,lib/modules}
  install -m 755 "$GUEST_BINARY" "$root/init"
  install -m 755 "$kernel/busybox" "$root/bin/busybox"
  ln -s ../bin/busybox "$root/sbin/modprobe"
  ln -s busybox "$root/bin/sh"
  cp -r "$kernel/modules" "$kernel/modules.squashfs" "$root/"
  find "$root" -exec touch -h -d @0 {} +
  # Not compressed: nearly all of it is (the squashfs), and under emulation the copy is quicker than any decompressor.
  (cd "$root" && find . -print0 | LC_ALL=C sort -z | cpio --null -o -H newc --owner 0:0 --reproducible --quiet) >"$WORK/initrd"
  size=$(stat -c %s "$WORK/initrd")
  truncate -s $(((size + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES)) "$WORK/initrd"
  mv "$WORK/initrd" "$OUT"
}

main "$@"
