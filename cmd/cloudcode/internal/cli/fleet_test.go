package cli

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing them")

// testNow is when all tests happen.
var testNow = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func TestMain(m *testing.M) {
	now = func() time.Time { return testNow }
	defaultPacing = pacing{
		minPause: 5 * time.Millisecond, maxPause: 50 * time.Millisecond,
		giveUp: 10 * time.Second, silence: 30 * time.Second, poll: 20 * time.Millisecond,
	}
	// Nothing of the machine that runs the tests may decide what they see.
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "SERVER_") ||
			strings.HasPrefix(name, "CLOUDCODE_") && name != "CLOUDCODE_REQUIRE_REAL" && name != "CLOUDCODE_LIBEXEC_DIR" ||
			name == "DISPLAY" || name == "WAYLAND_DISPLAY" || name == "NO_COLOR" {
			_ = os.Unsetenv(name)
		}
	}
	goleak.VerifyTestMain(m)
}

// fleet is a server on loopback with a scripted API. What a test does not set
// answers from the sessions and nodes it holds.
type fleet struct {
	cloudcodev1.UnimplementedSessionServiceServer
	cloudcodev1.UnimplementedNodeServiceServer
	cloudcodev1.UnimplementedStorageServiceServer

	t        *testing.T
	dir      string
	ca       *pki.CA
	verifier *auth.Verifier
	address  string
	server   *grpc.Server
	served   sync.WaitGroup

	mu       sync.Mutex
	sessions map[string]*cloudcodev1.Session
	nodes    []*cloudcodev1.Node
	headers  []string // authorization of each call
	filters  []string
	creates  []*cloudcodev1.CreateSessionRequest
	updates  []*cloudcodev1.UpdateSessionRequest
	after    []string // of each watch
	deletes  []*cloudcodev1.DeleteSessionRequest
	forks    []*cloudcodev1.ForkSessionRequest
	restores []*cloudcodev1.RestoreSessionRequest
	reads    []*cloudcodev1.ReadArchiveRequest
	recovers []*cloudcodev1.RecoverSessionsRequest
	profiles []*cloudcodev1.StorageProfile
	saved    []*cloudcodev1.Checkpoint
	stored   []*cloudcodev1.StoredSession
	files    string // /root/s3 of every session, on this machine

	onCreate  func(*cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error)
	onUpdate  func(*cloudcodev1.UpdateSessionRequest) error
	onDelete  func(*cloudcodev1.DeleteSessionRequest) (*cloudcodev1.Session, error)
	onWatch   func(*cloudcodev1.WatchSessionEventsRequest, grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error
	onSuspend func(*cloudcodev1.Session) (*cloudcodev1.Session, error)
	onResume  func(*cloudcodev1.Session) (*cloudcodev1.Session, error)
	onRestore func(*cloudcodev1.RestoreSessionRequest) (*cloudcodev1.Session, error)
	onFork    func(*cloudcodev1.ForkSessionRequest) (*cloudcodev1.Session, error)
	onRecover func(*cloudcodev1.RecoverSessionsRequest) (*cloudcodev1.RecoverSessionsResponse, error)
	onRead    func(*cloudcodev1.ReadArchiveRequest, archiveOut) error
	onWrite   func(archiveIn) error
	onLogs    func(*cloudcodev1.ReadSessionLogsRequest, grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error
}

// newFleet starts a server and leaves what one leaves in its data directory.
func newFleet(t *testing.T) *fleet {
	t.Helper()
	return newFleetAt(t, "127.0.0.1:0")
}

// newFleetAt listens elsewhere; the certificate is for 127.0.0.1 and localhost.
func newFleetAt(t *testing.T, address string) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir(), sessions: map[string]*cloudcodev1.Session{}}
	var err error
	if f.ca, err = pki.LoadOrCreateCA(filepath.Join(f.dir, "pki")); err != nil {
		t.Fatal(err)
	}
	if f.verifier, err = auth.New("agent", "secret"); err != nil {
		t.Fatal(err)
	}
	f.verifier.AddToken("local-token")
	f.start(address)
	f.write(addressFile, f.address+"\n", 0o644)
	f.write(tokenFile, "local-token\n", 0o600)
	t.Cleanup(f.stop)
	return f
}

func (f *fleet) start(address string) {
	f.t.Helper()
	cfg, err := f.ca.ServerTLS([]string{"127.0.0.1", "localhost"})
	if err != nil {
		f.t.Fatal(err)
	}
	lis, err := net.Listen("tcp", address)
	if err != nil {
		f.t.Fatal(err)
	}
	f.address = lis.Addr().String()
	f.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := f.check(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := f.check(s.Context()); err != nil {
				return err
			}
			return next(srv, s)
		}))
	cloudcodev1.RegisterSessionServiceServer(f.server, f)
	cloudcodev1.RegisterNodeServiceServer(f.server, f)
	cloudcodev1.RegisterStorageServiceServer(f.server, f)
	server := f.server
	f.served.Go(func() { _ = server.Serve(lis) })
}

// stop ends the server as a kill does: streams break.
func (f *fleet) stop() {
	f.server.Stop()
	f.served.Wait()
}

func (f *fleet) write(name, content string, mode os.FileMode) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) check(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	header := strings.Join(md.Get("authorization"), ",")
	f.mu.Lock()
	f.headers = append(f.headers, header)
	f.mu.Unlock()
	if !f.verifier.Header(header) {
		return grpcerr.New(codes.Unauthenticated, "UNAUTHENTICATED", "credentials are missing or wrong")
	}
	return nil
}

func (f *fleet) put(s *cloudcodev1.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions[s.GetName()] = proto.CloneOf(s)
}

func (f *fleet) remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sessions, name)
}

func (f *fleet) get(name string) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sessions[name]; s != nil {
		return proto.CloneOf(s), nil
	}
	return nil, grpcerr.New(codes.NotFound, "SESSION_NOT_FOUND", "there is no session %s", idOf(name))
}

func (f *fleet) CreateSession(_ context.Context, req *cloudcodev1.CreateSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.creates = append(f.creates, proto.CloneOf(req))
	f.mu.Unlock()
	if f.onCreate != nil {
		return f.onCreate(req)
	}
	s := proto.CloneOf(req.GetSession())
	s.Name, s.Uid, s.State = "sessions/"+req.GetSessionId(), "uid-1", cloudcodev1.Session_PENDING
	f.put(s)
	return s, nil
}

func (f *fleet) GetSession(_ context.Context, req *cloudcodev1.GetSessionRequest) (*cloudcodev1.Session, error) {
	return f.get(req.GetName())
}

// ListSessions has one session per page.
func (f *fleet) ListSessions(_ context.Context, req *cloudcodev1.ListSessionsRequest) (*cloudcodev1.ListSessionsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.filters = append(f.filters, req.GetFilter())
	var next *cloudcodev1.Session
	rest := 0
	for _, s := range f.sessions {
		if s.GetName() <= req.GetPageToken() {
			continue
		}
		rest++
		if next == nil || s.GetName() < next.GetName() {
			next = s
		}
	}
	resp := &cloudcodev1.ListSessionsResponse{}
	if next != nil {
		resp.Sessions = []*cloudcodev1.Session{proto.CloneOf(next)}
	}
	if rest > 1 {
		resp.NextPageToken = next.GetName()
	}
	return resp, nil
}

func (f *fleet) UpdateSession(_ context.Context, req *cloudcodev1.UpdateSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.updates = append(f.updates, proto.CloneOf(req))
	f.mu.Unlock()
	if f.onUpdate != nil {
		if err := f.onUpdate(req); err != nil {
			return nil, err
		}
	}
	f.put(req.GetSession())
	return req.GetSession(), nil
}

func (f *fleet) DeleteSession(_ context.Context, req *cloudcodev1.DeleteSessionRequest) (*cloudcodev1.Session, error) {
	f.mu.Lock()
	f.deletes = append(f.deletes, proto.CloneOf(req))
	f.mu.Unlock()
	if f.onDelete != nil {
		return f.onDelete(req)
	}
	s, err := f.get(req.GetName())
	if status.Code(err) == codes.NotFound && req.GetAllowMissing() {
		return &cloudcodev1.Session{}, nil
	}
	if err != nil {
		return nil, err
	}
	s.State = cloudcodev1.Session_DELETING
	f.put(s)
	return s, nil
}

func (f *fleet) WatchSessionEvents(req *cloudcodev1.WatchSessionEventsRequest, s grpc.ServerStreamingServer[cloudcodev1.SessionEvent]) error {
	f.mu.Lock()
	f.after = append(f.after, req.GetAfter())
	f.mu.Unlock()
	if f.onWatch == nil {
		return status.Error(codes.Unimplemented, "not scripted")
	}
	return f.onWatch(req, s)
}

func (f *fleet) ReadSessionLogs(req *cloudcodev1.ReadSessionLogsRequest, s grpc.ServerStreamingServer[cloudcodev1.LogEntry]) error {
	return f.onLogs(req, s)
}

func (f *fleet) GetNode(_ context.Context, req *cloudcodev1.GetNodeRequest) (*cloudcodev1.Node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.nodes {
		if n.GetName() == req.GetName() {
			return n, nil
		}
	}
	return nil, grpcerr.New(codes.NotFound, "NODE_NOT_FOUND", "there is no node %s", idOf(req.GetName()))
}

func (f *fleet) ListNodes(context.Context, *cloudcodev1.ListNodesRequest) (*cloudcodev1.ListNodesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &cloudcodev1.ListNodesResponse{Nodes: f.nodes}, nil
}

// result of one command.
type result struct {
	out, err string
	code     int
}

// terminal is an input or output that a person sits at.
type terminal struct {
	io.Reader
	*lockedBuffer
}

func (terminal) Width() int { return 60 }

// lockedBuffer is read by the test while a command writes.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// invocation is one run of the program.
type invocation struct {
	stdin  io.Reader
	out    io.Writer
	errOut io.Writer
	ctx    context.Context
}

func (i invocation) run(t *testing.T, args ...string) result {
	t.Helper()
	root := NewRoot("v1.2.3")
	BindEnv(root)
	out, errOut := &lockedBuffer{}, &lockedBuffer{}
	if i.out == nil {
		i.out = out
	}
	if i.errOut == nil {
		i.errOut = errOut
	}
	if i.stdin == nil {
		i.stdin = strings.NewReader("")
	}
	if i.ctx == nil {
		i.ctx = t.Context()
	}
	root.SetArgs(args)
	root.SetIn(i.stdin)
	root.SetOut(i.out)
	root.SetErr(i.errOut)
	ctx, cancel := context.WithTimeout(i.ctx, 30*time.Second)
	defer cancel()
	code := Execute(ctx, root)
	return result{fmt.Sprint(i.out), fmt.Sprint(i.errOut), code}
}

// run runs a command against f.
func (f *fleet) run(args ...string) result {
	f.t.Helper()
	return f.runWith(invocation{}, args...)
}

func (f *fleet) runWith(i invocation, args ...string) result {
	f.t.Helper()
	return i.run(f.t, append([]string{"--data-dir", f.dir}, args...)...)
}

// golden compares with testdata/NAME.
func golden(t *testing.T, name, have string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(have), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if have != string(want) {
		t.Errorf("%s differs (go test -update writes it)\n--- have\n%s\n--- want\n%s", path, have, want)
	}
}

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(testNow.Add(-d)) }

// running is a session in its prime.
func running(id string) *cloudcodev1.Session {
	return &cloudcodev1.Session{
		Name: "sessions/" + id, Uid: "uid-" + id, Etag: "7",
		CreateTime: ago(3 * 24 * time.Hour), UpdateTime: ago(5 * time.Minute), ReadyTime: ago(5 * time.Minute),
		Labels: map[string]string{"team": "web", "beta": ""},
		Spec: &cloudcodev1.SessionSpec{
			Image: "localhost/cloudcode/session:1", Env: map[string]string{"API_KEY": "hush", "LANG": "C"},
			OpencodeConfig: `{"model":"x"}`,
			Resources:      &cloudcodev1.Resources{CpuMillis: 1500, MemoryBytes: 2 << 30, Pids: 512, DiskBytes: 10 << 30},
			NodeSelector:   map[string]string{"zone": "a"},
		},
		State: cloudcodev1.Session_RUNNING, Node: "nodes/n1", Generation: 3, RestartCount: 2,
		OpencodeVersion: "1.18.34", WebUri: "http://" + id + ".localhost:8080",
	}
}
