package cli

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/cloudcode-dev/cloudcode/server"
)

// TestRealServer runs the commands against the server itself, which is found as
// users find it: by what it leaves in its data directory. It has no node.
func TestRealServer(t *testing.T) {
	dir := t.TempDir()
	srv, err := server.New(server.Config{DataDir: dir, GRPCListen: "127.0.0.1:0", Password: "secret", DefaultImage: "localhost/x:1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := srv.Stop(ctx); err != nil {
			t.Error(err)
		}
	}()
	saved := now
	now = time.Now
	defer func() { now = saved }()

	run := func(code int, out, errOut string, args ...string) string {
		t.Helper()
		r := invocation{}.run(t, append([]string{"--data-dir", dir}, args...)...)
		if r.code != code || !strings.Contains(r.out, out) || !strings.Contains(r.err, errOut) {
			t.Errorf("%q: exit %d, want %d\nstdout %s\nstderr %s", args, r.code, code, r.out, r.err)
		}
		return r.out
	}
	run(0, "", "no sessions", "session", "list")
	run(0, "session main created", "", "session", "create", "main", "-l", "team=web,example.com/tier=1", "--cpu", "1.5", "--memory", "2Gi")
	run(exitTimeout, "", "NO_NODES", "session", "create", "other", "--wait", "--timeout", "200ms")
	run(exitConflict, "", "main", "session", "create", "main")
	run(exitUsage, "", "", "session", "create", "Not_An_Id")
	run(exitUsage, "", "", "session", "create", "x", "--pids", "-5")
	run(exitNotFound, "", "cloudcode session list", "session", "get", "nobody")
	run(exitDenied, "", "CLOUDCODE_TOKEN", "session", "list", "--token", "wrong")
	run(0, "PENDING (NO_NODES)", "", "session", "get", "main")
	run(0, "1.5 CPU, 2 GiB memory", "", "session", "get", "main")
	for want, args := range map[string][]string{
		"sessions/main\nsessions/other\n": {"--state", "PENDING"},
		"sessions/main\n":                 {"--label", "team=web", "--label", "example.com/tier=1", "--state", "PENDING", "--state", "RUNNING"},
		"":                                {"--label", "team=other"},
		"sessions/other\n":                {"--filter", "NOT labels:team"},
	} {
		if have := run(0, "", "", append([]string{"session", "list", "-o", "name"}, args...)...); have != want {
			t.Errorf("list %q = %q, want %q", args, have, want)
		}
	}
	run(0, "sessions/main\n", "", "session", "list", "-o", "name", "--label", "example.com/tier")
	run(exitUsage, "", "", "session", "list", "--filter", "nonsense ===")
	run(0, "session main updated", "", "session", "update", "main", "--label", "team-", "--memory", "4Gi", "--env", "A=1")
	run(0, "4 GiB memory", "", "session", "get", "main")
	if out := run(0, `"A": "1"`, "", "session", "get", "main", "-o", "json"); strings.Contains(out, `"team"`) {
		t.Errorf("the label is still there: %s", out)
	}
	run(exitConflict, "", "", "session", "logs", "main")
	run(0, "", "no nodes", "node", "list")
	run(exitNotFound, "", "cloudcode node list", "node", "get", "n1")
	run(0, "session other deleted", "", "session", "delete", "--yes", "--wait", "other")
	run(exitUsage, "", "", "session", "events", "main", "--after", "no such id")

	// The events of a session up to its end.
	followed := make(chan result, 1)
	out := &notifyingBuffer{wrote: make(chan struct{})}
	go func() {
		followed <- invocation{out: out}.run(t, "--data-dir", dir, "session", "events", "main")
	}()
	select {
	case <-out.wrote:
	case r := <-followed:
		t.Fatalf("it ended before the first event: %+v", r)
	}
	run(0, "session main deleted", "", "session", "delete", "--yes", "--wait", "main")
	if r := <-followed; r.code != 0 || !strings.Contains(r.out, "PENDING") || !strings.Contains(r.out, "end ") {
		t.Errorf("%+v", r)
	}
}
