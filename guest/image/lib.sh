# What the image scripts share. Sourced by them; it names no mirror: packages come from where the machine's own APT settings say.
# shellcheck shell=bash

# Left behind by a build that was killed; nothing takes so long.
STALE_BUILD_MINUTES=180

die() {
  echo "✗ $*" >&2
  exit 1
}

os_release() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }

# The image is of the host's own release, whose packages the machine's sources offer.
suite() {
  local codename
  codename=$(os_release VERSION_CODENAME)
  if [ "$(os_release ID)" != debian ] || [ -z "$codename" ]; then
    die "the image is made of the host's own Debian, and this machine runs $(os_release PRETTY_NAME)"
  fi
  echo "$codename"
}

# begin OUT: sets OUT and WORK, a folder beside it (so that the last step is a rename) which goes when the script ends, however it ends.
begin() {
  [ $# = 1 ] || die "usage: $(basename "$0") OUT"
  OUT=$(realpath -m "$1")
  mkdir -p "$(dirname "$OUT")"
  find "$(dirname "$OUT")" -maxdepth 1 -name '.build-*' -mmin +"$STALE_BUILD_MINUTES" -exec rm -rf {} +
  WORK=$(mktemp -d "$(dirname "$OUT")/.build-XXXXXX")
  # A caller with a restrictive umask must not end up in the image.
  umask 022
  chmod 755 "$WORK"
  trap 'rm -rf "$WORK"' EXIT
  trap 'exit 130' INT TERM HUP
}

# APT with the machine's sources, keys and preferences but lists and caches of its own: fresh lists, nothing changed on the machine, no root needed.
private_apt() {
  local tool=$1
  shift
  "$tool" -q -o Dir::State::Lists="$WORK/apt/lists" -o Dir::Cache="$WORK/apt/cache" -o Dir::State::status="$WORK/apt/status" \
    -o APT::Sandbox::User="$(id -un)" -o Dpkg::Use-Pty=0 "$@"
}

update_private_apt() {
  mkdir -p "$WORK/apt/lists/partial" "$WORK/apt/cache/archives/partial"
  : >"$WORK/apt/status"
  echo "reading package lists"
  private_apt apt-get -o Acquire::Languages=none -o APT::Update::Error-Mode=any update || die "apt-get update failed: does the machine reach its mirror?"
}

# unpack_package PACKAGE FOLDER: its candidate by the machine's own preferences.
unpack_package() {
  echo "downloading $1"
  mkdir -p "$WORK/debs" "$2"
  rm -f "$WORK/debs"/*
  (cd "$WORK/debs" && private_apt apt-get download "$1") || die "cannot download $1"
  dpkg -x "$WORK/debs"/*.deb "$2"
}
