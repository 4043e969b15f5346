# The official image of this name has the server, and the few tools of busybox; here of those only wget, for health checks.
# sysusers: without naming the small one, apt takes all of systemd.
packages=nats-server,busybox,systemd-standalone-sysusers
options=(--customize-hook='ln -s busybox "$1/usr/bin/wget"')
changes=(
    'ENTRYPOINT ["nats-server"]'
    'CMD ["--http_port", "8222"]'
    'EXPOSE 4222 6222 8222'
)
