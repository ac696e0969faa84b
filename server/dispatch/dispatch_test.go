package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gateways is a list that tests change.
type gateways struct {
	mu      sync.Mutex
	list    []*nodev1.Gateway
	changed chan struct{}
}

func (g *gateways) Gateways() ([]*nodev1.Gateway, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.list), g.changed
}

func (g *gateways) set(ids ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.list = nil
	for _, id := range ids {
		g.list = append(g.list, &nodev1.Gateway{Id: id, Address: id + ":1"})
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

// keys knows the keys of every bucket.
type keys struct{}

func (keys) Assigned(s fleet.Storage) *nodev1.AssignedStorage {
	return &nodev1.AssignedStorage{Mode: cloudcodev1.Storage_SNAPSHOT, Bucket: s.Bucket, Prefix: s.Prefix, SecretAccessKey: "key of " + s.Profile}
}

// fixture is a store and a Dispatcher behind gRPC, in a bubble of virtual time.
type fixture struct {
	*testing.T
	store    *boltstore.Store
	faults   *faults // what the dispatcher uses
	gateways *gateways
	d        *Dispatcher
	client   nodev1.DispatchServiceClient
	stop     func()
}

func bubble(t *testing.T, fn func(f *fixture)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s, err := boltstore.Open(filepath.Join(dir, "fleet.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		f := &fixture{T: t, store: s, faults: &faults{Store: s}, gateways: &gateways{changed: make(chan struct{})}}
		f.start()
		defer func() { f.stop() }()
		fn(f)
	})
}

// start starts a server.
func (f *fixture) start() {
	f.d = New(Config{
		Store: f.faults, Gateways: f.gateways, Logger: slog.New(slog.DiscardHandler), Storage: keys{},
		Identify: func(ctx context.Context) (string, error) {
			id := metadata.ValueFromIncomingContext(ctx, "node")
			if len(id) != 1 {
				return "", grpcerr.New(codes.Unauthenticated, "NO_CERTIFICATE", "who are you")
			}
			return id[0], nil
		},
	})
	l := bufconn.Listen(64 << 10)
	server := grpc.NewServer()
	nodev1.RegisterDispatchServiceServer(server, f.d)
	go func() { _ = server.Serve(l) }() // ends with Stop
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		f.Fatal(err)
	}
	f.client = nodev1.NewDispatchServiceClient(conn)
	ctx, cancel := context.WithCancel(f.Context())
	done := make(chan error, 1)
	d := f.d
	go func() { done <- d.Run(ctx) }()
	f.stop = func() {
		conn.Close()
		server.Stop()
		cancel()
		if err := <-done; err != nil {
			f.Errorf("Run: %v", err)
		}
	}
	synctest.Wait()
}

func as(ctx context.Context, node string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "node", node)
}

func (f *fixture) register(node string) *nodev1.RegisterResponse {
	f.Helper()
	resp, err := f.client.Register(as(f.Context(), node), &nodev1.RegisterRequest{
		Info: &cloudcodev1.NodeInfo{Version: "v1"}, Labels: map[string]string{"zone": "a"},
	})
	if err != nil {
		f.Fatal(err)
	}
	return resp
}

func (f *fixture) heartbeat(node, registration string) error {
	_, err := f.client.Heartbeat(as(f.Context(), node), &nodev1.HeartbeatRequest{RegistrationId: registration})
	return err
}

// beat sends heartbeats for as long.
func (f *fixture) beat(node, registration string, d time.Duration) {
	f.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := f.heartbeat(node, registration); err != nil {
			f.Fatal(err)
		}
		wait(minPeriod)
	}
}

func wantExpired(t *testing.T, err error) {
	t.Helper()
	if status.Code(err) != codes.FailedPrecondition || grpcerr.Reason(err) != ReasonRegistrationExpired {
		t.Errorf("error %v, want FAILED_PRECONDITION %s", err, ReasonRegistrationExpired)
	}
}

func wait(d time.Duration) {
	time.Sleep(d) // in a bubble
	synctest.Wait()
}

func (f *fixture) node(id string) *fleet.Node {
	f.Helper()
	var n *fleet.Node
	if err := f.store.View(f.Context(), func(tx store.ReadTx) (err error) {
		n, err = tx.Node(id)
		return err
	}); err != nil {
		f.Fatal(err)
	}
	return n
}

func (f *fixture) wantState(id string, want fleet.NodeState) {
	f.Helper()
	if got := f.node(id).State; got != want {
		f.Errorf("node %s is %s, want %s", id, got, want)
	}
}

func session(id, node string) *fleet.Session {
	return &fleet.Session{
		ID: id, UID: "u-" + id, State: fleet.StateStarting, Generation: 1,
		Assignment: &fleet.Assignment{Node: node, Generation: 1, Password: "secret", Spec: fleet.Spec{Image: "i"}},
	}
}

func (f *fixture) put(sessions ...*fleet.Session) {
	f.Helper()
	f.update(func(tx store.Tx) error {
		for _, s := range sessions {
			if err := tx.PutSession(s); err != nil {
				return err
			}
		}
		return nil
	})
}

func (f *fixture) update(fn func(store.Tx) error) {
	f.Helper()
	if _, err := f.store.Update(f.Context(), fn); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) session(id string) (s *fleet.Session, events int) {
	f.Helper()
	if err := f.store.View(f.Context(), func(tx store.ReadTx) (err error) {
		if s, err = tx.Session(id); err != nil {
			return err
		}
		for _, err := range tx.Events(s.UID, 0) {
			if err != nil {
				return err
			}
			events++
		}
		return nil
	}); err != nil {
		f.Fatal(err)
	}
	return s, events
}

// watched is what a node knows from its stream.
type watched struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex
	assigned map[string]*nodev1.Assignment // nil before the full set
	pending  map[string]*nodev1.Assignment
	log      []string // what came, in order
	largest  int
	gateways []string
	err      error
}

func (f *fixture) watch(node, registration string) *watched {
	ctx, cancel := context.WithCancel(as(f.Context(), node))
	w := &watched{cancel: cancel, done: make(chan struct{}), pending: map[string]*nodev1.Assignment{}}
	go func() {
		defer close(w.done)
		stream, err := f.client.WatchAssignments(ctx, &nodev1.WatchAssignmentsRequest{RegistrationId: registration})
		for err == nil {
			var resp *nodev1.WatchAssignmentsResponse
			if resp, err = stream.Recv(); err == nil {
				w.take(resp)
			}
		}
		w.mu.Lock()
		w.err = err
		w.mu.Unlock()
	}()
	synctest.Wait()
	return w
}

func (w *watched) take(resp *nodev1.WatchAssignmentsResponse) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.largest = max(w.largest, proto.Size(resp))
	switch u := resp.GetUpdate().(type) {
	case *nodev1.WatchAssignmentsResponse_Snapshot:
		for _, a := range u.Snapshot.GetAssignments() {
			w.pending[a.GetSessionId()] = a
		}
		if u.Snapshot.GetLast() {
			w.assigned = w.pending
		}
	case *nodev1.WatchAssignmentsResponse_Changes:
		for _, a := range u.Changes.GetUpserts() {
			w.assigned[a.GetSessionId()] = a
			w.log = append(w.log, fmt.Sprintf("+%s %s %d %s", a.GetSessionId(), a.GetSessionUid(), a.GetGeneration(), a.GetDesiredState()))
		}
		for _, id := range u.Changes.GetRemoves() {
			delete(w.assigned, id)
			w.log = append(w.log, "-"+id)
		}
	case *nodev1.WatchAssignmentsResponse_Gateways:
		w.gateways = nil
		for _, g := range u.Gateways.GetGateways() {
			w.gateways = append(w.gateways, g.GetId()+"="+g.GetAddress())
		}
	}
}

// seen returns the log since the last call.
func (w *watched) seen() []string {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	log := w.log
	w.log = nil
	return log
}

func (f *fixture) wantSeen(w *watched, want ...string) {
	f.Helper()
	if got := w.seen(); !slices.Equal(got, want) {
		f.Errorf("got %q, want %q", got, want)
	}
}

func (f *fixture) report(node, registration string, statuses ...*nodev1.SessionStatus) ([]nodev1.ReportResult_Code, error) {
	resp, err := f.client.ReportStatus(as(f.Context(), node), &nodev1.ReportStatusRequest{RegistrationId: registration, Statuses: statuses})
	var out []nodev1.ReportResult_Code
	for _, r := range resp.GetResults() {
		out = append(out, r.GetCode())
	}
	return out, err
}

func running(id string, change ...func(*nodev1.SessionStatus)) *nodev1.SessionStatus {
	s := &nodev1.SessionStatus{SessionId: id, SessionUid: "u-" + id, Generation: 1, State: nodev1.SessionStatus_RUNNING}
	for _, c := range change {
		c(s)
	}
	return s
}

// faults is a store that refuses writes for a while, and those of a certain session.
type faults struct {
	store.Store

	mu    sync.Mutex
	until time.Time
	bad   string
}

var errBad = errors.New("cannot be stored")

func (s *faults) set(until time.Time, bad string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until, s.bad = until, bad
}

func (s *faults) Update(ctx context.Context, fn func(store.Tx) error) (store.Revision, error) {
	s.mu.Lock()
	until, bad := s.until, s.bad
	s.mu.Unlock()
	if time.Now().Before(until) {
		return 0, fmt.Errorf("%w: full", fleet.ErrResourceExhausted)
	}
	return s.Store.Update(ctx, func(tx store.Tx) error { return fn(faultyTx{tx, bad}) })
}

type faultyTx struct {
	store.Tx
	bad string
}

func (t faultyTx) PutSession(s *fleet.Session) error {
	if s.ID == t.bad {
		return errBad
	}
	return t.Tx.PutSession(s)
}
