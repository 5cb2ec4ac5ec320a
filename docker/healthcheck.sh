#!/bin/bash
# True when the server answers /ready with 200. Bash speaks TCP itself, so the image needs no HTTP client.
set -eu
port=${MOESAIC_PORT:-8000}
exec 3<> "/dev/tcp/127.0.0.1/$port"
printf 'GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
read -r -t 5 _ status _ <&3
[ "$status" = 200 ]
