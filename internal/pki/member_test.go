package pki_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/cloudcode-dev/cloudcode/internal/pki"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fleet signs whoever asks, for ttl.
type fleet struct {
	nodev1.UnimplementedJoinServiceServer
	ca  *pki.CA
	ttl time.Duration
}

func (f *fleet) Join(_ context.Context, r *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	der, err := f.ca.SignMember(r.GetCertificateRequest(), pki.Identity{Role: pki.RoleNode, ID: r.GetId()}, f.ttl)
	return &nodev1.JoinResponse{Certificate: der, CaCertificate: f.ca.CertDER()}, err
}

func TestRenew(t *testing.T) {
	ca, err := pki.LoadOrCreateCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	config, err := ca.ServerTLS(nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{ca: ca, ttl: time.Minute} // in its last third at once: certificates begin 5 min early
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	nodev1.RegisterJoinServiceServer(s, f)
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	defer func() {
		s.Stop()
		<-served
	}()
	secret := pki.Token{CADigest: pki.Digest(ca.CertDER()), Secret: "x"}.String()
	o := pki.JoinOptions{Server: l.Addr().String(), Token: secret, Dir: t.TempDir(), Identity: pki.Identity{Role: pki.RoleNode, ID: "n1"}}
	m, err := pki.Join(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	client, server := m.ClientTLS(pki.RoleGateway), m.ServerTLS() // made before it is renewed
	ends := func() (time.Time, time.Time) {
		c, err := client.GetClientCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := server.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf.NotAfter, s.Leaf.NotAfter
	}
	o.Token = ""
	none := errors.New("no token")
	if renewed, err := m.Renew(t.Context(), o, func() (string, error) { return "", none }); renewed || !errors.Is(err, none) {
		t.Errorf("without a token: %v, %v", renewed, err)
	}
	f.ttl = 24 * time.Hour
	token := func() (string, error) { return secret, nil }
	if renewed, err := m.Renew(t.Context(), o, token); !renewed || err != nil {
		t.Fatalf("%v, %v", renewed, err)
	}
	if c, s := ends(); time.Until(c) < time.Hour || time.Until(s) < time.Hour {
		t.Errorf("still shows the old one: %v, %v", c, s)
	}
	if renewed, err := m.Renew(t.Context(), o, token); renewed || err != nil {
		t.Errorf("a fresh one: %v, %v", renewed, err)
	}
	if again, err := pki.Join(t.Context(), o); err != nil {
		t.Errorf("after a restart: %v, %v", again, err)
	}
}

// Half an authority is never replaced while there is a fleet; what a first start
// left that was killed is.
func TestHalfAnAuthority(t *testing.T) {
	for gone, want := range map[string]string{"ca.crt": "restore", "ca.key": "restore"} {
		dir := t.TempDir()
		ca, err := pki.LoadOrCreateCA(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pki.LoadOrCreateToken(dir, ca); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, gone)); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.LoadOrCreateCA(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("without %s: %v", gone, err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca.key"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadOrCreateCA(dir); err != nil {
		t.Errorf("after a first start that was killed: %v", err)
	}
}
