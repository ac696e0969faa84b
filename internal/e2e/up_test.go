//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// TestUp is the life of `cloudcode up`: what it prints works, kill -9 loses
// nothing, Ctrl-C leaves nothing but data, and the data comes back.
func TestUp(t *testing.T) {
	needReal(t)
	before := machineNow()
	id := idPrefix + "main"
	f := upFleet(t, "up", id)
	up := f.server
	defer func() {
		if t.Failed() {
			t.Log(up.tail(60))
		}
		if err := f.end(); err != nil { // nothing to do unless the test has failed
			t.Error(err)
		}
	}()
	const running = "Cloud Code is running."
	start := func() {
		t.Helper()
		had := strings.Count(up.output(), running)
		up.start(t)
		eventually(t, 3*time.Minute, "up says that it runs", func() string {
			if !up.running() {
				t.Fatalf("it has ended: %v", up.err)
			}
			if strings.Count(up.output(), running) == had {
				return up.tail(3)
			}
			return ""
		})
		f.dial(t)
		// What it says is true, also when the session ran before.
		code, body, err := f.call(bounded(t, 5*time.Second), "GET", "http://"+f.host(id)+"/global/health", nil)
		if err != nil || code != http.StatusOK {
			t.Fatalf("up says that it runs, and its session answers %d %s %v", code, body, err)
		}
		if s := f.get(t, id); s.GetState() != cloudcodev1.Session_RUNNING {
			t.Fatalf("up says that it runs, and its session is %v", s)
		}
	}
	start()
	f.waitReady(t)

	t.Run("lines to paste", func(t *testing.T) { pasteLines(t, f, id) })

	// What the check after Ctrl-C looks for is there to be found.
	here := fmt.Sprint(machineNow().since(before))
	for _, kind := range []string{"process", "mount", "interface", "firewall rule", "cgroup", "run folder"} {
		if !strings.Contains(here, "left behind: "+kind+" ") {
			t.Errorf("while it runs, no %s of it is found", kind)
		}
	}

	// A second session, with a model.
	second := idPrefix + "second"
	if _, err := f.sessions.CreateSession(bounded(t, 20*time.Second), &cloudcodev1.CreateSessionRequest{
		SessionId: second, Session: &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{OpencodeConfig: model(t).config(f.bridgeIP)}},
	}); err != nil {
		t.Fatal(err)
	}
	f.waitState(t, second, cloudcodev1.Session_RUNNING)
	chats := map[string]string{id: f.openCode(id).newChat(t), second: f.openCode(second).newChat(t)}
	f.openCode(second).prompt(t, chats[second], "write kept.txt kept on disk")
	intact := func() {
		t.Helper()
		f.waitReady(t)
		for s, chat := range chats {
			f.waitState(t, s, cloudcodev1.Session_RUNNING)
			var got struct{ ID string }
			f.openCode(s).do(t, "GET", "/session/"+chat, nil, &got)
			if got.ID != chat {
				t.Errorf("session %s has lost its chat: %+v", s, got)
			}
		}
		list, err := f.openCode(second).messages(bounded(t, 20*time.Second), chats[second])
		if err != nil || len(list) < 4 || !strings.Contains(list[len(list)-1].text(), "KEPT ON DISK") {
			t.Errorf("the chat: %v %+v", err, list)
		}
		if b, err := os.ReadFile(f.hostFile(t, second, "kept.txt")); err != nil || strings.TrimSpace(string(b)) != "kept on disk" {
			t.Errorf("kept.txt: %q %v", b, err)
		}
	}

	t.Run("kill -9 of everything", func(t *testing.T) {
		pids := map[string]string{id: f.containerPID(t, id), second: f.containerPID(t, second)}
		up.kill(t)
		start()
		intact()
		for s, pid := range pids {
			if now := f.containerPID(t, s); now != pid {
				t.Errorf("the process of session %s is %s, was %s: it was not adopted", s, now, pid)
			}
			if got := f.get(t, s); got.GetRestartCount() != 0 || got.GetGeneration() != 1 {
				t.Errorf("%v", got)
			}
		}
	})

	t.Run("Ctrl-C", func(t *testing.T) {
		for round := range 2 {
			up.signal(t, syscall.SIGINT, 60*time.Second)
			if code := up.exitCode(); code != 0 {
				t.Errorf("round %d: exit code %d\n%s", round, code, up.tail(20))
			}
			if err := machineNow().since(before); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
			if round == 0 {
				began := time.Now()
				start()
				t.Logf("the second start took %v", time.Since(began).Round(time.Millisecond))
				intact()
			}
		}
		if _, err := os.Stat(filepath.Join(f.serverDir, "server", "fleet.db")); err != nil {
			t.Errorf("the data is gone: %v", err)
		}
	})
}

// pasteLines runs the commands that up prints, as a person would.
func pasteLines(t *testing.T, f *fleet, id string) {
	modules := nodeModules(t)
	line := func(prefix string) string {
		for l := range strings.Lines(f.server.output()) {
			if l = strings.TrimSpace(l); strings.HasPrefix(l, prefix+" ") {
				return l
			}
		}
		t.Fatalf("up prints no line with %s", prefix)
		return ""
	}
	bin := t.TempDir()
	grpcurl := fmt.Sprintf("#!/bin/sh\nexec go tool -modfile=%s/tools/go.mod grpcurl \"$@\"\n", work.repo)
	if err := os.WriteFile(filepath.Join(bin, "grpcurl"), []byte(grpcurl), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(modules, "opencode-linux-x64", "bin", "opencode"), filepath.Join(bin, "opencode")); err != nil {
		t.Fatal(err)
	}
	path := "PATH=" + bin + ":" + os.Getenv("PATH")
	for _, program := range []string{"curl", "grpcurl"} {
		out := mustRun(t, 4*time.Minute, append(os.Environ(), path, "SERVER_PASSWORD="+password), "bash", "-euc", line(program))
		if !strings.Contains(out, `"sessions/`+id+`"`) || !strings.Contains(out, "RUNNING") {
			t.Errorf("%s\n%s", line(program), out)
		}
	}
	// The session has no model yet: the screen that asks is what there is to see.
	attach(t, []string{"env", path, "SERVER_PASSWORD=" + password, "bash", "-euc", "exec " + line("opencode")}, "")
	for _, what := range []string{"dashboard", "session"} {
		f := strings.Fields(line(what))
		if len(f) != 2 || !strings.HasPrefix(f[1], "http://") {
			t.Errorf("%s is at %q", what, f)
		}
	}
}
