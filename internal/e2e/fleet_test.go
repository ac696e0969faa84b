//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/nodeagent"
	"github.com/cloudcode-dev/cloudcode/nodeagent/mount"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

// idPrefix begins the ids of all sessions of this run: cgroups of containers
// are named by them, and other fleets may be on this machine.
var idPrefix = "e" + strings.ToLower(rand.Text()[:5]) + "-"

// fleetRunDirs are where the private containerds of this run keep their sockets.
var fleetRunDirs []string

// fleet is a whole fleet on this machine: as separate processes, each with a data
// folder of its own as if they were on as many machines, or `cloudcode up`.
type fleet struct {
	name                  string
	serverDir, gatewayDir string
	grpcAddr, httpAddr    string
	anonymous             bool // no password
	ended                 bool
	serverEnv             []string // more of the server's environment
	modelIP               string   // where containers of all its nodes find the model

	server, gateway *process // and node: all the same for `up`

	*nodeHost             // its node; the first, if there are more
	hosts     []*nodeHost // all

	http     *http.Client
	conn     *grpc.ClientConn
	sessions cloudcodev1.SessionServiceClient
	nodes    cloudcodev1.NodeServiceClient
}

// nodeHost is one machine that sessions run on: a node daemon with a disk, a
// containerd and a network of its own.
type nodeHost struct {
	fleet                    *fleet
	id, nodeDir              string
	bridge, subnet, bridgeIP string
	node                     *process
	died                     bool // everything on it was killed at least once
}

// freePort returns one that was free a moment ago. Processes that are killed and
// started again must come back where they were.
func freePort(tb testing.TB) string {
	lis, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer lis.Close()
	return strconv.Itoa(lis.Addr().(*net.TCPAddr).Port)
}

// freeSubnet returns a /24 that this machine has no address in, and its first address.
func freeSubnet(tb testing.TB) (subnet, first string) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		tb.Fatal(err)
	}
	for range 100 {
		var b [2]byte
		_, _ = rand.Read(b[:])
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + b[0]%128, b[1], 0}), 24)
		used := false
		for _, a := range addrs {
			if other, err := netip.ParsePrefix(a.String()); err == nil && other.Masked().Overlaps(p) {
				used = true
			}
		}
		if !used {
			return p.String(), p.Addr().Next().String()
		}
	}
	tb.Fatal("no free subnet")
	return "", ""
}

func newFleet(tb testing.TB, name string) *fleet {
	tb.Helper()
	f := &fleet{name: name}
	work.fleets = append(work.fleets, f)
	f.grpcAddr, f.httpAddr = "127.0.0.1:"+freePort(tb), "127.0.0.1:"+freePort(tb)
	dir := filepath.Join(work.dir, name)
	f.serverDir, f.gatewayDir = filepath.Join(dir, "s"), filepath.Join(dir, "g")
	for _, d := range []string{f.serverDir, f.gatewayDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	f.nodeHost = f.addHost(tb, "n")
	f.id, f.modelIP = "node-"+name, f.bridgeIP
	f.http = &http.Client{Transport: &http.Transport{
		// {id}.localhost is this machine wherever names are resolved; in Go it is not.
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", f.httpAddr)
		},
		MaxIdleConnsPerHost: 64,
	}}
	return f
}

// addHost makes a machine without starting its node daemon.
func (f *fleet) addHost(tb testing.TB, name string) *nodeHost {
	tb.Helper()
	h := &nodeHost{
		fleet: f, id: "node-" + f.name + "-" + name,
		nodeDir: filepath.Join(work.dir, f.name, name), bridge: bridgePrefix + strings.ToLower(rand.Text()[:6]),
	}
	h.subnet, h.bridgeIP = freeSubnet(tb)
	if err := os.MkdirAll(h.nodeDir, 0o755); err != nil {
		tb.Fatal(err)
	}
	f.hosts = append(f.hosts, h)
	return h
}

func (f *fleet) auth() []string {
	if f.anonymous {
		return nil
	}
	return []string{"SERVER_USERNAME=" + user, "SERVER_PASSWORD=" + password, "CLOUDCODE_LOG_LEVEL=" + logLevel()}
}

func (h *nodeHost) nodeFlags() []string {
	return []string{"--node-id", h.id, "--bridge", h.bridge, "--subnet", h.subnet, "--libexec-dir", work.libexec}
}

func (h *nodeHost) nodeID() string { return h.id }

// threeProcesses sets up server, gateway and node daemon, and starts them.
func threeProcesses(tb testing.TB, name string) *fleet {
	tb.Helper()
	f := newFleet(tb, name)
	f.startServer(tb)
	f.startMembers(tb)
	f.waitReady(tb)
	return f
}

// startMembers starts gateway and node daemons, which join with the fleet's token.
func (f *fleet) startMembers(tb testing.TB) {
	tb.Helper()
	token, err := os.ReadFile(filepath.Join(f.serverDir, "pki", "join-token"))
	if err != nil {
		tb.Fatal(err)
	}
	env := append(f.auth(), "CLOUDCODE_JOIN_TOKEN="+strings.TrimSpace(string(token)))
	f.gateway = newProcess(filepath.Dir(f.serverDir), "gateway", env, f.gatewayArgs(f.httpAddr)...)
	f.gateway.start(tb)
	for _, h := range f.hosts {
		h.start(tb, env)
	}
}

// start starts the node daemon for the first time. The node's label `host` is
// the machine's name, for sessions that ask for it.
func (h *nodeHost) start(tb testing.TB, env []string) {
	tb.Helper()
	name := filepath.Base(h.nodeDir)
	h.node = newProcess(filepath.Dir(h.nodeDir), "nodeagent-"+name, env,
		append([]string{"nodeagent", "--data-dir", h.nodeDir, "--server", h.fleet.grpcAddr, "--node-label", "host=" + name}, h.nodeFlags()...)...)
	h.noteRunDir()
	h.node.start(tb)
}

func (f *fleet) gatewayArgs(listen string) []string {
	return []string{"gateway", "--data-dir", f.gatewayDir, "--server", f.grpcAddr, "--listen", listen}
}

// noteRunDir remembers where the private containerd of the node keeps its socket.
func (h *nodeHost) noteRunDir() { fleetRunDirs = append(fleetRunDirs, h.runDir()) }

func (h *nodeHost) runDir() string {
	sum := sha256.Sum256([]byte(filepath.Join(h.nodeDir, "node", "containerd")))
	return filepath.Join("/run/cloudcode", hex.EncodeToString(sum[:4]))
}

func (f *fleet) startServer(tb testing.TB) {
	tb.Helper()
	f.server = newProcess(filepath.Dir(f.serverDir), "server", append(f.auth(), f.serverEnv...), "server", "--data-dir", f.serverDir, "--grpc-listen", f.grpcAddr)
	f.server.start(tb)
	f.dial(tb)
}

// upFleet is a fleet that `cloudcode up` will run: start f.server.
func upFleet(tb testing.TB, name, session string, more ...string) *fleet {
	tb.Helper()
	if _, err := sessionImage(); err != nil {
		tb.Fatal(err)
	}
	f := newFleet(tb, name)
	f.gatewayDir, f.nodeDir = f.serverDir, f.serverDir
	f.noteRunDir()
	// `up` keeps its image cache below its data folder; every test sharing one saves minutes.
	if err := os.Symlink(imageCache(), filepath.Join(f.serverDir, "image")); err != nil {
		tb.Fatal(err)
	}
	args := append([]string{"up", "--data-dir", f.serverDir, "--grpc-listen", f.grpcAddr, "--listen", f.httpAddr, "--session", session}, f.nodeFlags()...)
	f.server = newProcess(filepath.Dir(f.serverDir), "up", f.auth(), append(args, more...)...)
	f.gateway, f.node = f.server, f.server
	return f
}

// dial waits for the server's certificate authority and connects as the admin.
func (f *fleet) dial(tb testing.TB) {
	tb.Helper()
	if f.conn != nil {
		return
	}
	var token string
	pool := x509.NewCertPool()
	eventually(tb, 20*time.Second, "the server writes where it is", func() string {
		if !f.server.running() {
			tb.Fatalf("the server has ended: %v\n%s", f.server.err, f.server.tail(30))
		}
		address, err := os.ReadFile(filepath.Join(f.serverDir, "server", "address"))
		if err != nil {
			return err.Error()
		}
		if got := strings.TrimSpace(string(address)); got != f.grpcAddr {
			tb.Fatalf("the server says it is at %q, not at %s", got, f.grpcAddr)
		}
		t, err := os.ReadFile(filepath.Join(f.serverDir, "server", "token"))
		if err != nil {
			return err.Error()
		}
		ca, err := os.ReadFile(f.caFile())
		if err != nil {
			return err.Error()
		}
		pool.AppendCertsFromPEM(ca)
		token = strings.TrimSpace(string(t))
		return ""
	})
	f.conn = f.dialAs(tb, pool, "Bearer "+token)
	f.sessions, f.nodes = cloudcodev1.NewSessionServiceClient(f.conn), cloudcodev1.NewNodeServiceClient(f.conn)
}

func (f *fleet) dialAs(tb testing.TB, pool *x509.CertPool, authorization string) *grpc.ClientConn {
	tb.Helper()
	with := func(ctx context.Context) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "authorization", authorization)
	}
	conn, err := grpc.NewClient(f.grpcAddr,
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(with(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return stream(with(ctx), desc, cc, method, opts...)
		}))
	if err != nil {
		tb.Fatal(err)
	}
	return conn
}

func (f *fleet) caFile() string { return filepath.Join(f.serverDir, "pki", "ca.crt") }

// processes are those that were made, nodes first.
func (f *fleet) processes() (list []*process) {
	for _, h := range f.hosts {
		list = append(list, h.node)
	}
	return slices.DeleteFunc(append(list, f.gateway, f.server), func(p *process) bool { return p == nil })
}

// waitReady returns once the gateway is connected and the nodes are ready.
func (f *fleet) waitReady(tb testing.TB) {
	tb.Helper()
	eventually(tb, 30*time.Second, "fleet "+f.name+" gets ready", func() string {
		for _, p := range f.processes() {
			if !p.running() {
				tb.Fatalf("%s has ended: %v\n%s", p.name, p.err, p.tail(40))
			}
		}
		if missing := f.gatewayReady(); missing != "" {
			return missing
		}
		for _, h := range f.hosts {
			if missing := h.nodeReady(); missing != "" {
				return missing
			}
		}
		return ""
	})
}

func (f *fleet) gatewayReady() string {
	resp, err := f.http.Get(f.url("/readyz"))
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if got := strings.TrimSpace(string(text)); resp.StatusCode != http.StatusOK || got != "ok" {
		return "gateway: " + got
	}
	return ""
}

func (h *nodeHost) nodeReady() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	n, err := h.fleet.nodes.GetNode(ctx, &cloudcodev1.GetNodeRequest{Name: "nodes/" + h.nodeID()})
	if err != nil {
		return "node: " + err.Error()
	}
	if n.GetState() != cloudcodev1.Node_READY {
		return "node: " + n.String()
	}
	return ""
}

// cli runs the command line against this fleet.
func (f *fleet) cli(tb testing.TB, args ...string) string {
	tb.Helper()
	return mustRun(tb, 3*time.Minute, cleanEnv(), work.bin, append([]string{"--data-dir", f.serverDir}, args...)...)
}

// importImage brings the session image to the node.
func (h *nodeHost) importImage(tb testing.TB) {
	tb.Helper()
	res, err := sessionImage()
	if err != nil {
		tb.Fatal(err)
	}
	out := mustRun(tb, 3*time.Minute, cleanEnv(), work.bin, "image", "import", "--data-dir", h.nodeDir, res.Path)
	if !strings.Contains(out, res.Ref) {
		tb.Fatalf("image import does not name %s:\n%s", res.Ref, out)
	}
}

// url of the gateway itself.
func (f *fleet) url(path string) string {
	_, port, _ := net.SplitHostPort(f.httpAddr)
	return "http://localhost:" + port + path
}

// host is where a session's OpenCode, or one of its ports, is found.
func (f *fleet) host(session string) string {
	_, port, _ := net.SplitHostPort(f.httpAddr)
	return session + ".localhost:" + port
}

// containerPID asks containerd for the session's first process.
func (h *nodeHost) containerPID(tb testing.TB, session string) string {
	tb.Helper()
	out := mustRun(tb, 20*time.Second, cleanEnv(), filepath.Join(work.libexec, "ctr"), "-a", h.containerd(tb), "-n", "cloudcode", "task", "ls")
	for line := range strings.Lines(out) {
		if w := strings.Fields(line); len(w) == 3 && w[0] == session && w[2] == "RUNNING" {
			return w[1]
		}
	}
	tb.Fatalf("session %s has no running container:\n%s", session, out)
	return ""
}

func (h *nodeHost) containerd(tb testing.TB) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(h.nodeDir, "node", nodeagent.ContainerdAddressFile))
	if err != nil {
		tb.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// hostFile is where the node keeps a file of the session's project folder.
func (h *nodeHost) hostFile(tb testing.TB, session, file string) string {
	tb.Helper()
	found, err := filepath.Glob(filepath.Join(h.nodeDir, "node", "volumes", session+"*", "data", "s3", "workspace", "project", file))
	if err != nil || len(found) != 1 {
		tb.Fatalf("%s of session %s on the node: %v %v", file, session, found, err)
	}
	return found[0]
}

// endAfter ends the fleet after the test. Call it before sessions are made, which
// are deleted first.
func (f *fleet) endAfter(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() {
			for _, p := range f.processes() {
				t.Log(p.tail(40))
			}
		}
		if err := f.end(); err != nil {
			t.Error(err)
		}
	})
}

// end stops all processes and removes what they made on this machine.
func (f *fleet) end() error {
	if f.ended {
		return nil
	}
	f.ended = true
	var errs []error
	if f.conn != nil {
		errs = append(errs, f.conn.Close())
	}
	f.http.CloseIdleConnections()
	for _, p := range f.processes() {
		errs = append(errs, p.stop())
		if work.keep != "" {
			_ = os.WriteFile(filepath.Join(work.keep, f.name+"-"+filepath.Base(p.log)), []byte(p.output()), 0o644)
		}
	}
	for _, h := range f.hosts {
		if h.node != nil && h.node.cmd != nil {
			errs = append(errs, h.teardown())
		}
	}
	return errors.Join(errs...)
}

// teardown adopts what the node daemon left running, and ends it.
func (h *nodeHost) teardown() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	agent, err := nodeagent.New(nodeagent.Config{
		Dir: filepath.Join(h.nodeDir, "node"), NodeID: h.nodeID(), Server: h.fleet.grpcAddr,
		JoinToken:  func() (string, error) { return "", errors.New("the fleet ends") },
		LibexecDir: work.libexec, BridgeName: h.bridge, Subnet: h.subnet, Executable: work.bin, Version: "teardown",
	})
	if err != nil {
		return err
	}
	if err := agent.Start(ctx); err != nil {
		return fmt.Errorf("teardown of %s: %w", h.id, err)
	}
	err = agent.Teardown(ctx, func(string) {})
	if h.died && errors.Is(err, mount.ErrNotFlushed) {
		return nil // it says that a mounter was killed; what is left behind is looked for anyway
	}
	return err
}

// endFleets ends those that no test has ended: shared ones, and what a failed
// start left.
func endFleets() error {
	var errs []error
	for _, f := range work.fleets {
		errs = append(errs, f.end())
	}
	return errors.Join(errs...)
}

// sharedFleet is what most tests use: it has the session image.
var sharedFleet struct {
	once  sync.Once
	fleet *fleet
}

// shared returns the fleet that most tests use, whole: a test that kills one of
// its processes starts it again.
func shared(tb testing.TB) *fleet {
	tb.Helper()
	needReal(tb)
	sharedFleet.once.Do(func() {
		f := threeProcesses(tb, "three")
		f.importImage(tb)
		sharedFleet.fleet = f
	})
	if sharedFleet.fleet == nil {
		tb.Fatal("the fleet did not start; see the first test that failed")
	}
	f := sharedFleet.fleet
	tb.Cleanup(func() {
		if tb.Failed() {
			for _, p := range f.processes() {
				tb.Log(p.tail(40))
			}
		}
	})
	return f
}

// sharedModel is the one scripted model of the run.
var sharedModel struct {
	once  sync.Once
	model *stubModel
}

func model(tb testing.TB) *stubModel {
	sharedModel.once.Do(func() { sharedModel.model = startModel(tb) })
	return sharedModel.model
}

func bounded(tb testing.TB, most time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	tb.Cleanup(cancel)
	return ctx
}

// create makes a session without waiting for it, and deletes it after the test.
func (f *fleet) create(tb testing.TB, name string, spec *cloudcodev1.SessionSpec) *cloudcodev1.Session {
	tb.Helper()
	if spec == nil {
		spec = &cloudcodev1.SessionSpec{}
	}
	if spec.OpencodeConfig == "" {
		spec.OpencodeConfig = model(tb).config(f.modelIP)
	}
	s, err := f.sessions.CreateSession(bounded(tb, 20*time.Second), &cloudcodev1.CreateSessionRequest{
		SessionId: idPrefix + name, Session: &cloudcodev1.Session{Spec: spec},
	})
	if err != nil {
		tb.Fatalf("create session: %v", err)
	}
	tb.Cleanup(func() { f.remove(tb, idPrefix+name) })
	return s
}

// session makes a session and waits until it runs. It returns its id.
func (f *fleet) session(tb testing.TB, name string, spec *cloudcodev1.SessionSpec) string {
	tb.Helper()
	f.create(tb, name, spec)
	f.waitState(tb, idPrefix+name, cloudcodev1.Session_RUNNING)
	return idPrefix + name
}

func (f *fleet) get(tb testing.TB, id string) *cloudcodev1.Session {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := f.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: "sessions/" + id})
	if err != nil {
		tb.Fatalf("get session %s: %v", id, err)
	}
	return s
}

func (f *fleet) waitState(tb testing.TB, id string, want cloudcodev1.Session_State) *cloudcodev1.Session {
	tb.Helper()
	return f.waitSession(tb, id, want.String(), func(s *cloudcodev1.Session) bool { return s.GetState() == want })
}

func (f *fleet) waitSession(tb testing.TB, id, what string, ok func(*cloudcodev1.Session) bool) (s *cloudcodev1.Session) {
	tb.Helper()
	eventually(tb, 90*time.Second, "session "+id+" becomes "+what, func() string {
		if s = f.get(tb, id); ok(s) {
			return ""
		}
		return s.String()
	})
	return s
}

// remove deletes a session and waits until it is gone.
func (f *fleet) remove(tb testing.TB, id string) {
	tb.Helper()
	name := "sessions/" + id
	ctx, cancel := context.WithTimeout(context.Background(), 45*time.Second)
	defer cancel()
	if tb.Failed() {
		tb.Logf("---- last lines that session %s wrote\n%s", id, f.sessionLog(ctx, name))
	}
	if _, err := f.sessions.DeleteSession(ctx, &cloudcodev1.DeleteSessionRequest{Name: name, AllowMissing: true}); err != nil {
		tb.Errorf("delete %s: %v", id, err)
		return
	}
	for {
		s, err := f.sessions.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: name})
		if status.Code(err) == codes.NotFound {
			return
		}
		if err != nil || ctx.Err() != nil {
			tb.Errorf("session %s is not removed: %v %v", id, err, s)
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (f *fleet) sessionLog(ctx context.Context, name string) string {
	stream, err := f.sessions.ReadSessionLogs(ctx, &cloudcodev1.ReadSessionLogsRequest{Name: name, TailLines: 20})
	var b strings.Builder
	for err == nil {
		var e *cloudcodev1.LogEntry
		if e, err = stream.Recv(); err == nil {
			fmt.Fprintln(&b, e.GetStream(), e.GetLine())
		}
	}
	if !errors.Is(err, io.EOF) {
		fmt.Fprintln(&b, err)
	}
	return b.String()
}

// readLines calls each for the lines of r until it returns false or r ends.
func readLines(r io.Reader, each func(string) bool) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 8<<20)
	for sc.Scan() {
		if !each(sc.Text()) {
			return nil
		}
	}
	return sc.Err()
}

// logLevel of our processes: everything where somebody keeps it to look at.
func logLevel() string {
	if work.keep != "" {
		return "debug"
	}
	return "info"
}
