// Package join gives machines that show the fleet's join token the certificate
// that they are known by from then on.
//
//	join.New(join.Config{CA: ca, Token: token, Log: log}) *join.Service
package join

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"log/slog"
	"regexp"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// certificateLife is how long a member's certificate is good for; members join
// again when two thirds have passed.
const certificateLife = 90 * 24 * time.Hour

// wrongTokenDelay slows guessing down without locking anybody out. Guessing 128
// random bits is hopeless anyway; this keeps the log short.
const wrongTokenDelay = time.Second

var memberID = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// Config of a Service.
type Config struct {
	CA    *pki.CA
	Token pki.Token
	Log   *slog.Logger
}

// Service implements nodev1.JoinServiceServer.
type Service struct {
	nodev1.UnimplementedJoinServiceServer
	cfg    Config
	secret [sha256.Size]byte
	guess  chan struct{} // one wrong token is answered at a time
}

// New returns a service.
func New(cfg Config) *Service {
	return &Service{cfg: cfg, secret: sha256.Sum256([]byte(cfg.Token.Secret)), guess: make(chan struct{}, 1)}
}

// Join implements nodev1.JoinServiceServer.
func (s *Service) Join(ctx context.Context, req *nodev1.JoinRequest) (*nodev1.JoinResponse, error) {
	got := sha256.Sum256([]byte(req.GetToken()))
	if subtle.ConstantTimeCompare(got[:], s.secret[:]) != 1 {
		return nil, s.refuse(ctx, req)
	}
	role, ok := map[nodev1.JoinRequest_Role]pki.Role{
		nodev1.JoinRequest_NODE: pki.RoleNode, nodev1.JoinRequest_GATEWAY: pki.RoleGateway,
	}[req.GetRole()]
	if !ok {
		return nil, grpcerr.New(codes.InvalidArgument, "INVALID_ROLE", "role %v cannot join: join as NODE or GATEWAY", req.GetRole())
	}
	if !memberID.MatchString(req.GetId()) {
		return nil, grpcerr.New(codes.InvalidArgument, "INVALID_ID", "%q cannot be the id of a member: use a DNS label, at most 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", req.GetId())
	}
	id := pki.Identity{Role: role, ID: req.GetId()}
	cert, err := s.cfg.CA.SignMember(req.GetCertificateRequest(), id, certificateLife)
	if err != nil {
		return nil, grpcerr.New(codes.InvalidArgument, "INVALID_CERTIFICATE_REQUEST", "%v", err)
	}
	s.cfg.Log.InfoContext(ctx, "joined", "member", id.String())
	return &nodev1.JoinResponse{Certificate: cert, CaCertificate: s.cfg.CA.CertDER()}, nil
}

// refuse answers a wrong token, slowly; the right one is never held up.
func (s *Service) refuse(ctx context.Context, req *nodev1.JoinRequest) error {
	select {
	case s.guess <- struct{}{}:
		defer func() { <-s.guess }()
		select {
		case <-time.After(wrongTokenDelay):
		case <-ctx.Done():
			return ctx.Err()
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	s.cfg.Log.WarnContext(ctx, "a machine tried to join with a wrong token", "id", req.GetId())
	return grpcerr.New(codes.Unauthenticated, "INVALID_TOKEN", "the join token is wrong: the server keeps the right one in pki/join-token below its data directory")
}
