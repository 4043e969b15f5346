# The small packages are named, because apt installs all of systemd otherwise.
packages=prometheus,systemd-standalone-sysusers,systemd-standalone-tmpfiles
changes=('ENTRYPOINT ["prometheus"]')
