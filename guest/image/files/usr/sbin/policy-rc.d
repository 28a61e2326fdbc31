#!/bin/sh
# No init of Debian's runs in a sprite, so packages do not start what they install; `sprite-env services` does.
exit 101
