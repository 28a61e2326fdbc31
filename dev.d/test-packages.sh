#!/usr/bin/env bash
# The backports entry is derived from the machine's own APT sources, whatever their format, and from nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=dev.d/packages.sh
. dev.d/packages.sh

check() {
  local what=$1 file=$2 content=$3 expected=$4 folder actual
  folder=$(mktemp -d)
  mkdir "$folder/sources.list.d"
  printf '%s\n' "$content" >"$folder/$file"
  actual=$(backports_source bookworm "$folder" || echo none)
  rm -rf "$folder"
  if [ "$actual" != "$expected" ]; then
    printf 'FAILED: %s\nexpected:\n%s\ngot:\n%s\n' "$what" "$expected" "$actual"
    exit 1
  fi
}

check 'deb822, the second stanza is the security mirror' sources.list.d/debian.sources \
'Types: deb
# a comment
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.test/security
Suites: bookworm-security
Components: main' \
'Types: deb
URIs: http://mirror.test/debian
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg'

check 'deb822 with source packages first and a disabled stanza' sources.list.d/debian.sources \
'Types: deb-src
URIs: http://sources.test/
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://disabled.test/
Suites: bookworm
Components: main

Types: deb deb-src
URIs: http://mirror.test/
Suites: bookworm
Components: main' \
'Types: deb
URIs: http://mirror.test/
Suites: bookworm-backports
Components: main'

check 'one-line format with options' sources.list \
'# deb http://commented.test/ bookworm main
deb-src http://sources.test/ bookworm main
deb http://security.test/ bookworm-security main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian bookworm main contrib' \
'Types: deb
URIs: http://mirror.test/debian
Suites: bookworm-backports
Components: main
Signed-By: /k.gpg'

check 'one-line format without options' sources.list 'deb http://mirror.test/debian/ bookworm main' \
'Types: deb
URIs: http://mirror.test/debian/
Suites: bookworm-backports
Components: main'

check 'a machine of another release' sources.list 'deb http://mirror.test/ trixie main' none
