#!/usr/bin/env bash
# Installs the browser in which tests/browser opens reports, from Debian's archive (as root): tests/browser/install.sh
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
