package routes

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
	"github.com/cloudcode-dev/cloudcode/server/store/boltstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a store and Routes behind gRPC, in a bubble of virtual time.
type fixture struct {
	*testing.T
	store  *boltstore.Store
	path   string
	routes *Routes
	client gatewayv1.RouteServiceClient
	stop   func()
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
		f := &fixture{T: t, store: s, path: filepath.Join(dir, "gateways.json")}
		f.start()
		defer func() { f.stop() }()
		fn(f)
	})
}

func (f *fixture) start() {
	f.routes = New(Config{Store: f.store, Path: f.path, Identify: func(ctx context.Context) (string, error) {
		id := metadata.ValueFromIncomingContext(ctx, "gateway")
		if len(id) != 1 {
			return "", grpcerr.New(codes.Unauthenticated, "NO_CERTIFICATE", "who are you")
		}
		return id[0], nil
	}})
	l := bufconn.Listen(64 << 10)
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	gatewayv1.RegisterRouteServiceServer(server, f.routes)
	go func() { _ = server.Serve(l) }() // ends with Stop
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		f.Fatal(err)
	}
	f.client = gatewayv1.NewRouteServiceClient(conn)
	ctx, cancel := context.WithCancel(f.Context())
	done := make(chan error, 1)
	r := f.routes
	go func() { done <- r.Run(ctx) }()
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

// gatewayStream is what a gateway knows from its stream.
type gatewayStream struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	routes  map[string]*gatewayv1.Route // by name of the session; nil before the full set
	pending map[string]*gatewayv1.Route
	largest int
	err     error
}

func (f *fixture) connect(id, address, base string) *gatewayStream {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(f.Context(), "gateway", id))
	g := &gatewayStream{cancel: cancel, done: make(chan struct{}), pending: map[string]*gatewayv1.Route{}}
	go func() {
		defer close(g.done)
		stream, err := f.client.WatchRoutes(ctx, &gatewayv1.WatchRoutesRequest{LinkAddress: address, BaseUri: base})
		for err == nil {
			var resp *gatewayv1.WatchRoutesResponse
			if resp, err = stream.Recv(); err == nil {
				g.take(resp)
			}
		}
		g.mu.Lock()
		g.err = err
		g.mu.Unlock()
	}()
	synctest.Wait()
	return g
}

func (g *gatewayStream) take(resp *gatewayv1.WatchRoutesResponse) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.largest = max(g.largest, proto.Size(resp))
	for _, r := range resp.GetSnapshot().GetRoutes() {
		g.pending[r.GetSession().GetName()] = r
	}
	if resp.GetSnapshot().GetLast() {
		g.routes = g.pending
	}
	for _, r := range resp.GetChanges().GetUpserts() {
		g.routes[r.GetSession().GetName()] = r
	}
	for _, id := range resp.GetChanges().GetRemoves() {
		delete(g.routes, "sessions/"+id)
	}
}

// end closes the stream as the gateway does.
func (g *gatewayStream) end() {
	g.cancel()
	<-g.done
	synctest.Wait()
}

func (g *gatewayStream) route(id string) *gatewayv1.Route {
	synctest.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.routes["sessions/"+id]
}

func (f *fixture) want(want ...string) {
	f.Helper()
	synctest.Wait()
	list, _ := f.routes.Gateways()
	var got []string
	for _, g := range list {
		got = append(got, g.GetId()+"="+g.GetAddress())
	}
	if !slices.Equal(got, want) {
		f.Errorf("gateways %q, want %q", got, want)
	}
}

func (f *fixture) put(sessions ...*fleet.Session) {
	f.Helper()
	if _, err := f.store.Update(f.Context(), func(tx store.Tx) error {
		for _, s := range sessions {
			if err := tx.PutSession(s); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		f.Fatal(err)
	}
}

func wait(d time.Duration) {
	time.Sleep(d) // in a bubble
	synctest.Wait()
}

func session(id string) *fleet.Session {
	return &fleet.Session{
		ID: id, UID: "u-" + id, State: fleet.StateRunning, Generation: 1,
		Assignment: &fleet.Assignment{Node: "n1", Generation: 1, Password: "secret"},
	}
}

func TestBadRequests(t *testing.T) {
	bubble(t, func(f *fixture) {
		for _, tt := range []struct{ address, base string }{
			{"", "http://a"},
			{"host", "http://a"},
			{":1", "http://a"},
			{"host:0", "http://a"},
			{"host:1", ""},
			{"host:1", "localhost:8080"},
			{"host:1", "ftp://a"},
			{"host:1", "http://"},
			{"host:1", "http://a b"},
		} {
			g := f.connect("g1", tt.address, tt.base)
			<-g.done
			if status.Code(g.err) != codes.InvalidArgument {
				f.Errorf("%+v: %v", tt, g.err)
			}
		}
		f.want()
		stream, err := f.client.WatchRoutes(f.Context(), &gatewayv1.WatchRoutesRequest{LinkAddress: "a:1", BaseUri: "http://a"})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unauthenticated {
			f.Errorf("without an identity: %v", err)
		}
	})
}

func TestRoutes(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.put(session("a"))
		g := f.connect("g1", "h:1", "http://localhost:8080")
		r := g.route("a")
		if r.GetNodeId() != "n1" || r.GetOpencodePassword() != "secret" || r.GetSession().GetGeneration() != 1 ||
			r.GetSession().GetWebUri() != "http://a.localhost:8080/" {
			f.Fatalf("route %v, %v", r, g.err)
		}
		b := session("b")
		b.Assignment = nil
		f.put(b)
		if r := g.route("b"); r == nil || r.GetNodeId() != "" || r.GetOpencodePassword() != "" {
			f.Errorf("a session that is not placed: %v", r)
		}
		a := session("a")
		a.Assignment.Node, a.Assignment.Generation, a.Generation = "n2", 2, 2
		f.put(a)
		if r := g.route("a"); r.GetNodeId() != "n2" || r.GetSession().GetGeneration() != 2 {
			f.Errorf("moved: %v", r)
		}
		if _, err := f.store.Update(f.Context(), func(tx store.Tx) error { return tx.DeleteSession("a") }); err != nil {
			f.Fatal(err)
		}
		if r := g.route("a"); r != nil {
			f.Errorf("deleted, and still there: %v", r)
		}
		g.end()
	})
}

func TestManyRoutes(t *testing.T) {
	bubble(t, func(f *fixture) {
		const n = 3000
		var all []*fleet.Session
		for i := range n {
			s := session(fmt.Sprintf("s%d", i))
			s.Spec.OpenCodeConfig = strings.Repeat("x", 5000)
			all = append(all, s)
		}
		f.put(all...)
		g := f.connect("g1", "h:1", "http://localhost")
		g.mu.Lock()
		if len(g.routes) != n || g.largest > chunkBytes+10_000 {
			f.Errorf("%d routes, largest message %d: %v", len(g.routes), g.largest, g.err)
		}
		g.mu.Unlock()
		g.end()
	})
}

func TestGateways(t *testing.T) {
	bubble(t, func(f *fixture) {
		_, changed := f.routes.Gateways()
		if got := f.routes.WebURI("a"); got != "" {
			f.Errorf("without a gateway: %q", got)
		}
		g2 := f.connect("g2", "h2:1", "https://two.example")
		select {
		case <-changed:
		default:
			f.Error("the change was not told")
		}
		f.want("g2=h2:1")
		if got := f.routes.WebURI("a"); got != "https://a.two.example/" {
			f.Errorf("web URI %q", got)
		}
		g1 := f.connect("g1", "h1:1", "http://one.example:80")
		f.want("g1=h1:1", "g2=h2:1")
		if got := f.routes.BaseURI(); got != "http://one.example:80" {
			f.Errorf("base URI %q", got)
		}
		// A connection that broke: still listed for a while, but second choice.
		g1.end()
		f.want("g1=h1:1", "g2=h2:1")
		if got := f.routes.BaseURI(); got != "https://two.example" {
			f.Errorf("base URI %q", got)
		}
		wait(defaultLinger - time.Second)
		g1 = f.connect("g1", "h1:1", "http://one.example:80")
		wait(2 * defaultLinger)
		f.want("g1=h1:1", "g2=h2:1")
		_, changed = f.routes.Gateways()
		g2.end()
		wait(defaultLinger + time.Second)
		f.want("g1=h1:1")
		select {
		case <-changed:
		default:
			f.Error("the change was not told")
		}
		g1.end()
	})
}

func TestRestartedGatewayReplacesItself(t *testing.T) {
	bubble(t, func(f *fixture) {
		old := f.connect("g1", "h:1", "http://localhost:1")
		now := f.connect("g1", "h:2", "http://localhost:2")
		<-old.done
		if status.Code(old.err) != codes.Aborted {
			f.Errorf("old stream: %v", old.err)
		}
		f.want("g1=h:2")
		wait(2 * defaultLinger) // the end of the old stream takes nothing away
		f.want("g1=h:2")
		if got := f.routes.BaseURI(); got != "http://localhost:2" {
			f.Errorf("base URI %q", got)
		}
		now.end()
	})
}

// TestServerRestart: nodes must not be told to drop their links to gateways that
// only have not come back yet.
func TestServerRestart(t *testing.T) {
	bubble(t, func(f *fixture) {
		f.connect("g1", "h:1", "http://localhost")
		f.connect("g2", "h:2", "http://localhost")
		f.stop()
		f.start()
		f.want("g1=h:1", "g2=h:2")
		g := f.connect("g1", "h:1", "http://localhost")
		f.want("g1=h:1", "g2=h:2")
		wait(defaultLinger + time.Second)
		f.want("g1=h:1")
		g.end()
		f.stop()
		if err := os.WriteFile(f.path, []byte("{damaged"), 0o600); err != nil {
			f.Fatal(err)
		}
		f.start()
		f.want()
	})
}
