package eventlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/protoconv"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a node daemon with the event ring of one session, over real gRPC.
type node struct {
	nodev1.UnimplementedAgentServiceServer
	mu      sync.Mutex
	has     bool // the session is on this node
	linked  bool
	first   uint64 // number of events[0], or of the next one
	events  []*nodev1.RingEvent
	changed chan struct{}
	broken  chan struct{} // closed: streams end
	streams int           // open now
	opened  int           // ever
}

func newNode() *node {
	return &node{has: true, linked: true, first: 1_000, changed: make(chan struct{}), broken: make(chan struct{})}
}

func (n *node) WatchEvents(req *nodev1.WatchEventsRequest, stream grpc.ServerStreamingServer[nodev1.WatchEventsResponse]) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.has {
		return status.Error(codes.NotFound, "not here")
	}
	n.streams++
	n.opened++
	defer func() { n.streams-- }()
	broken := n.broken
	newest := n.first + uint64(len(n.events)) - 1
	p := &nodev1.RingPosition{First: n.first, Last: newest, Generation: req.GetGeneration()}
	if after := req.GetAfter(); after != 0 {
		if after+1 < n.first || after > newest {
			p.Gap = true
		} else {
			p.First = after + 1
		}
	}
	send := func(m *nodev1.WatchEventsResponse) error {
		n.mu.Unlock()
		defer n.mu.Lock()
		return stream.Send(m)
	}
	if err := send(&nodev1.WatchEventsResponse{Update: &nodev1.WatchEventsResponse_Position{Position: p}}); err != nil {
		return err
	}
	for next := p.GetFirst(); ; {
		select {
		case <-broken:
			return status.Error(codes.Unavailable, "broken")
		default:
		}
		if next < n.first {
			next = n.first
			p := &nodev1.RingPosition{First: next, Last: n.first + uint64(len(n.events)) - 1, Gap: true}
			if err := send(&nodev1.WatchEventsResponse{Update: &nodev1.WatchEventsResponse_Position{Position: p}}); err != nil {
				return err
			}
			continue
		}
		if batch := slices.Clone(n.events[next-n.first:]); len(batch) > 0 {
			batch = batch[:min(len(batch), 100)]
			next += uint64(len(batch))
			if err := send(&nodev1.WatchEventsResponse{Update: &nodev1.WatchEventsResponse_Events{Events: &nodev1.RingEvents{Events: batch}}}); err != nil {
				return err
			}
			continue
		}
		changed := n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-broken:
		case <-stream.Context().Done():
		}
		n.mu.Lock()
		if stream.Context().Err() != nil {
			return stream.Context().Err()
		}
	}
}

// emit makes OpenCode say something.
func (n *node) emit(types ...string) {
	for _, typ := range types {
		n.emitFrame(typ, `{"a":1}`)
	}
}

func (n *node) emitFrame(typ, frame string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, &nodev1.RingEvent{
		Sequence: n.first + uint64(len(n.events)), Time: timestamppb.Now(), Type: typ, Frame: []byte(frame),
	})
	close(n.changed)
	n.changed = make(chan struct{})
}

// forget drops the oldest events.
func (n *node) forget(count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.first += uint64(count)
	n.events = n.events[count:]
}

// restart is a node daemon that begins anew.
func (n *node) restart(first uint64) {
	n.mu.Lock()
	n.first, n.events = first, nil
	n.mu.Unlock()
	n.breakStreams()
}

func (n *node) breakStreams() {
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.broken)
	n.broken = make(chan struct{})
}

func (n *node) link(up bool) {
	n.mu.Lock()
	n.linked = up
	n.mu.Unlock()
	if !up {
		n.breakStreams()
	}
}

func (n *node) open() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.streams
}

// fixture is a store, nodes, and a Log, in a bubble of virtual time.
type fixture struct {
	*testing.T
	store   *boltstore.Store
	current atomic.Pointer[Log]
	nodes   map[string]*node
	conns   map[string]*grpc.ClientConn
	limit   int
}

func (f *fixture) Agent(_ context.Context, id string) (nodev1.AgentServiceClient, error) {
	n := f.nodes[id]
	if n == nil {
		return nil, fmt.Errorf("%w: no node %s", fleet.ErrUnavailable, id)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.linked {
		return nil, fmt.Errorf("%w: node %s is not linked", fleet.ErrUnavailable, id)
	}
	return nodev1.NewAgentServiceClient(f.conns[id]), nil
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
		f := &fixture{T: t, store: s, nodes: map[string]*node{}, conns: map[string]*grpc.ClientConn{}, limit: ringBytes}
		for _, id := range []string{"n1", "n2"} {
			n := newNode()
			l := bufconn.Listen(64 << 10)
			server := grpc.NewServer()
			nodev1.RegisterAgentServiceServer(server, n)
			go func() { _ = server.Serve(l) }() // ends with Stop
			conn, err := grpc.NewClient("passthrough:///"+id, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			f.nodes[id], f.conns[id] = n, conn
			defer server.Stop()
			defer conn.Close()
		}
		f.start()
		defer func() { f.log().Close() }()
		fn(f)
	})
}

func (f *fixture) start() {
	l := New(Config{
		Store: f.store, Agents: f, Logger: slog.New(slog.DiscardHandler),
		Session: func(s *fleet.Session) *cloudcodev1.Session { return protoconv.Session(s, "") },
	})
	l.limit = f.limit
	f.current.Store(l)
}

func (f *fixture) log() *Log { return f.current.Load() }

// restartServer begins with new feeds.
func (f *fixture) restartServer() {
	f.log().Close()
	f.start()
}

// create stores a running session on n1.
func (f *fixture) create(id, uid string) {
	f.Helper()
	f.update(func(tx store.Tx) error {
		s := &fleet.Session{
			ID: id, UID: uid, State: fleet.StateRunning, Generation: 1,
			Assignment: &fleet.Assignment{Node: "n1", Generation: 1, Password: "secret"},
		}
		return putEvent(tx, s)
	})
}

func putEvent(tx store.Tx, s *fleet.Session) error {
	if err := tx.PutSession(s); err != nil {
		return err
	}
	_, err := tx.AppendEvent(s)
	return err
}

func (f *fixture) update(fn func(store.Tx) error) {
	f.Helper()
	if _, err := f.store.Update(f.Context(), fn); err != nil {
		f.Fatal(err)
	}
}

// change stores a lifecycle event with a message.
func (f *fixture) change(id, message string, more ...func(*fleet.Session)) {
	f.Helper()
	f.update(func(tx store.Tx) error {
		s, err := tx.Session(id)
		if err != nil {
			return err
		}
		s.Message = message
		for _, m := range more {
			m(s)
		}
		return putEvent(tx, s)
	})
}

func (f *fixture) remove(id string) {
	f.Helper()
	f.update(func(tx store.Tx) error { return tx.DeleteSession(id) })
}

// name is what a test compares: heartbeats are left out.
func name(e *cloudcodev1.SessionEvent) string {
	switch v := e.GetEvent().(type) {
	case *cloudcodev1.SessionEvent_Lifecycle:
		s := v.Lifecycle.GetSession()
		return "L:" + s.GetState().String() + ":" + s.GetMessage()
	case *cloudcodev1.SessionEvent_Opencode:
		return v.Opencode.GetType()
	case *cloudcodev1.SessionEvent_Checkpointed:
		return "CHECKPOINT:" + v.Checkpointed.GetCheckpoint().GetId() + ":" + v.Checkpointed.GetCheckpoint().GetTrigger()
	case *cloudcodev1.SessionEvent_Gap:
		return "GAP"
	case *cloudcodev1.SessionEvent_End:
		return "END:" + v.End.GetReason()
	}
	return "HEARTBEAT"
}

// reader collects what a subscriber gets.
type reader struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	all    []*cloudcodev1.SessionEvent
	err    error
	paused chan struct{} // not nil: wait for it after each event
}

func (f *fixture) subscribe(id, after string) *reader {
	ctx, cancel := context.WithCancel(f.Context())
	r := &reader{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		for e, err := range f.log().Subscribe(ctx, id, after) {
			r.mu.Lock()
			if err != nil {
				r.err = err
			} else {
				r.all = append(r.all, e)
			}
			paused := r.paused
			r.mu.Unlock()
			if paused != nil {
				select {
				case <-paused:
				case <-ctx.Done():
				}
			}
		}
	}()
	return r
}

// stop ends the reader and returns the id of its last event.
func (r *reader) stop() string {
	r.cancel()
	<-r.done
	return r.all[len(r.all)-1].GetId()
}

// got is everything so far, heartbeats included.
func (r *reader) got() []*cloudcodev1.SessionEvent {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

func (r *reader) names() []string {
	var out []string
	for _, e := range r.got() {
		if n := name(e); n != "HEARTBEAT" {
			out = append(out, n)
		}
	}
	return out
}

func (f *fixture) want(r *reader, want ...string) {
	f.Helper()
	if got := r.names(); !slices.Equal(got, want) {
		f.Errorf("got  %q\nwant %q", got, want)
	}
}

// first takes the first item of a subscription.
func (f *fixture) first(id, after string) (*cloudcodev1.SessionEvent, error) {
	for e, err := range f.log().Subscribe(f.Context(), id, after) {
		return e, err
	}
	return nil, io.EOF
}

func errorIs(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
}

// wait lets virtual time pass.
func wait(d time.Duration) {
	time.Sleep(d) // in a bubble
	synctest.Wait()
}
