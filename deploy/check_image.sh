#!/usr/bin/env bash
# Builds the image's target `cpu`, runs it as it is meant to be run, and checks what deploy/README.md
# says of it. Needs no container engine: buildah builds, and the image's own command then runs in
# namespaces of its own, as process 1, with a read-only root and no network but loopback.
#
#   deploy/check_image.sh [OPTION OF `buildah bud`]...      e.g. --secret id=pip.conf,src=pip.conf
#
#   WORK=DIR   where images and caches go (default: a new folder, removed at the end)
#   SKIP_BUILD=1   check the image that an earlier run left in WORK
#   STORAGE_DRIVER=vfs   where the kernel has no overlay file system for buildah; takes several times the room
#   CUDA_STEPS=1   also build `cuda` on a stand-in for vLLM's image: the environment of `cpu`
#
# As root, on Debian: apt-get install buildah debootstrap iproute2
set -euo pipefail

readonly IMAGE=vllm-sae:cpu
readonly BASE=docker.io/library/debian:bookworm-slim CUDA_BASE=docker.io/vllm/vllm-openai:v0.32.0
readonly CACHE=/var/cache/vllm-sae
readonly READY_SECONDS=900 STOP_SECONDS=120

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kept=${WORK:+yes}
work=${WORK:-$(mktemp --directory)}
mkdir -p "$work"/{storage,run,cache}
export BUILDAH_ISOLATION=chroot
server=

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
images() {
  nice -n 10 buildah ${STORAGE_DRIVER:+--storage-driver "$STORAGE_DRIVER"} \
    --root "$work/storage" --runroot "$work/run" "$@"
}
has_image() { images inspect --type image "$1" >/dev/null 2>&1; }

# image_field IMAGE EXPRESSION: of the image's configuration `config`, a Python dictionary.
image_field() {
  images inspect --type image "$1" \
    | python3 -c 'import json, sys
config = json.load(sys.stdin)["Docker"]["config"]
value = eval(sys.argv[1])
print("\n".join(value) if isinstance(value, list) else value)' "$2"
}

stop_all() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
  images rm --all >/dev/null 2>&1 || true
  [ -n "$kept" ] || rm -rf "$work"
}
trap stop_all EXIT

# Debian's own packages stand in for the base that a registry would serve.
make_base() {
  has_image "$BASE" && return
  say "base: debootstrap, tagged $BASE"
  local container
  container=$(images from scratch)
  nice -n 10 debootstrap --variant=minbase bookworm "$(images mount "$container")" >"$work/debootstrap.log" \
    || fail "debootstrap, see $work/debootstrap.log"
  images commit --quiet --format docker --rm "$container" "$BASE" >/dev/null
}

# build TARGET TAG [OPTION]...
build() {
  local target=$1 tag=$2
  shift 2
  say "build: $target"
  # OCI's format has no health check.
  images bud --format docker --pull=never --target "$target" --tag "$tag" "$@" "$repository"
}

# check_configuration IMAGE
check_configuration() {
  local user
  user=$(image_field "$1" 'config["User"]')
  [ "$user" = 10001:10001 ] || fail "user is '$user'"
  [ "$(image_field "$1" 'config["Entrypoint"]')" = vllm-sae ] || fail "entry point is not in exec form"
  image_field "$1" 'config["Healthcheck"]["Test"]' | grep -q /health || fail "no health check"
  say "user $user, health check"
}

# check_files ROOT
check_files() {
  local root=$1 tool folder
  for tool in cc gcc g++ c++ clang make ld as pip pip3; do
    for folder in bin sbin usr/bin usr/local/bin opt/vllm-sae/bin; do
      [ ! -e "$root/$folder/$tool" ] || fail "$folder/$tool is in the image"
    done
  done
  local owned
  owned=$(find "$root" -xdev \( -uid 10001 -o -type d -perm -o=w ! -perm -1000 \) ! -path "$root$CACHE")
  [ -z "$owned" ] || fail "the server's user could change: $owned"
  say "no build tools, nothing that the server could change; $(du -sxm "$root" | cut -f1) MiB"
}

# in_namespaces ROOT COMMAND...: the command as process 1, its root read-only but for /tmp and CACHE.
in_namespaces() {
  local root=$1
  shift
  mapfile -t variables < <(image_field "$IMAGE" 'config["Env"]')
  # shellcheck disable=SC2016  # expanded inside
  exec unshare --mount --pid --net --fork --kill-child=KILL -- bash -euc '
    root=$1 cache=$2; shift 2
    ip link set lo up
    mount --bind "$root" "$root"
    mount --options remount,bind,ro "$root"
    mount --types tmpfs tmpfs "$root/tmp" --options mode=1777
    mount --types proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --types sysfs sysfs "$root/sys" --options ro
    mount --bind "$cache" "$root/var/cache/vllm-sae"
    exec env --ignore-environment "$@"' \
    namespaces "$root" "$work/cache" \
    "${variables[@]}" VLLM_API_KEY=a-key-for-the-check VLLM_CPU_KVCACHE_SPACE=1 \
    "$(command -v chroot)" --userspec=10001:10001 "$root" \
    /bin/sh -c 'cd /var/cache/vllm-sae && exec "$@"' sh "$@"
}

# beside PID COMMAND...: a command in the namespaces of a running container, as the same user.
beside() {
  local pid=$1
  shift
  env --ignore-environment "${variables[@]}" \
    nsenter --target "$pid" --mount --pid --net --root --wd --setuid 10001 --setgid 10001 -- "$@"
}

check_server() {
  local root=$1 model demo_sae
  chown 10001:10001 "$work/cache"
  say "demo model: converted without a network"
  model=$(in_namespaces "$root" python3 -m server.commands.demo_model 2>"$work/convert.log" | tail -n 1) \
    || fail "conversion, see $work/convert.log"
  demo_sae=$(in_namespaces "$root" python3 -c 'from server.commands.demo import DEMO_SAE; print(DEMO_SAE)')

  say "serve $model"
  in_namespaces "$root" vllm-sae serve "$model" --sae "l14=$demo_sae" --served-model-name demo \
    --enforce-eager --dtype float32 --max-model-len 1024 --max-num-seqs 8 --shutdown-timeout 60 \
    >"$work/server.log" 2>&1 &
  server=$!
  mapfile -t variables < <(image_field "$IMAGE" 'config["Env"]')
  mapfile -t probe < <(image_field "$IMAGE" 'config["Healthcheck"]["Test"][1:]')
  local pid started=$SECONDS
  until pid=$(pgrep --parent "$server") && beside "$pid" "${probe[@]}" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$work/server.log" >&2; fail "the server ended"; }
    [ $((SECONDS - started)) -lt "$READY_SECONDS" ] || fail "no health, see $work/server.log"
    sleep 2
  done
  say "healthy after $((SECONDS - started)) s"
  grep --quiet '^Uid:.10001' "/proc/$pid/status" || fail "the server does not run as 10001"
  ! beside "$pid" sh -c 'echo > /root-is-writable' 2>/dev/null || fail "the root is writable"

  beside "$pid" python3 - <"$repository/deploy/check_requests.py" || fail "requests"
  local code=0 stopping=$SECONDS
  while kill -0 "$server" 2>/dev/null; do
    [ $((SECONDS - stopping)) -lt "$STOP_SECONDS" ] || fail "the server goes on, see $work/server.log"
    sleep 1
  done
  wait "$server" || code=$?
  server=
  [ "$code" -eq 0 ] || fail "the server's exit code after SIGTERM is $code, see $work/server.log"
  say "drained, exit code 0"
}

# check_cuda_steps [OPTION]...: the stage `cuda` on the CPU's environment, which stands in for an image
# that has vLLM in its python3, a pip, and another user.
check_cuda_steps() {
  build environment vllm-sae:environment --layers "$@"
  local container root path=/opt/vllm-sae/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  container=$(images from --pull=never vllm-sae:environment)
  images run "$container" -- /opt/vllm-sae/bin/python3 -m ensurepip >/dev/null
  images run "$container" -- /opt/vllm-sae/bin/python3 -m pip uninstall --quiet --yes vllm-sae
  images config --env PATH="$path" --user 65534:65534 "$container"
  images commit --quiet --format docker --rm "$container" "$CUDA_BASE" >/dev/null
  # Not from kept layers: buildah 1.28 does not mount those of another stage.
  build cuda vllm-sae:cuda "$@"
  check_configuration vllm-sae:cuda
  root=$(images mount "$(images from --pull=never vllm-sae:cuda)")
  chroot --userspec=10001:10001 "$root" /usr/bin/env PATH="$path" HOME=/tmp vllm-sae --help \
    | grep --quiet serve || fail "vllm-sae does not start in cuda"
  say "cuda: vllm-sae starts on the stand-in"
}

if [ -z "${SKIP_BUILD:-}" ]; then
  make_base
  build cpu "$IMAGE" ${CUDA_STEPS:+--layers} "$@"
fi
has_image "$IMAGE" || fail "no $IMAGE in $work"
rootfs=$(images mount "$(images from --pull=never "$IMAGE")")
check_configuration "$IMAGE"
check_files "$rootfs"
check_server "$rootfs"
[ -z "${CUDA_STEPS:-}" ] || check_cuda_steps "$@"
say "passed"
