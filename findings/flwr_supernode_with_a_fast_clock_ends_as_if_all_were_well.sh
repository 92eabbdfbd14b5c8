#!/usr/bin/env bash
# flwr 1.42.0: a SuperNode whose clock is more than 5 s ahead of its SuperLink's says
# "SuperNode terminated gracefully." and exits with 0.
# Boards without a battery-backed clock have such a clock until NTP sets it. A good engineer
# expects a node that was refused to exit with an error, so that `Restart=on-failure` starts it
# again, and expects a line that names the clock. The SuperLink answers 401 (every request is
# signed with its time, also with --insecure, where it logs that SuperNode authentication is
# disabled and that it "will accept connections from any SuperNode"); the SuperNode then sends
# itself SIGINT, which is a wanted end. Neither's log says why.
# Seen, without keys of nodes: 2 s ahead, the node joins and stays; 8 s ahead, "register-node"
# is answered 401, exit code 0, and in the node's log neither an error nor a word of clock or time.
set -euo pipefail
dir=$(mktemp -d)
link= node=
trap 'kill $node $link 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
export PATH="$dir/venv/bin:$PATH" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
mkdir "$dir/link" "$dir/node"
cat > "$dir/ahead.c" <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
  int (*next)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = next(clock, now);
  if (!failed && clock == CLOCK_REALTIME) now->tv_sec += SECONDS;
  return failed;
}
C
port=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
own=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
FLWR_HOME="$dir/link" flower-superlink --insecure --port "$port" > "$dir/link.log" 2>&1 & link=$!
until python -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; do sleep 0.5; done
start_node() {
  cc -shared -fPIC -DSECONDS="$1" -o "$dir/ahead$1.so" "$dir/ahead.c" -ldl
  FLWR_HOME="$dir/node" LD_PRELOAD="$dir/ahead$1.so" flower-supernode --insecure \
    --superlink "127.0.0.1:$port" --port "$own" > "$dir/node$1.log" 2>&1 & node=$!
}
# A node that is 2 s ahead is let in.
start_node 2
timeout 120 bash -c "until grep -q 'SuperNode ID' '$dir/node2.log'; do sleep 0.1; done"
kill -TERM $node; wait $node || true
# One that is 8 s ahead ends by itself.
start_node 8
timeout 120 bash -c "while kill -0 $node 2>/dev/null; do sleep 0.1; done"
code=0
wait $node || code=$?
node=
grep -o "POST .* 401" "$dir/link.log"
grep -o "SuperNode terminated gracefully." "$dir/node8.log"
echo "exit code $code"
[ "$code" = 0 ]
if grep -i -E "SuperNode ID|error|clock|time|refused|authent| 401" "$dir/node8.log"; then exit 1; fi
