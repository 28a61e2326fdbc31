#!/usr/bin/env bash
# A short digest of the recipe: every file here that has a part in the image, and the suite. The cache and the base volume are named by it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=guest/image/lib.sh
. ./lib.sh

suite=$(suite)
{
  echo "$suite"
  find . -type f ! -name '*.md' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
} | sha256sum | cut -c 1-16
