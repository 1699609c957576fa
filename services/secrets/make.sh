#!/bin/sh
# Makes the secrets of compose.secure.yaml, once: sh services/secrets/make.sh FOLDER
#
# The containers run as users of their own, so the files can be read by all, and the folder by its owner alone.
set -eu
umask 022
folder=${1:?name the folder to make}
mkdir -m 700 "$folder"

broker=$(openssl rand -hex 24)
store=$(openssl rand -hex 24)
cd "$folder"
printf 'default_user = lorabbit\ndefault_pass = %s\n' "$broker" >rabbitmq.conf
printf 'amqps://lorabbit:%s@rabbitmq:5671/\n' "$broker" >broker-url
printf 'https://lorabbit:%s@rabbitmq:15671/\n' "$broker" >management-url
printf 'requirepass %s\n' "$store" >redis.conf
printf '%s\n' "$store" >redis-password
printf 'rediss://:%s@redis:6379/0\n' "$store" >redis-url
openssl rand -hex 24 >http-token
# `lorabbit token` fills it, once the server is up.
: >join-token
