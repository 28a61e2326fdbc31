# The local cluster: up, down, status, logs, env. Sourced by ./dev.
# shellcheck shell=bash

# A first start imports the base image into the bucket and boots the golden VM, under TCG.
START_DEADLINE_S=600
# sprited cuts off after 300 s itself; past that something is wrong.
STOP_DEADLINE_S=330
LOG_BYTES_MAX=$((20 << 20))
DEMO=demo

log_file() { echo "$DATA/sprited.log"; }

# The pid of the sprited that holds the data folder; nothing if none does. The lock decides, the number in it may be stale.
holder() {
  [ -e "$DATA/lock" ] || return 0
  flock -n -s "$DATA/lock" true || head -n 1 "$DATA/lock"
}

is_ready() { [ -e "$DATA/run/ready" ] && [ "$(jq -r .pid "$DATA/run/ready" 2>/dev/null)" = "$1" ]; }

ready_field() { jq -r ".$1" "$DATA/run/ready"; }

up() {
  local started=$SECONDS
  require_debian
  # Before minutes of installing.
  check_rust
  install_packages "${PACKAGES_RUN[@]}" "${PACKAGES_BUILD[@]}" || die "packages are missing; see above"
  install_qemu
  resolve_localhost
  build_all || die "the build failed; see above"
  mkdir -p "$DATA"
  exec 9>"$DATA/up.lock"
  flock -n 9 || die "another ./dev up is at work on $DATA"
  keep_settings
  put_setting "$DATA/sprited.toml" image "\"$IMAGE\""
  start_cluster
  check_edge
  ready_field 'notices[]' | sed 's/^/! /' >&2
  first_sprite
  say "✓ up in $((SECONDS - started)) s"
  what_next
}

start_cluster() {
  local pid
  pid=$(holder)
  if [ -n "$pid" ] && is_current "$pid"; then
    step "sprited (pid $pid) runs already" await_ready "$pid" || die "it does not become ready; see ./dev logs"
    return
  fi
  if [ -n "$pid" ]; then
    # Sprites go on: their VMs are processes of their own, and the new sprited adopts them.
    kill -HUP "$pid"
    step "a new build or new settings: restarting sprited, sprites go on" await_end "$pid" 30 || die "pid $pid does not end"
  fi
  rotate_log
  setsid "$BIN/sprited" dev --data "$DATA" --config "$DATA/sprited.toml" >>"$(log_file)" 2>&1 </dev/null 9>&- &
  pid=$!
  cp "$DATA/sprited.toml" "$DATA/sprited.toml.started"
  if ! step "starting the cluster (a first start imports the image and boots the golden VM)" await_ready "$pid"; then
    tail -n 25 "$(log_file)" >&2
    die "sprited did not become ready; all of its log: $(log_file)"
  fi
}

# Same binary, same settings?
is_current() {
  case $(readlink "/proc/$1/exe") in *' (deleted)') return 1 ;; esac
  cmp -s "$DATA/sprited.toml" "$DATA/sprited.toml.started"
}

rotate_log() {
  local log
  log=$(log_file)
  if [ -e "$log" ] && [ "$(stat -c %s "$log")" -gt "$LOG_BYTES_MAX" ]; then mv "$log" "$log.1"; fi
}

await_ready() {
  local pid=$1 end=$((SECONDS + START_DEADLINE_S))
  until is_ready "$pid"; do
    kill -0 "$pid" 2>/dev/null || { echo "sprited (pid $pid) ended"; return 1; }
    [ $SECONDS -lt $end ] || { echo "not ready after $START_DEADLINE_S s"; return 1; }
    tail -n 1 "$(log_file)" 2>/dev/null || true
    sleep 0.2
  done
}

await_end() {
  local pid=$1 end=$((SECONDS + $2))
  while kill -0 "$pid" 2>/dev/null; do
    [ $SECONDS -lt $end ] || return 1
    tail -n 1 "$(log_file)" 2>/dev/null || true
    sleep 0.2
  done
}

# As a user would reach it: by name, over TLS, with a token.
check_edge() {
  local url answer
  url=$(ready_field api_url)/v1/sprites
  answer=$(curl -sS --max-time 20 --retry 5 --retry-connrefused --cacert "$(ready_field ca_file)" -H "@-" "$url" \
    <<<"Authorization: Bearer $(cat "$(ready_field token_file)")" 2>&1) || die "the API does not answer at $url: $answer"
  jq -e .sprites >/dev/null 2>&1 <<<"$answer" || die "the API at $url answers strangely: $answer"
  say "✓ the API answers at $(ready_field api_url)"
}

first_sprite() {
  local exports
  exports=$(print_env)
  eval "$exports"
  if ! sprite info -s "$DEMO" >/dev/null 2>&1; then
    sprite create "$DEMO" --skip-console >&2 || die "sprite create $DEMO failed; see ./dev logs"
  fi
  say "\$ sprite exec -s $DEMO -- uname -a"
  sprite exec -s "$DEMO" -- uname -a >&2 || die "the sprite $DEMO does not run commands; see ./dev logs"
  say "✓ $DEMO has the address $(sprite url -s "$DEMO" 2>/dev/null | head -n 1)"
}

what_next() {
  cat >&2 <<TEXT

Next:
  eval "\$(./dev env)"                 this shell finds the cluster, \`sprite\` and the certificate
  sprite console -s $DEMO              a shell in it; leave with Ctrl-D
  sprite create another               a second computer
  sprite checkpoint create -s $DEMO    keep its disk as it is now; later: sprite restore v1 -s $DEMO
  ./dev status | logs | down
TEXT
}

down() {
  local pid
  pid=$(holder)
  if [ -z "$pid" ] && [ -n "$(orphans)" ]; then
    say "! sprited is gone but its VMs go on; starting it once more to put them away"
    start_cluster
    pid=$(holder)
  fi
  [ -n "$pid" ] || { say "✓ nothing runs on $DATA"; return 0; }
  kill -TERM "$pid"
  step "suspending sprites, pushing everything to the bucket" await_end "$pid" "$STOP_DEADLINE_S" \
    || die "sprited (pid $pid) is still at it; see ./dev logs. Once more ./dev down lets it leave at once"
}

# VMs of this data folder.
orphans() { pgrep -f "^[^ ]*qemu-system-x86_64 .*$DATA/" || true; }

status() {
  [ -x "$BIN/sprited" ] || die "not built yet; ./dev up"
  "$BIN/sprited" status --data "$DATA"
}

logs() {
  local follow='' options=() word
  for word in "$@"; do
    if [ "$word" = -f ]; then follow=1; else options+=("$word"); fi
  done
  read_options ${options[@]+"${options[@]}"}
  [ -e "$(log_file)" ] || die "there is no log at $(log_file); nothing was started on $DATA yet"
  if [ -n "$follow" ]; then exec tail -n 200 -F "$(log_file)"; else exec cat "$(log_file)"; fi
}

# Only export lines on stdout. The bundle is system + local CA, so that pip and curl in that shell reach the rest of the world as before.
print_env() {
  local pid
  pid=$(holder)
  if [ -z "$pid" ] || ! is_ready "$pid"; then die "nothing runs on $DATA; ./dev up"; fi
  local bundle=$DATA/ca-bundle.pem name
  cat /etc/ssl/certs/ca-certificates.crt "$(ready_field ca_file)" >"$bundle.new"
  mv "$bundle.new" "$bundle"
  printf 'export SPRITES_API_URL=%q\n' "$(ready_field api_url)"
  printf 'export SPRITE_TOKEN=%q\n' "$(cat "$(ready_field token_file)")"
  printf 'export PATH=%q:"$PATH"\n' "$BIN"
  for name in SSL_CERT_FILE CURL_CA_BUNDLE REQUESTS_CA_BUNDLE NODE_EXTRA_CA_CERTS PIP_CERT GIT_SSL_CAINFO; do
    printf 'export %s=%q\n' "$name" "$bundle"
  done
}
