#!/usr/bin/env bash
# Fetches the five npm packages that the emoji come from, as tarballs, into a folder.
# Usage: bash miniature/fetch.sh DIR
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: bash miniature/fetch.sh DIR" >&2
  exit 2
fi
if ! command -v npm >/dev/null; then
  echo "npm is not installed: install Node.js, then run this again" >&2
  exit 1
fi

mkdir -p "$1"
cd "$1"
for package in \
  emojibase-data@17.0.0 \
  @lobehub/fluent-emoji-3d@1.1.0 \
  @iconify-json/noto@1.2.9 \
  @iconify-json/fluent-emoji-flat@1.2.6 \
  @iconify-json/twemoji@1.2.5; do
  npm pack --silent "$package"
done
