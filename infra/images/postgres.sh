major=${name##*:}
major=${major%%[!0-9]*}
home=/var/lib/postgresql

# The small packages are named, because apt installs all of systemd otherwise.
packages=postgresql-$major,systemd-standalone-sysusers,systemd-standalone-tmpfiles

options=(
    # The ids of the official image, so that both images can use the same volume.
    --essential-hook='echo postgres:x:999: >>"$1/etc/group"'
    --essential-hook='echo postgres:x:999:999::'$home':/bin/bash >>"$1/etc/passwd"'

    # Prevents the database that Debian creates on installation.
    --essential-hook='mkdir -p "$1/etc/postgresql-common/createcluster.d"'
    --essential-hook='echo create_main_cluster = false >"$1/etc/postgresql-common/createcluster.d/image.conf"'

    --customize-hook="upload '$here/postgres-entrypoint.sh' /usr/local/bin/docker-entrypoint.sh"
    --customize-hook='chmod 755 "$1/usr/local/bin/docker-entrypoint.sh"'
    --customize-hook='mkdir "$1/docker-entrypoint-initdb.d"'

    # The default is localhost, which is not reachable from outside of the container.
    --customize-hook='echo "listen_addresses = '"'*'"'" >>"$1/usr/share/postgresql/'"$major"'/postgresql.conf.sample"'

    # The directory of the socket must exist even if the container does not start as root.
    --skip=cleanup/run
    --customize-hook='install -d -o 999 -g 999 -m 3777 "$1/run/postgresql"'
    --customize-hook='install -d -o 999 -g 999 -m 1777 "$1'$home'"'
)

changes=(
    'ENTRYPOINT ["docker-entrypoint.sh"]'
    'CMD ["postgres"]'
    'EXPOSE 5432'
    "VOLUME $home"
    "ENV PGDATA=$home/$major/docker"
    "ENV PG_MAJOR=$major"
    'ENV LANG=C.UTF-8'
    # First in PATH, because /usr/bin/psql of Debian is a slow wrapper that searches for other versions.
    "ENV PATH=/usr/lib/postgresql/$major/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

# SIGTERM would wait until every client has disconnected.
stop_signal=SIGINT
