package server

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"

	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// member joins over the wire, as node daemons and gateways do.
func member(t *testing.T, s *Server, role pki.Role, id string) *grpc.ClientConn {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(pkiDir(s.config.DataDir), "join-token"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := pki.Join(t.Context(), pki.JoinOptions{
		Server: s.Addr().String(), Token: string(token), Identity: pki.Identity{Role: role, ID: id}, Dir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(s.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(m.ClientTLS(pki.RoleServer))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// fakeNode does what a node daemon does towards the server, with no containers.
type fakeNode struct {
	nodev1.UnimplementedAgentServiceServer
	conn  *grpc.ClientConn
	id    string // of the registration
	watch grpc.ServerStreamingClient[nodev1.WatchAssignmentsResponse]
	line  atomic.Pointer[string] // what is in the log; nil: hello
}

func (n *fakeNode) ReadLogs(_ *nodev1.ReadLogsRequest, s grpc.ServerStreamingServer[nodev1.ReadLogsResponse]) error {
	line := "hello"
	if p := n.line.Load(); p != nil {
		line = *p
	}
	return s.Send(&nodev1.ReadLogsResponse{Entries: []*cloudcodev1.LogEntry{{Stream: "stdout", Line: line}}})
}

func startNode(t *testing.T, s *Server, id string) *fakeNode {
	t.Helper()
	n := &fakeNode{conn: member(t, s, pki.RoleNode, id)}

	agent := grpc.NewServer()
	nodev1.RegisterAgentServiceServer(agent, n)
	local := bufconn.Listen(1 << 20)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = agent.Serve(local) })
	linked := make(chan bool, 8)
	wg.Go(func() {
		link.Keep(ctx, n.conn, func(ctx context.Context, _ *linkv1.Target) (net.Conn, error) { return local.DialContext(ctx) },
			slog.New(slog.DiscardHandler), func(up bool) { linked <- up })
	})
	t.Cleanup(func() {
		cancel()
		agent.Stop()
		wg.Wait()
	})
	select {
	case <-linked:
	case <-time.After(10 * time.Second):
		t.Fatal("no link")
	}

	client := nodev1.NewDispatchServiceClient(n.conn)
	reg, err := client.Register(t.Context(), &nodev1.RegisterRequest{Info: &cloudcodev1.NodeInfo{CpuMillis: 4000}, Labels: map[string]string{"zone": "a"}})
	if err != nil {
		t.Fatal(err)
	}
	n.id = reg.GetRegistrationId()
	n.watch, err = client.WatchAssignments(ctx, &nodev1.WatchAssignmentsRequest{RegistrationId: n.id})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// next waits for an assignment of a session that pleases.
func (n *fakeNode) next(t *testing.T, what string, pleases func(*nodev1.Assignment) bool) *nodev1.Assignment {
	t.Helper()
	for {
		resp, err := n.watch.Recv()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for _, a := range append(resp.GetSnapshot().GetAssignments(), resp.GetChanges().GetUpserts()...) {
			if pleases(a) {
				return a
			}
		}
	}
}

func (n *fakeNode) report(t *testing.T, a *nodev1.Assignment, state nodev1.SessionStatus_State) {
	t.Helper()
	resp, err := nodev1.NewDispatchServiceClient(n.conn).ReportStatus(t.Context(), &nodev1.ReportStatusRequest{
		RegistrationId: n.id,
		Statuses:       []*nodev1.SessionStatus{{SessionId: a.GetSessionId(), SessionUid: a.GetSessionUid(), Generation: a.GetGeneration(), State: state}},
	})
	if err != nil || resp.GetResults()[0].GetCode() != nodev1.ReportResult_STORED {
		t.Fatalf("report %s: %v, %v", state, resp, err)
	}
}

// TestOneSession takes a session through its life: node, gateway and user speak
// to the server over TLS, and only the container is missing.
func TestOneSession(t *testing.T) {
	s := start(t, Config{Password: "secret"})
	ctx, cancel := context.WithTimeout(with(t.Context(), basic("", "secret")), 30*time.Second)
	defer cancel()
	user := cloudcodev1.NewSessionServiceClient(dial(t, s, "", ""))

	gateway := gatewayv1.NewRouteServiceClient(member(t, s, pki.RoleGateway, "g1"))
	routes, err := gateway.WatchRoutes(ctx, &gatewayv1.WatchRoutesRequest{LinkAddress: "127.0.0.1:1", BaseUri: "http://localhost:8080"})
	if err != nil {
		t.Fatal(err)
	}
	route := func(pleases func(*gatewayv1.Route) bool) *gatewayv1.Route {
		t.Helper()
		for {
			resp, err := routes.Recv()
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range append(resp.GetSnapshot().GetRoutes(), resp.GetChanges().GetUpserts()...) {
				if pleases(r) {
					return r
				}
			}
		}
	}
	if resp, err := routes.Recv(); err != nil || !resp.GetSnapshot().GetLast() {
		t.Fatalf("routes: %v, %v", resp, err)
	}

	if _, err := user.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: "main", Session: &cloudcodev1.Session{
		Spec: &cloudcodev1.SessionSpec{NodeSelector: map[string]string{"zone": "a"}, Env: map[string]string{"KEY": "value"}},
	}}); err != nil {
		t.Fatal(err)
	}
	route(func(r *gatewayv1.Route) bool { return r.GetSession().GetReason() == "NO_NODES" })
	events, err := user.WatchSessionEvents(ctx, &cloudcodev1.WatchSessionEventsRequest{Name: "sessions/main"})
	if err != nil {
		t.Fatal(err)
	}
	if first, err := events.Recv(); err != nil || first.GetHeartbeat() == nil {
		t.Errorf("the stream begins with %v, %v", first, err)
	}

	node := startNode(t, s, "n1")
	a := node.next(t, "run", func(a *nodev1.Assignment) bool { return a.GetDesiredState() == nodev1.Assignment_RUN })
	if a.GetSessionId() != "main" || a.GetGeneration() != 1 || a.GetOpencodePassword() == "" || a.GetSpec().GetImage() != "default:1" || a.GetSpec().GetEnv()["KEY"] != "value" {
		t.Errorf("assignment %v", a)
	}
	node.report(t, a, nodev1.SessionStatus_RUNNING)
	r := route(func(r *gatewayv1.Route) bool { return r.GetSession().GetState() == cloudcodev1.Session_RUNNING })
	if r.GetNodeId() != "n1" || r.GetOpencodePassword() != a.GetOpencodePassword() {
		t.Errorf("route %v", r)
	}
	got, err := user.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: "sessions/main"})
	if err != nil || got.GetState() != cloudcodev1.Session_RUNNING || got.GetNode() != "nodes/n1" || got.GetWebUri() != "http://main.localhost:8080/" {
		t.Errorf("session %v, %v", got, err)
	}
	if strings.Contains(got.String(), a.GetOpencodePassword()) {
		t.Error("the API shows the password")
	}
	shown, err := cloudcodev1.NewNodeServiceClient(dial(t, s, "", "")).GetNode(ctx, &cloudcodev1.GetNodeRequest{Name: "nodes/n1"})
	if err != nil || shown.GetState() != cloudcodev1.Node_READY || shown.GetSessionCount() != 1 || shown.GetHeartbeatTime() == nil {
		t.Errorf("node %v, %v", shown, err)
	}

	logs, err := user.ReadSessionLogs(ctx, &cloudcodev1.ReadSessionLogsRequest{Name: "sessions/main"})
	if err != nil {
		t.Fatal(err)
	}
	if entry, err := logs.Recv(); err != nil || entry.GetLine() != "hello" {
		t.Errorf("logs over the link: %v, %v", entry, err)
	}
	// One event of OpenCode may be larger than gRPC takes by itself.
	large := strings.Repeat("x", 9<<20)
	node.line.Store(&large)
	logs, err = user.ReadSessionLogs(ctx, &cloudcodev1.ReadSessionLogsRequest{Name: "sessions/main"}, grpc.MaxCallRecvMsgSize(pki.MaxMessage))
	if err != nil {
		t.Fatal(err)
	}
	if entry, err := logs.Recv(); err != nil || entry.GetLine() != large {
		t.Errorf("a large message over the link: %d bytes, %v", len(entry.GetLine()), err)
	}

	if _, err := user.UpdateSession(ctx, &cloudcodev1.UpdateSessionRequest{Session: &cloudcodev1.Session{
		Name: "sessions/main", Etag: got.GetEtag(), Spec: &cloudcodev1.SessionSpec{Image: "other:2"},
	}}); err != nil {
		t.Fatal(err)
	}
	second := node.next(t, "new image", func(a *nodev1.Assignment) bool { return a.GetGeneration() == 2 })
	if second.GetSpec().GetImage() != "other:2" || second.GetOpencodePassword() != a.GetOpencodePassword() {
		t.Errorf("second assignment %v", second)
	}

	if _, err := user.DeleteSession(ctx, &cloudcodev1.DeleteSessionRequest{Name: "sessions/main"}); err != nil {
		t.Fatal(err)
	}
	last := node.next(t, "delete", func(a *nodev1.Assignment) bool { return a.GetDesiredState() == nodev1.Assignment_DELETE })
	node.report(t, last, nodev1.SessionStatus_GONE)
	for {
		resp, err := routes.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.GetChanges().GetRemoves()) > 0 {
			break
		}
	}
	var seen []string
	for {
		e, err := events.Recv()
		if err != nil {
			t.Fatalf("events end with %v after %q", err, seen)
		}
		if l := e.GetLifecycle(); l != nil {
			seen = append(seen, l.GetSession().GetState().String())
		}
		if e.GetEnd() != nil {
			break
		}
	}
	if got := strings.Join(slices.Compact(seen), " "); got != "PENDING STARTING RUNNING STARTING DELETING" {
		t.Errorf("lifecycle %s", got)
	}
	if _, err := user.CreateSession(ctx, &cloudcodev1.CreateSessionRequest{SessionId: "main", Session: &cloudcodev1.Session{}}); err != nil {
		t.Errorf("the id is free again: %v", err)
	}
}
