package cli

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// threeSessions has one that runs, one that waits and one that lies.
func threeSessions(t *testing.T) *fleet {
	f := newFleet(t)
	f.put(running("main"))
	f.put(&cloudcodev1.Session{
		Name: "sessions/waiting", Uid: "u2", CreateTime: ago(90 * time.Second),
		State: cloudcodev1.Session_PENDING, Reason: "NO_READY_NODE", Message: "1 node has joined, none is ready",
	})
	f.put(&cloudcodev1.Session{
		Name: "sessions/evil", Uid: "u3", CreateTime: ago(400 * 24 * time.Hour), State: cloudcodev1.Session_FAILED,
		Reason: "OPENCODE_EXITED", Message: "exit code 1: \x1b[31mred\x1b[0m\nsecond line", Node: "nodes/n1",
	})
	return f
}

func TestSessionOutput(t *testing.T) {
	f := threeSessions(t)
	for name, args := range map[string][]string{
		"session_list.table": {"session", "list"},
		"session_list.json":  {"session", "list", "-o", "json"},
		"session_list.name":  {"session", "list", "-o", "name"},
		"session_get.table":  {"session", "get", "main"},
		"session_get.json":   {"session", "get", "sessions/main", "-o", "json"},
		"session_evil.table": {"session", "get", "evil"},
	} {
		t.Run(name, func(t *testing.T) {
			r := f.run(args...)
			if r.code != 0 || r.err != "" {
				t.Fatalf("exit %d, stderr %q", r.code, r.err)
			}
			if strings.Contains(r.out, "\x1b") {
				t.Error("escape sequences in the output")
			}
			golden(t, name, r.out)
		})
	}
}

func TestNodeOutput(t *testing.T) {
	f := newFleet(t)
	f.nodes = []*cloudcodev1.Node{{
		Name: "nodes/n1", CreateTime: ago(50 * time.Hour), HeartbeatTime: ago(2 * time.Second), State: cloudcodev1.Node_READY,
		Labels: map[string]string{"zone": "a"}, SessionCount: 2,
		Info: &cloudcodev1.NodeInfo{
			Version: "v1.2.3", Hostname: "box", Os: "linux", Architecture: "amd64", KernelVersion: "6.1.0",
			ContainerRuntimeVersion: "containerd 2.4.2", CpuMillis: 8000, MemoryBytes: 32 << 30, DiskBytes: 500 << 30,
		},
	}, {
		Name: "nodes/n2", CreateTime: ago(time.Hour), HeartbeatTime: ago(15 * time.Minute), State: cloudcodev1.Node_NOT_READY,
		Reason: "HEARTBEAT_MISSED", Message: "not heard of for 15 minutes",
	}}
	for name, args := range map[string][]string{
		"node_list.table": {"node", "list"},
		"node_list.json":  {"node", "list", "-o", "json"},
		"node_get.table":  {"node", "get", "n1"},
		"node_get.name":   {"node", "get", "n2", "-o", "name"},
	} {
		t.Run(name, func(t *testing.T) {
			r := f.run(args...)
			if r.code != 0 || r.err != "" {
				t.Fatalf("exit %d, stderr %q", r.code, r.err)
			}
			golden(t, name, r.out)
		})
	}
}

func TestEmptyLists(t *testing.T) {
	f := newFleet(t)
	if r := f.run("session", "list"); r.out != "" || !strings.Contains(r.err, "session create") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "list", "--state", "failed"); r.err != "no session matches\n" {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "list", "-o", "json"); r.out != "{\n  \"sessions\": [],\n  \"nextPageToken\": \"\"\n}\n" {
		t.Errorf("%q", r.out)
	}
	if r := f.run("node", "list"); r.out != "" || !strings.Contains(r.err, "cloudcode nodeagent") {
		t.Errorf("%+v", r)
	}
}

func TestListFilter(t *testing.T) {
	for _, tc := range []struct {
		filter         string
		states, labels []string
		want           string
		bad            bool
	}{
		{want: ""},
		{filter: "state = RUNNING", want: "state = RUNNING"},
		{states: []string{"running"}, want: "state = RUNNING"},
		{states: []string{"RUNNING", "FAILED"}, labels: []string{"team=web"}, want: `(state = RUNNING OR state = FAILED) AND (labels.team = "web")`},
		{labels: []string{"example.com/team=a b"}, want: `labels."example.com/team" = "a b"`},
		{labels: []string{"team"}, want: "labels:team"},
		{labels: []string{"a-b/c"}, want: `labels:"a-b/c"`},
		{filter: "a OR b", labels: []string{"x="}, want: `(a OR b) AND (labels.x = "")`},
		{states: []string{"ASLEEP"}, bad: true},
		{labels: []string{"=x"}, bad: true},
	} {
		have, err := listFilter(tc.filter, tc.states, tc.labels)
		if (err != nil) != tc.bad || have != tc.want {
			t.Errorf("listFilter(%q, %q, %q) = %q, %v", tc.filter, tc.states, tc.labels, have, err)
		}
	}
}

func TestCreateSendsWhatWasAsked(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	envFile := filepath.Join(dir, "env")
	if err := os.WriteFile(envFile, []byte("# comment\r\nA=from file\r\n\nB=b=b\nTAKEN\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TAKEN", "from the environment")
	t.Setenv("KEY", "k")
	r := f.runWith(invocation{stdin: strings.NewReader(`{"model":"m"}`)},
		"session", "create", "main", "--image", "img:1", "--env-file", envFile, "-e", "A=flag, with comma", "-e", "KEY",
		"--opencode-config", "-", "-l", "team=web,tier=1", "--cpu", "1500m", "--memory", "2Gi", "--disk", "10G", "--pids", "99",
		"--node-selector", "zone=a", "--request-id", "8b5a3b1e-0000-4000-8000-000000000000")
	if r.code != 0 || r.out != "session main created\n" || !strings.Contains(r.err, "cloudcode session open main") {
		t.Fatalf("%+v", r)
	}
	have, err := jsonOf(f.creates[0], true)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "create_request.json", string(have)+"\n")
}

func TestCreateRefusesBeforeItAsks(t *testing.T) {
	f := newFleet(t)
	empty := filepath.Join(t.TempDir(), "empty.json")
	if err := os.WriteFile(empty, []byte(" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"-e", "NOT_THERE"}, "there is no such variable in the environment"},
		{[]string{"-e", "=x"}, "want NAME=VALUE"},
		{[]string{"-l", "team"}, `--label "team": want KEY=VALUE`},
		{[]string{"--cpu", "lots"}, "want CPUs such as 1.5"},
		{[]string{"--memory", "2Zi"}, `unknown unit "Zi"`},
		{[]string{"--opencode-config", empty}, "is empty"},
		{[]string{"--opencode-config", "/does/not/exist"}, "no such file"},
		{[]string{"--env-file", "/does/not/exist"}, "no such file"},
		{[]string{"a/b"}, "is no id"},
		{[]string{"a", "b"}, "at most 1"},
		{[]string{"--timeout", "0s"}, "want more than 0"},
	} {
		r := f.run(append([]string{"session", "create"}, tc.args...)...)
		if r.code != exitUsage || !strings.Contains(r.err, tc.want) || !strings.Contains(r.err, "--help") {
			t.Errorf("create %q: exit %d, %s", tc.args, r.code, r.err)
		}
	}
	if len(f.creates) != 0 {
		t.Errorf("%d requests were sent", len(f.creates))
	}
}

func TestCreateRetriesWithOneRequestID(t *testing.T) {
	f := newFleet(t)
	f.onCreate = func(req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
		if len(f.creates) < 3 {
			return nil, status.Error(codes.Unavailable, "the server is stopping")
		}
		return running("main"), nil
	}
	if r := f.run("session", "create", "main", "-o", "name"); r.code != 0 || r.out != "sessions/main\n" {
		t.Fatalf("%+v", r)
	}
	if len(f.creates) != 3 || f.creates[0].GetRequestId() == "" || f.creates[0].GetRequestId() != f.creates[2].GetRequestId() {
		t.Errorf("requests: %v", f.creates)
	}
}

func TestUpdate(t *testing.T) {
	f := newFleet(t)
	f.put(running("main"))
	tries := 0
	f.onUpdate = func(*cloudcodev1.UpdateSessionRequest) error {
		if tries++; tries == 1 {
			return grpcerr.New(codes.Aborted, "ETAG_MISMATCH", "the session has changed")
		}
		return nil
	}
	r := f.run("session", "update", "main", "--label", "team=ops,beta-", "--env", "API_KEY-", "--env", "NEW=1", "--memory", "4Gi", "--pids", "0")
	if r.code != 0 || r.out != "session main updated\n" {
		t.Fatalf("%+v", r)
	}
	if len(f.updates) != 2 {
		t.Fatalf("%d updates, want one and a retry", len(f.updates))
	}
	have, err := jsonOf(f.updates[1], true)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "update_request.json", string(have)+"\n")

	if r := f.run("session", "update", "main"); r.code != exitUsage || !strings.Contains(r.err, "nothing to change") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "update", "nobody", "--cpu", "1"); r.code != exitNotFound {
		t.Errorf("%+v", r)
	}
}

func TestDeleteAsksFirst(t *testing.T) {
	f := newFleet(t)
	ask := func(answer string, args ...string) result {
		f.put(running("main"))
		return f.runWith(invocation{stdin: terminal{Reader: strings.NewReader(answer)}}, append([]string{"session", "delete"}, args...)...)
	}
	deleted := func() bool {
		s, err := f.get("sessions/main")
		return err != nil || s.GetState() == cloudcodev1.Session_DELETING
	}
	for _, no := range []string{"", "\n", "n\n", "nope\n", "yep\n"} {
		r := ask(no, "main")
		if r.code != exitError || !strings.Contains(r.err, "Delete session main and its workspace? This cannot be undone. [y/N]") ||
			!strings.Contains(r.err, "nothing was deleted") || deleted() {
			t.Errorf("answer %q: %+v", no, r)
		}
	}
	for _, yes := range []string{"y\n", "YES\n", "y"} {
		if r := ask(yes, "main"); r.code != 0 || r.out != "session main is being deleted\n" || !deleted() {
			t.Errorf("answer %q: %+v", yes, r)
		}
	}
	f.put(running("main"))
	if r := f.run("session", "delete", "main"); r.code != exitUsage || !strings.Contains(r.err, "add --yes") || deleted() {
		t.Errorf("without a terminal: %+v", r)
	}
	if r := f.run("session", "delete", "main", "--yes"); r.code != 0 || !deleted() {
		t.Errorf("--yes: %+v", r)
	}
}

func TestDeleteSeveral(t *testing.T) {
	f := newFleet(t)
	f.put(running("a"))
	f.put(running("c"))
	r := f.run("session", "delete", "-y", "a", "b", "c")
	if r.code != exitNotFound || r.out != "session a is being deleted\nsession c is being deleted\n" || !strings.Contains(r.err, "no session b") {
		t.Errorf("%+v", r)
	}
	if r := f.run("session", "delete", "-y", "b", "--allow-missing", "--wait"); r.code != 0 {
		t.Errorf("%+v", r)
	}
}

func TestDeleteWaits(t *testing.T) {
	f := newFleet(t)
	f.put(running("main"))
	f.onDelete = func(req *cloudcodev1.DeleteSessionRequest) (*cloudcodev1.Session, error) {
		s, err := f.get(req.GetName())
		if err == nil {
			s.State = cloudcodev1.Session_DELETING
			f.put(s)
		}
		return s, err
	}
	f.onWatch = func(req *cloudcodev1.WatchSessionEventsRequest, s grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error {
		f.remove(req.GetName())
		return s.Send(&cloudcodev1.SessionEvent{Event: &cloudcodev1.SessionEvent_End{End: &cloudcodev1.EndEvent{Reason: "DELETED"}}})
	}
	if r := f.run("session", "delete", "-y", "--wait", "main"); r.code != 0 || r.out != "session main deleted\n" {
		t.Errorf("%+v", r)
	}

	f.put(running("stuck"))
	f.onWatch = nil
	r := f.run("session", "delete", "-y", "--wait", "--timeout", "100ms", "stuck")
	if r.code != exitTimeout || !strings.Contains(r.err, "session stuck is not gone after 100ms: DELETING") {
		t.Errorf("%+v", r)
	}
}

func TestOpen(t *testing.T) {
	f := threeSessions(t)
	if r := f.run("session", "open", "main", "--print"); r.code != 0 || r.out != "http://main.localhost:8080\n" || r.err != "" {
		t.Errorf("%+v", r)
	}
	t.Setenv("SERVER_USERNAME", "agent")
	t.Setenv("SERVER_PASSWORD", "secret")
	r := f.run("session", "open", "main")
	if want := "opencode attach http://localhost:8080/v1/sessions/main/proxy -u \"$SERVER_USERNAME\" -p \"$SERVER_PASSWORD\"\n"; r.err != want {
		t.Errorf("%q, want %q", r.err, want)
	}
	if strings.Contains(r.out+r.err, "secret") {
		t.Error("the password is shown")
	}
	if r := f.run("session", "open", "waiting"); r.code != exitConflict || !strings.Contains(r.err, "no gateway") {
		t.Errorf("%+v", r)
	}
	bad := running("bad")
	bad.WebUri = "file:///etc/passwd"
	f.put(bad)
	if r := f.run("session", "open", "bad"); r.code != exitError || !strings.Contains(r.err, "not an http address") {
		t.Errorf("%+v", r)
	}
}

// TestOpenStartsABrowser has a stand-in for xdg-open.
func TestOpenStartsABrowser(t *testing.T) {
	f := threeSessions(t)
	bin := t.TempDir()
	opened := filepath.Join(bin, "opened")
	script := "#!/bin/sh\nprintf %s \"$1\" > " + opened + "\n"
	if err := os.WriteFile(filepath.Join(bin, "xdg-open"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("DISPLAY", ":0")
	if r := f.run("session", "open", "main", "--print"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if _, err := os.Stat(opened); err == nil {
		t.Error("--print opened a browser")
	}
	if r := f.run("session", "open", "main"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if have, _ := os.ReadFile(opened); string(have) != "http://main.localhost:8080" {
		t.Errorf("opened %q", have)
	}
}

func TestInterruptedAnswer(t *testing.T) {
	f := newFleet(t)
	f.put(running("main"))
	ctx, cancel := context.WithCancel(t.Context())
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close() // ends the goroutine that reads
	cancel()
	res := f.runWith(invocation{stdin: terminal{Reader: r}, ctx: ctx}, "session", "delete", "main")
	if res.code != exitInterrupted {
		t.Errorf("%+v", res)
	}
}

func TestCompletion(t *testing.T) {
	f := threeSessions(t)
	t.Setenv("CLOUDCODE_DATA_DIR", f.dir)
	f.nodes = []*cloudcodev1.Node{{Name: "nodes/n1", State: cloudcodev1.Node_READY, CreateTime: timestamppb.Now()}}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"session", "get", ""}, "evil\tFAILED\nmain\tRUNNING\nwaiting\tPENDING\n:4\n"},
		{[]string{"session", "get", "main", ""}, ":4\n"},
		{[]string{"session", "delete", "main", ""}, "evil\tFAILED\nwaiting\tPENDING\n:4\n"},
		{[]string{"node", "get", ""}, "n1\tREADY\n:4\n"},
		{[]string{"session", "list", "--state", "R"}, "PENDING\nSTARTING\nRUNNING\nSUSPENDING\nSUSPENDED\nFAILED\nLOST\nDELETING\n:4\n"},
	} {
		r := invocation{}.run(t, append([]string{"__complete"}, tc.args...)...)
		if r.code != 0 || r.out != tc.want {
			t.Errorf("%q: %q, %s", tc.args, r.out, r.err)
		}
	}
	f.stop()
	if r := (invocation{}).run(t, "__complete", "session", "get", ""); r.code != 0 || r.out != ":4\n" {
		t.Errorf("without a server: %+v", r)
	}
}
