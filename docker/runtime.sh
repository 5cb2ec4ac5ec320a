#!/bin/sh
# What the runtime stage adds to a plain Debian: certificates for the hub and for TLS to Redis, and a user without rights.
# The Dockerfile runs it, and so does scripts/image-check in a chroot.
set -eu
apt-get update -qq
apt-get install -y -qq --no-install-recommends ca-certificates
rm -rf /var/lib/apt/lists/*
useradd --uid 10001 --create-home --home-dir /home/moesaic --shell /usr/sbin/nologin moesaic
install -d -o moesaic -g moesaic /cache /models /home/moesaic/.cache
