#!/bin/sh
# Succeeds if this server has to be restarted: a stream is frozen, and its volume has room.
#
# A write that fails, as on a full disk, freezes its stream: no publish is acknowledged until the server restarts, even when
# there is room again. Only the plain /healthz reports it. While the disk is full a restart cannot help, so this does not
# ask for one.
#
# Needs no more than a shell, df, and busybox: its wget discards the body of an error, so nc reads it.

# More than a batch of events needs. With less, the restarted server would freeze again at once.
room_kb=65536

printf 'GET /healthz HTTP/1.0\r\n\r\n' | timeout 3 busybox nc 127.0.0.1 8222 | grep -q 'write error' || exit 1
[ "$(df -P -k /data | awk 'END { print $4 }')" -ge "$room_kb" ]
