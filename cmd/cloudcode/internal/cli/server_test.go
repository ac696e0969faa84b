package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/cloudcode-dev/cloudcode/internal/checkpoint"
	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
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

// save puts sessions into a bucket as a node does: main, with two checkpoints. It
// returns their ids, newest first.
func save(t *testing.T, conf storage.Config) [2]string {
	t.Helper()
	store, err := storage.Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	defer objstore.Close(store)
	repo, err := checkpoint.Open(store, "", conf.EncryptionKey)
	if err != nil {
		t.Fatal(err)
	}
	record, err := protojson.Marshal(&cloudcodev1.Session{
		Name: "sessions/main", Uid: "uid-of-old", Labels: map[string]string{"team": "web"},
		Spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A": "1"}, Storage: &cloudcodev1.Storage{Mode: cloudcodev1.Storage_SNAPSHOT}},
	})
	if err != nil {
		t.Fatal(err)
	}
	tree := t.TempDir()
	project := filepath.Join(tree, "workspace", "project")
	if err := os.MkdirAll(project, 0o755); err != nil {
		t.Fatal(err)
	}
	grow(t, filepath.Join(project, "src"))
	owner := checkpoint.Owner{SessionID: "main", SessionUID: "uid-of-old", Node: "old", Instance: "i", Generation: 1}
	sess := repo.Session("main")
	if _, _, err := sess.Acquire(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	w, err := sess.NewWriter(t.Context(), checkpoint.WriterOptions{Dir: tree, StateDir: t.TempDir(), Owner: owner, IDBase: uint32(os.Getuid())})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var ids [2]string
	for i, state := range []string{"the first", "the second"} {
		if err := os.WriteFile(filepath.Join(project, "state"), []byte(state), 0o644); err != nil {
			t.Fatal(err)
		}
		info, err := w.Save(t.Context(), nil, checkpoint.Meta{Trigger: "turn", SessionJSON: record, Mode: "SNAPSHOT"})
		if err != nil {
			t.Fatal(err)
		}
		ids[1-i] = info.ID
	}
	return ids
}

// TestRealStorage runs the storage commands against the server, a real S3 server
// and real checkpoints: a new fleet over an old bucket. It has no node.
func TestRealStorage(t *testing.T) {
	conf := s3test.Start(t, s3test.Options{}).Bucket("work")
	conf.Root = "fleet"
	ids := save(t, conf)
	profiles, err := storage.NewProfiles(&conf, nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	srv, err := server.New(server.Config{DataDir: dir, GRPCListen: "127.0.0.1:0", DefaultImage: "localhost/x:1", StorageProfiles: profiles, OwnStorage: storage.OwnAny})
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
	here := t.TempDir()
	t.Chdir(here)
	run := func(code int, out, errOut string, args ...string) string {
		t.Helper()
		r := invocation{}.run(t, append([]string{"--data-dir", dir}, args...)...)
		if r.code != code || !strings.Contains(r.out, out) || !strings.Contains(r.err, errOut) {
			t.Errorf("%q: exit %d, want %d\nstdout %s\nstderr %s", args, r.code, code, r.out, r.err)
		}
		return r.out
	}
	content := func(path string) string {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return string(data)
	}
	run(0, "s3://work/fleet", "", "storage", "profiles")
	run(0, "RECOVERABLE", "", "session", "recover", "--dry-run")
	run(0, "", "no sessions", "session", "list")
	run(0, "session main recovered", "", "session", "recover")
	run(0, "IN THIS FLEET", "", "session", "recover", "--dry-run")
	run(exitError, "", "nothing to recover", "session", "recover", "main")
	run(exitError, "", "no stored session", "session", "recover", "nobody")
	run(exitNotFound, "", "cloudcode storage profiles", "session", "recover", "--profile", "nope")
	run(0, "snapshot in s3://work/fleet/main", "", "session", "get", "main")
	run(0, "team=web", "", "session", "get", "main")
	if have := run(0, ids[0]+"\n"+ids[1]+"\n", "", "session", "checkpoints", "main", "-o", "name"); have != ids[0]+"\n"+ids[1]+"\n" {
		t.Errorf("checkpoints %q", have)
	}
	run(exitConflict, "", "", "session", "checkpoint", "main")

	// What is saved comes out, as it was.
	run(0, "exported", "", "session", "export", "main", "-f", "main.tar")
	run(0, "copied 1 file", "", "session", "cp", "main:state", "now")
	run(0, "copied 1 file", "", "session", "cp", "main:state", "then", "--at", ids[1])
	run(0, "copied", "", "session", "cp", "main:src", ".")
	if have := content("now") + ", " + content("then"); have != "the second, the first" {
		t.Errorf("copied %s", have)
	}
	for _, line := range []string{`"run.sh" -rwxr-xr-x 10 `, `"link" Lrwxrwxrwx -> run.sh`, `"hard" -rw-r--r-- 3200000 "0123456789abcdef0123" 2020-02-03T04:05:06Z = "big"`, `"hollow" drwx------ 2020`} {
		if have := tree(t, "src"); !strings.Contains(have, line) {
			t.Errorf("no %s in\n%s", line, have)
		}
	}
	run(exitNotFound, "", "relative to /root/s3/workspace/project", "session", "cp", "main:nothing", "x")
	run(exitNotFound, "", "cloudcode session checkpoints", "session", "cp", "main:state", "x", "--at", "2020")
	run(exitConflict, "", "cloudcode session get", "session", "cp", "now", "main:now")

	// Suspend, resume, restore and fork. There is no node to run them.
	run(0, "session main suspended", "", "session", "suspend", "main", "--wait")
	run(0, "SUSPENDED", "", "session", "list", "--state", "suspended")
	run(exitFailed, "", "cloudcode session resume main", "session", "import", "main", "-f", "main.tar")
	run(exitTimeout, "", "waiting for a node (NO_NODES", "session", "resume", "main", "--wait", "--timeout", "200ms")
	run(0, "session main is being restored", "", "session", "restore", "main", "--at", ids[1], "--yes")
	run(exitNotFound, "", "", "session", "restore", "main", "--at", "2020", "--yes")
	run(0, "session copy created", "", "session", "fork", "main", "copy", "--at", ids[1])
	run(0, "copied 1 file", "", "session", "cp", "copy:state", "of-copy")
	if have := content("of-copy"); have != "the first" {
		t.Errorf("the fork has %q", have)
	}
	run(exitConflict, "", "", "session", "fork", "main", "copy")

	// What is wrong is said at once.
	run(exitNotFound, "", "cloudcode storage profiles", "session", "create", "x", "--storage-profile", "nope")
	run(exitConflict, "", "--storage-prefix", "session", "create", "x", "--storage-prefix", "main/sub")
	t.Setenv(secretKeyEnv, "wrong")
	run(exitUsage, "", "does not know access key id nobody", "session", "create", "x", "--s3-endpoint", conf.Endpoint, "--s3-bucket", "work", "--s3-access-key-id", "nobody", "--s3-path-style")
	run(0, "session scratch created", "", "session", "create", "scratch", "--storage-mode", "local")
	run(0, notPersistent, "", "session", "get", "scratch")
	run(exitConflict, "", "storage mode LOCAL", "session", "checkpoints", "scratch")
	run(exitConflict, "", "", "session", "export", "scratch", "-f", "x.tar")
	if _, err := os.Stat("x.tar"); err == nil {
		t.Error("a file was made for what could not be exported")
	}

	// Deleting keeps what is stored, purging does not.
	run(0, "session main deleted", "", "session", "delete", "main", "--yes", "--wait")
	run(0, "session copy deleted", "", "session", "delete", "copy", "--yes", "--wait", "--purge")
	list := run(0, "\nmain ", "", "session", "recover", "--dry-run")
	if strings.Contains(list, "copy") {
		t.Errorf("what was purged is still there:\n%s", list)
	}
	run(0, "session main recovered", "", "session", "recover", "main")
}
