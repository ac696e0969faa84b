package server

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/cloudcode-dev/cloudcode/internal/auth"
	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
)

// access says who may call a service.
type access int

const (
	accessNobody  access = iota // not listed below
	accessOpen                  // everybody
	accessPublic                // users, with a password or token, and gateways
	accessNode                  // nodes, by certificate
	accessGateway               // gateways, by certificate
)

// services lists every service that the server has. One that is missing here can
// be called by nobody.
var services = map[string]access{
	"cloudcode.v1.SessionService":              accessPublic,
	"cloudcode.v1.NodeService":                 accessPublic,
	"cloudcode.v1.StorageService":              accessPublic,
	"grpc.reflection.v1.ServerReflection":      accessPublic,
	"grpc.reflection.v1alpha.ServerReflection": accessPublic,
	"grpc.health.v1.Health":                    accessOpen,
	"cloudcode.node.v1.JoinService":            accessOpen, // checks the join token itself
	"cloudcode.node.v1.DispatchService":        accessNode,
	"cloudcode.link.v1.LinkService":            accessNode,
	"cloudcode.gateway.v1.RouteService":        accessGateway,
}

// authorize returns nil if the caller may call the method.
func authorize(ctx context.Context, verifier *auth.Verifier, fullMethod string) error {
	service, _, _ := strings.Cut(strings.TrimPrefix(fullMethod, "/"), "/")
	switch services[service] {
	case accessOpen:
		return nil
	case accessPublic:
		return authorizeUser(ctx, verifier)
	case accessNode:
		return authorizeMember(ctx, pki.RoleNode)
	case accessGateway:
		return authorizeMember(ctx, pki.RoleGateway)
	}
	return grpcerr.New(codes.PermissionDenied, "NOT_ALLOWED", "%s cannot be called", fullMethod)
}

func authorizeMember(ctx context.Context, role pki.Role) error {
	id, ok := pki.FromContext(ctx)
	if !ok {
		return grpcerr.New(codes.Unauthenticated, "NO_CERTIFICATE", "this needs the certificate of a %s: join the fleet first", role)
	}
	if id.Role != role {
		return grpcerr.New(codes.PermissionDenied, "WRONG_ROLE", "this is for a %s, and the certificate is of %s", role, id)
	}
	return nil
}

func authorizeUser(ctx context.Context, verifier *auth.Verifier) error {
	if !verifier.Enabled() {
		return nil
	}
	// A gateway has asked its users itself.
	if id, ok := pki.FromContext(ctx); ok && id.Role == pki.RoleGateway {
		return nil
	}
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return grpcerr.New(codes.Unauthenticated, "NO_CREDENTIALS", "credentials are missing: send `authorization` metadata, `Basic …` with user name and password or `Bearer …` with a token")
	}
	if len(values) > 1 {
		return grpcerr.New(codes.Unauthenticated, "WRONG_CREDENTIALS", "there is more than one `authorization`")
	}
	switch err := verifier.CheckHeader(values[0]); {
	case errors.Is(err, auth.ErrBusy):
		return grpcerr.New(codes.Unavailable, "BUSY", "%s: try again", err)
	case err != nil:
		return grpcerr.New(codes.Unauthenticated, "WRONG_CREDENTIALS", "user name, password or token is wrong")
	}
	return nil
}
