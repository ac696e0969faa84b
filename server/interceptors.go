package server

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/cloudcode-dev/cloudcode/internal/grpcerr"
	"github.com/cloudcode-dev/cloudcode/internal/pki"
	"github.com/cloudcode-dev/cloudcode/server/api"
)

// The order matters: the log sees what the caller gets; a panic becomes an error
// before it is turned into a status; nothing of a service runs before the caller
// is allowed to call it.

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	defer func() { s.logCall(ctx, info.FullMethod, start, err) }()
	if err := authorize(ctx, s.verifier, info.FullMethod); err != nil {
		return nil, err
	}
	err = s.guard(ctx, info.FullMethod, func() error {
		resp, err = handler(ctx, req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	start := time.Now()
	defer func() { s.logCall(ss.Context(), info.FullMethod, start, err) }()
	if err := authorize(ss.Context(), s.verifier, info.FullMethod); err != nil {
		return err
	}
	// Streams have no end of their own: they end when the server stops, so that a
	// graceful stop is one.
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(s.streams, cancel)()
	err = s.guard(ctx, info.FullMethod, func() error { return handler(srv, &boundStream{ss, ctx}) })
	if err != nil && s.streams.Err() != nil && ss.Context().Err() == nil {
		return grpcerr.New(codes.Unavailable, "STOPPING", "the server is stopping: connect again")
	}
	return err
}

// boundStream is a stream with a context that also ends when the server stops.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (b *boundStream) Context() context.Context { return b.ctx }

// guard turns panics and errors of fn into errors with a status.
func (s *Server) guard(ctx context.Context, method string, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.ErrorContext(ctx, "panic", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = grpcerr.New(codes.Internal, "INTERNAL", "internal error: the server's log says more")
		}
	}()
	return api.Status(ctx, s.log, fn())
}

func (s *Server) logCall(ctx context.Context, method string, start time.Time, err error) {
	code := status.Code(err)
	level := slog.LevelDebug
	switch code {
	case codes.OK:
		// One for each node every few seconds says nothing.
		if strings.HasSuffix(method, "/Heartbeat") || strings.HasPrefix(method, "/grpc.health.") {
			return
		}
	case codes.Internal, codes.Unknown, codes.DataLoss:
		level = slog.LevelError
	case codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted:
		level = slog.LevelWarn
	}
	if !s.log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("method", method), slog.String("code", code.String()), slog.Duration("took", time.Since(start)),
	}
	if err != nil {
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()))
	}
	if id, ok := pki.FromContext(ctx); ok {
		attrs = append(attrs, slog.String("caller", id.String()))
	} else if p, ok := peer.FromContext(ctx); ok {
		attrs = append(attrs, slog.String("caller", p.Addr.String()))
	}
	s.log.LogAttrs(ctx, level, "call", attrs...)
}
