# What the machine needs: Debian packages, the Rust toolchain, names that resolve. Sourced by ./dev; all of it does nothing the second time.
# shellcheck shell=bash

QEMU_MAJOR_MIN=9
RUST_MIN=1.95
PACKAGES_RUN=(libnss-myhostname nftables iproute2 e2fsprogs util-linux procps ca-certificates curl jq)
PACKAGES_BUILD=(build-essential pkg-config mmdebstrap squashfs-tools cpio lz4 zstd xz-utils binutils kmod python3)
PACKAGES_TEST=(shellcheck fio nbdkit libnbd-bin python3-libnbd qemu-utils openssl bsdutils protobuf-compiler python3-grpcio python3-protobuf)
# What the floor of the benchmarks makes its bare VM from.
PACKAGES_BENCH=(busybox-static qemu-utils python3 jq)
APT_SOURCES_DIR=${APT_SOURCES_DIR:-/etc/apt}

require_debian() {
  [ "$(id -u)" = 0 ] || die "run ./dev as root: sprites get their own users, namespaces and network devices"
  [ "$(uname -m)" = x86_64 ] || die "sprites are x86_64 machines, and this one is $(uname -m)"
  [ -r /etc/os-release ] || die "this is no Debian: /etc/os-release is missing"
  local id codename
  id=$(os_release ID)
  codename=$(os_release VERSION_CODENAME)
  case $id/$codename in
    debian/bookworm | debian/trixie) ;;
    *) say "! $id $codename is untested; ./dev is made for Debian 12 and 13" ;;
  esac
}

os_release() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing_of() {
  local package
  for package in "$@"; do is_installed "$package" || echo "$package"; done
}

apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"; }

install_packages() {
  local missing=()
  mapfile -t missing < <(missing_of "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  step "apt-get update" apt update || return 1
  step "installing ${missing[*]}" apt install -y --no-install-recommends "${missing[@]}"
}

qemu_major() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'; }

qemu_candidate() { apt-cache policy qemu-system-x86 2>/dev/null | sed -n 's/^  Candidate: [0-9]*:\([0-9]*\)\..*/\1/p'; }

install_qemu() {
  local major candidate
  major=$(qemu_major || true)
  [ "${major:-0}" -lt "$QEMU_MAJOR_MIN" ] || return 0
  candidate=$(qemu_candidate)
  if [ -z "$candidate" ]; then
    # A fresh machine has no package lists at all.
    step "apt-get update" apt update || return 1
    candidate=$(qemu_candidate)
  fi
  if [ "${candidate:-0}" -ge "$QEMU_MAJOR_MIN" ]; then
    step "installing QEMU" apt install -y --no-install-recommends qemu-system-x86
    return
  fi
  local codename entry file=$APT_SOURCES_DIR/sources.list.d/sprites-backports.sources
  codename=$(os_release VERSION_CODENAME)
  # Not `grep -q`, which may end the pipe early and with it fail.
  if ! apt-cache policy | grep "n=$codename-backports" >/dev/null; then
    entry=$(backports_source "$codename" "$APT_SOURCES_DIR") \
      || die "no APT source of this machine offers $codename, so there is none to take backports from; install qemu-system-x86 $QEMU_MAJOR_MIN or newer yourself"
    printf '%s\n' "$entry" >"$file"
    # An entry that its mirror does not have would break every later update of this machine.
    step "apt-get update" apt -o APT::Update::Error-Mode=any update || { rm -f "$file"; return 1; }
  else
    step "apt-get update" apt update || return 1
  fi
  step "installing QEMU from $codename-backports" apt install -y --no-install-recommends -t "$codename-backports" qemu-system-x86 || return 1
  major=$(qemu_major || true)
  [ "${major:-0}" -ge "$QEMU_MAJOR_MIN" ] || die "QEMU is ${major:-missing}, $QEMU_MAJOR_MIN is needed, and backports has none newer"
}

# backports_source CODENAME APT_DIR: a deb822 entry for CODENAME-backports on the mirror this machine already uses for CODENAME. The mirror,
# its key and its options are taken from the machine's own sources, in either of APT's formats; a mirror is never named here.
backports_source() {
  local codename=$1 dir=$2 file entry
  for file in "$dir"/sources.list.d/*.sources; do
    [ -r "$file" ] || continue
    entry=$(backports_from_deb822 "$codename" "$file")
    [ -z "$entry" ] || { printf '%s\n' "$entry"; return 0; }
  done
  for file in "$dir"/sources.list "$dir"/sources.list.d/*.list; do
    [ -r "$file" ] || continue
    entry=$(backports_from_list "$codename" "$file")
    [ -z "$entry" ] || { printf '%s\n' "$entry"; return 0; }
  done
  return 1
}

backports_from_deb822() {
  grep -v '^#' "$2" | awk -v codename="$1" '
    BEGIN { RS = ""; FS = "\n" }
    done { next }
    {
      offers = binary = 0; enabled = 1; out = ""
      for (i = 1; i <= NF; i++) {
        line = $i; lower = tolower(line)
        if (lower ~ /^suites:/) { n = split(line, word, /[ \t]+/); for (j = 2; j <= n; j++) if (word[j] == codename) offers = 1; line = "Suites: " codename "-backports" }
        else if (lower ~ /^types:/) { if (line ~ /(^|[ \t])deb([ \t]|$)/) binary = 1; line = "Types: deb" }
        else if (lower ~ /^components:/) line = "Components: main"
        else if (lower ~ /^enabled:[ \t]*(no|false|0)/) enabled = 0
        out = out line "\n"
      }
      if (offers && binary && enabled) { printf "%s", out; done = 1 }
    }'
}

backports_from_list() {
  awk -v codename="$1" '
    done || $1 != "deb" { next }
    {
      options = ""; rest = $0; sub(/^[ \t]*deb[ \t]+/, "", rest)
      if (rest ~ /^\[/) { options = rest; sub(/\].*/, "", options); sub(/^\[[ \t]*/, "", options); sub(/^[^]]*\][ \t]*/, "", rest) }
      n = split(rest, word, /[ \t]+/)
      if (n < 3 || word[2] != codename) next
      print "Types: deb\nURIs: " word[1] "\nSuites: " codename "-backports\nComponents: main"
      m = split(options, option, /[ \t]+/)
      for (i = 1; i <= m; i++) if (option[i] ~ /^signed-by=/) { sub(/^signed-by=/, "", option[i]); print "Signed-By: " option[i] }
      done = 1
    }' "$2"
}

check_rust() {
  [ -x "$(command -v cargo)" ] || PATH=$PATH:$HOME/.cargo/bin
  local advice="get it with rustup (https://rustup.rs): install rustup, then \`rustup toolchain install stable && rustup default stable\`"
  command -v cargo >/dev/null || die "Rust $RUST_MIN or newer is needed and there is no cargo; $advice"
  local version
  version=$(rustc --version | awk '{ print $2 }')
  printf '%s\n%s\n' "$RUST_MIN" "${version%%-*}" | sort -V -C || die "Rust is $version, $RUST_MIN or newer is needed; $advice"
}

# Every program must find demo-x1y2z3.sprites.localhost: glibc's own rule for .localhost covers one label only in some versions.
resolve_localhost() {
  local probe=dev-probe.sprites.localhost
  resolves_here "$probe" && return 0
  grep -q '^hosts:.*myhostname' /etc/nsswitch.conf || sed -i 's/^\(hosts:.*files\)/\1 myhostname/' /etc/nsswitch.conf
  resolves_here "$probe" || die "$probe does not resolve to this machine; put \`myhostname\` after \`files\` in the hosts line of /etc/nsswitch.conf"
}

resolves_here() { getent ahosts "$1" | awk '$1 ~ /^(127\.|::1$)/ { here = 1 } END { exit !here }'; }
