major=${name##*:}
major=${major%%[!0-9]*}
home=/var/lib/postgresql

# Without naming the small ones, apt takes all of systemd.
packages=postgresql-$major,systemd-standalone-sysusers,systemd-standalone-tmpfiles

options=(
    # The ids of the official image: a volume filled by one can be used by the other.
    --essential-hook='echo postgres:x:999: >>"$1/etc/group"'
    --essential-hook='echo postgres:x:999:999::'$home':/bin/bash >>"$1/etc/passwd"'

    # Debian makes a database on installation, which nobody would use.
    --essential-hook='mkdir -p "$1/etc/postgresql-common/createcluster.d"'
    --essential-hook='echo create_main_cluster = false >"$1/etc/postgresql-common/createcluster.d/image.conf"'

    --customize-hook="upload '$here/postgres-entrypoint.sh' /usr/local/bin/docker-entrypoint.sh"
    --customize-hook='chmod 755 "$1/usr/local/bin/docker-entrypoint.sh"'
    --customize-hook='mkdir "$1/docker-entrypoint-initdb.d"'

    # The default is localhost, which nobody outside of the container could reach.
    --customize-hook='echo "listen_addresses = '"'*'"'" >>"$1/usr/share/postgresql/'"$major"'/postgresql.conf.sample"'

    # The directory of the socket has to be there even when the container does not start as root.
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
    # In front, because Debian's /usr/bin/psql is a slow wrapper that looks for other versions.
    "ENV PATH=/usr/lib/postgresql/$major/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

# SIGTERM would wait until every client has left by itself.
stop_signal=SIGINT
