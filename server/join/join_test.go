package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/pki"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func request(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func authority(t *testing.T) *pki.CA {
	t.Helper()
	ca, err := pki.LoadOrCreateCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestJoin(t *testing.T) {
	ca := authority(t)
	s := New(Config{CA: ca, Secret: "right", TTL: time.Hour})
	csr := request(t)
	for _, tt := range []struct {
		role nodev1.JoinRequest_Role
		want pki.Identity
	}{
		{nodev1.JoinRequest_NODE, pki.Identity{Role: pki.RoleNode, ID: "n1"}},
		{nodev1.JoinRequest_GATEWAY, pki.Identity{Role: pki.RoleGateway, ID: "n1"}},
	} {
		resp, err := s.Join(t.Context(), &nodev1.JoinRequest{Token: "right", Role: tt.role, Id: "n1", CertificateRequest: csr})
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(resp.GetCertificate())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Error(err)
		}
		if id, ok := pki.FromCertificate(cert); !ok || id != tt.want {
			t.Errorf("certificate is for %v, want %v", id, tt.want)
		}
		if left := time.Until(cert.NotAfter); left > time.Hour || left < 50*time.Minute {
			t.Errorf("certificate is good for %v", left)
		}
		if string(resp.GetCaCertificate()) != string(ca.CertDER()) {
			t.Error("answered with another authority")
		}
	}
}

func TestRefused(t *testing.T) {
	ca := authority(t)
	csr := request(t)
	damaged := append([]byte(nil), csr...)
	damaged[len(damaged)-1] ^= 1
	long := strings.Repeat("a", 64)
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{CA: ca, Secret: "right"})
		for _, tt := range []struct {
			name string
			req  *nodev1.JoinRequest
			code codes.Code
		}{
			{"wrong token", &nodev1.JoinRequest{Token: "wrong", Role: 1, Id: "n1", CertificateRequest: csr}, codes.Unauthenticated},
			{"no token", &nodev1.JoinRequest{Role: 1, Id: "n1", CertificateRequest: csr}, codes.Unauthenticated},
			{"half a token", &nodev1.JoinRequest{Token: "righ", Role: 1, Id: "n1", CertificateRequest: csr}, codes.Unauthenticated},
			{"no role", &nodev1.JoinRequest{Token: "right", Id: "n1", CertificateRequest: csr}, codes.InvalidArgument},
			{"unknown role", &nodev1.JoinRequest{Token: "right", Role: 9, Id: "n1", CertificateRequest: csr}, codes.InvalidArgument},
			{"no request", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1"}, codes.InvalidArgument},
			{"damaged request", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1", CertificateRequest: damaged}, codes.InvalidArgument},
			{"huge request", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1", CertificateRequest: make([]byte, maxRequest+1)}, codes.InvalidArgument},
			{"no id", &nodev1.JoinRequest{Token: "right", Role: 1, CertificateRequest: csr}, codes.InvalidArgument},
			{"upper case", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "N1", CertificateRequest: csr}, codes.InvalidArgument},
			{"slash", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1/x", CertificateRequest: csr}, codes.InvalidArgument},
			{"line end", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1\n", CertificateRequest: csr}, codes.InvalidArgument},
			{"hyphen first", &nodev1.JoinRequest{Token: "right", Role: 1, Id: "-n1", CertificateRequest: csr}, codes.InvalidArgument},
			{"long", &nodev1.JoinRequest{Token: "right", Role: 1, Id: long, CertificateRequest: csr}, codes.InvalidArgument},
		} {
			if resp, err := s.Join(t.Context(), tt.req); status.Code(err) != tt.code || resp != nil {
				t.Errorf("%s: %v, %v; want %v", tt.name, resp, err, tt.code)
			}
		}
		if _, err := s.Join(t.Context(), &nodev1.JoinRequest{Token: "right", Role: 1, Id: long[1:], CertificateRequest: csr}); err != nil {
			t.Errorf("63 characters: %v", err)
		}
		// A server without a secret lets nobody in.
		s = New(Config{CA: ca})
		if _, err := s.Join(t.Context(), &nodev1.JoinRequest{Role: 1, Id: "n1", CertificateRequest: csr}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("without a secret: %v", err)
		}
	})
}

// TestGuesses: they are slow, whoever makes them, and keep nobody else out.
func TestGuesses(t *testing.T) {
	ca := authority(t)
	csr := request(t)
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{CA: ca, Secret: "right"})
		began := time.Now()
		var wg sync.WaitGroup
		var mu sync.Mutex
		got := map[codes.Code]int{}
		for range 10 * failuresMax {
			wg.Go(func() {
				_, err := s.Join(t.Context(), &nodev1.JoinRequest{Token: "wrong", Role: 1, Id: "n1", CertificateRequest: csr})
				mu.Lock()
				defer mu.Unlock()
				got[status.Code(err)]++
			})
		}
		synctest.Wait()
		if _, err := s.Join(t.Context(), &nodev1.JoinRequest{Token: "right", Role: 1, Id: "n1", CertificateRequest: csr}); err != nil || time.Since(began) != 0 {
			t.Errorf("the right token, after %v: %v", time.Since(began), err)
		}
		wg.Wait()
		if got[codes.Unauthenticated] != failuresMax || got[codes.ResourceExhausted] != 9*failuresMax || time.Since(began) != failureDelay {
			t.Errorf("%v after %v", got, time.Since(began))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.Join(ctx, &nodev1.JoinRequest{Token: "wrong"})
		if status.Code(err) != codes.Unauthenticated {
			t.Error(err)
		}
	})
}
