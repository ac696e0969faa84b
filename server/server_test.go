package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	linkv1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/link/v1"
	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, c Config) *Server {
	t.Helper()
	if c.DataDir == "" {
		c.DataDir = t.TempDir()
	}
	if c.GRPCListen == "" {
		c.GRPCListen = "127.0.0.1:0"
	}
	c.DefaultImage = "default:1"
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return s
}

// dial connects as somebody with a certificate, or without if role is empty.
func dial(t *testing.T, s *Server, role pki.Role, id string) *grpc.ClientConn {
	t.Helper()
	ca, err := pki.LoadOrCreateCA(pkiDir(s.config.DataDir))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{RootCAs: ca.Pool(), MinVersion: tls.VersionTLS13}
	if role != "" {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		der, err := ca.SignMember(csr, pki.Identity{Role: role, ID: id}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	}
	conn, err := grpc.NewClient(s.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func list(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := cloudcodev1.NewSessionServiceClient(conn).ListSessions(ctx, &cloudcodev1.ListSessionsRequest{})
	return err
}

func with(ctx context.Context, authorization ...string) context.Context {
	for _, a := range authorization {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", a)
	}
	return ctx
}

func basic(user, pass string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+pass))
}

func adminToken(t *testing.T, s *Server) string {
	t.Helper()
	data, err := os.ReadFile(TokenPath(s.config.DataDir))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func TestUsers(t *testing.T) {
	hash, err := auth.HashPassword("secret")
	if err != nil {
		t.Fatal(err)
	}
	for name, password := range map[string]string{"plain": "secret", "hash": hash} {
		t.Run(name, func(t *testing.T) {
			s := start(t, Config{Username: "me", Password: password})
			conn := dial(t, s, "", "")
			for what, c := range map[string]struct {
				ctx    context.Context
				reason string // empty: allowed
			}{
				"nothing":        {t.Context(), "NO_CREDENTIALS"},
				"basic":          {with(t.Context(), basic("me", "secret")), ""},
				"wrong password": {with(t.Context(), basic("me", "wrong")), "WRONG_CREDENTIALS"},
				"wrong user":     {with(t.Context(), basic("you", "secret")), "WRONG_CREDENTIALS"},
				"admin token":    {with(t.Context(), "Bearer "+adminToken(t, s)), ""},
				"wrong token":    {with(t.Context(), "Bearer x"), "WRONG_CREDENTIALS"},
				"two":            {with(t.Context(), basic("me", "secret"), "Bearer x"), "WRONG_CREDENTIALS"},
			} {
				err := list(c.ctx, conn)
				if grpcerr.Reason(err) != c.reason || (c.reason != "" && status.Code(err) != codes.Unauthenticated) || (c.reason == "" && err != nil) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := list(t.Context(), dial(t, s, pki.RoleGateway, "g1")); err != nil {
				t.Errorf("gateway: %v", err)
			}
			if err := list(t.Context(), dial(t, s, pki.RoleNode, "n1")); status.Code(err) != codes.Unauthenticated {
				t.Errorf("a node is no user: %v", err)
			}
			// Health is for everybody, reflection for users.
			if _, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
				t.Errorf("health: %v", err)
			}
			if err := reflect(t.Context(), conn); status.Code(err) != codes.Unauthenticated {
				t.Errorf("reflection: %v", err)
			}
			if err := reflect(with(t.Context(), basic("me", "secret")), conn); err != nil {
				t.Errorf("reflection: %v", err)
			}
		})
	}
}

func reflect(ctx context.Context, conn *grpc.ClientConn) error {
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	// An error of Send is io.EOF; Recv has the reason.
	_ = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}})
	_ = stream.CloseSend()
	_, err = stream.Recv()
	return err
}

func TestEveryServiceHasARule(t *testing.T) {
	s := start(t, Config{Password: "x"})
	for name := range s.grpc.GetServiceInfo() {
		if services[name] == accessNobody {
			t.Errorf("%s can be called by nobody: add it to services", name)
		}
	}
	conn := dial(t, s, "", "")
	gateway := dial(t, s, pki.RoleGateway, "g1")
	node := dial(t, s, pki.RoleNode, "n1")
	for service, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			method := "/" + service + "/" + m.Name
			check := func(who string, c *grpc.ClientConn, allowed bool) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				stream, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
				if err != nil {
					t.Errorf("%s: %v", method, err)
					return
				}
				if allowed {
					cancel() // some have no end
					return
				}
				_ = stream.SendMsg(&healthv1.HealthCheckRequest{}) // empty: of any type
				_ = stream.CloseSend()
				var raw healthv1.HealthCheckResponse
				err = stream.RecvMsg(&raw)
				if code := status.Code(err); code != codes.Unauthenticated && code != codes.PermissionDenied {
					t.Errorf("%s as %s: %v", method, who, err)
				}
			}
			rule := services[service]
			open := rule == accessOpen
			check("nobody", conn, open)
			check("gateway", gateway, open || rule == accessPublic || rule == accessGateway)
			check("node", node, open || rule == accessNode)
		}
	}
}

func TestOpenOnlyOnLoopback(t *testing.T) {
	for _, listen := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:7443", "example.com:7443"} {
		if _, err := New(Config{DataDir: t.TempDir(), GRPCListen: listen}); err == nil || !strings.Contains(err.Error(), "--allow-anonymous") {
			t.Errorf("%s: %v", listen, err)
		}
		if _, err := New(Config{DataDir: t.TempDir(), GRPCListen: listen, AllowAnonymous: true}); err != nil {
			t.Errorf("%s: %v", listen, err)
		}
		if _, err := New(Config{DataDir: t.TempDir(), GRPCListen: listen, Password: "x"}); err != nil {
			t.Errorf("%s: %v", listen, err)
		}
	}
	for _, listen := range []string{"", "127.0.0.1:0", "localhost:0", "[::1]:0", "127.1.2.3:0"} {
		if _, err := New(Config{DataDir: t.TempDir(), GRPCListen: listen}); err != nil {
			t.Errorf("%s: %v", listen, err)
		}
	}
	if _, err := New(Config{DataDir: t.TempDir(), GRPCListen: "7443"}); err == nil {
		t.Error("a port alone is no address")
	}
	s := start(t, Config{})
	if err := list(t.Context(), dial(t, s, "", "")); err != nil {
		t.Errorf("without a password: %v", err)
	}
}

func TestFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := start(t, Config{DataDir: dir})
	for path, mode := range map[string]os.FileMode{
		storePath(dir): 0o600, TokenPath(dir): 0o600, AddressPath(dir): 0o644,
		filepath.Join(pkiDir(dir), "ca.crt"): 0o644, filepath.Join(pkiDir(dir), "ca.key"): 0o600,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	address, _ := os.ReadFile(AddressPath(dir))
	if strings.TrimSpace(string(address)) != s.Addr().String() {
		t.Errorf("address is %q, the server listens on %s", address, s.Addr())
	}
	token := adminToken(t, s)
	second, err := New(Config{DataDir: dir, GRPCListen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "another cloudcode server") {
		t.Errorf("second server: %v", err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(AddressPath(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("address of a stopped server: %v", err)
	}
	if err := s.Wait(); err != nil {
		t.Errorf("wait: %v", err)
	}
	if again := start(t, Config{DataDir: dir}); adminToken(t, again) != token {
		t.Error("the token changed with a restart")
	}
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	s, err := New(Config{DataDir: dir, GRPCListen: l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "--grpc-listen") {
		t.Fatalf("start: %v", err)
	}
	start(t, Config{DataDir: dir}) // nothing is held
}

func TestStopEndsStreams(t *testing.T) {
	s := start(t, Config{StopTimeout: time.Minute})
	conn := dial(t, s, "", "")
	watch, err := healthv1.NewHealthClient(conn).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := watch.Recv(); err != nil || r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v, %v", r, err)
	}
	link, err := linkv1.NewLinkServiceClient(dial(t, s, pki.RoleNode, "n1")).Control(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("stop took %v", took)
	}
	for {
		if _, err := watch.Recv(); err != nil {
			if status.Code(err) != codes.Unavailable {
				t.Errorf("watch ends with %v", err)
			}
			break
		}
	}
	if _, err := link.Recv(); err == nil {
		t.Errorf("link ends with %v", err)
	}
}

func TestSessionsSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{DataDir: dir})
	client := cloudcodev1.NewSessionServiceClient(dial(t, s, "", ""))
	made, err := client.CreateSession(t.Context(), &cloudcodev1.CreateSessionRequest{SessionId: "main", Session: &cloudcodev1.Session{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	s = start(t, Config{DataDir: dir})
	client = cloudcodev1.NewSessionServiceClient(dial(t, s, "", ""))
	got, err := client.GetSession(t.Context(), &cloudcodev1.GetSessionRequest{Name: made.GetName()})
	if err != nil || got.GetUid() != made.GetUid() {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := client.DeleteSession(t.Context(), &cloudcodev1.DeleteSessionRequest{Name: made.GetName()}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		if _, err := client.GetSession(ctx, &cloudcodev1.GetSessionRequest{Name: made.GetName()}); status.Code(err) == codes.NotFound {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
