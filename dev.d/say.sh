# Output for people: steps with elapsed time, everything on stderr so that stdout stays for answers. Sourced by ./dev.
# shellcheck shell=bash

# How often a long step shows a sign of life where the output is not a terminal.
SAY_EVERY_S=15

say() { printf '%s\n' "$*" >&2; }

die() {
  say "✗ $*"
  exit 1
}

# start_job LOG COMMAND…: in the background, as JOB. Ctrl-C (or TERM) ends it with all its descendants: bash starts background commands with SIGINT
# ignored, and a build would go on alone.
start_job() {
  local log=$1
  shift
  "$@" >"$log" 2>&1 </dev/null &
  JOB=$!
  trap 'end_tree "$JOB"; exit 130' INT TERM HUP
}

# The result of JOB.
await_job() {
  local status=0
  wait "$JOB" || status=$?
  trap - INT TERM HUP
  [ ! -t 2 ] || printf '\r\033[K' >&2
  return "$status"
}

end_tree() {
  local child
  for child in $(pgrep -P "$1"); do end_tree "$child"; done
  kill -TERM "$1" 2>/dev/null || true
}

# step WHAT COMMAND…: runs the command with its output in a file, shows its last line and the elapsed time meanwhile, and the tail if it fails.
step() {
  local what=$1 log start=$SECONDS
  shift
  log=$(mktemp)
  start_job "$log" "$@"
  show_progress "$what" "$log" "$JOB" "$start"
  if await_job; then
    say "✓ $what ($((SECONDS - start)) s)"
    rm -f "$log"
    return 0
  fi
  say "✗ $what failed after $((SECONDS - start)) s; the end of its output ($log):"
  tail -n 40 "$log" | sed 's/^/    /' >&2
  return 1
}

show_progress() {
  local what=$1 log=$2 pid=$3 start=$4 shown=0 elapsed
  while kill -0 "$pid" 2>/dev/null; do
    elapsed=$((SECONDS - start))
    if [ -t 2 ]; then
      printf '\r\033[K· %s (%d s) %.60s' "$what" "$elapsed" "$(last_line "$log")" >&2
    elif [ "$elapsed" -ge $((shown + SAY_EVERY_S)) ]; then
      shown=$elapsed
      say "· $what ($elapsed s) $(last_line "$log")"
    fi
    # Waiting for a process that is ours: it has a state to poll, not an event to await together with a redraw.
    sleep 0.2
  done
}

last_line() { tail -c 400 "$1" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c 1-100 || true; }
