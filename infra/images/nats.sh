# The official image has nothing but the server in it: whatever works with this one must not need a shell in there.
# sysusers: without naming the small one, apt takes all of systemd.
packages=nats-server,systemd-standalone-sysusers
changes=(
    'ENTRYPOINT ["nats-server"]'
    'CMD ["--http_port", "8222"]'
    'EXPOSE 4222 6222 8222'
)
