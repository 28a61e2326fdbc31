# Where things lie, and the options of up, down, status and env. Sourced by ./dev.
# shellcheck shell=bash

default_cache() { if [ "$(id -u)" = 0 ]; then echo /var/cache/sprites; else echo "${XDG_CACHE_HOME:-$HOME/.cache}/sprites"; fi; }

export SPRITES_CACHE=${SPRITES_CACHE:-$(default_cache)}
DATA=${SPRITES_DATA:-/var/lib/sprites}
BUCKET='' PORT='' INSTANCE=''
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
BIN=$TARGET/debug

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --bucket=* | --data=* | --port=* | --instance=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --bucket | --data | --port | --instance)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
          --bucket) BUCKET=$2 ;;
          --data) DATA=$(realpath -m "$2") ;;
          --port) PORT=$2 ;;
          --instance) INSTANCE=$2 ;;
        esac
        shift 2
        ;;
      *) die "unknown option $1; see ./dev help" ;;
    esac
  done
  case $PORT in *[!0-9]*) die "--port $PORT is not a number" ;; esac
}

# Settings given now replace those of the last `up`; the rest is kept. sprited reads the file and refuses what it does not know.
keep_settings() {
  local file=$DATA/sprited.toml
  mkdir -p "$DATA"
  touch "$file"
  [ -z "$BUCKET" ] || put_setting "$file" bucket "\"$BUCKET\""
  [ -z "$PORT" ] || put_setting "$file" port "$PORT"
  [ -z "$INSTANCE" ] || put_setting "$file" instance "\"$INSTANCE\""
}

put_setting() {
  local file=$1 name=$2 value=$3
  { grep -v "^$name = " "$file" || true; printf '%s = %s\n' "$name" "$value"; } >"$file.new"
  mv "$file.new" "$file"
}
