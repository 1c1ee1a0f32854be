#!/bin/sh
# fetch_googletest.sh SYSTEM_DIR OUT: GoogleTest's sources in OUT, from SYSTEM_DIR (where Debian's and Ubuntu's package
# `googletest` puts them) or out of that package, downloaded but not installed, so that no root is needed.
set -eu
system_dir=$1
out=$2

if [ -f "$system_dir/CMakeLists.txt" ]; then
  ln -sfn "$system_dir" "$out"
  exit 0
fi

explain() {
  echo "GoogleTest is needed for the C++ tests and could not be fetched: apt-get install googletest," >&2
  echo "or unpack its sources and say make test GOOGLETEST_DIR=/path/to/googletest" >&2
  exit 1
}
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || explain

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd_download() { (cd "$work" && apt-get "$@" download googletest >/dev/null 2>"$work/log"); }
if ! cd_download -q; then  # no package lists yet: fetch them, privately
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
  private="-o Dir::State::lists=$work/lists -o Dir::Cache=$work/cache"
  # shellcheck disable=SC2086
  apt-get -q $private update >/dev/null 2>"$work/log" && cd_download -q $private || { cat "$work/log" >&2; explain; }
fi
dpkg-deb -x "$work"/googletest_*.deb "$work/unpacked"
rm -rf "$out"
mv "$work/unpacked/usr/src/googletest" "$out"
