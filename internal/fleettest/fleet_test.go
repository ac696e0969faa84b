package fleettest_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cloudcode-dev/cloudcode/internal/fleettest"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// client reaches the gateway whatever the name: not every machine resolves names
// below localhost. It leaves no connection open for goleak.
func client(f *fleettest.Fleet) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", f.Gateway.Addr())
		},
	}}
}

func get(t *testing.T, f *fleettest.Fleet, url string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), fleettest.Wait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client(f).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestLifeOfASession(t *testing.T) {
	f := fleettest.New(t)
	f.Create("early", nil)
	if s := f.Await("early", "explained", func(s *cloudcodev1.Session) bool { return s.GetReason() != "" }); s.GetState() != cloudcodev1.Session_PENDING || s.GetReason() != "NO_NODES" {
		t.Fatalf("without a node: %v", s)
	}
	n := f.AddNode("n1")
	s := f.AwaitState("early", cloudcodev1.Session_RUNNING)
	if s.GetNode() != "nodes/n1" || s.GetGeneration() != 1 || s.GetOpencodeVersion() != "test" || !strings.HasPrefix(s.GetWebUri(), "http://early.localhost:") {
		t.Errorf("session %v", s)
	}
	if code, body := get(t, f, f.URL("early", "/any/path")); code != 200 || body != "early: GET /any/path as opencode" {
		t.Errorf("through the gateway: %d %q", code, body)
	}
	if code, body := get(t, f, f.URL("", "/v1/sessions/early/proxy/any/path")); code != 200 || body != "early: GET /any/path as opencode" {
		t.Errorf("through the path: %d %q", code, body)
	}
	if code, _ := get(t, f, f.URL("nobody", "/")); code != 404 {
		t.Errorf("an unknown session answers %d", code)
	}

	// Limits change in place, the environment in a new container.
	update := func(s *cloudcodev1.Session, paths ...string) {
		t.Helper()
		s.Name = "sessions/early"
		if _, err := f.Sessions.UpdateSession(t.Context(), &cloudcodev1.UpdateSessionRequest{Session: s, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}}); err != nil {
			t.Fatal(err)
		}
	}
	instance := func() (pid int, generation uint64) {
		list, err := n.Runtime.List(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatalf("containers %v, %v", list, err)
		}
		return list[0].PID, list[0].Generation
	}
	running := func(generation int64) {
		t.Helper()
		f.Await("early", "running at the generation", func(s *cloudcodev1.Session) bool {
			return s.GetGeneration() == generation && s.GetState() == cloudcodev1.Session_RUNNING
		})
	}
	first, _ := instance()
	update(&cloudcodev1.Session{Labels: map[string]string{"a": "b"}}, "labels")
	update(&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Resources: &cloudcodev1.Resources{MemoryBytes: 1 << 30}}}, "spec.resources.memory_bytes")
	running(2)
	// It stays RUNNING meanwhile, so only the container tells when it is done.
	for end := time.Now().Add(fleettest.Wait); ; {
		pid, generation := instance()
		if pid == first && generation == 2 {
			break
		}
		if pid != first || time.Now().After(end) {
			t.Fatalf("after a change of limits: process %d at generation %d, want %d at 2", pid, generation, first)
		}
	}
	if code, body := get(t, f, f.URL("early", "/y")); code != 200 {
		t.Errorf("after a change of limits: %d %s", code, body)
	}
	update(&cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{Env: map[string]string{"A": "1"}}}, "spec.env")
	running(3)
	if pid, _ := instance(); pid == first {
		t.Error("a change of the environment did not make a new container")
	}

	if _, err := f.Sessions.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: "sessions/early"}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(fleettest.Wait); ; {
		_, err := f.Sessions.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "sessions/early"})
		if status.Code(err) == codes.NotFound {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("still there: %v", err)
		}
	}
	if left, _ := n.Runtime.List(t.Context()); len(left) != 0 {
		t.Errorf("containers left: %v", left)
	}
	// The same name again is another session.
	if s := f.Create("early", nil); s.GetState() != cloudcodev1.Session_PENDING {
		t.Errorf("made again: %v", s)
	}
	f.AwaitState("early", cloudcodev1.Session_RUNNING)
}

// Any of our processes can be restarted under running sessions: the container
// stays, and so does the session's state.
func TestRestarts(t *testing.T) {
	f := fleettest.New(t)
	n := f.AddNode("n1")
	f.Create("s1", nil)
	f.AwaitState("s1", cloudcodev1.Session_RUNNING)
	before, _ := n.Runtime.List(t.Context())
	reachable := func(after string) {
		t.Helper()
		for end := time.Now().Add(fleettest.Wait); ; {
			code, body := get(t, f, f.URL("s1", "/x"))
			if code == 200 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("after %s: %d %s", after, code, body)
			}
		}
		now, _ := n.Runtime.List(t.Context())
		if len(now) != 1 || now[0].PID != before[0].PID {
			t.Fatalf("after %s: containers %v, want %v", after, now, before)
		}
		if s := f.AwaitState("s1", cloudcodev1.Session_RUNNING); s.GetGeneration() != 1 || s.GetRestartCount() != 0 {
			t.Fatalf("after %s: %v", after, s)
		}
	}

	reachable("the start") // the gateway knows it, too
	f.StopServer()
	if code, body := get(t, f, f.URL("s1", "/x")); code != 200 {
		t.Errorf("while the server is away: %d %s", code, body)
	}
	f.StartServer()
	reachable("a restart of the server")

	f.StopGateway()
	f.StartGateway()
	reachable("a restart of the gateway")

	n.Stop()
	n.Start()
	reachable("a restart of the node daemon")

	// The node daemon comes back while the server is away.
	f.StopServer()
	n.Stop()
	n.Start()
	for end := time.Now().Add(fleettest.Wait); ; {
		code, body := get(t, f, f.URL("s1", "/x"))
		if code == 200 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("node daemon restarted, server away: %d %s", code, body)
		}
	}
	f.StartServer()
	reachable("restarts of server and node daemon")
}

// event is one frame of the gateway's stream.
type event struct{ id, kind, data string }

// sse reads frames until fn says enough.
func sse(t *testing.T, f *fleettest.Fleet, url, lastID string, fn func(event) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), fleettest.Wait)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	resp, err := client(f).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e event
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "id":
			e.id = value
		case "event":
			e.kind = value
		case "data":
			e.data = value
		case "":
			if e.kind != "" && !fn(e) {
				return
			}
			e = event{id: e.id}
		}
	}
	t.Fatalf("the stream ended: %v", lines.Err())
}

func tick(t *testing.T, e event) int {
	t.Helper()
	var frame struct {
		Payload struct {
			Properties struct{ N int }
		}
	}
	if err := json.Unmarshal([]byte(e.data), &frame); err != nil {
		t.Fatalf("%v: %s", err, e.data)
	}
	return frame.Payload.Properties.N
}

// A client that is cut off again and again, also by restarts of server and
// gateway, gets every event once and in order.
func TestEventsResume(t *testing.T) {
	f := fleettest.New(t)
	f.AddNode("n1")
	f.Create("s1", nil)
	f.AwaitState("s1", cloudcodev1.Session_RUNNING)
	last, next, seen := "", -1, 0
	for round := range 12 {
		switch round {
		case 4:
			f.StopServer()
			f.StartServer()
		case 8:
			f.StopGateway()
			f.StartGateway()
		}
		for end := time.Now().Add(fleettest.Wait); ; { // the gateway may not have its routes yet
			if code, _ := get(t, f, f.URL("s1", "/x")); code == 200 {
				break
			} else if time.Now().After(end) {
				t.Fatal("the session cannot be reached: " + strconv.Itoa(code))
			}
		}
		got := 0
		sse(t, f, f.URL("", "/v1/sessions/s1/events"), last, func(e event) bool {
			switch e.kind {
			case "gap":
				t.Fatalf("round %d: gap %s", round, e.data)
			case "opencode":
				n := tick(t, e)
				if next >= 0 && n != next {
					t.Fatalf("round %d: event %d, want %d", round, n, next)
				}
				next, last = n+1, e.id
				seen++
				got++
			}
			return got < 7
		})
	}
	if seen < 80 {
		t.Errorf("only %d events", seen)
	}
}

func TestTwoNodes(t *testing.T) {
	f := fleettest.New(t)
	f.AddNode("n1")
	f.AddNode("n2")
	for end := time.Now().Add(fleettest.Wait); ; {
		list, err := f.Nodes.ListNodes(t.Context(), &cloudcodev1.ListNodesRequest{})
		if err == nil && len(list.GetNodes()) == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("nodes %v, %v", list, err)
		}
	}
	for _, want := range []string{"n2", "n1", "n2"} {
		id := "on-" + want
		if _, err := f.Sessions.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: "sessions/" + id}); err == nil {
			id += "-2"
		}
		f.Create(id, &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"name": want}}})
		if s := f.AwaitState(id, cloudcodev1.Session_RUNNING); s.GetNode() != "nodes/"+want {
			t.Errorf("session is on %s, want %s", s.GetNode(), want)
		}
		if code, body := get(t, f, f.URL(id, "/")); code != 200 {
			t.Errorf("through the gateway: %d %s", code, body)
		}
	}
	f.Create("nowhere", &cloudcodev1.Session{Spec: &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"name": "n3"}}})
	if s := f.Await("nowhere", "explained", func(s *cloudcodev1.Session) bool { return s.GetReason() == "NO_MATCHING_NODE" }); !strings.Contains(s.GetMessage(), "n3") {
		t.Errorf("message %q", s.GetMessage())
	}
}

// A machine that claims another one's id gets nothing of it: not its sessions,
// not its traffic.
func TestTwoMachinesOfOneID(t *testing.T) {
	f := fleettest.New(t)
	n := f.AddNode("n1")
	f.Create("s1", nil)
	f.AwaitState("s1", cloudcodev1.Session_RUNNING)
	imposter := f.AddMachine("n1", "elsewhere")
	for range 20 {
		if code, body := get(t, f, f.URL("s1", "/x")); code != 200 {
			t.Fatalf("with a second machine: %d %s", code, body)
		}
		select {
		case <-time.After(20 * time.Millisecond): // long enough for the other to have tried to register
		case <-t.Context().Done():
		}
	}
	if left, _ := imposter.Runtime.List(t.Context()); len(left) != 0 {
		t.Errorf("the second machine runs %v", left)
	}
	if list, _ := n.Runtime.List(t.Context()); len(list) != 1 {
		t.Errorf("the first machine runs %v", list)
	}
}

// Whoever was told that a session is created finds it, however quick he is.
func TestCreatedIsReachable(t *testing.T) {
	f := fleettest.New(t)
	f.AddNode("n1")
	for i := range 30 {
		id := "s" + strconv.Itoa(i)
		f.Create(id, nil)
		if code, body := get(t, f, f.URL(id, "/x")); code != 200 {
			t.Fatalf("%s right after its create: %d %s", id, code, body)
		}
	}
}

// A gateway's certificate serves links; it must not pass for the server, which
// nodes show their join token to.
func TestAGatewayIsNoServer(t *testing.T) {
	f := fleettest.New(t)
	if err := f.DialGatewayAs(pki.RoleGateway); status.Code(err) != codes.Unimplemented {
		t.Errorf("as a gateway: %v, want that it is reached and has no such service", err)
	}
	if err := f.DialGatewayAs(pki.RoleServer); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "not of a server") {
		t.Errorf("as a server: %v", err)
	}
}
