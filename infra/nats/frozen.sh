#!/bin/sh
# Succeeds if this server must be restarted: a stream is frozen, and its volume has free space.
#
# A failed write, for example on a full disk, freezes its stream: no publish is acknowledged until the server restarts, even
# after space was freed. Only the plain /healthz reports it. While the disk is full a restart does not help, so this fails.
#
# Needs only a shell, df, and busybox. Its wget discards the body of an error, so nc reads it.

# More than a batch of events needs. With less, the restarted server would freeze again at once.
room_kb=65536

printf 'GET /healthz HTTP/1.0\r\n\r\n' | timeout 3 busybox nc 127.0.0.1 8222 | grep -q 'write error' || exit 1
[ "$(df -P -k /data | awk 'END { print $4 }')" -ge "$room_kb" ]
