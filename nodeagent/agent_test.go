package nodeagent

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/nodeagent/runtime/runtimetest"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// What containerd cannot do is an error that says so, whether or not something
// had been started before.
func TestStartWithoutContainerd(t *testing.T) {
	t.Setenv("PATH", "")
	for _, ephemeral := range []bool{false, true} {
		for what, cfg := range map[string]Config{
			"no programs":    {LibexecDir: t.TempDir()},
			"nobody answers": {ContainerdAddress: filepath.Join(t.TempDir(), "none.sock")},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			cfg.Dir, cfg.NodeID, cfg.Ephemeral = t.TempDir(), "n1", ephemeral
			agent, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := agent.Start(ctx); err == nil || !strings.Contains(err.Error(), "containerd") {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

// lines is a log that tests can look at.
type lines struct {
	mu sync.Mutex
	bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(p)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.String(), text)
}

// joinAs signs whoever asks.
type joinAs struct {
	nodev1.UnimplementedJoinServiceServer
	ca *pki.CA
}

func (j joinAs) Join(_ context.Context, r *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	der, err := j.ca.SignMember(r.GetCertificateRequest(), pki.Identity{Role: pki.RoleNode, ID: r.GetId()}, time.Hour)
	return &nodev1.JoinResponse{Certificate: der, CaCertificate: j.ca.CertDER()}, err
}

// A server that was made anew has another authority: nothing but a person can
// help, so it must be said.
func TestAnotherAuthorityIsSaid(t *testing.T) {
	serve := func(address string) (*pki.CA, net.Listener, *grpc.Server) {
		ca, err := pki.LoadOrCreateCA(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		var config *tls.Config
		if config, err = ca.ServerTLS(nil); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
		nodev1.RegisterJoinServiceServer(s, joinAs{ca: ca})
		go func() { _ = s.Serve(l) }()
		t.Cleanup(s.Stop)
		return ca, l, s
	}
	ca, l, first := serve("127.0.0.1:0")
	dir, log, fake := t.TempDir(), &lines{}, runtimetest.NewFake()
	defer fake.Close()
	token := pki.Token{CADigest: pki.Digest(ca.CertDER()), Secret: "x"}.String()
	boot := func() *Agent {
		agent, err := New(Config{
			Dir: dir, NodeID: "n1", Server: l.Addr().String(), Runtime: keepOpen{fake},
			JoinToken: func() (string, error) { return token, nil }, Log: slog.New(slog.NewTextHandler(log, nil)),
		})
		if err == nil {
			err = agent.Start(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return agent
	}
	await := func(what string, is func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !is(); {
			if time.Now().After(end) {
				t.Fatalf("not %s after 20 s:\n%s", what, log.String())
			}
			<-time.After(10 * time.Millisecond)
		}
	}
	agent := boot()
	await("joined", func() bool { _, err := os.Stat(filepath.Join(dir, "node.pem")); return err == nil })
	if err := agent.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	first.Stop()
	serve(l.Addr().String())
	agent = boot()
	defer func() {
		if err := agent.Stop(t.Context()); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	await("said", func() bool { return log.count("unknown authority") > 0 })
}
