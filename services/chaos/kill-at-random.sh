#!/bin/sh
# Kill a container of this project at random, start it again, and so on for ever.
#   CHAOS_PROJECT   the compose project
#   CHAOS_SERVICES  whom to kill, with spaces between
#   CHAOS_SECONDS   between two kills, on average; half of it passes before a victim is started again
set -eu

victims() {
  for service in $CHAOS_SERVICES; do
    docker ps --quiet --filter "label=com.docker.compose.project=$CHAOS_PROJECT" \
      --filter "label=com.docker.compose.service=$service"
  done
}

while :; do
  sleep "$(shuf -i "1-$CHAOS_SECONDS" -n 1)"
  victim=$(victims | shuf -n 1)
  [ -n "$victim" ] || continue
  echo "kill $(docker inspect --format '{{.Name}}' "$victim")"
  docker kill "$victim" >/dev/null || continue
  sleep "$((CHAOS_SECONDS / 2))"
  # A client that was scaled away meanwhile stays away.
  docker start "$victim" >/dev/null || echo "$victim is gone"
done
