#!/usr/bin/env bash
# build-rootfs.sh OUT: a new sprite's disk as a raw sparse file: Debian of the host's own release in a 100 GB ext4 (`packages`, `files/`, `setup.sh`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=guest/image/lib.sh
. ./lib.sh

DISK_GIB=100
# The default would be 1 GiB, through which every metadata write travels: in a log-structured volume all of it would be kept.
JOURNAL_MIB=64
# Of a full disk, what only root may use; 1 % is enough to log in and clean up.
RESERVED_PERCENT=1
# Documentation of the preinstalled packages: a third of their files.
LEFT_OUT=('/usr/share/doc/*' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/lintian/*')
KEPT=('/usr/share/doc/*/copyright' '/usr/share/locale/locale.alias' '/usr/share/locale/en*')

main() {
  begin "$@"
  local root=$WORK/root
  # Without root, mmdebstrap works in a user namespace, whose root has to write here.
  [ "$(id -u)" = 0 ] || chmod 777 "$WORK"
  update_private_apt
  debootstrap_into "$root"
  as_image_root bash -euc "$(declare -f finish); finish $(printf '%q ' "$root" "$WORK/acquire.conf" "$PWD")"
  make_file_system "$root" "$WORK/rootfs.ext4"
  as_image_root rm -rf "$root"
  mv "$WORK/rootfs.ext4" "$OUT"
}

as_image_root() { if [ "$(id -u)" = 0 ]; then "$@"; else mmdebstrap --unshare-helper "$@"; fi; }

debootstrap_into() {
  local root=$1 release options=() sources=() key packages
  release=$(suite)
  mapfile -t sources < <(machine_sources "$release")
  [ ${#sources[@]} -gt 0 ] || die "no APT source of this machine offers Debian $release"
  for key in $(machine_keys "$release"); do options+=(--keyring="$key" --customize-hook="copy-in $key /etc/apt/trusted.gpg.d/"); done
  while IFS= read -r key; do options+=(--aptopt="$key"); done < <(machine_acquire | tee "$WORK/acquire.conf")
  for key in "${LEFT_OUT[@]}"; do options+=(--dpkgopt="path-exclude=$key"); done
  for key in "${KEPT[@]}"; do options+=(--dpkgopt="path-include=$key"); done
  packages=$(sed 's/#.*//' packages | tr -s ' \n' ',' | sed 's/^,//; s/,$//')
  mmdebstrap --verbose --variant=minbase --format=directory --include="$packages" --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt=force-unsafe-io "${options[@]}" \
    "$release" "$root" "${sources[@]}" || die "mmdebstrap failed"
}

# The machine's own entries for its release, in APT's one-line format whatever they are written in; only Debian's, without backports.
machine_sources() {
  private_apt apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Created-By: Packages' | awk -v release="$1" '
    NF == 4 && $4 == "Debian" && ($2 == release || $2 == release "-updates" || $2 == release "-security") && !seen[$0]++ {
      entry = "deb " $1 " " $2
      if (!(entry in components)) order[++n] = entry
      components[entry] = components[entry] " " $3
    }
    END { for (i = 1; i <= n; i++) print order[i] components[order[i]] }'
}

# Keys that the machine's sources of this release name, other than Debian's own, which the image has anyway.
machine_keys() {
  local file key
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    if [ -r "$file" ] && grep -q -E "^[^#]*[ :]$1( |-|\$)" "$file"; then grep -v '^#' "$file" | grep -o -i -E 'signed-by[=:] *[^] ]+' || true; fi
  done | sed 's/^[^=:]*[=:] *//' | tr ',' '\n' | sort -u | while read -r key; do
    case $key in
      /usr/share/keyrings/debian-archive-*) ;;
      /*) [ ! -r "$key" ] || echo "$key" ;;
    esac
  done
}

# How the machine reaches its mirror (proxies, a mirror whose Release file has expired): as good inside as here.
machine_acquire() {
  apt-config dump | grep -E '^Acquire::((http|https|ftp)::(Proxy|No-Cache)|Check-Valid-Until|Check-Date|Retries|ForceIPv4)' | grep -v '""' || true
}

# In the image's own user namespace, where there is one.
finish() {
  local root=$1 acquire=$2 recipe=$3
  cp -r --no-target-directory --no-preserve=ownership "$recipe/files" "$root"
  cp "$recipe/setup.sh" "$root/setup.sh"
  chroot "$root" /setup.sh
  rm "$root/setup.sh"
  [ ! -s "$acquire" ] || cp "$acquire" "$root/etc/apt/apt.conf.d/90machine"
}

# The features are named because defaults differ between releases of e2fsprogs. metadata_csum_seed: a sprite's UUID is set while it is mounted.
# No orphan_file: with it every mount of 100 GB takes about a second, without it a tenth of that.
# The inode tables are zero because the file is new: said to be so (lazy_itable_init=0 punches holes), else each sprite's kernel would go over
# all of them in its first minutes.
make_file_system() {
  local root=$1 file=$2 uuid
  uuid=$(./digest.sh | sha256sum | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/')
  echo "making the file system"
  truncate -s "${DISK_GIB}G" "$file"
  PATH=$PATH:/sbin:/usr/sbin as_image_root mkfs.ext4 -q -F -L sprite -U "$uuid" -b 4096 -m "$RESERVED_PERCENT" -J "size=$JOURNAL_MIB" \
    -O 64bit,metadata_csum,metadata_csum_seed,has_journal,extent,flex_bg,resize_inode,^orphan_file,^fast_commit,^verity \
    -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=1,nodiscard,root_owner=0:0" -d "$root" "$file"
}

main "$@"
