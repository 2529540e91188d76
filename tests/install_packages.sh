#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install_packages.sh PACKAGE...: installs those Debian packages that are missing.
set -uo pipefail

if ! command -v apt-get > /dev/null; then
  echo "no apt-get here, so these are taken to be installed by other means: $*"
  exit
fi
missing=()
for package in "$@"; do
  dpkg -s "$package" 2> /dev/null | grep -q '^Status: .* installed$' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
apt_get() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 "$@" > /dev/null
}
echo "installing ${missing[*]}"
apt_get update && apt_get install --yes --no-install-recommends "${missing[@]}" && exit
echo "cannot install these packages, please do: ${missing[*]}" >&2
exit 1
