#!/bin/sh
# Takes the README's screenshot of the results page: results/index.html -> results/figures/page.png.
# Needs chromium.
set -eu
cd "$(dirname "$0")/.."
picture=results/figures/page.png
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
  --virtual-time-budget=2000 --window-size=1280,1000 --screenshot="$picture" "file://$PWD/results/index.html" \
  2> "$profile/log" || { cat "$profile/log" >&2; exit 1; }
echo "$picture"
