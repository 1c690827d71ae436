#!/bin/sh
# with-keys COMMAND …: runs COMMAND with keys that lie in files, Docker's secrets, as the environment variables that it
# reads: for each VARIABLE below what VARIABLE_FILE names. So no such key is in a command line, in an image or in
# `docker inspect`.
set -eu
for variable in QTILT_ADMIN_KEY QTILT_API_KEY VLLM_API_KEY HF_TOKEN; do
  file=$(printenv "${variable}_FILE") || continue
  key=$(cat "$file")
  if [ -z "$key" ]; then
    echo "with-keys: ${variable}_FILE is $file, and that is empty" >&2
    exit 2
  fi
  export "$variable=$key"
  unset "${variable}_FILE"
done
exec "$@"
