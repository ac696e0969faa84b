//go:build e2e

package e2e

import (
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// TestPrompt is the way of a prompt: through the gateway to real OpenCode, which
// asks the model, calls its tools in the container, and says so in events.
func TestPrompt(t *testing.T) {
	f := shared(t)
	id := f.session(t, "prompt", nil)
	oc := f.openCode(id)
	sse, api := f.watchSSE(t, id, ""), f.watchGRPC(t, id, "")

	chat := oc.newChat(t)
	answer := oc.prompt(t, chat, "write hello.txt made by the agent")
	if want := "Wrote hello.txt, and bash said: 0\nMADE BY THE AGENT"; answer.text() != want {
		t.Errorf("the answer is %q, not %q", answer.text(), want)
	}
	if got, want := oc.tools(t, chat), []string{"write completed", "bash completed"}; !slices.Equal(got, want) {
		t.Errorf("tool calls %q, not %q", got, want)
	}

	t.Run("files", func(t *testing.T) {
		for file, want := range map[string]string{"hello.txt": "made by the agent", "hello.txt.upper": "MADE BY THE AGENT"} {
			var read struct{ Type, Content string }
			oc.do(t, "GET", "/file/content?path="+url.QueryEscape(file), nil, &read)
			if strings.TrimSpace(read.Content) != want {
				t.Errorf("OpenCode reads %q in %s, not %q", read.Content, file, want)
			}
			path := f.hostFile(t, id, file)
			onDisk, err := os.ReadFile(path)
			if err != nil || strings.TrimSpace(string(onDisk)) != want {
				t.Errorf("%s is %q (%v), not %q", path, onDisk, err, want)
			}
		}
	})

	idle := func(e event) bool { return e.isIdle(chat) }
	fromSSE, fromGRPC := sse.wait(t, "idle by SSE", idle), api.wait(t, "idle by gRPC", idle)

	t.Run("same events by SSE and gRPC", func(t *testing.T) {
		a, b := openCodeEvents(fromSSE), openCodeEvents(fromGRPC)
		// Both began before the prompt; the later one may have missed what
		// OpenCode said in between.
		a, b = alignEvents(t, a, b)
		compareEvents(t, a, b)
		if len(a) < 20 {
			t.Errorf("only %d events of two tool calls", len(a))
		}
		text := ""
		for _, e := range a {
			text += e.data
		}
		for _, want := range []string{`"tool":"write"`, `"tool":"bash"`, "MADE BY THE AGENT", "message.part.updated", "session.status"} {
			if !strings.Contains(text, want) {
				t.Errorf("no event has %s", want)
			}
		}
		for _, w := range []*watcher{sse, api} {
			first := w.list()[0]
			if first.kind != "lifecycle" || first.id == "" {
				t.Errorf("a stream begins with %+v, not with the session as it is", first)
			}
			if n := w.count("gap"); n != 0 {
				t.Errorf("%d gaps", n)
			}
		}
	})

	t.Run("resume", func(t *testing.T) {
		all := openCodeEvents(fromSSE)
		middle := len(all) / 2
		want := all[middle+1:]
		again := f.watchSSE(t, id, all[middle].id)
		compareEvents(t, openCodeEvents(again.wait(t, "idle, resumed by SSE", idle)), want)
		againGRPC := f.watchGRPC(t, id, all[middle].id)
		compareEvents(t, openCodeEvents(againGRPC.wait(t, "idle, resumed by gRPC", idle)), want)
		if n := again.count("gap") + againGRPC.count("gap"); n != 0 {
			t.Errorf("%d gaps after resuming", n)
		}
	})

	t.Run("end", func(t *testing.T) {
		f.remove(t, id)
		for what, w := range map[string]*watcher{"SSE": sse, "gRPC": api} {
			got := w.wait(t, "end by "+what, func(e event) bool { return e.kind == "end" })
			states := 0
			for _, e := range got {
				if e.kind == "lifecycle" {
					states++
				}
			}
			if states < 2 {
				t.Errorf("%s: %d lifecycle events, though the session was there and was deleted", what, states)
			}
		}
		<-sse.done // the gateway ends the response
		<-api.done
		if api.err != nil {
			t.Errorf("the gRPC stream ended with %v", api.err)
		}
	})
}

func openCodeEvents(list []event) (out []event) {
	for _, e := range list {
		if e.kind == "opencode" {
			out = append(out, e)
		}
	}
	return out
}

// alignEvents lets two lists begin with the same event.
func alignEvents(t *testing.T, a, b []event) (x, y []event) {
	t.Helper()
	if len(a) == 0 || len(b) == 0 {
		t.Fatalf("%d and %d events", len(a), len(b))
	}
	if i := slices.IndexFunc(a, func(e event) bool { return e.id == b[0].id }); i >= 0 {
		return a[i:], b
	}
	if i := slices.IndexFunc(b, func(e event) bool { return e.id == a[0].id }); i >= 0 {
		return a, b[i:]
	}
	t.Fatalf("no common event: one begins with %s, the other with %s", a[0].id, b[0].id)
	return nil, nil
}

func compareEvents(t *testing.T, got, want []event) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(got):
			t.Fatalf("%d events, not %d; missing from %s on", len(got), len(want), want[i].id)
		case i >= len(want):
			t.Fatalf("%d events, not %d; too many from %s on", len(got), len(want), got[i].id)
		case got[i].id != want[i].id || !sameJSON(got[i].data, want[i].data):
			t.Fatalf("event %d is %s %.300s\nnot %s %.300s", i, got[i].id, got[i].data, want[i].id, want[i].data)
		}
	}
}

// sameJSON compares frames, which are passed on verbatim.
func sameJSON(a, b string) bool { return a == b }

// TestSession is what a session is told, and tells.
func TestSession(t *testing.T) {
	f := shared(t)
	id := idPrefix + "told"
	config := filepath.Join(t.TempDir(), "opencode.json")
	if err := os.WriteFile(config, []byte(model(t).config(f.bridgeIP)), 0o600); err != nil {
		t.Fatal(err)
	}
	out := f.cli(t, "session", "create", id, "--wait", "--opencode-config", config, "--label", "team=e2e", "--env", "GREETING=good day",
		"--cpu", "2", "--memory", "2Gi", "-o", "json")
	t.Cleanup(func() { f.remove(t, id) })
	if !strings.Contains(out, id) || !strings.Contains(out, "RUNNING") {
		t.Errorf("session create --wait prints %s", out)
	}
	s := f.get(t, id)
	if s.GetState() != cloudcodev1.Session_RUNNING || s.GetNode() != "nodes/"+f.nodeID() || s.GetGeneration() != 1 ||
		s.GetOpencodeVersion() == "" || s.GetReadyTime() == nil || s.GetWebUri() != "http://"+f.host(id) && s.GetWebUri() != "http://"+f.host(id)+"/" {
		t.Errorf("the session is %v", s)
	}
	if list := f.cli(t, "session", "list"); !strings.Contains(list, id) {
		t.Errorf("session list lacks %s:\n%s", id, list)
	}
	if nodes := f.cli(t, "node", "list"); !strings.Contains(nodes, f.nodeID()) {
		t.Errorf("node list lacks %s:\n%s", f.nodeID(), nodes)
	}
	if logs := f.cli(t, "session", "logs", id); !strings.Contains(logs, "opencode server listening") {
		t.Errorf("session logs lack OpenCode's first line:\n%s", logs)
	}
	out = f.bash(t, id, `echo "$GREETING, $(nproc)"; cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; env | grep -c PASSWORD`)
	if !strings.Contains(out, "good day") {
		t.Errorf("the environment lacks what was asked for: %s", out)
	}
}
