package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// Member is a node's or gateway's own certificate and the authority it trusts.
type Member struct {
	Identity Identity
	pair     atomic.Pointer[tls.Certificate] // the newest
	ca       *x509.Certificate
}

func (m *Member) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(m.ca)
	return pool
}

// ClientTLS is for dialling a peer of a role: a gateway's certificate serves, too,
// but does not make a server. Each new connection shows the newest certificate.
func (m *Member) ClientTLS(peer Role) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: ServerName,
		RootCAs:    m.pool(),
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return m.pair.Load(), nil
		},
		VerifyConnection: func(state tls.ConnectionState) error {
			return expectRole(state.PeerCertificates[0], peer)
		},
	}
}

func expectRole(cert *x509.Certificate, want Role) error {
	if id, ok := FromCertificate(cert); !ok || id.Role != want {
		return fmt.Errorf("the peer's certificate is of %q, not of a %s", id, want)
	}
	return nil
}

// ServerTLS is for a listener that members dial: it demands their certificate.
func (m *Member) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return m.pair.Load(), nil
		},
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  m.pool(),
	}
}

// MaxMessage bounds what members take in one message, in bytes. gRPC's own 4 MiB
// is less than one event of OpenCode may have (8 MiB, and more once it is made
// valid UTF-8): whoever reads events would fail at it again and again.
const MaxMessage = 32 << 20

// Dial returns a connection to the server or to a gateway, as role says. It comes
// back by itself.
func (m *Member) Dial(role Role, address string) (*grpc.ClientConn, error) {
	return grpc.NewClient(address,
		grpc.WithTransportCredentials(credentials.NewTLS(m.ClientTLS(role))),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
		// Notices a peer that vanished without a word. Listeners of ours allow 5 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		// gRPC's own pauses grow to two minutes; sessions wait for this.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
}

// JoinOptions say how to become a member.
type JoinOptions struct {
	Server   string // host:port of the server
	Token    string // as the server wrote it; needed for the first time only
	Identity Identity
	Dir      string // keeps certificate and key
}

// Join returns the member that Dir holds, or joins the fleet if Dir holds none
// for this identity, or one that ends within a third of its life. While there is a
// certificate that is still good, a server that cannot be reached is no error.
func Join(ctx context.Context, o JoinOptions) (*Member, error) {
	old, loadErr := loadMember(o)
	if loadErr == nil && !nearEnd(old.pair.Load().Leaf) {
		return old, nil
	}
	m, err := join(ctx, o)
	if err != nil && loadErr == nil && time.Now().Before(old.pair.Load().Leaf.NotAfter) {
		return old, nil
	}
	return m, err
}

// Renew joins again if the certificate is in the last third of its life, for a
// process that runs for longer than that. New connections show the new
// certificate; open ones stay. token is asked for only then.
func (m *Member) Renew(ctx context.Context, o JoinOptions, token func() (string, error)) (renewed bool, err error) {
	if !nearEnd(m.pair.Load().Leaf) {
		return false, nil
	}
	if o.Token, err = token(); err != nil {
		return false, err
	}
	next, err := join(ctx, o)
	if err != nil {
		return false, err
	}
	if !next.ca.Equal(m.ca) {
		return false, errors.New("the fleet has another authority now: restart this process")
	}
	m.pair.Store(next.pair.Load())
	return true, nil
}

// KeepValid calls Renew now and then until ctx ends.
func (m *Member) KeepValid(ctx context.Context, o JoinOptions, token func() (string, error), log *slog.Logger) {
	for {
		select {
		case <-time.After(renewEvery):
		case <-ctx.Done():
			return
		}
		rctx, cancel := context.WithTimeout(ctx, renewTimeout)
		renewed, err := m.Renew(rctx, o, token)
		cancel()
		ends := m.pair.Load().Leaf.NotAfter
		if err != nil && ctx.Err() == nil {
			log.Error("cannot renew this member's certificate; the fleet refuses it from its end on", "member", m.Identity, "ends", ends, "error", err, "retry_in", renewEvery)
		} else if renewed {
			log.Info("renewed this member's certificate", "member", m.Identity, "ends", ends)
		}
	}
}

const (
	renewEvery   = 6 * time.Hour
	renewTimeout = 30 * time.Second
)

func nearEnd(c *x509.Certificate) bool {
	return time.Now().After(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3))
}

// memberPaths: certificate and key are one file, so that a crash between two
// writes cannot leave a pair that does not fit.
func memberPaths(o JoinOptions) (pairPath, caPath string) {
	return filepath.Join(o.Dir, string(o.Identity.Role)+".pem"), filepath.Join(o.Dir, "fleet-ca.crt")
}

func loadMember(o JoinOptions) (*Member, error) {
	pairPath, caPath := memberPaths(o)
	pair, err := loadPair(pairPath, pairPath)
	if err != nil {
		return nil, err
	}
	if id, ok := FromCertificate(pair.Leaf); !ok || id != o.Identity {
		return nil, fmt.Errorf("%s is for another identity", pairPath)
	}
	caPEM, err := os.ReadFile(caPath)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(caPEM)
	if block == nil {
		return nil, fmt.Errorf("%s holds no certificate", caPath)
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if o.Token != "" {
		// A token of another authority means that the server was made anew.
		if token, err := ParseToken(o.Token); err == nil && token.CADigest != Digest(ca.Raw) {
			return nil, fmt.Errorf("%s is of another fleet", pairPath)
		}
	}
	m := &Member{Identity: o.Identity, ca: ca}
	m.pair.Store(&pair)
	return m, nil
}

func join(ctx context.Context, o JoinOptions) (*Member, error) {
	token, err := ParseToken(o.Token)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, err
	}
	digest, err := hex.DecodeString(token.CADigest)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(o.Server, grpc.WithTransportCredentials(credentials.NewTLS(pinned(digest))))
	if err != nil {
		return nil, err
	}
	defer conn.Close() // nothing was written that could be lost

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	role := map[Role]nodev1.JoinRequest_Role{RoleNode: nodev1.JoinRequest_NODE, RoleGateway: nodev1.JoinRequest_GATEWAY}[o.Identity.Role]
	resp, err := nodev1.NewJoinServiceClient(conn).Join(ctx, &nodev1.JoinRequest{
		Token: token.Secret, Role: role, Id: o.Identity.ID, CertificateRequest: csr,
	})
	if err != nil {
		return nil, fmt.Errorf("join the fleet at %s: %w", o.Server, err)
	}
	if Digest(resp.GetCaCertificate()) != token.CADigest {
		return nil, errors.New("join: the server answered with another authority than the token names")
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	pairPath, caPath := memberPaths(o)
	if err := atomicfile.Write(caPath, encodeCert(resp.GetCaCertificate()), 0o644); err != nil {
		return nil, err
	}
	if err := atomicfile.Write(pairPath, append(encodeCert(resp.GetCertificate()), keyPEM...), 0o600); err != nil {
		return nil, err
	}
	return loadMember(o)
}

// pinned trusts a chain that ends in the authority with this digest, and
// nothing else: the caller has no certificate of it yet.
func pinned(digest []byte) *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         ServerName,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection below verifies against the pinned authority
		VerifyConnection: func(state tls.ConnectionState) error {
			for _, cert := range state.PeerCertificates {
				sum := sha256.Sum256(cert.Raw)
				if !bytes.Equal(sum[:], digest) {
					continue
				}
				roots := x509.NewCertPool()
				roots.AddCert(cert)
				if _, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: ServerName}); err != nil {
					return err
				}
				return expectRole(state.PeerCertificates[0], RoleServer)
			}
			return errors.New("the server's certificate is not of the fleet that the join token names")
		},
	}
}
