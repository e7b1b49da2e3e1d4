# What the scripts of this folder say and check of their command lines; they source it, and have
# `program`, their name, and `synopsis`, which prints how they are called.
# shellcheck shell=bash disable=SC2154

say() { printf '%s: %s\n' "$program" "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# A mistake in the command line: one line that says what to change, then the synopsis.
misuse() {
  say "$*"
  synopsis >&2
  exit 2
}

# check FLAG VALUE PATTERN EXAMPLE: the whole value must match, else say what would.
check() {
  [[ -n $2 ]] || misuse "$1 is missing: add $1 $4"
  [[ $2 =~ ^($3)$ ]] || misuse "$1 '$2' is not valid: write it like $1 $4"
}
