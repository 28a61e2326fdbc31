#!/usr/bin/env bash
# Every path of this repository that a Markdown file names exists: in links, and in `code` that looks like a path into one of the rooms. So does
# every ruling that a comment cites.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=0
complain() {
  echo "$1 names $2, which does not exist"
  missing=1
}

# Links: [text](target), without web addresses and anchors within the page.
links_of() { grep -o '](\([^)]*\))' "$1" | sed 's/^](//; s/)$//; s/#.*//; s/ .*//' | grep -v -E '^([a-z]+:|$)' || true; }

# `path/like/this` whose first part is a tracked file or folder at the top, without placeholders and patterns.
code_paths_of() { grep -o '`[^` ]*`' "$1" | tr -d '`' | sed 's/[:,;]$//; s/:[0-9]*$//' | grep -E '^(\./)?[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]*)+$' || true; }

while IFS= read -r -d '' file; do
  folder=$(dirname "$file")
  while IFS= read -r link; do
    [ -z "$link" ] || [ -e "$folder/$link" ] || [ -e ".$link" ] || complain "$file" "$link"
  done < <(links_of "$file")
  while IFS= read -r path; do
    [ -n "$path" ] || continue
    path=${path#./}
    # Only what begins in this repository is a claim about it.
    [ -e "${path%%/*}" ] || continue
    [ -e "$path" ] || complain "$file" "$path"
  done < <(code_paths_of "$file")
done < <(git ls-files -z --cached --others --exclude-standard -- '*.md')

# "ruling 7" in a comment is one of docs/rulings.md.
while IFS= read -r number; do
  grep -q "^- \*\*$number\. " docs/rulings.md || complain "a comment" "ruling $number of docs/rulings.md"
done < <(git grep -h -o -E 'rulings? [0-9]+((, | and )[0-9]+)*' -- '*.rs' '*.proto' | grep -o '[0-9]*' | sort -u)
exit "$missing"
