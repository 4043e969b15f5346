#!/bin/bash
# Accepts the environment and the arguments of the official image, so that either image works under the name.
set -Eeuo pipefail

unfinished=$PGDATA/.init-unfinished

main() { # arguments of docker run
    [[ ${1:-} != -* ]] || set -- postgres "$@"

    if [[ ${1:-} == postgres && " $* " != *' --version '* && " $* " != *' --help '* ]]; then
        [[ $(id -u) != 0 ]] || become_postgres "$@"
        if [[ ! -s $PGDATA/PG_VERSION || -e $unfinished ]]; then
            init "${@:2}"
        fi
    fi
    exec "$@"
}

become_postgres() {
    if mountpoint --quiet /var/lib/postgresql/data; then
        fail 'a volume is mounted on /var/lib/postgresql/data, where nothing is stored since version 18.' \
            'Mount it on /var/lib/postgresql.'
    fi
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA"
    find "$PGDATA" ! -user postgres -exec chown postgres:postgres {} +
    export HOME=/var/lib/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
}

init() { # arguments of the server
    # Process 1 ignores a signal without a trap.
    trap 'exit 1' INT TERM

    from_file_or POSTGRES_PASSWORD ''
    from_file_or POSTGRES_USER postgres
    from_file_or POSTGRES_DB "$POSTGRES_USER"
    from_file_or POSTGRES_INITDB_ARGS ''
    local host_auth=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256} initdb_args
    if [[ -z $POSTGRES_PASSWORD && $host_auth != trust ]]; then
        fail 'this is a new database and its superuser has no password.' \
            'Set POSTGRES_PASSWORD, or POSTGRES_HOST_AUTH_METHOD=trust to let everybody in without one.'
    fi
    # They are parsed as words of a shell, including quotes.
    eval "initdb_args=($POSTGRES_INITDB_ARGS)"

    if [[ -e $unfinished ]]; then
        echo 'The last start ended before the database was complete: starting over.'
        find "$PGDATA" -mindepth 1 -delete
    fi
    initdb --username="$POSTGRES_USER" --pwfile=/dev/stdin --encoding=UTF8 --auth=trust "${initdb_args[@]}" \
        <<<"$POSTGRES_PASSWORD"
    # If the container dies from here on, the database looks complete, but lacks the objects of the init files.
    touch "$unfinished"
    echo "host all all all $host_auth" >>"$PGDATA/pg_hba.conf"

    # Only on the socket, so that the port opens after the initialization.
    pg_ctl start --silent --wait --options="$(printf '%q ' "$@" -c listen_addresses= -c port=5432)"
    if [[ $POSTGRES_DB != postgres ]]; then
        POSTGRES_DB=postgres sql --set=name="$POSTGRES_DB" <<<'create database :"name";'
    fi
    run_init_files
    pg_ctl stop --silent --wait --mode=fast

    rm "$unfinished"
    trap - INT TERM
    echo 'PostgreSQL init process complete; ready for start up.'
}

run_init_files() {
    local file
    for file in /docker-entrypoint-initdb.d/*; do
        echo "running $file"
        case $file in
            *.sh) if [[ -x $file ]]; then "$file"; else . "$file"; fi ;;
            *.sql) sql --file="$file" ;;
            *.sql.gz) gunzip --stdout "$file" | sql ;;
            *) echo "  (ignored: neither .sh nor .sql nor .sql.gz)" ;;
        esac
    done
}

sql() {
    psql --set=ON_ERROR_STOP=1 --no-psqlrc --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" "$@"
}

# Secrets may be files: $1_FILE sets $1. Exported, because the init files use them.
from_file_or() { # variable default
    local file_variable=$1_FILE
    local file=${!file_variable:-} value=${!1:-}
    [[ -z $file || -z $value ]] || fail "both $1 and $file_variable are set."
    [[ -z $file ]] || value=$(<"$file")
    export "$1=${value:-$2}"
}

fail() { # sentences
    printf 'error: %s\n' "$*" >&2
    exit 1
}

shopt -s nullglob
main "$@"
