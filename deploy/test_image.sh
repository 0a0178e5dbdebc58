#!/usr/bin/env bash
# Builds the CPU image without Docker and uses it: `make image-test` (root, some minutes, 12 GB of disk).
#
# debootstrap makes the bare Debian root that the Dockerfile starts from, buildah executes the
# Dockerfile's own instructions on it in a chroot. Then the image's command is started as its
# user, asked a question (smoke.sh) and checked with the image's HEALTHCHECK; both must fail for
# the same image without the plugin. Where podman can run containers, compose.yaml is started too:
# read-only, without capabilities, behind its port.
#
# MIRROR=URL        Debian mirror (the one that apt is configured with)
# TORCH_INDEX=URL   where torch's CPU build is (empty where pip's own configuration knows it)
# KEEP=1            leave the work folder, to look into the image
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "chroot needs root: run it as root"
for tool in debootstrap buildah curl jq python3; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install debootstrap buildah curl jq python3"
done
# Optional: apt-get install podman crun runc catatonit, pip install podman-compose
compose=$(command -v podman-compose || command -v .venv/bin/podman-compose || true)

suite=bookworm # that of DEBIAN_IMAGE in the Dockerfile
# shellcheck disable=SC2016  # apt's own variables
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Identifier: Packages' |
    awk -v suite=$suite '$2 == suite {print $1; exit}')}
[ -n "$mirror" ] || die "apt knows no mirror of Debian $suite: set MIRROR=URL"

work=$(mktemp -d "${TMPDIR:-/tmp}/rlkv-image.XXXXXX")
server=
composed=
export BUILDAH_ISOLATION=chroot
# Storage of its own; limits that any machine allows; no timers of systemd.
export DISABLE_HC_SYSTEMD=true
export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' \
    "$work/storage" "$work/run" >"$CONTAINERS_STORAGE_CONF"
configure_podman() {
    printf '[engine]\nruntime = "%s"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' "$1"
    printf '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
} >"$CONTAINERS_CONF"
configure_podman crun

# buildah hands no signal on: it goes to the container's first process, the first Python below it.
first_process() {
    local pid=$1 child
    while child=$(pgrep -P "$pid" | head -n 1) && [ -n "$child" ]; do
        pid=$child
        [[ $(readlink "/proc/$pid/exe") == *python* ]] && break
    done
    echo "$pid"
}

stop_server() { # with the status it ends with
    local buildah=$server
    server=
    [ -z "$buildah" ] || { kill -TERM "$(first_process "$buildah")" && wait "$buildah"; }
}

cleanup() {
    stop_server || true
    [ -z "$composed" ] || compose down --volumes >/dev/null 2>&1 || true
    buildah rm --all >/dev/null 2>&1 || true
    if [ -n "${KEEP:-}" ]; then
        echo "left: $work (CONTAINERS_STORAGE_CONF=$CONTAINERS_STORAGE_CONF buildah images)"
    else
        buildah rmi --all --force >/dev/null 2>&1 || true
        rm -rf "$work"
    fi
}
trap cleanup EXIT

say "a bare root: Debian $suite"
SECONDS=0
debootstrap --variant=minbase "$suite" "$work/root" "$mirror" >"$work/debootstrap.log" 2>&1 ||
    die "debootstrap failed: $(tail -n 3 "$work/debootstrap.log")"
rm -rf "$work/root/var/cache/apt/archives/"*.deb "$work/root/var/lib/apt/lists/"*
bare=$(buildah from scratch)
buildah add --quiet "$bare" "$work/root" / >/dev/null
buildah commit --quiet "$bare" localhost/debian:bare >/dev/null
buildah rm "$bare" >/dev/null
rm -rf "$work/root"
echo "made in ${SECONDS} s"

say "the Dockerfile, target cpu"
# pip's configuration of this machine is needed there as well: its indexes, and the files they are.
python3 - "$work" <<'PY'
import pathlib, re, subprocess, sys

work = pathlib.Path(sys.argv[1])
listed = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
).stdout
kept = {}
for line in listed.splitlines():
    name, _, value = line.partition("=")
    option = name.rpartition(".")[2]
    if option in ("index-url", "extra-index-url", "find-links", "trusted-host"):
        kept[option] = re.sub(r"\\n", " ", value.strip("'\""))
places = [place for value in kept.values() for place in value.split()]
# An index links to files beside it.
indexes = {str(pathlib.Path(p.removeprefix("file://")).parent) for p in places if p[:5] == "file:"}
volumes = sorted(indexes | {place for place in places if place.startswith("/")})
kept["cert"] = "/run/host-certificates.crt"
(work / "pip.conf").write_text(
    "[global]\n" + "".join(f"{name} = {value}\n" for name, value in kept.items())
)
certificates = "/etc/ssl/certs/ca-certificates.crt:/run/host-certificates.crt:ro"
(work / "volumes").write_text(
    "".join(f"--volume={v}\n" for v in [certificates, *(f"{p}:{p}:ro" for p in volumes)])
)
PY
mapfile -t volumes <"$work/volumes"
if [ -z "${TORCH_INDEX+set}" ]; then
    torch=$(grep '^torch==' deploy/requirements-cpu.txt)
    if python3 -m pip download --quiet --no-deps --dest "$work/torch" "$torch" >/dev/null 2>&1; then
        TORCH_INDEX=
    fi
    rm -rf "$work/torch"
fi
SECONDS=0
buildah bud --format docker --target cpu --tag localhost/rlkv-vllm:cpu "${volumes[@]}" \
    --secret "id=pip_conf,src=$work/pip.conf" \
    --build-arg DEBIAN_IMAGE=localhost/debian:bare \
    ${TORCH_INDEX+--build-arg "TORCH_INDEX=$TORCH_INDEX"} . 2>&1 | tee "$work/build.log" | grep --line-buffered -E "STEP|rror" ||
    die "the build failed: $(tail -n 20 "$work/build.log")"
built=$SECONDS

config=$(buildah inspect --type image localhost/rlkv-vllm:cpu | jq .Docker.config)
mapfile -t argv < <(jq -r '.Entrypoint[], .Cmd[]' <<<"$config")
mapfile -t health < <(jq -r '.Healthcheck.Test[1:][]' <<<"$config")
user=$(jq -r .User <<<"$config")
[ "${user%%:*}" -gt 0 ] || die "the image runs as user '$user', not as a numbered non-root user"
[ "${#health[@]}" -gt 0 ] || die "the image has no HEALTHCHECK"
container=$(buildah from localhost/rlkv-vllm:cpu)
root=$(buildah mount "$container")
echo "built in $built s; the image has $(du -sm "$root" | cut -f1) MB"
(cd "$root" && du -sm opt/venv/lib/python*/site-packages/* | sort -rn | sed -n 1,5p)
left=$(find "$root"/usr/bin "$root"/usr/local/bin "$root"/opt/venv/bin -name pip -o -name cc -o -name 'g++*' -o -name 'gcc*')
[ -z "$left" ] || die "tools are left in the image: $left"
left=$(find "$root/root/.cache" "$root/var/lib/apt/lists" "$root/var/cache/apt" -type f 2>/dev/null || true)
[ -z "$left" ] || die "caches are left in the image: $left"
# As compose.yaml mounts it: nothing but these can be written.
chown 0:0 "$root/home/vllm"

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
export VLLM_API_KEY=image-test
run() { buildah run --env VLLM_API_KEY="$VLLM_API_KEY" --env RLKV_URL="$url" "$@"; }

await() { # the server, or its end
    local log=$1 tries
    for ((tries = 0; tries < 300; tries++)); do
        curl --silent --fail --max-time 5 --output /dev/null "$url/health" && return
        kill -0 "$server" 2>/dev/null || die "the server ended: $(tail -n 20 "$log")"
        sleep 1
    done
    die "the server is not ready after 300 s: $(tail -n 20 "$log")"
}

say "its command: ${argv[*]} --port $port, as user $user, with an API key"
SECONDS=0
run "$container" -- "${argv[@]}" --port "$port" >"$work/server.log" 2>&1 &
server=$!
await "$work/server.log"
echo "ready after $SECONDS s"
deploy/smoke.sh "$url" || die "the image does not answer: $(tail -n 20 "$work/server.log")"
run "$container" -- "${health[@]}" || die "HEALTHCHECK fails on a split server"
echo "HEALTHCHECK passes"
if VLLM_API_KEY=wrong run "$container" -- "${health[@]}"; then
    die "HEALTHCHECK passes with a wrong API key"
fi
stop_server || die "the server does not stop with status 0: $(tail -n 20 "$work/server.log")"
echo "stopped by SIGTERM"

say "the same image without the plugin: HEALTHCHECK and smoke.sh must fail"
model=$(run "$container" -- python3 -c 'from rlkv_vllm.models import model_dir; print(model_dir())')
run --env VLLM_PLUGINS= "$container" -- python3 -m vllm.entrypoints.launchers.api_server.entry \
    --model "$model" --served-model-name embedded --dtype float32 --enforce-eager \
    --kv-cache-memory-bytes 256M --reasoning-parser deepseek_r1 --port "$port" >"$work/plain.log" 2>&1 &
server=$!
await "$work/plain.log"
if deploy/smoke.sh "$url"; then die "smoke.sh passes without the plugin"; fi
if run "$container" -- "${health[@]}"; then die "HEALTHCHECK passes without the plugin"; fi
stop_server || true

say "compose.yaml, started by podman"
compose() {
    RLKV_IMAGE=localhost/rlkv-vllm:cpu RLKV_PORT=$port "$compose" -f deploy/compose.yaml "$@"
}
for runtime in crun runc; do
    configure_podman "$runtime"
    if podman run --rm --init --entrypoint true localhost/rlkv-vllm:cpu >"$work/podman.log" 2>&1; then
        composed=$runtime
        break
    fi
done
if [ -z "$compose" ] || [ -z "$composed" ]; then
    echo "left out: no podman-compose, or podman cannot run containers here" \
        "($(tail -n 1 "$work/podman.log" 2>/dev/null))"
else
    compose up -d >"$work/compose.log" 2>&1 || die "compose up: $(tail -n 5 "$work/compose.log")"
    deploy/smoke.sh "$url" || die "the service does not answer: $(compose logs 2>&1 | tail -n 20)"
    podman healthcheck run rlkv_serve_1 || die "the service is unhealthy"
    podman inspect rlkv_serve_1 | jq -e '.[0].HostConfig.ReadonlyRootfs and .[0].EffectiveCaps == null' \
        >/dev/null || die "the service may write its root or has capabilities"
    compose down --volumes >/dev/null 2>&1
    composed=
fi

say "passed"
