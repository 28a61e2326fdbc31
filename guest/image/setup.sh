#!/bin/sh
# Runs as root in the finished image, before it becomes a file system: what packages and plain files (files/) cannot say.
set -eu

useradd --create-home --uid 1000 --shell /bin/bash --groups sudo sprite
chown root:root /etc/sudoers.d/sprite
chmod 440 /etc/sudoers.d/sprite
visudo --check --quiet
sed -i 's/^#alias ll=/alias ll=/' /home/sprite/.bashrc
echo 'en_US.UTF-8 UTF-8' >/etc/locale.gen
locale-gen >/dev/null

# Each sprite makes its own when it gets its identity.
rm -f /etc/ssh/ssh_host_*
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id /var/lib/systemd/random-seed

# The build's own settings and traces. Packages that are installed later come whole, with their documentation.
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/log/*.log /var/log/apt /tmp/* /run/*
mkdir -p /var/lib/apt/lists/partial /lib/modules
