#!/usr/bin/env bash
# A throw-away Slurm of several nodes on one Linux machine, as root and without systemd.
#
#   lab.sh up | down             start or stop it; its files lie in $LAB (default /tmp/slurm-lab)
#   lab.sh run CMD...            run CMD on the login node
#   lab.sh on NODE CMD...        run CMD on a node, in its namespaces
#   lab.sh crash NODE            every process of the node dies, Slurm finds it down
#   lab.sh boot NODE             it comes back
#   lab.sh user-signal on|off    Slurm's preempt_send_user_signal
#
# Each node is a network namespace with a host name and an /etc/hosts of its own, joined by a bridge. GPUs are device
# files that are clones of /dev/null. Debian packages: install.sh.
set -euo pipefail

LAB=${LAB:-/tmp/slurm-lab}
NODES=${LAB_NODES:-4} GPUS=8 CPUS=64
NET=10.77.0 # exists only inside the namespaces
HERE=$(dirname "$(readlink -f "$0")")
export SLURM_CONF=$LAB/etc/slurm.conf

node_names() { seq -f 'node%g' 1 "$NODES"; }

# nsenter, not `ip netns exec`: the latter mounts a fresh /sys, and slurmd does not start without its cgroups.
enter() { # enter HOST CMD...
  local host=$1
  shift
  exec nsenter --net="/run/netns/lab-$host" unshare --uts --mount sh -c '
    hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' sh "$host" "$LAB/etc/hosts" "$@"
}
login() { (enter login "$@"); }

pid_of() { cat "$LAB/run/$1.pid" 2>/dev/null || echo none; }
alive() { grep -q . "/proc/$(pid_of "$1")/cmdline" 2>/dev/null; } # a zombie's is empty
wait_until() { # wait_until SECONDS CMD...
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

start() { # start NAME HOST CMD...: a daemon; NAME.pid is its own process, since everything execs
  local name=$1 host=$2
  shift 2
  setsid bash "$0" enter "$host" "$@" </dev/null >>"$LAB/log/$name.out" 2>&1 &
  echo $! >"$LAB/run/$name.pid"
}
stop() { # stop NAME...: TERM, and KILL after ten seconds
  local name
  for name in "$@"; do kill -TERM "$(pid_of "$name")" 2>/dev/null || true; done
  for name in "$@"; do wait_until 10 dead "$name" || kill -KILL "$(pid_of "$name")" 2>/dev/null || true; done
}
dead() { ! alive "$1"; }

write_conf() { # write_conf on|off
  local i signal=""
  [[ $1 == off ]] || signal="SlurmctldParameters=preempt_send_user_signal"
  mkdir -p "$LAB"/{etc,run,log,state,dev,munge}
  chmod 755 "$LAB" "$LAB"/{etc,run,log,state}
  chmod 700 "$LAB/munge"
  [[ -s $LAB/munge/key ]] || mungekey -c -k "$LAB/munge/key"
  for ((i = 0; i < GPUS; i++)); do [[ -c $LAB/dev/gpu$i ]] || mknod "$LAB/dev/gpu$i" c 1 3; done
  echo "127.0.0.1 localhost" >"$LAB/etc/hosts"
  echo "$NET.254 login" >>"$LAB/etc/hosts"
  for ((i = 1; i <= NODES; i++)); do
    echo "$NET.$i node$i" >>"$LAB/etc/hosts"
    mkdir -p "$LAB/spool/node$i"
  done
  echo "Name=gpu Type=h100 File=$LAB/dev/gpu[0-$((GPUS - 1))]" >"$LAB/etc/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$LAB/etc/cgroup.conf" # or slurmd wants a mounted cgroup tree that nothing uses
  echo "required $LAB/pyxis.so" >"$LAB/etc/plugstack.conf"
  sed -e "s|@LAB@|$LAB|g" -e "s|@NET@|$NET|g" -e "s|@NODES@|$NODES|g" -e "s|@CPUS@|$CPUS|g" -e "s|@GPUS@|$GPUS|g" \
    -e "s|@SIGNAL@|$signal|" "$HERE/slurm.conf.in" >"$SLURM_CONF"
}

network() {
  local i host
  for host in login $(node_names); do
    ip netns add "lab-$host"
    ip -n "lab-$host" link set lo up
  done
  ip -n lab-login link add bridge type bridge
  ip -n lab-login addr add "$NET.254/24" dev bridge
  ip -n lab-login link set bridge up
  for ((i = 1; i <= NODES; i++)); do
    ip -n lab-login link add "veth$i" type veth peer name eth0 netns "lab-node$i"
    ip -n lab-login link set "veth$i" master bridge up
    ip -n "lab-node$i" addr add "$NET.$i/24" dev eth0
    ip -n "lab-node$i" link set eth0 up
  done
}

boot() { start "slurmd-$1" "$1" slurmd -D -N "$1"; }
idle() { [[ $(login timeout 2 sinfo -h -N -p batch -o %T 2>/dev/null | grep -cx idle) -eq $NODES ]]; }

up() {
  local node
  write_conf off
  gcc -shared -fPIC -O1 -o "$LAB/pyxis.so" "$HERE/pyxis.c"
  network
  start munged login munged -F --key-file="$LAB/munge/key" --socket="$LAB/run/munge.sock" \
    --pid-file="$LAB/run/munged.own" --log-file="$LAB/log/munged.log" --seed-file="$LAB/munge/seed"
  wait_until 10 test -S "$LAB/run/munge.sock"
  start slurmctld login slurmctld -D
  for node in $(node_names); do boot "$node"; done
  wait_until 30 idle || {
    tail -n 5 "$LAB"/log/*.out >&2
    login timeout 5 sinfo -N -o '%N %T %E' >&2 || true
    return 1
  }
}

down() {
  local daemons host
  if alive slurmctld; then
    login timeout 10 scancel --user=root || true
    wait_until 15 no_jobs || true
  fi
  mapfile -t daemons < <(seq -f 'slurmd-node%g' 1 "$NODES")
  stop "${daemons[@]}" slurmctld
  stop munged # last: the others sign their farewells with it
  for host in login $(node_names); do
    [[ -e /run/netns/lab-$host ]] || continue
    end_processes "$host"
    ip netns del "lab-$host"
  done
  rm -rf "$LAB"
}
no_jobs() { [[ -z $(login timeout 5 squeue -h 2>/dev/null) ]]; }
end_processes() { ip netns pids "lab-$1" | xargs -r kill -KILL 2>/dev/null || true; } # only the lab's live in there

crash() {
  end_processes "$1"
  login scontrol update NodeName="$1" State=DOWN Reason="crashed" # what slurmctld finds out after SlurmdTimeout
}

command=${1:-}
shift || true
case $command in
  up | down | boot | crash) "$command" "$@" ;;
  enter) enter "$@" ;;
  run) enter login "$@" ;;
  on) # inside the mount namespace that slurmd and so the node's jobs have
    exec nsenter --target "$(pid_of "slurmd-$1")" --net --uts --mount "${@:2}"
    ;;
  user-signal)
    write_conf "$1"
    login scontrol reconfigure
    ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
