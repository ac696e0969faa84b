package gateway

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	gatewayv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/gateway/v1"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/link"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const bound = 20 * time.Second // of every wait; far more than anything needs

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(bound)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", bound, what)
		}
		<-tick.C
	}
}

// fakeServer is the server as a gateway sees it, over real gRPC.
type fakeServer struct {
	cloudcodev1.UnimplementedSessionServiceServer
	cloudcodev1.UnimplementedNodeServiceServer
	cloudcodev1.UnimplementedStorageServiceServer
	gatewayv1.UnimplementedRouteServiceServer

	addr string
	grpc *grpc.Server
	done chan struct{}

	mu       sync.Mutex
	routes   map[string]*gatewayv1.Route
	watchers map[chan *gatewayv1.WatchRoutesResponse]bool
	hello    *gatewayv1.WatchRoutesRequest
	created  *cloudcodev1.CreateSessionRequest
	updated  *cloudcodev1.UpdateSessionRequest
	watched  []string // `after` of each WatchSessionEvents
	nodes    []*cloudcodev1.Node
	called   []string // what was done to which session: "suspend sessions/main"

	// events serves WatchSessionEvents, logs ReadSessionLogs.
	events func(after string, s grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error
	logs   func(req *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error
	// read and write serve archives; act is told of each call that changes a session.
	read        func(req *cloudcodev1.ReadArchiveRequest, s grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]) error
	write       func(s grpc.ClientStreamingServer[cloudcodev1.WriteArchiveRequest, cloudcodev1.WriteArchiveResponse]) error
	checkpoints func() []*cloudcodev1.Checkpoint
	act         func(what, name string) error
}

func newFakeServer(t *testing.T) *fakeServer {
	f := &fakeServer{routes: map[string]*gatewayv1.Route{}, watchers: map[chan *gatewayv1.WatchRoutesResponse]bool{}, addr: "127.0.0.1:0"}
	f.start(t)
	t.Cleanup(f.stop)
	return f
}

func (f *fakeServer) start(t *testing.T) {
	t.Helper()
	var lis net.Listener
	eventually(t, "listen on "+f.addr, func() bool {
		var err error
		lis, err = net.Listen("tcp", f.addr)
		return err == nil
	})
	f.addr = lis.Addr().String()
	f.grpc, f.done = grpc.NewServer(), make(chan struct{})
	cloudcodev1.RegisterSessionServiceServer(f.grpc, f)
	cloudcodev1.RegisterNodeServiceServer(f.grpc, f)
	cloudcodev1.RegisterStorageServiceServer(f.grpc, f)
	gatewayv1.RegisterRouteServiceServer(f.grpc, f)
	srv, done := f.grpc, f.done
	go func() { defer close(done); _ = srv.Serve(lis) }()
}

func (f *fakeServer) stop() { f.grpc.Stop(); <-f.done }

func (f *fakeServer) set(r *gatewayv1.Route) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.routes[r.GetSession().GetName()] = r
	f.tell(&gatewayv1.RouteChanges{Upserts: []*gatewayv1.Route{r}})
}

func (f *fakeServer) remove(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.routes, "sessions/"+id)
	f.tell(&gatewayv1.RouteChanges{Removes: []string{id}})
}

func (f *fakeServer) tell(c *gatewayv1.RouteChanges) {
	for w := range f.watchers {
		w <- &gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Changes{Changes: c}}
	}
}

func (f *fakeServer) WatchRoutes(req *gatewayv1.WatchRoutesRequest, s grpc.ServerStreamingServer[gatewayv1.WatchRoutesResponse]) error {
	ch := make(chan *gatewayv1.WatchRoutesResponse, 100)
	f.mu.Lock()
	f.hello = req
	all := make([]*gatewayv1.Route, 0, len(f.routes))
	for _, r := range f.routes {
		all = append(all, r)
	}
	f.watchers[ch] = true
	f.mu.Unlock()
	defer func() { f.mu.Lock(); delete(f.watchers, ch); f.mu.Unlock() }()
	for i := 0; ; i++ { // one a chunk
		chunk := &gatewayv1.RouteChunk{Last: i >= len(all)-1}
		if i < len(all) {
			chunk.Routes = all[i : i+1]
		}
		if err := s.Send(&gatewayv1.WatchRoutesResponse{Update: &gatewayv1.WatchRoutesResponse_Snapshot{Snapshot: chunk}}); err != nil {
			return err
		}
		if chunk.GetLast() {
			break
		}
	}
	for {
		select {
		case m := <-ch:
			if err := s.Send(m); err != nil {
				return err
			}
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

func notFound(name string) error {
	return grpcerr.New(codes.NotFound, "SESSION_NOT_FOUND", "there is no %s", name)
}

func (f *fakeServer) GetSession(_ context.Context, req *cloudcodev1.GetSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r, ok := f.routes[req.GetName()]; ok {
		return r.GetSession(), nil
	}
	return nil, notFound(req.GetName())
}

func (f *fakeServer) ListSessions(context.Context, *cloudcodev1.ListSessionsRequest) (*cloudcodev1.ListSessionsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &cloudcodev1.ListSessionsResponse{}
	for _, r := range f.routes {
		resp.Sessions = append(resp.Sessions, r.GetSession())
	}
	slices.SortFunc(resp.Sessions, func(a, b *cloudcodev1.Session) int { return strings.Compare(a.GetName(), b.GetName()) })
	return resp, nil
}

func (f *fakeServer) ListNodes(context.Context, *cloudcodev1.ListNodesRequest) (*cloudcodev1.ListNodesResponse, error) {
	if f.nodes == nil {
		return nil, status.Error(codes.Unimplemented, "not in this test")
	}
	return &cloudcodev1.ListNodesResponse{Nodes: f.nodes}, nil
}

func (f *fakeServer) CreateSession(ctx context.Context, req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.created = req
	return &cloudcodev1.Session{Name: "sessions/" + req.GetSessionId(), Labels: req.GetSession().GetLabels(), State: cloudcodev1.Session_PENDING}, nil
}

func (f *fakeServer) UpdateSession(_ context.Context, req *cloudcodev1.UpdateSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.updated = req
	return req.GetSession(), nil
}

func (f *fakeServer) WatchSessionEvents(req *cloudcodev1.WatchSessionEventsRequest, s grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error {
	f.mu.Lock()
	f.watched = append(f.watched, req.GetAfter())
	events, _ := f.events, f.routes
	_, known := f.routes[req.GetName()]
	f.mu.Unlock()
	if !known {
		return notFound(req.GetName())
	}
	return events(req.GetAfter(), s)
}

func (f *fakeServer) ReadSessionLogs(req *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
	return f.logs(req, s)
}

func (f *fakeServer) ReadArchive(req *cloudcodev1.ReadArchiveRequest, s grpc.ServerStreamingServer[cloudcodev1.ReadArchiveResponse]) error {
	return f.read(req, s)
}

func (f *fakeServer) WriteArchive(s grpc.ClientStreamingServer[cloudcodev1.WriteArchiveRequest, cloudcodev1.WriteArchiveResponse]) error {
	return f.write(s)
}

func (f *fakeServer) did(what, name string) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.called = append(f.called, what+" "+name)
	r := f.routes[name]
	f.mu.Unlock()
	if f.act != nil {
		if err := f.act(what, name); err != nil {
			return nil, err
		}
	}
	if r == nil {
		return nil, notFound(name)
	}
	return r.GetSession(), nil
}

func (f *fakeServer) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.called)
}

func (f *fakeServer) SuspendSession(_ context.Context, req *cloudcodev1.SuspendSessionRequest) (*cloudcodev1.Session, error) {
	return f.did("suspend", req.GetName())
}

func (f *fakeServer) ResumeSession(_ context.Context, req *cloudcodev1.ResumeSessionRequest) (*cloudcodev1.Session, error) {
	return f.did("resume", req.GetName())
}

func (f *fakeServer) RestoreSession(_ context.Context, req *cloudcodev1.RestoreSessionRequest) (*cloudcodev1.Session, error) {
	return f.did("restore "+req.GetCheckpoint(), req.GetName())
}

func (f *fakeServer) ForkSession(_ context.Context, req *cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error) {
	return f.did("fork "+req.GetSessionId()+" at "+req.GetCheckpoint()+" from", req.GetName())
}

func (f *fakeServer) DeleteSession(_ context.Context, req *cloudcodev1.DeleteSessionRequest) (*cloudcodev1.Session, error) {
	return f.did(fmt.Sprintf("delete purge=%t", req.GetPurgeStorage()), req.GetName())
}

func (f *fakeServer) CheckpointSession(_ context.Context, req *cloudcodev1.CheckpointSessionRequest) (*cloudcodev1.Checkpoint, error) {
	if _, err := f.did("checkpoint", req.GetName()); err != nil {
		return nil, err
	}
	return f.checkpoints()[0], nil
}

func (f *fakeServer) ListCheckpoints(_ context.Context, req *cloudcodev1.ListCheckpointsRequest) (*cloudcodev1.ListCheckpointsResponse, error) {
	if f.checkpoints == nil {
		return nil, grpcerr.New(codes.FailedPrecondition, "SESSION_NOT_PERSISTENT", "%s has no object storage", req.GetParent())
	}
	return &cloudcodev1.ListCheckpointsResponse{Checkpoints: f.checkpoints()}, nil
}

func (f *fakeServer) ListStorageProfiles(context.Context, *cloudcodev1.ListStorageProfilesRequest) (*cloudcodev1.ListStorageProfilesResponse, error) {
	return &cloudcodev1.ListStorageProfilesResponse{StorageProfiles: []*cloudcodev1.StorageProfile{{Name: "storageProfiles/default", Bucket: "work"}}}, nil
}

// rig is a gateway with a server, and a node that is linked to it for real.
type rig struct {
	t      *testing.T
	server *fakeServer
	gw     *Gateway
	client *http.Client
	ca     *pki.CA

	mu       sync.Mutex
	backends map[string]string // "id:generation:port" → address
	stopLink func()
}

func start(t *testing.T, cfg Config) *rig {
	t.Helper()
	ca, err := pki.LoadOrCreateCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, server: newFakeServer(t), backends: map[string]string{}, ca: ca}
	r.boot(cfg)
	return r
}

func (r *rig) boot(cfg Config) {
	t := r.t
	t.Helper()
	conn, err := grpc.NewClient(r.server.addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.2, MaxDelay: 50 * time.Millisecond}}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	cfg.ServerConn = conn
	setDefault(&cfg.Listen, "127.0.0.1:0")
	setDefault(&cfg.Logger, slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})))
	setDefault(&cfg.LinkTLS, r.memberTLS(pki.Identity{Role: pki.RoleGateway, ID: "g"}, true))
	if r.gw, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if err := r.gw.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	gw := r.gw
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bound)
		defer cancel()
		if err := gw.Stop(ctx); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", gw.Addr())
		},
		DisableCompression: true,
	}
	r.client = &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(tr.CloseIdleConnections)
	eventually(t, "routes", func() bool { ok, _ := r.gw.routes.status(); return ok })
}

// testWriter puts logs where failed tests show them.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

func (r *rig) memberTLS(id pki.Identity, serve bool) *tls.Config {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		r.t.Fatal(err)
	}
	der, err := r.ca.SignMember(csr, id, time.Hour)
	if err != nil {
		r.t.Fatal(err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	if serve {
		cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, r.ca.Pool()
	} else {
		cfg.RootCAs, cfg.ServerName = r.ca.Pool(), pki.ServerName
	}
	return cfg
}

// linkNode links node "n1"; its sessions are what backend was told.
func (r *rig) linkNode() {
	r.t.Helper()
	conn, err := grpc.NewClient(r.gw.LinkAddr(), grpc.WithTransportCredentials(credentials.NewTLS(r.memberTLS(pki.Identity{Role: pki.RoleNode, ID: "n1"}, false))))
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		link.Keep(ctx, conn, func(ctx context.Context, target *linkv1.Target) (net.Conn, error) {
			s := target.GetSession()
			r.mu.Lock()
			addr, ok := r.backends[fmt.Sprintf("%s:%d:%d", s.GetSessionId(), s.GetGeneration(), s.GetPort())]
			r.mu.Unlock()
			if !ok {
				return nil, status.Error(codes.FailedPrecondition, "connection refused")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}, slog.New(slog.DiscardHandler), nil)
	}()
	r.stopLink = sync.OnceFunc(func() { cancel(); conn.Close(); <-done })
	r.t.Cleanup(r.stopLink)
	eventually(r.t, "link", func() bool { return r.gw.hub.Linked("n1") })
}

// backend serves a port of a session.
func (r *rig) backend(id string, generation int64, port int, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(h)
	r.t.Cleanup(s.Close)
	r.t.Cleanup(s.CloseClientConnections) // before Close, which waits for streams
	r.mu.Lock()
	defer r.mu.Unlock()
	r.backends[fmt.Sprintf("%s:%d:%d", id, generation, port)] = s.Listener.Addr().String()
	return s
}

func session(id string, state cloudcodev1.Session_State, generation int64) *gatewayv1.Route {
	return &gatewayv1.Route{
		Session: &cloudcodev1.Session{Name: "sessions/" + id, State: state, Generation: generation, Node: "nodes/n1"},
		NodeId:  "n1", OpencodePassword: "inner-" + id,
	}
}

// put announces a route and waits until the gateway has it.
func (r *rig) put(rt *gatewayv1.Route) {
	r.t.Helper()
	r.server.set(rt)
	id := strings.TrimPrefix(rt.GetSession().GetName(), "sessions/")
	eventually(r.t, "route "+id, func() bool {
		got, _, _ := r.gw.routes.get(id)
		return got != nil && got.session.GetState() == rt.GetSession().GetState() && got.session.GetGeneration() == rt.GetSession().GetGeneration()
	})
}

// run announces a running session with an OpenCode that is h.
func (r *rig) run(id string, h http.HandlerFunc) {
	r.t.Helper()
	r.backend(id, 1, openCodePort, h)
	r.put(session(id, cloudcodev1.Session_RUNNING, 1))
}

// host returns name with the gateway's port, or the bare address for "".
func (r *rig) url(name, path string) string {
	_, port, _ := net.SplitHostPort(r.gw.Addr())
	if name == "" {
		name = "localhost"
	}
	return "http://" + name + ":" + port + path
}

type answer struct {
	code int
	h    http.Header
	body string
}

// do sends a request; headers are pairs.
func (r *rig) do(method, url string, body io.Reader, headers ...string) answer {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), bound)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		} else {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := r.client.Do(req)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, url, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatalf("%s %s: read: %v", method, url, err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}

func (r *rig) get(url string, headers ...string) answer {
	r.t.Helper()
	return r.do(http.MethodGet, url, nil, headers...)
}

// stream opens a response whose body is read as it comes.
func (r *rig) stream(url string, headers ...string) (*http.Response, *bufio.Reader) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), bound)
	r.t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := r.client.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { resp.Body.Close() })
	return resp, bufio.NewReader(resp.Body)
}
