#!/bin/sh
# Makes the secrets that docker-compose.yml reads, each where it is missing: sh deploy/secrets.sh
# The folder keeps others out; the files can be read by the users that the containers run as.
set -eu
cd "$(dirname "$0")/.."
mkdir -p secrets
chmod 700 secrets
for name in postgres_superuser_password postgres_owner_password postgres_password \
    rabbitmq_admin_password rabbitmq_neighbours_password rabbitmq_positions_password rabbitmq_flower_password \
    redis_password api_key flower_password grafana_password; do
    if [ ! -s "secrets/$name" ]; then
        head -c 24 /dev/urandom | base64 | tr '+/' '-_' > "secrets/$name"
        chmod 444 "secrets/$name"
        echo "secrets/$name"
    fi
done
