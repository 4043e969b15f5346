# The official image contains the server and the tools of busybox. Here only wget of them is linked, for health checks.
# systemd-standalone-sysusers is named, because apt installs all of systemd otherwise.
packages=nats-server,busybox,systemd-standalone-sysusers
options=(--customize-hook='ln -s busybox "$1/usr/bin/wget"')
changes=(
    'ENTRYPOINT ["nats-server"]'
    'CMD ["--http_port", "8222"]'
    'EXPOSE 4222 6222 8222'
)
