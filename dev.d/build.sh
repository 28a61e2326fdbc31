# sprited, sprite and the guest image. Sourced by ./dev.
# shellcheck shell=bash

GUEST_TARGET=x86_64-unknown-linux-gnu
# Image folders that no `up` used for so long are removed.
IMAGE_KEEP_DAYS=30

build_all() {
  check_rust
  build_binaries || return 1
  build_image
}

# The example is named only because it makes cargo choose the features of dependencies as it does for the tests: one build of each serves both.
build_binaries() {
  step "building sprited and sprite" cargo build --locked --workspace --bin sprited --bin sprite --bin dev-s3 --example nbd_memory
}

# Static, because it runs in an initramfs without a userland; for the GNU target, because a musl one needs a download of its own.
build_guest() {
  RUSTFLAGS='-C target-feature=+crt-static' step "building the guest's PID 1" \
    cargo build --locked -p guest --profile guest --target "$GUEST_TARGET"
}

# Sets IMAGE to a folder with vmlinux, initrd, rootfs.ext4 and rootfs.digest. Each piece is cached by the content it is made from: kernel and
# root file system by their recipe, the initramfs also by the guest binary inside.
build_image() {
  build_guest || return 1
  local guest=$TARGET/$GUEST_TARGET/guest/guest recipe folder key
  recipe=$(guest/image/digest.sh) || die "guest/image/digest.sh failed"
  folder=$SPRITES_CACHE/$recipe
  build_piece "$folder/kernel" "the guest's kernel" guest/image/build-kernel.sh || return 1
  build_piece "$folder/rootfs.ext4" "the guest's Debian (some minutes, once)" guest/image/build-rootfs.sh || return 1
  key=$(cat "$guest" <(echo "$recipe") | sha256sum | cut -c 1-16)
  IMAGE=$folder/image-$key
  GUEST_BINARY=$guest KERNEL=$folder/kernel build_piece "$IMAGE/initrd" "the guest's initramfs" guest/image/build-initrd.sh || return 1
  ln -sf ../kernel/vmlinux ../rootfs.ext4 "$IMAGE/"
  echo "$recipe" >"$IMAGE/rootfs.digest"
  touch "$folder" "$IMAGE"
  find "$SPRITES_CACHE" -mindepth 2 -maxdepth 2 -name 'image-*' -mtime "+$IMAGE_KEEP_DAYS" -exec rm -rf {} +
  remove_old_recipes
}

# A recipe's folder is as old as its last use; only folders that are one.
remove_old_recipes() {
  local old
  find "$SPRITES_CACHE" -mindepth 1 -maxdepth 1 -type d -mtime "+$IMAGE_KEEP_DAYS" -print0 | while IFS= read -r -d '' old; do
    [ ! -e "$old/kernel/vmlinux" ] || rm -rf "$old"
  done
}

# build_piece FILE WHAT SCRIPT: FILE (or folder) exists whole or not at all, also when two clones build at once: the second waits, and finds it.
build_piece() {
  local file=$1 what=$2 script=$3
  [ ! -e "$file" ] || return 0
  mkdir -p "$(dirname "$file")"
  step "building $what" locked_piece "$file" "$script"
}

locked_piece() (
  exec 8>"$1.lock"
  flock 8
  [ ! -e "$1" ] || exit 0
  rm -rf "$1.partial"
  "$2" "$1.partial" 8>&- || exit 1
  find "$1.partial" -type f -exec sync {} +
  mv -T "$1.partial" "$1"
)
