#!/bin/sh
# Puts the users' passwords into the definitions and becomes RabbitMQ. A changed password counts after a restart.
set -eu
umask 077
script=
for user in admin neighbours positions flower; do
    # Of letters, digits, - and _, as deploy/secrets.sh makes them: they go through sed and JSON as they are.
    password=$(tr -d '\n' < "/run/secrets/rabbitmq_${user}_password")
    case $password in
        '' | *[!A-Za-z0-9_-]*) echo "rabbitmq_${user}_password: only letters, digits, - and _" >&2; exit 1 ;;
    esac
    script="$script
s/@${user}_password@/$password/"
done
printf '%s\n' "$script" > /tmp/script
sed -f /tmp/script /etc/rabbitmq/definitions.json > /tmp/definitions.json
rm /tmp/script
exec docker-entrypoint.sh rabbitmq-server
