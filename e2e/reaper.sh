#!/usr/bin/env bash
# Cleans up after one test cluster, however its test process ended: started with a pipe as stdin, it acts when the other end is gone.
# usage: reaper.sh FOLDER INSTANCE
set -u
folder=$1 instance=$2
STOP_S=60

while read -r _; do :; done

# Processes that have the private folder, or this instance's memory folder, in their command line or as their root. Only ours do.
ours() {
  local process
  for process in /proc/[0-9]*; do
    if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q -F -e "$folder" -e "/dev/shm/sprites-$instance" ||
      readlink "$process/root" 2>/dev/null | grep -q -F -e "$folder" -e "/dev/shm/sprites-$instance"; then
      [ "${process#/proc/}" = $$ ] || echo "${process#/proc/}"
    fi
  done
}

if [ -e "$folder/lock" ] && ! flock -n -s "$folder/lock" true; then
  sprited=$(head -n 1 "$folder/lock")
  kill -TERM "$sprited" 2>/dev/null
  for ((i = 0; i < STOP_S * 5; i++)); do
    kill -0 "$sprited" 2>/dev/null || break
    sleep 0.2
  done
fi
for pid in $(ours); do
  [ "$pid" = $$ ] || [ "$pid" = $BASHPID ] || kill -KILL "$pid" 2>/dev/null
done
for namespace in $(ip netns list 2>/dev/null | awk '{ print $1 }' | grep "^$instance-"); do ip netns delete "$namespace"; done
nft list tables 2>/dev/null | awk -v prefix="$instance" '$3 ~ "^" prefix "[-_]" { print $2, $3 }' | while read -r family table; do
  nft delete table "$family" "$table"
done
mounts=$(awk '{ print $2 }' /proc/mounts | grep -F -e "$folder" | sort -r)
for mount in $mounts; do umount -l "$mount"; done
rm -rf "$folder" "/dev/shm/sprites-$instance"
