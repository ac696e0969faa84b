// Package join lets machines into the fleet: who knows the join token gets a
// certificate that names its role and id, and is known by that from then on.
//
//	svc := join.New(join.Config{CA: ca, Secret: token.Secret, Logger: log}) // ca is a *pki.CA
//	nodev1.RegisterJoinServiceServer(grpcServer, svc)
package join

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"regexp"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

const (
	defaultTTL = 365 * 24 * time.Hour // members join again in the last third of it

	// Who shows a wrong token waits, and only so many wait at a time: that bounds
	// guesses to a few dozen in a second, whoever makes them. Who shows the right
	// one never waits, so nobody can lock others out.
	failureDelay = 500 * time.Millisecond
	failuresMax  = 32

	maxRequest = 16 << 10 // bytes of a certificate request
)

// Reasons of errors. They are part of the API: never rename one.
const (
	reasonWrongToken = "WRONG_JOIN_TOKEN"
	reasonTooMany    = "TOO_MANY_WRONG_TOKENS"
	reasonInvalid    = "INVALID_FIELDS"
)

// A name that becomes part of host names and of the certificate.
var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Signer signs certificate requests; *pki.CA is one.
type Signer interface {
	SignMember(csrDER []byte, id pki.Identity, ttl time.Duration) (certDER []byte, err error)
	CertDER() []byte
}

// Config of the service. CA and Secret are needed.
type Config struct {
	CA Signer
	// Secret of the fleet's join token.
	Secret string
	// TTL of the certificates; 0: a year.
	TTL    time.Duration
	Logger *slog.Logger
}

// Service serves nodev1.JoinService.
type Service struct {
	nodev1.UnimplementedJoinServiceServer
	config  Config
	secret  [sha256.Size]byte
	waiting chan struct{} // one for each caller with a wrong token
}

var _ nodev1.JoinServiceServer = (*Service)(nil)

// New returns the service. Without a secret nobody can join.
func New(c Config) *Service {
	if c.TTL <= 0 {
		c.TTL = defaultTTL
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Service{config: c, secret: sha256.Sum256([]byte(c.Secret)), waiting: make(chan struct{}, failuresMax)}
}

// Join implements nodev1.JoinService.
func (s *Service) Join(ctx context.Context, req *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	// Digests are of equal length, so the comparison tells nothing of the secret's.
	given := sha256.Sum256([]byte(req.GetToken()))
	if subtle.ConstantTimeCompare(given[:], s.secret[:]) != 1 || s.config.Secret == "" {
		return nil, s.refuse(ctx, req)
	}
	id := pki.Identity{ID: req.GetId()}
	switch req.GetRole() {
	case nodev1.JoinRequest_NODE:
		id.Role = pki.RoleNode
	case nodev1.JoinRequest_GATEWAY:
		id.Role = pki.RoleGateway
	default:
		return nil, invalid("role: must be NODE or GATEWAY")
	}
	if !label.MatchString(id.ID) {
		return nil, invalid("id: %q is no DNS label: at most 63 of a-z, 0-9 and -, no - at either end", clip(id.ID))
	}
	if n := len(req.GetCertificateRequest()); n > maxRequest {
		return nil, invalid("certificate_request: %d bytes are more than a request needs", n)
	}
	cert, err := s.config.CA.SignMember(req.GetCertificateRequest(), id, s.config.TTL)
	if err != nil {
		return nil, invalid("certificate_request: %v", err)
	}
	s.config.Logger.InfoContext(ctx, "joined the fleet", "member", id.String(), "from", from(ctx))
	return &nodev1.JoinResponse{Certificate: cert, CaCertificate: s.config.CA.CertDER()}, nil
}

func (s *Service) refuse(ctx context.Context, req *nodev1.JoinRequest) error {
	select {
	case s.waiting <- struct{}{}:
		defer func() { <-s.waiting }()
	default:
		return grpcerr.New(codes.ResourceExhausted, reasonTooMany, "too many wrong join tokens at this moment: try again in a second")
	}
	s.config.Logger.WarnContext(ctx, "wrong join token", "role", req.GetRole().String(), "id", clip(req.GetId()), "from", from(ctx))
	select {
	case <-time.After(failureDelay):
	case <-ctx.Done():
	}
	return grpcerr.New(codes.Unauthenticated, reasonWrongToken, "the join token is not that of this fleet: the server keeps it in pki/join-token below its data directory")
}

func invalid(format string, args ...any) error {
	return grpcerr.New(codes.InvalidArgument, reasonInvalid, format, args...)
}

// clip bounds what a stranger can put into logs and errors.
func clip(s string) string { return s[:min(len(s), 100)] }

func from(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}
