// Package pki is the fleet's certificate authority and what its members are
// known by. The server makes the authority at first start; nodes and gateways
// join with a token that carries the authority's digest, and are known by the
// URI in their certificate from then on.
package pki

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/cloudcode-dev/cloudcode/internal/atomicfile"
)

// Role of a member of the fleet.
type Role string

// The roles that a certificate can name.
const (
	RoleServer  Role = "server"
	RoleNode    Role = "node"
	RoleGateway Role = "gateway"
)

// ServerName is the name that members expect in the server's and a gateway's
// certificate, whatever address they dial.
const ServerName = "cloudcode.internal"

// trustDomain is the host part of the URIs, as in SPIFFE ids.
const trustDomain = "cloudcode"

// Identity is who holds a certificate.
type Identity struct {
	Role Role
	ID   string
}

func (i Identity) String() string { return string(i.Role) + "/" + i.ID }

func (i Identity) uri() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: "/" + string(i.Role) + "/" + i.ID}
}

// FromCertificate returns the identity in a verified certificate.
func FromCertificate(cert *x509.Certificate) (Identity, bool) {
	for _, u := range cert.URIs {
		role, id, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
		if u.Scheme == "spiffe" && u.Host == trustDomain && ok && id != "" {
			return Identity{Role: Role(role), ID: id}, true
		}
	}
	return Identity{}, false
}

// FromContext returns the identity that the caller of a gRPC method has proved
// with a client certificate; false if it has shown none.
func FromContext(ctx context.Context) (Identity, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}, false
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return Identity{}, false
	}
	return FromCertificate(info.State.VerifiedChains[0][0])
}

// CA signs the certificates of one fleet.
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

const tokenFile = "join-token"

// LoadOrCreateCA reads the authority from dir/ca.crt and dir/ca.key, or makes it
// if neither is there. One without the other is an error: making a new one
// would lock every member out.
func LoadOrCreateCA(dir string) (*CA, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create %s: %w", dir, err)
	}
	certPath, keyPath := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	pair, err := loadPair(certPath, keyPath)
	if err == nil {
		signer, ok := pair.PrivateKey.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("%s: key cannot sign", keyPath)
		}
		return &CA{cert: pair.Leaf, key: signer}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if exists(certPath) {
		return nil, fmt.Errorf("%s is there but %s is not: restore it from a backup, or remove both to start a new authority (all nodes must then join again)", certPath, keyPath)
	}
	// A key alone is what a first start leaves that was killed; with a token, there
	// is a fleet.
	if exists(keyPath) && exists(filepath.Join(dir, tokenFile)) {
		return nil, fmt.Errorf("%s is there but %s is not: restore it (every member has a copy, fleet-ca.crt), or remove both and %s to start a new authority (all nodes must then join again)", keyPath, certPath, tokenFile)
	}

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Cloud Code fleet CA"},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.AddDate(20, 0, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	// The key first: a certificate without its key would be the error above.
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(keyPath, keyPEM, 0o600); err != nil {
		return nil, err
	}
	if err := atomicfile.Write(certPath, encodeCert(der), 0o644); err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{cert: cert, key: key}, nil
}

// CertDER returns the authority's certificate.
func (ca *CA) CertDER() []byte { return ca.cert.Raw }

// Pool returns a pool that trusts the authority alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// SignMember signs the public key of a PKCS #10 request in DER for an identity.
// Nothing else of the request counts. A gateway's certificate also serves: nodes
// link to it.
func (ca *CA) SignMember(csrDER []byte, id Identity, ttl time.Duration) ([]byte, error) {
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	usage := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	var names []string
	if id.Role == RoleGateway {
		usage = append(usage, x509.ExtKeyUsageServerAuth)
		names = []string{ServerName}
	}
	return ca.sign(csr.PublicKey, id, ttl, usage, names, nil)
}

func (ca *CA) sign(public crypto.PublicKey, id Identity, ttl time.Duration, usage []x509.ExtKeyUsage, names []string, ips []net.IP) ([]byte, error) {
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: id.String()},
		NotBefore:    now.Add(-5 * time.Minute), // clocks differ
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  usage,
		URIs:         []*url.URL{id.uri()},
		DNSNames:     names,
		IPAddresses:  ips,
	}
	return x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key)
}

// ServerTLS returns the configuration of the server's listener: a fresh
// certificate for hosts (names or addresses) and for ServerName, and client
// certificates verified if given. The certificate is made anew at every start.
func (ca *CA) ServerTLS(hosts []string) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	names, ips := []string{ServerName}, []net.IP(nil)
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			ips = append(ips, ip)
		} else if h != "" {
			names = append(names, h)
		}
	}
	der, err := ca.sign(key.Public(), Identity{RoleServer, "server"}, 5*365*24*time.Hour, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, names, ips)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, ca.cert.Raw}, PrivateKey: key}},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		ClientCAs:    ca.Pool(),
	}, nil
}

// Token lets a machine join: it names the authority by digest, so that the
// machine cannot be lured to another one, and holds a secret.
type Token struct {
	CADigest string // SHA-256 of the authority's certificate, hex
	Secret   string
}

func (t Token) String() string { return t.CADigest + "." + t.Secret }

// ParseToken reads what String wrote.
func ParseToken(s string) (Token, error) {
	digest, secret, ok := strings.Cut(strings.TrimSpace(s), ".")
	if raw, err := hex.DecodeString(digest); !ok || err != nil || len(raw) != sha256.Size || secret == "" {
		return Token{}, errors.New("not a join token: it looks like <64 hex digits>.<secret>; the server keeps it in pki/join-token below its data directory")
	}
	return Token{CADigest: digest, Secret: secret}, nil
}

// LoadOrCreateToken reads the fleet's join token from dir/join-token, or makes it.
func LoadOrCreateToken(dir string, ca *CA) (Token, error) {
	path := filepath.Join(dir, tokenFile)
	digest := Digest(ca.CertDER())
	data, err := os.ReadFile(path)
	if err == nil {
		token, err := ParseToken(string(data))
		if err != nil {
			return Token{}, fmt.Errorf("%s: %w", path, err)
		}
		if token.CADigest == digest {
			return token, nil
		} // of an authority that is gone: make a new one
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Token{}, err
	}
	token := Token{CADigest: digest, Secret: rand.Text()}
	return token, atomicfile.Write(path, []byte(token.String()+"\n"), 0o600)
}

// Digest returns the SHA-256 of a certificate in hex.
func Digest(certDER []byte) string {
	sum := sha256.Sum256(certDER)
	return hex.EncodeToString(sum[:])
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func serial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[0] &= 0x7f           // positive
	return new(big.Int).SetBytes(b[:])
}

func encodeCert(der ...[]byte) []byte {
	var out []byte
	for _, d := range der {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
	}
	return out
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func loadPair(certPath, keyPath string) (tls.Certificate, error) {
	certPEM, err := os.ReadFile(certPath)
	if err != nil {
		return tls.Certificate{}, err
	}
	keyPEM, err := os.ReadFile(keyPath)
	if errors.Is(err, fs.ErrNotExist) {
		return tls.Certificate{}, err
	} else if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s and %s: %w", certPath, keyPath, err)
	}
	return pair, nil
}
