//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// bash lets the agent run a command in the session's container with OpenCode's
// bash tool, and returns what the tool showed.
func (f *fleet) bash(tb testing.TB, session, command string) string {
	tb.Helper()
	oc := f.openCode(session)
	chat := oc.newChat(tb)
	oc.prompt(tb, chat, "bash "+command)
	list, err := oc.messages(bounded(tb, 20*time.Second), chat)
	if err != nil {
		tb.Fatal(err)
	}
	for _, m := range list {
		for _, p := range m.Parts {
			if p.Type == "tool" {
				return p.State.Output
			}
		}
	}
	tb.Fatalf("the agent did not run %q: %+v", command, list)
	return ""
}

// TestInside is what an agent does as root of its container.
func TestInside(t *testing.T) {
	f := shared(t)
	id := f.session(t, "inside", nil)
	// Not through a mirror: whether one is reached is the network's business,
	// and that apt, npm and git work as root in a user namespace is ours.
	for name, c := range map[string]struct{ command, want string }{
		"apt": {
			`set -e; cd /tmp; mkdir -p pkg/DEBIAN pkg/opt/e2e; echo works > pkg/opt/e2e/file
			printf 'Package: e2e\nVersion: 1\nArchitecture: all\nMaintainer: e2e <e2e@example.com>\nDescription: test\n' > pkg/DEBIAN/control
			printf '#!/bin/sh\nset -e\nadduser --system --quiet --no-create-home e2euser 2>/dev/null || useradd -r e2euser\nchown e2euser /opt/e2e/file\n' > pkg/DEBIAN/postinst; chmod 755 pkg/DEBIAN/postinst
			dpkg-deb --build pkg e2e.deb >/dev/null
			apt-get install -y -o Acquire::Languages=none ./e2e.deb 2>&1 | tail -3; stat -c 'owner %U' /opt/e2e/file; apt-get remove -y e2e >/dev/null 2>&1; test ! -e /opt/e2e/file && echo removed`,
			"owner e2euser\nremoved",
		},
		"npm": {
			`set -e; mkdir -p /tmp/lib/bin && cd /tmp/lib && cat > package.json <<'J'
{"name":"e2e-lib","version":"1.0.0","bin":{"e2e-tool":"bin/tool.js"},"scripts":{"postinstall":"touch ran"}}
J
			printf '#!/usr/bin/env node\nconsole.log("tool runs")\n' > bin/tool.js; export npm_config_update_notifier=false; npm pack --silent >/dev/null; mkdir -p app && cd app && npm init -y >/dev/null && npm install --offline --no-audit --no-fund ../e2e-lib-1.0.0.tgz 2>&1 | tail -1; npx --no-install e2e-tool; ls node_modules/e2e-lib/ran`,
			"tool runs\nnode_modules/e2e-lib/ran",
		},
		"git": {
			`set -e; cd; mkdir -p s3/workspace/project/repo && cd s3/workspace/project/repo; git init -q; echo 1 > a; git add a; git -c user.name=e -c user.email=e@example.com commit -qm first; git log --format=%s; git status --porcelain | wc -l; git clone -q . ../clone && cat ../clone/a`,
			"first\n0\n1",
		},
		"python": {`python3 -m venv /tmp/venv && /tmp/venv/bin/python -c 'import sys; print("python ok", sys.version_info >= (3, 12))'`, "python ok True"},
		"tools":  {`node --version | cut -d. -f1; rg --version | head -1 | cut -d' ' -f1; curl --version | head -1 | cut -d' ' -f1`, "v22\nripgrep\ncurl"},
		"root":   {`id -u; echo x > /usr/local/bin/x && echo writable; cat /proc/self/uid_map | awk '{print ($2 > 65536) ? "mapped" : "host ids"}'; mount -t tmpfs t /mnt 2>&1 | grep -c 'permission\|denied\|must be'`, "0\nwritable\nmapped\n1"},
	} {
		t.Run(name, func(t *testing.T) {
			if out := f.bash(t, id, c.command); !strings.Contains(out, c.want) {
				t.Errorf("%s\nsays\n%s\nwithout\n%s", c.command, out, c.want)
			}
		})
	}
}

// TestIsolation: sessions reach neither each other nor what listens on the
// machine's loopback.
func TestIsolation(t *testing.T) {
	f := shared(t)
	one, two := f.session(t, "one", nil), f.session(t, "two", nil)
	onHost, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer onHost.Close()
	_, hostPort, _ := net.SplitHostPort(onHost.Addr().String())

	serve := `nohup python3 -m http.server %d --bind %s >/dev/null 2>&1 & for i in $(seq 100); do python3 -c 'import socket; socket.create_connection(("127.0.0.1", %[1]d), 1)' 2>/dev/null && break; sleep 0.05; done; ip -4 -o addr show eth0 | awk '{print $4}' | cut -d/ -f1`
	address := strings.TrimSpace(f.bash(t, two, fmt.Sprintf(serve, 8100, "0.0.0.0")))
	if net.ParseIP(address) == nil {
		t.Fatalf("no address of %s: %q", two, address)
	}
	_, modelPort, _ := net.SplitHostPort(model(t).listener.Addr().String())
	targets := []struct{ what, addr, port string }{
		{"the machine's bridge address, where the model is,", f.bridgeIP, modelPort},
		{"the server at its bridge address", address, "8100"},
		{"OpenCode at its bridge address", address, "2633"},
		{"the server at loopback", "127.0.0.1", "8100"},
		{"the machine's loopback", "127.0.0.1", hostPort},
	}
	probe := `python3 - <<'EOF'
import socket
def reach(a, p):
    try:
        socket.create_connection((a, p), 1.5).close()
        return "reached"
    except OSError as e:
        return "not reached: " + str(e)
`
	for _, to := range targets {
		probe += fmt.Sprintf("print(reach(%q, %s))\n", to.addr, to.port)
	}
	for _, c := range []struct {
		session, who string
		want         []bool
	}{
		{one, "another session", []bool{true, false, false, false, false}},
		// The proof that the server is there to be reached.
		{two, "the session itself", []bool{true, true, false, true, false}},
	} {
		got := strings.Split(strings.TrimSpace(f.bash(t, c.session, probe+"EOF")), "\n")
		if len(got) != len(targets) {
			t.Fatalf("the probe says %q", got)
		}
		for i, to := range targets {
			if (got[i] == "reached") != c.want[i] || got[i] != "reached" && !strings.HasPrefix(got[i], "not reached: ") {
				t.Errorf("from %s, %s is %s", c.who, to.what, got[i])
			}
		}
	}
	// Nor does the machine's network lead in.
	if conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, "2633"), time.Second); err == nil {
		conn.Close()
		t.Error("OpenCode listens on the container's bridge address")
	}
}

// devServer is a server for pages and a WebSocket that listens on localhost.
const devServer = `const http = require("http"), crypto = require("crypto");
const s = http.createServer((q, r) => { r.setHeader("Content-Type", "text/plain"); r.end("dev server: " + q.method + " " + q.url + " host=" + q.headers.host + " auth=" + (q.headers.authorization || "none")); });
s.on("upgrade", (q, sock) => {
  const accept = crypto.createHash("sha1").update(q.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest("base64");
  sock.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept + "\r\n\r\n");
  sock.on("data", (b) => {
    if ((b[0] & 15) === 8) return sock.end(Buffer.from([0x88, 0]));
    const n = b[1] & 127, mask = b.subarray(2, 6), data = Buffer.from(b.subarray(6, 6 + n)).map((x, i) => x ^ mask[i % 4]);
    const text = Buffer.from("echo: " + data); sock.write(Buffer.concat([Buffer.from([0x81, text.length]), text]));
  });
});
s.listen(3000, "localhost", () => console.log("up"));`

// TestPorts: a dev server inside that listens on localhost is reached by host
// name and by path, WebSockets included.
func TestPorts(t *testing.T) {
	f := shared(t)
	id := f.session(t, "ports", nil)
	base := "http://3000--" + f.host(id)
	code, body, err := f.call(bounded(t, 20*time.Second), "GET", base+"/", nil)
	if err != nil || code != http.StatusBadGateway || !strings.Contains(string(body), "PORT_NOT_REACHABLE") {
		t.Errorf("with nothing on the port: %d %s %v", code, body, err)
	}
	f.bash(t, id, "cat > /tmp/dev.js <<'EOF'\n"+devServer+"\nEOF\nnohup node /tmp/dev.js > /tmp/dev.log 2>&1 & for i in $(seq 100); do grep -q up /tmp/dev.log && break; sleep 0.05; done")

	for _, url := range []string{base + "/a%20b?c=d", f.url("/v1/sessions/" + id + "/ports/3000/a%20b?c=d")} {
		code, body, err := f.call(bounded(t, 20*time.Second), "GET", url, nil)
		if err != nil || code != http.StatusOK || !strings.HasPrefix(string(body), "dev server: GET /a%20b?c=d ") || !strings.HasSuffix(string(body), "auth=none") {
			t.Errorf("%s: %d %s %v", url, code, body, err)
		}
	}
	for _, url := range []string{"ws://3000--" + f.host(id) + "/ws", strings.Replace(f.url("/v1/sessions/"+id+"/ports/3000/ws"), "http:", "ws:", 1)} {
		ctx := bounded(t, 20*time.Second)
		header := http.Header{}
		req, err := f.request(ctx, "GET", base, nil)
		if err != nil {
			t.Fatal(err)
		}
		header.Set("Authorization", req.Header.Get("Authorization"))
		ws, _, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: f.http, HTTPHeader: header})
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		for _, text := range []string{"one", "two"} {
			if err := ws.Write(ctx, websocket.MessageText, []byte(text)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := ws.Read(ctx); err != nil || string(got) != "echo: "+text {
				t.Errorf("%s: %q %v", url, got, err)
			}
		}
		_ = ws.Close(websocket.StatusNormalClosure, "")
	}
}

// TestTerminal is OpenCode's own WebSocket: a terminal in the browser.
func TestTerminal(t *testing.T) {
	f := shared(t)
	id := f.session(t, "terminal", nil)
	var pty struct{ ID string }
	f.openCode(id).do(t, "POST", "/pty", map[string]any{"command": "/bin/bash", "args": []string{"--norc"}}, &pty)
	for name, base := range map[string]string{"by host": "http://" + f.host(id), "by path": f.url("/v1/sessions/" + id + "/proxy")} {
		t.Run(name, func(t *testing.T) {
			ctx := bounded(t, 30*time.Second)
			ws, _, err := websocket.Dial(ctx, strings.Replace(base, "http:", "ws:", 1)+"/pty/"+pty.ID+"/connect", &websocket.DialOptions{
				HTTPClient: f.http, HTTPHeader: http.Header{"Authorization": {basicAuth()}},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer ws.CloseNow()
			if err := ws.Write(ctx, websocket.MessageText, []byte("echo $((6 * 7)) "+strings.ReplaceAll(name, " ", "-")+"\n")); err != nil {
				t.Fatal(err)
			}
			screen := ""
			for want := "42 " + strings.ReplaceAll(name, " ", "-"); !strings.Contains(screen, want); {
				_, data, err := ws.Read(ctx)
				if err != nil {
					t.Fatalf("%v; the terminal shows %q", err, screen)
				}
				screen += string(data)
			}
		})
	}
}

// TestRestarts: what dies inside comes back, and says why it died.
func TestRestarts(t *testing.T) {
	f := shared(t)
	id := f.session(t, "restarts", &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{MemoryBytes: 1 << 30}})
	oc := f.openCode(id)
	chat := oc.newChat(t)
	oc.prompt(t, chat, "hello")
	sse := f.follow(t, id)

	t.Run("OpenCode is killed", func(t *testing.T) {
		before := f.get(t, id)
		first := f.containerPID(t, id) // tini, whose only child is OpenCode
		children := mustRun(t, 10*time.Second, cleanEnv(), "cat", "/proc/"+first+"/task/"+first+"/children")
		opencode, err := strconv.Atoi(strings.Fields(children + " ?")[0])
		if err != nil {
			t.Fatalf("children of the container's first process: %q", children)
		}
		if err := syscall.Kill(opencode, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s := f.waitSession(t, id, "restarted", func(s *cloudcodev1.Session) bool {
			return s.GetState() == cloudcodev1.Session_RUNNING && s.GetRestartCount() == 1
		})
		if s.GetGeneration() != before.GetGeneration() || !s.GetReadyTime().AsTime().After(before.GetReadyTime().AsTime()) {
			t.Errorf("before %v\nafter %v", before, s)
		}
		sse.wait(t, "of the exit", func(e event) bool {
			return e.kind == "lifecycle" && strings.Contains(e.data, "OPENCODE_EXITED")
		})
		list, err := oc.messages(bounded(t, 20*time.Second), chat)
		if err != nil || len(list) != 2 || list[1].text() != "You said: hello" {
			t.Errorf("the chat after the restart: %+v %v", list, err)
		}
	})

	t.Run("out of memory", func(t *testing.T) {
		// The kernel picks the largest process of the cgroup. A tool that is
		// larger than OpenCode dies alone; whatever dies, the session gets well.
		before := f.get(t, id)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		_ = oc.try(ctx, "POST", "/session/"+chat+"/message", prompt(`bash python3 -c 'b = []
while True: b.append(bytearray(16 << 20))'; echo "exit $?"`), nil) // breaks off if OpenCode dies
		s := f.waitSession(t, id, "well again", func(s *cloudcodev1.Session) bool {
			return s.GetState() == cloudcodev1.Session_RUNNING && oc.try(ctx, "GET", "/global/health", nil, nil) == nil
		})
		if s.GetRestartCount() == before.GetRestartCount() {
			list, err := oc.messages(bounded(t, 20*time.Second), chat)
			if err != nil {
				t.Fatal(err)
			}
			out := ""
			for _, m := range list {
				for _, p := range m.Parts {
					out += p.State.Output
				}
			}
			if !strings.Contains(out, "exit 137") {
				t.Errorf("the tool was not killed: %q", out)
			}
			t.Log("the kernel killed the tool; OpenCode went on")
			return
		}
		sse.wait(t, "of the OOM kill", func(e event) bool {
			return e.kind == "lifecycle" && strings.Contains(e.data, "OOM_KILLED")
		})
	})

	t.Run("OpenCode is too large", func(t *testing.T) {
		// OpenCode alone under the smallest limit that is allowed.
		small := f.create(t, "small", &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{MemoryBytes: 256 << 20}})
		sid := strings.TrimPrefix(small.GetName(), "sessions/")
		soc, events := f.openCode(sid), f.follow(t, sid)
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		// It may fit while it is idle: prompts make it grow.
		for i := 0; f.get(t, sid).GetRestartCount() == 0 && f.get(t, sid).GetReason() != "OOM_KILLED"; i++ {
			if ctx.Err() != nil {
				t.Fatalf("OpenCode lives in 256 MiB: %v", f.get(t, sid))
			}
			var made struct{ ID string }
			if soc.try(ctx, "POST", "/session", map[string]any{}, &made) == nil {
				_ = soc.try(ctx, "POST", "/session/"+made.ID+"/message", prompt(fmt.Sprint("hello ", i)), nil)
			}
		}
		list := events.wait(t, "of the OOM kill", func(e event) bool {
			return e.kind == "lifecycle" && strings.Contains(e.data, "OOM_KILLED")
		})
		for _, want := range []string{"256MiB", "--memory"} {
			if e := list[len(list)-1]; !strings.Contains(e.data, want) {
				t.Errorf("the event does not say %q: %s", want, e.data)
			}
		}
	})
}
