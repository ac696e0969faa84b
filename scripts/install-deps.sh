#!/usr/bin/env bash
# Installs what Cloud Code needs and this machine lacks:
#   scripts/install-deps.sh run    what `make run` needs
#   scripts/install-deps.sh test   that, and what `make test` needs
# Debian packages come through apt-get; containerd, runc, the CNI plugins and, for
# tests, versitygw are built by `go install` into libexec/cloudcode, unless the
# machine has versions that are new enough. What is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

containerd_version=2.4.2 containerd_oldest=2.3.5
runc_version=1.5.2 runc_oldest=1.4.0
cni_version=1.9.1
versitygw_version=1.8.0
libexec=$PWD/libexec/cloudcode

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# at_least OLDEST VERSION
at_least() { [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

version_of() { "$@" 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1 || true; }

go_works() {
  have go || die "Go is not installed or not in PATH; Cloud Code needs the version that go.mod names or newer"
}

packages=()
need() { # COMMAND-OR-FILE PACKAGE
  if [ -e "$1" ] || have "$1"; then return; fi
  packages+=("$2")
}

debian_packages() {
  need mmdebstrap mmdebstrap
  need npm npm
  need git git
  need iptables iptables
  need nft nftables
  need ip iproute2
  need mkfs.ext4 e2fsprogs
  need gcc gcc
  need pkg-config pkg-config
  need /usr/include/seccomp.h libseccomp-dev
  need /etc/ssl/certs/ca-certificates.crt ca-certificates
  need fusermount3 fuse3 # mounts of object storage; TigrisFS itself has its own package
  need rclone rclone     # mounts where TigrisFS is not installed
  if [ "$1" = test ]; then
    need chromium chromium
    need tmux tmux
    need restic restic # measured against in benchmarks
  fi
  [ ${#packages[@]} -eq 0 ] && return
  have apt-get || die "these are missing, and there is no apt-get to install them with: ${packages[*]}"
  [ "$(id -u)" = 0 ] || die "these are missing: run 'sudo apt-get install ${packages[*]}', then try again"
  say "installing Debian packages: ${packages[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

build() { # WHAT DIR PACKAGE...
  local what=$1 dir=$2
  shift 2
  say "building $what (a few minutes the first time)"
  mkdir -p "$dir"
  GOBIN=$dir GOFLAGS='' go install "$@"
}

runtime() {
  local own
  own=$(version_of "$libexec/containerd" --version)
  if ! at_least $containerd_oldest "$own" && ! at_least $containerd_oldest "$(version_of containerd --version)"; then
    build "containerd $containerd_version" "$libexec" \
      github.com/containerd/containerd/v2/cmd/{containerd,containerd-shim-runc-v2,ctr}@v$containerd_version
  fi
  own=$(version_of "$libexec/runc" --version)
  if ! at_least $runc_oldest "$own" && ! at_least $runc_oldest "$(version_of runc --version)"; then
    build "runc $runc_version" "$libexec" -tags seccomp github.com/opencontainers/runc@v$runc_version
  fi
  if [ ! -x "$libexec/cni/bridge" ] || [ ! -x "$libexec/cni/host-local" ] || [ ! -x "$libexec/cni/loopback" ]; then
    build "CNI plugins $cni_version" "$libexec/cni" \
      github.com/containernetworking/plugins/plugins/{main/bridge,main/loopback,ipam/host-local}@v$cni_version
  fi
}

# s3_server is for tests: a real S3 server, of the version that they were written for.
s3_server() {
  local own
  # Built by go install, its --version says nothing.
  own=$(go version -m "$libexec/versitygw" 2>/dev/null | grep -oE 'versitygw[[:space:]]+v[0-9.]+' || true)
  if [ "${own##*v}" != $versitygw_version ]; then
    build "versitygw $versitygw_version" "$libexec" github.com/versity/versitygw/cmd/versitygw@v$versitygw_version
  fi
}

case "${1:-}" in
  run | test) ;;
  *) die "usage: $0 run|test" ;;
esac
[ "$(uname -s)" = Linux ] || die "Cloud Code's node daemon runs on Linux only"
debian_packages "$1"
go_works
runtime
if [ "$1" = test ]; then s3_server; fi
