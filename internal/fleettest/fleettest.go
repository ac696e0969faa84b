// Package fleettest runs a whole fleet in one test: the real server, gateway and
// node daemon, over real TLS, with a runtime in memory and an OpenCode that
// answers just what the node daemon asks.
package fleettest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/gateway"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
	"github.com/cloudcode-dev/cloudcode/nodeagent"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
	"github.com/cloudcode-dev/cloudcode/nodeagent/volume"
	"github.com/cloudcode-dev/cloudcode/nodeagent/worker"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server"
)

// Image is the one image that nodes have.
const Image = "localhost/test/session:1"

// Wait bounds every wait of a fleet.
const Wait = 20 * time.Second

// Fleet is one server, one gateway and any number of nodes.
type Fleet struct {
	t   testing.TB
	dir string
	log *slog.Logger

	Server   *server.Server
	Gateway  *gateway.Gateway
	Sessions cloudcodev1.SessionServiceClient
	Nodes    cloudcodev1.NodeServiceClient
	Storages cloudcodev1.StorageServiceClient

	storage    *storage.Profiles
	grpcListen string // of the first start, so that a restart is found again
	client     *grpc.ClientConn
	gateConn   *grpc.ClientConn
}

// Node is a node daemon and the runtime that outlives it.
type Node struct {
	fleet   *Fleet
	ID      string
	machine string
	Runtime *runtimetest.Fake
	agent   *nodeagent.Agent
}

// New starts a server and a gateway; both are stopped with the test.
func New(t testing.TB) *Fleet {
	t.Helper()
	return NewStored(t, nil)
}

// NewStored is New with object storage for the server.
func NewStored(t testing.TB, profiles *storage.Profiles) *Fleet {
	t.Helper()
	f := &Fleet{t: t, storage: profiles, dir: t.TempDir(), grpcListen: "127.0.0.1:0", log: slog.New(slog.DiscardHandler)}
	if os.Getenv("FLEETTEST_LOG") != "" {
		f.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	f.StartServer()
	t.Cleanup(f.StopServer)
	f.dial()
	t.Cleanup(func() { f.client.Close() })
	f.StartGateway()
	t.Cleanup(f.StopGateway)
	return f
}

func (f *Fleet) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func stop(fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), Wait)
	defer cancel()
	return fn(ctx)
}

// StartServer starts the server, at the same address as before.
func (f *Fleet) StartServer() {
	f.t.Helper()
	s, err := server.New(server.Config{DataDir: f.dir, GRPCListen: f.grpcListen, DefaultImage: Image, StorageProfiles: f.storage, Logger: f.log.With("process", "server")})
	f.must(err)
	f.must(s.Start(f.t.Context()))
	f.Server, f.grpcListen = s, s.Addr().String()
}

// StopServer stops the server; starting it again is a restart.
func (f *Fleet) StopServer() {
	f.t.Helper()
	if f.Server == nil {
		return
	}
	if err := stop(f.Server.Stop); err != nil {
		f.t.Errorf("stop the server: %v", err)
	}
	f.Server = nil
}

func (f *Fleet) token() (string, error) {
	data, err := os.ReadFile(filepath.Join(f.dir, "pki", "join-token"))
	return strings.TrimSpace(string(data)), err
}

func (f *Fleet) dial() {
	f.t.Helper()
	ca, err := os.ReadFile(filepath.Join(f.dir, "pki", "ca.crt"))
	f.must(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	f.client, err = grpc.NewClient(f.grpcListen, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: pki.ServerName})))
	f.must(err)
	f.Sessions, f.Nodes = cloudcodev1.NewSessionServiceClient(f.client), cloudcodev1.NewNodeServiceClient(f.client)
	f.Storages = cloudcodev1.NewStorageServiceClient(f.client)
}

// StartGateway joins as a gateway and starts it.
func (f *Fleet) StartGateway() {
	f.t.Helper()
	token, err := f.token()
	f.must(err)
	member, err := pki.Join(f.t.Context(), pki.JoinOptions{
		Server: f.grpcListen, Token: token, Dir: filepath.Join(f.dir, "gateway"),
		Identity: pki.Identity{Role: pki.RoleGateway, ID: "gw"},
	})
	f.must(err)
	f.gateConn, err = grpc.NewClient(f.grpcListen, grpc.WithTransportCredentials(credentials.NewTLS(member.ClientTLS(pki.RoleServer))))
	f.must(err)
	f.Gateway, err = gateway.New(gateway.Config{
		Listen: "127.0.0.1:0", LinkTLS: member.ServerTLS(), ServerConn: f.gateConn, Logger: f.log.With("process", "gateway"),
	})
	f.must(err)
	f.must(f.Gateway.Start(f.t.Context()))
}

// DialGatewayAs calls the server's API on the gateway's link listener, taking it
// for a peer of that role.
func (f *Fleet) DialGatewayAs(role pki.Role) error {
	f.t.Helper()
	token, err := f.token()
	f.must(err)
	member, err := pki.Join(f.t.Context(), pki.JoinOptions{
		Server: f.grpcListen, Token: token, Dir: f.t.TempDir(), Identity: pki.Identity{Role: pki.RoleNode, ID: "visitor"},
	})
	f.must(err)
	conn, err := member.Dial(role, f.Gateway.LinkAddr())
	f.must(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(f.t.Context(), Wait)
	defer cancel()
	_, err = cloudcodev1.NewNodeServiceClient(conn).ListNodes(ctx, &cloudcodev1.ListNodesRequest{})
	return err
}

// StopGateway stops the gateway; starting it again is a restart.
func (f *Fleet) StopGateway() {
	f.t.Helper()
	if f.Gateway == nil {
		return
	}
	if err := stop(f.Gateway.Stop); err != nil {
		f.t.Errorf("stop the gateway: %v", err)
	}
	f.gateConn.Close()
	f.Gateway = nil
}

// URL of a path of a session's OpenCode, or of the gateway itself if host is empty.
func (f *Fleet) URL(host, path string) string {
	if host == "" {
		return "http://" + f.Gateway.Addr() + path
	}
	return "http://" + host + ".localhost" + f.Gateway.Addr()[strings.LastIndex(f.Gateway.Addr(), ":"):] + path
}

// AddNode starts a node daemon with a runtime of its own.
func (f *Fleet) AddNode(id string) *Node {
	f.t.Helper()
	return f.AddMachine(id, id)
}

// AddMachine is AddNode on a machine, whose disk is its own, that may claim the
// id of another.
func (f *Fleet) AddMachine(id, machine string) *Node {
	f.t.Helper()
	n := &Node{fleet: f, ID: id, machine: machine, Runtime: runtimetest.NewFake(Image)}
	n.Runtime.Handler = func(session string, _ uint16) http.Handler { return openCode(session) }
	n.Start()
	f.t.Cleanup(func() {
		n.Stop()
		n.Runtime.Close()
	})
	return n
}

// Start starts the node daemon; after Stop that is a restart.
func (n *Node) Start() {
	f := n.fleet
	f.t.Helper()
	agent, err := nodeagent.New(nodeagent.Config{
		Dir: filepath.Join(f.dir, "node-"+n.machine), NodeID: n.ID, Server: f.grpcListen, JoinToken: f.token,
		Labels: map[string]string{"name": n.ID}, Log: f.log.With("process", "nodeagent"),
		Runtime: keepOpen{n.Runtime}, Volumes: volumes{filepath.Join(f.dir, "volumes-"+n.machine)},
	})
	f.must(err)
	f.must(agent.Start(f.t.Context()))
	n.agent = agent
}

// Stop stops the node daemon; its containers go on.
func (n *Node) Stop() {
	n.fleet.t.Helper()
	if n.agent == nil {
		return
	}
	if err := stop(n.agent.Stop); err != nil {
		n.fleet.t.Errorf("stop node %s: %v", n.ID, err)
	}
	n.agent = nil
}

// Files is where the node has a session's files, which are /root/s3 in its container;
// empty if it has none.
func (n *Node) Files(s *cloudcodev1.Session) string {
	n.fleet.t.Helper()
	name := worker.VolumeName(&nodev1.Assignment{SessionId: strings.TrimPrefix(s.GetName(), "sessions/"), SessionUid: s.GetUid()})
	dir := filepath.Join(n.fleet.dir, "volumes-"+n.machine, name, "s3")
	if _, err := os.Stat(dir); err != nil {
		return ""
	}
	return dir
}

// keepOpen is a runtime that outlives the node daemon.
type keepOpen struct{ *runtimetest.Fake }

func (keepOpen) Close() error { return nil }

type volumes struct{ dir string }

func (v volumes) Exists(name string) (bool, error) {
	_, err := os.Stat(filepath.Join(v.dir, name))
	return err == nil, nil
}

func (v volumes) Ensure(_ context.Context, name string, _ int64) (volume.Volume, error) {
	dir := filepath.Join(v.dir, name)
	vol := volume.Volume{
		Dir: dir, S3Dir: filepath.Join(dir, "s3"), IDBase: 0x10000000, MountDir: filepath.Join(dir, "mnt"),
		RootDir: filepath.Join(dir, "root"), StateDir: filepath.Join(dir, "state"),
	}
	return vol, os.MkdirAll(vol.S3Dir, 0o755)
}

func (v volumes) Remove(_ context.Context, name string) error {
	return os.RemoveAll(filepath.Join(v.dir, name))
}

// openCode says that it is healthy, echoes, and has an event stream that numbers
// its events.
func openCode(session string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /global/health", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"healthy":true,"version":"test"}`)
	})
	mux.HandleFunc("GET /global/event", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; r.Context().Err() == nil; i++ {
			fmt.Fprintf(w, "data: {\"directory\":\"/\",\"payload\":{\"type\":\"test.tick\",\"properties\":{\"n\":%d}}}\n\n", i)
			w.(http.Flusher).Flush()
			select {
			case <-time.After(20 * time.Millisecond):
			case <-r.Context().Done():
			}
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		user, _, _ := r.BasicAuth()
		fmt.Fprintf(w, "%s: %s %s as %s", session, r.Method, r.URL.Path, user)
	})
	return mux
}

// Create makes a session.
func (f *Fleet) Create(id string, s *cloudcodev1.Session) *cloudcodev1.Session {
	f.t.Helper()
	if s == nil {
		s = &cloudcodev1.Session{}
	}
	created, err := f.Sessions.CreateSession(f.t.Context(), &cloudcodev1.CreateSessionRequest{SessionId: id, Session: s})
	f.must(err)
	return created
}

// Await waits until the session is as wanted.
func (f *Fleet) Await(id, what string, want func(*cloudcodev1.Session) bool) *cloudcodev1.Session {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), Wait)
	defer cancel()
	for {
		s, err := f.Sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: "sessions/" + id}, grpc.WaitForReady(true))
		if err == nil && want(s) {
			return s
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			f.t.Fatalf("session %s is not %s after %v: %v, %v", id, what, Wait, s, err)
		}
	}
}

// AwaitState waits for a state.
func (f *Fleet) AwaitState(id string, state cloudcodev1.Session_State) *cloudcodev1.Session {
	f.t.Helper()
	return f.Await(id, state.String(), func(s *cloudcodev1.Session) bool { return s.GetState() == state })
}

// AwaitGone waits until there is no such session.
func (f *Fleet) AwaitGone(id string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), Wait)
	defer cancel()
	for {
		s, err := f.Sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: "sessions/" + id}, grpc.WaitForReady(true))
		if status.Code(err) == codes.NotFound {
			return
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			f.t.Fatalf("session %s is not gone after %v: %v, %v", id, Wait, s, err)
		}
	}
}
