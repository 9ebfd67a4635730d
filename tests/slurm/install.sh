#!/usr/bin/env bash
# Installs what the Slurm lab needs from Debian's archive (as root): tests/slurm/install.sh
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  munge slurm-client slurmctld slurmd iproute2 libslurm-dev gcc libc6-dev
