# ./dev test: everything CI runs, each suite timed, the sum in the last line. Sourced by ./dev.
# shellcheck shell=bash

SUITES=(fmt clippy doc deny shell paths packages unit e2e)
# No suite may hang CI: its slice of the 60 minutes.
SUITE_DEADLINE_S=2400
# Old clones leave their crates behind in a shared target folder; past this it is built anew.
CI_TARGET_KIB_MAX=$((25 << 20))
CARGO_DENY_VERSION=0.20.2

PASSED=0 FAILED=0 SKIPPED=0

run_tests() {
  local filter=${1:-} suite started=$SECONDS suites=("${SUITES[@]}")
  check_rust
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install_packages "${PACKAGES_RUN[@]}" "${PACKAGES_BUILD[@]}" "${PACKAGES_TEST[@]}" || die "packages for the tests are missing; see above"
  fi
  trim_ci_target
  TEST_FILTER=''
  if [ -n "$filter" ]; then
    # shellcheck disable=SC2076 # a literal match is meant
    if [[ " ${SUITES[*]} " =~ " $filter " ]]; then suites=("$filter"); else suites=(unit e2e) TEST_FILTER=$filter; fi
  fi
  for suite in "${suites[@]}"; do
    case $suite in unit | e2e) prepare_vms || { FAILED=$((FAILED + 1)); continue; } ;; esac
    run_suite "$suite"
  done
  say "all suites: $((SECONDS - started)) s"
  echo "$PASSED passed, $FAILED failed, $SKIPPED skipped"
  [ "$FAILED" -eq 0 ]
}

trim_ci_target() {
  [ -n "${CI:-}" ] && [ -d "$TARGET" ] || return 0
  if [ "$(du -sk "$TARGET" | cut -f 1)" -gt "$CI_TARGET_KIB_MAX" ]; then rm -rf "$TARGET"; fi
}

run_suite() {
  local suite=$1 log start=$SECONDS status=0 reason
  reason=$("cannot_$suite" 2>/dev/null || true)
  if [ -n "$reason" ]; then
    SKIPPED=$((SKIPPED + 1))
    say "- $suite skipped: $reason"
    return 0
  fi
  log=$(mktemp)
  start_job "$log" suite_with_errexit "$suite"
  show_progress "$suite" "$log" "$JOB" "$start"
  await_job || status=$?
  count_suite "$suite" "$log" "$status"
  if [ "$status" = 0 ]; then
    say "✓ $suite ($((SECONDS - start)) s)$SUITE_COUNTS"
    rm -f "$log"
  else
    say "✗ $suite ($((SECONDS - start)) s)$SUITE_COUNTS; its output:"
    failure_of "$log" | sed 's/^/    /' >&2
    say "    (all of it: $log)"
  fi
}

# A background job is a subshell of its own, in which errexit is not switched off by the `if` or `||` of a caller.
suite_with_errexit() {
  set -e
  "suite_$1"
}

# A cargo suite counts its tests; any other suite is one test. A cargo suite that failed without a failed test (it did not compile, it hung)
# counts as one failure, so that the last line never looks better than the exit code.
count_suite() {
  local suite=$1 log=$2 status=$3 passed failed skipped
  read -r passed failed skipped < <(awk '
    /^test result: / { for (i = 1; i < NF; i++) { if ($(i + 1) ~ /^passed/) p += $i; if ($(i + 1) ~ /^failed/) f += $i; if ($(i + 1) ~ /^ignored/) s += $i } }
    END { print p + 0, f + 0, s + 0 }' "$log")
  case $suite in
    unit | e2e) ;;
    *) passed=$((status == 0)) failed=0 skipped=0 ;;
  esac
  if [ "$status" != 0 ] && [ "$failed" = 0 ]; then failed=1; fi
  PASSED=$((PASSED + passed)) FAILED=$((FAILED + failed)) SKIPPED=$((SKIPPED + skipped))
  SUITE_COUNTS=''
  case $suite in unit | e2e) SUITE_COUNTS=": $passed passed, $failed failed, $skipped skipped" ;; esac
  # A skipped test says why.
  grep -E '^test .* \.\.\. ignored' "$log" | sed 's/^/- /' >&2 || true
}

# The failures if cargo lists some, else the end.
failure_of() {
  if grep -q '^failures:' "$1"; then
    awk '/^failures:/ { show = 1 } /^test result:/ { show = 0 } show' "$1" | head -n 400
    grep -E '^test .* (FAILED|has been running)' "$1" | sort -u || true
  else
    tail -n 80 "$1"
  fi
}

bounded() { timeout --kill-after=30 "$SUITE_DEADLINE_S" "$@"; }

suite_fmt() { cargo fmt --all --check; }
suite_clippy() { bounded cargo clippy --workspace --all-targets --locked -- -D warnings; }
suite_doc() { RUSTDOCFLAGS='-D warnings' bounded cargo doc --workspace --no-deps --locked; }
# The pieces of ./dev are checked as part of it: alone, what they define for each other looks unused.
suite_shell() { shellcheck -x -a dev && shellcheck -x dev.d/check-paths.sh dev.d/test-packages.sh .ci/run e2e/reaper.sh bench/run guest/image/*.sh; }
suite_paths() { dev.d/check-paths.sh; }
suite_packages() { dev.d/test-packages.sh; }
suite_unit() { bounded cargo test --workspace --exclude e2e --locked --no-fail-fast -- ${TEST_FILTER:+"$TEST_FILTER"}; }

# Licences, sources and duplicate crates. Not advisories: their database is a download of its own, which a clone without network lacks.
suite_deny() {
  install_cargo_deny
  cargo_deny --locked check bans licenses sources
}

cargo_deny() { PATH=$SPRITES_CACHE/bin:$PATH cargo deny "$@"; }

install_cargo_deny() {
  ! cargo_deny --version >/dev/null 2>&1 || return 0
  # Not optimised: it checks for a second, and its own release profile (one unit, whole-program LTO) builds for many minutes.
  CARGO_TARGET_DIR=$SPRITES_CACHE/target-tools bounded cargo install cargo-deny --version "$CARGO_DENY_VERSION" --locked --debug --root "$SPRITES_CACHE"
  rm -rf "$SPRITES_CACHE/target-tools"
}

cannot_e2e() {
  [ "$(id -u)" = 0 ] || { echo "whole-system tests make VMs and network namespaces, which needs root"; return; }
  [ "$(uname -m)" = x86_64 ] || echo "VMs are x86_64 and this machine is $(uname -m)"
}

# Some of the unit suite's tests start VMs as well; where none can run they say that they are skipped.
prepare_vms() {
  [ -z "${SPRITES_IMAGE:-}" ] && [ -z "$(cannot_e2e)" ] || return 0
  require_debian
  install_qemu && resolve_localhost && build_binaries && build_image || return 1
  export SPRITES_IMAGE=$IMAGE SPRITES_BIN=$BIN
}

suite_e2e() {
  # The whole workspace is named so that the dependencies' features, and with them their builds, are those of the other suites.
  bounded cargo test --workspace --test system --test faults --locked --no-fail-fast -- ${TEST_FILTER:+"$TEST_FILTER"}
}

run_bench() {
  [ -x bench/run ] || die "bench/run is missing"
  require_debian
  check_rust
  install_packages "${PACKAGES_RUN[@]}" "${PACKAGES_BUILD[@]}" "${PACKAGES_BENCH[@]}" || die "packages for the benchmarks are missing; see above"
  install_qemu || die "there is no QEMU to measure; see above"
  resolve_localhost || die "*.localhost does not resolve; see above"
  build_image || die "the guest image did not build; see above"
  SPRITES_IMAGE=$IMAGE exec bench/run "$@"
}
