#!/usr/bin/env bash
# Cleans up after one test cluster, however its test process ended: started with a pipe as stdin, it acts when the other end is gone.
# usage: reaper.sh FOLDER INSTANCE
set -u
folder=$1 instance=$2
STOP_S=60

while read -r _; do :; done

# Processes that have the private folder, or this instance's memory folder, in their command line or as their root: only ours do. Not this
# script, which is told the folder as well.
ours() {
  local process command
  for process in /proc/[0-9]*; do
    command=$(tr '\0' ' ' <"$process/cmdline" 2>/dev/null) || continue
    case "$command $(readlink "$process/root" 2>/dev/null)" in
      *reaper.sh*) ;;
      *"$folder"* | *"/dev/shm/sprites-$instance"*) echo "${process#/proc/}" ;;
    esac
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
for pid in $(ours); do kill -KILL "$pid" 2>/dev/null; done
for namespace in $(ip netns list 2>/dev/null | awk '{ print $1 }' | grep "^spr$instance-"); do ip netns delete "$namespace"; done
nft delete table inet "sprites$instance" 2>/dev/null
mounts=$(awk '{ print $2 }' /proc/mounts | grep -F -e "$folder" | sort -r)
for mount in $mounts; do umount -l "$mount"; done
rm -rf "$folder" "/dev/shm/sprites-$instance"
